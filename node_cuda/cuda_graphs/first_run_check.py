"""The first captured solve of a process on a device, and its first captured gradients, are done again by the host loop.

Captured graphs depend on the driver, the toolkit and torch; a gradient that is wrong for that reason tells nobody. So
what is captured is compared once, for each kind of solve, dtype and way to repeat steps. If it differs, what the host
computed is returned, a warning says so, and the host does all solves on that device from then on.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from node_cuda.solution import Stats
from node_cuda.status import Status, users_level

ROUNDING = 1e-10
"""How far apart numbers may be, in units of the largest: in float64 (see `_limit` for others)."""

_confirmed: set[tuple[str, torch.device, torch.dtype, str]] = set()
_refuted: dict[torch.device, str] = {}
_lock = threading.Lock()


class Outcome(NamedTuple):
    """What a solve gave. steps: accepted and rejected ones, where they are to be compared."""

    status: Status
    tensors: Sequence[Tensor | None]
    steps: tuple[int, int] = (0, 0)


class Trial:
    """A captured solve that may be the first of its kind. like: a tensor of its state's device and dtype."""

    def __init__(self, kind: str, tier: str, like: Tensor) -> None:
        self.kind, self.device, self.dtype = kind, like.device, like.dtype
        self._key = kind, like.device, like.dtype, tier
        self._before: dict[str, Any] = {}

    @property
    def due(self) -> bool:
        """Nothing of its kind was compared before."""
        return self._key not in _confirmed

    def begin(self, stats: Stats) -> None:
        """The solve is to be launched, and counts in these statistics."""
        if self.due:
            self._before = {**vars(stats), "pending": [*stats.pending]}

    def agrees(self, stats: Stats, found: Outcome, by_the_host: Callable[[], Outcome]) -> bool:
        """Compare what was found with what the host computes. If it differs, the statistics are again what they were
        before, and the solve is to be left to the host."""
        try:
            apart = difference(found, by_the_host(), self.dtype)
        except torch.OutOfMemoryError:  # there is no room to compare it now
            return True
        if apart is None:
            _confirmed.add(self._key)
            return True
        vars(stats).update(self._before)
        _refute(self.kind, self.device, apart)
        return False


def refuted(device: torch.device) -> str | None:
    """Why the device is not to repeat steps, as half a sentence, if captured solves were wrong there."""
    return _refuted.get(device)


def _refute(kind: str, device: torch.device, apart: str) -> None:
    with _lock:
        if device in _refuted:
            return
        _refuted[device] = f"a captured {kind} on {device} was not that of the host loop ({apart})"
    warnings.warn(
        f"{_refuted[device]}. The host loop solves on this device from now on. Please report it with what "
        "`python -m node_cuda` prints.",
        RuntimeWarning,
        stacklevel=users_level(),
    )


def difference(found: Outcome, expected: Outcome, dtype: torch.dtype) -> str | None:
    """How two outcomes differ, if they do by more than rounding.

    The kernels of a captured solve are those of the host loop, and so are its bits, but for the discrete adjoint, which
    sums in another order. The kernels of func need not be: a library may choose another algorithm in a capture, or sum
    in an order of chance. So bits are not demanded; where they are the same, so are the steps.
    """
    if found.status is not expected.status:
        return f"it ended with {found.status.name}, and not with {expected.status.name}"
    pairs = [(a, b) for a, b in zip(found.tensors, expected.tensors, strict=True) if a is not None and b is not None]
    gaps = [_gap(a, b) for a, b in pairs]
    sizes = [_largest(b) for _, b in pairs]
    slack = 0 if not any(gaps) else 1 + sum(expected.steps) // 20
    if any(abs(a - b) > slack for a, b in zip(found.steps, expected.steps, strict=True)):
        return f"it took {found.steps[0]} steps and {found.steps[1]} that were rejected, and not {expected.steps}"
    # A tensor that is nearly zero is as good as the sums that it is a difference of.
    floor = 1e-3 * max(sizes, default=0.0)
    for gap, size in zip(gaps, sizes, strict=True):
        if gap > _limit(dtype) * max(size, floor):
            return f"numbers of the size {size:.3g} are {gap:.3g} apart"
    return None


def _limit(dtype: torch.dtype) -> float:
    """Some hundred roundings, which a solve that is well conditioned does not make more of; in half precision, whose
    roundings are large, what still tells a wrong step."""
    real = dtype.to_real()
    return ROUNDING if real is torch.float64 else min(500 * torch.finfo(real).eps, 0.05)


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference; inf where one of the numbers is finite and the other is not."""
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    return _largest(_wide(a) - _wide(b))


def _largest(x: Tensor) -> float:
    x = _wide(x)
    return float(x.abs().max()) if x.numel() else 0.0


def _wide(x: Tensor) -> Tensor:
    """In double, with zero in the place of what is not finite."""
    return torch.where(x.isfinite(), x, 0.0).to(torch.complex128 if x.is_complex() else torch.float64)
