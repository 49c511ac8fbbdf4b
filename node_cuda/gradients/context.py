"""Autocast as it was in the forward pass, for the backward passes of both adjoint methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def autocast_state(device_type: str) -> Callable[[], list[Any]]:
    """Return a function that returns the contexts that restore the present autocast, for this device and the CPU.

    It returns no contexts if autocast has not changed by then.
    """
    kinds = ["cpu"]
    if device_type != "cpu" and torch.amp.is_autocast_available(device_type):
        kinds.insert(0, device_type)
    before = _autocast(kinds)

    def contexts() -> list[Any]:
        states, cache = before
        if _autocast(kinds) == before:
            return []
        return [torch.autocast(name, dtype=dtype, enabled=on, cache_enabled=cache) for name, on, dtype in states]

    return contexts


def _autocast(kinds: Sequence[str]) -> tuple[list[tuple[str, bool, torch.dtype]], bool]:
    """Return the state of autocast for these kinds of device, and whether its cache is enabled."""
    states = [(name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in kinds]
    return states, torch.is_autocast_cache_enabled()


def autocasts(device_type: str) -> bool:
    """Return whether autocast is on for this device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
