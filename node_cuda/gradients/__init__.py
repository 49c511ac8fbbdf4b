"""The gradient modes. Each has a file or a folder, and one line in `registry`."""
