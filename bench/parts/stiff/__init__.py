"""The problems, the training steps and the memory cells of stiff.py."""
