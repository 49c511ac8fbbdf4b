"""The version, written here and nowhere else: pyproject.toml and `node_cuda.__version__` read it."""

__version__ = "0.1.0"
