"""The problems, the contestants, the tables and the plot of peers.py."""
