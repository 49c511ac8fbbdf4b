"""The tables of speed.py."""
