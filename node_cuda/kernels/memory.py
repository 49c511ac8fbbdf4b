"""Tensors as a kernel needs them: the final numbers in memory, and their address."""

from __future__ import annotations

import torch
from torch import Tensor

from node_cuda.status import InvalidField


def resolved(x: Tensor) -> Tensor:
    """Return x dense, with conjugation and sign applied; x itself if that is already true."""
    if x.layout is not torch.strided:
        x = x.to_dense()
    if x.is_conj() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    return x.clone() if x._is_zerotensor() else x


def address(x: Tensor, what: str) -> int:
    """Return the address of x. Raises InvalidField for a tensor without memory, such as a wrapper around others."""
    where = x.data_ptr()
    if where == 0 and x.numel():
        raise InvalidField(
            f"{what} is a {type(x).__name__} without memory, which the kernels cannot read. Use plain "
            'tensors, or solve inside `node_cuda.backend("reference")`.'
        )
    return where


def has_address(x: Tensor) -> bool:
    """Return whether a kernel can read x as it is."""
    return x.layout is torch.strided and (x.data_ptr() != 0 or x.numel() == 0)
