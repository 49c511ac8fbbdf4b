"""Autocast as it was in the forward pass, for the backward passes of both adjoint methods."""

from __future__ import annotations

from typing import Any

import torch

State = tuple[bool, list[tuple[str, bool, torch.dtype]]]
"""Whether autocast's cache is enabled, and for each kind of device whether autocast is, and its dtype."""


def autocast_state(device: torch.device) -> State | None:
    """Return the state of autocast for this device and the CPU; None if autocast is off everywhere."""
    if not torch._C._is_any_autocast_enabled():
        return None
    states = [(name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in _kinds(device)]
    return torch.is_autocast_cache_enabled(), states


def autocast_contexts(state: State | None, device: torch.device) -> list[Any]:
    """Return the contexts that restore this state."""
    if state is None:
        return [torch.autocast(name, enabled=False) for name in _kinds(device)]
    cache, states = state
    return [torch.autocast(name, dtype=dtype, enabled=on, cache_enabled=cache) for name, on, dtype in states]


def autocasts(device_type: str) -> bool:
    """Return whether autocast is on for this device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _kinds(device: torch.device) -> list[str]:
    """Return the CPU and the type of this device, if they have autocast."""
    return [name for name in dict.fromkeys(("cpu", device.type)) if torch.amp.is_autocast_available(name)]
