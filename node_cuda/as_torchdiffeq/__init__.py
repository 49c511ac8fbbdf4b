"""This package under the name of torchdiffeq, for programs that import torchdiffeq inside themselves."""

from node_cuda.as_torchdiffeq.install import AsTorchdiffeq, install_as_torchdiffeq

__all__ = ["AsTorchdiffeq", "install_as_torchdiffeq"]
