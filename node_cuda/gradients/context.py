"""What the backward passes by hand share: autocast as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def autocast_state(device_type: str) -> Callable[[], list[Any]]:
    """Contexts that put autocast back to what it is now, for this device and the CPU."""
    states = [
        (name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name))
        for name in dict.fromkeys((device_type, "cpu"))
        if torch.amp.is_autocast_available(name)
    ]
    cache = torch.is_autocast_cache_enabled()
    return lambda: [torch.autocast(name, dtype=dtype, enabled=on, cache_enabled=cache) for name, on, dtype in states]


def autocasts(device_type: str) -> bool:
    """Autocast is on for this device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
