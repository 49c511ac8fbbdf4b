"""The gradient modes: each has one file or folder, and one line in `registry`."""
