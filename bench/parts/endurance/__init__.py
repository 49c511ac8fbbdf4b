"""The loops of endurance.py."""
