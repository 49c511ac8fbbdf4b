"""What the processes do at their start that a program of `python -m node_cuda run` starts."""

VARIABLE = "NODE_CUDA_AS_TORCHDIFFEQ"
"""The environment variable that these processes read: the folder in which node_cuda lies."""
