"""Memory: how much a backward pass may use, and how much the autograd graph of one evaluation uses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

SHARE = 0.25
"""The share of the free memory that the kept states may use. The autograd graphs of a step may use the same share."""

UNKNOWN = 2**32
"""Bytes that are taken to be free on the host where the system does not say."""

SMALL = 2**26
"""Up to this number of bytes the free memory is not read, because that costs a call of the driver."""


def free_memory(device: torch.device) -> int:
    """Return the free bytes on the device, including those that torch has reserved and does not use."""
    if device.type != "cuda":
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # Windows, macOS
            return UNKNOWN
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle


def fits(size: int, device: torch.device) -> bool:
    """Return whether this number of bytes is within the share of the free memory."""
    return size <= SMALL or size <= SHARE * free_memory(device)


@contextlib.contextmanager
def graph_size(device: torch.device, params: Sequence[Tensor]) -> Iterator[Callable[[], int]]:
    """Context that counts the bytes that an autograd graph built in it keeps alive, without the parameters."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.memory_allocated(device) - before
        return
    c: Any = torch._C
    if not c._autograd._saved_tensors_hooks_is_enabled():  # a transform of torch.func has none
        yield lambda: 0
        return
    known = {p.untyped_storage().data_ptr() for p in params}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        try:
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
        except (NotImplementedError, RuntimeError):  # sparse tensors have no storage
            pass
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield lambda: sum(kept.values())
