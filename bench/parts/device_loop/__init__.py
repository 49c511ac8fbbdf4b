"""The captured solves and the cells of device_loop.py."""
