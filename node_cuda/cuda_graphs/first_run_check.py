"""The host loop checks the first captured solve of a process on a device, and its first captured gradients.

Captured graphs depend on the driver, the toolkit and torch. If one of them makes a gradient wrong, no error appears. So
the first captured result of each kind of solve, dtype and way to repeat steps is compared with that of the host loop.
If they differ, the result of the host loop is returned, a warning is issued, and the host loop runs all later solves on
that device.
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
"""The allowed difference in float64, relative to the largest number. `_limit` gives it for other dtypes."""

_confirmed: set[tuple[str, torch.device, torch.dtype, str]] = set()
_refuted: dict[torch.device, str] = {}
_lock = threading.Lock()


class Outcome(NamedTuple):
    """The result of a solve. steps: the numbers of accepted and rejected steps, if they are to be compared."""

    status: Status
    tensors: Sequence[Tensor | None]
    steps: tuple[int, int] = (0, 0)


class Trial:
    """A captured solve that may be the first of its kind. like: a tensor with the state's device and dtype."""

    def __init__(self, kind: str, tier: str, like: Tensor) -> None:
        self.kind, self.device, self.dtype = kind, like.device, like.dtype
        self._key = kind, like.device, like.dtype, tier
        self._before: dict[str, Any] = {}

    @property
    def due(self) -> bool:
        """Whether no solve of this kind was compared before."""
        return self._key not in _confirmed

    def begin(self, stats: Stats) -> None:
        """Save the statistics before the solve is launched."""
        if self.due:
            self._before = {**vars(stats), "pending": [*stats.pending]}

    def agrees(self, stats: Stats, found: Outcome, by_the_host: Callable[[], Outcome]) -> bool:
        """Compare the captured result with that of the host loop, and return whether they agree.

        If they differ, the statistics are restored, and the caller must use the host loop.
        """
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
    """Return the reason why captured solves are not used on this device, as half a sentence, or None.

    There is a reason if a captured solve was wrong there.
    """
    return _refuted.get(device)


def _refute(kind: str, device: torch.device, apart: str) -> None:
    with _lock:
        if device in _refuted:
            return
        _refuted[device] = f"a captured {kind} on {device} differs from that of the host loop ({apart})"
    warnings.warn(
        f"{_refuted[device]}. The host loop solves on this device from now on. Please report this, with the "
        "output of `python -m node_cuda`.",
        RuntimeWarning,
        stacklevel=users_level(),
    )


def difference(found: Outcome, expected: Outcome, dtype: torch.dtype) -> str | None:
    """Return how two outcomes differ, or None if they differ by no more than rounding.

    A captured solve uses the kernels of the host loop. So it has the same bits, except for the discrete adjoint, which
    sums in another order. The kernels of func may differ: a library may choose another algorithm in a capture, or its
    order of summation may be non-deterministic. So equal bits are not required. If all bits are equal, the numbers of
    steps must be equal too.
    """
    if found.status is not expected.status:
        return f"it ended with {found.status.name}, and not with {expected.status.name}"
    pairs = [(a, b) for a, b in zip(found.tensors, expected.tensors, strict=True) if a is not None and b is not None]
    gaps = [_gap(a, b) for a, b in pairs]
    sizes = [_largest(b) for _, b in pairs]
    slack = 0 if not any(gaps) else 1 + sum(expected.steps) // 20
    if any(abs(a - b) > slack for a, b in zip(found.steps, expected.steps, strict=True)):
        return f"its accepted and rejected steps are {found.steps}, and not {expected.steps}"
    # A tensor that is nearly zero is a difference of larger sums, and has the absolute error of those sums.
    floor = 1e-3 * max(sizes, default=0.0)
    for gap, size in zip(gaps, sizes, strict=True):
        if gap > _limit(dtype) * max(size, floor):
            return f"numbers of size {size:.3g} differ by {gap:.3g}"
    return None


def _limit(dtype: torch.dtype) -> float:
    """Return the allowed relative difference: some hundred roundings, which a well-conditioned solve does not exceed.

    Roundings in half precision are large. There the limit is small enough to detect a wrong step.
    """
    real = dtype.to_real()
    return ROUNDING if real is torch.float64 else min(500 * torch.finfo(real).eps, 0.05)


def _gap(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, or inf if a number is finite in one tensor only."""
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    return _largest(_wide(a) - _wide(b))


def _largest(x: Tensor) -> float:
    x = _wide(x)
    return float(x.abs().max()) if x.numel() else 0.0


def _wide(x: Tensor) -> Tensor:
    """Return x in double, with zeros instead of numbers that are not finite."""
    return torch.where(x.isfinite(), x, 0.0).to(torch.complex128 if x.is_complex() else torch.float64)
