"""The network, the training step and the memory cells of memory_vs_steps.py."""
