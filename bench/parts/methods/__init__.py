"""The problems and the tables of methods.py."""
