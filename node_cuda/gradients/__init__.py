"""How gradients flow through a solve: one mode a file or folder, and one line in `registry`."""
