"""Autocast as it was in the forward pass, for the backward passes of both adjoint methods."""

from __future__ import annotations

from typing import Any

import torch

State = tuple[bool, list[tuple[str, bool, torch.dtype]]]
"""Whether autocast's cache is enabled, and for each kind of device whether autocast is, and its dtype."""


def autocast_state(device_type: str) -> State:
    """Return the state of autocast for this device and the CPU."""
    states = [("cpu", torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))]
    if device_type != "cpu" and torch.amp.is_autocast_available(device_type):
        states.append((device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)))
    return torch.is_autocast_cache_enabled(), states


def autocast_contexts(state: State) -> list[Any]:
    """Return the contexts that restore this state."""
    cache, states = state
    return [torch.autocast(name, dtype=dtype, enabled=on, cache_enabled=cache) for name, on, dtype in states]


def autocasts(device_type: str) -> bool:
    """Return whether autocast is on for this device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
