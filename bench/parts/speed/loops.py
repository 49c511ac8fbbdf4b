"""The loops that a person would write instead of calling a library: one step a turn, and nothing else.

field: f(t, y). y: any shape. times: the time at the start of every step. h: the size of all steps. Each returns y at
the end; the last time is times[-1] + h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
Loop = Callable[[Field, Tensor, Iterable[Tensor], float], Tensor]


def euler(field: Field, y: Tensor, times: Iterable[Tensor], h: float) -> Tensor:
    """Euler's method."""
    for t in times:
        y = y + h * field(t, y)
    return y


def midpoint(field: Field, y: Tensor, times: Iterable[Tensor], h: float) -> Tensor:
    """The midpoint rule."""
    for t in times:
        y = y + h * field(t + h / 2, y + h / 2 * field(t, y))
    return y


def rk4(field: Field, y: Tensor, times: Iterable[Tensor], h: float) -> Tensor:
    """The 3/8 rule, which torchdiffeq and node_cuda call rk4."""
    for t in times:
        k1 = field(t, y)
        k2 = field(t + h / 3, y + h / 3 * k1)
        k3 = field(t + 2 * h / 3, y + h * (k2 - k1 / 3))
        k4 = field(t + h, y + h * (k1 - k2 + k3))
        y = y + h / 8 * (k1 + 3 * (k2 + k3) + k4)
    return y


LOOPS: dict[str, Loop] = {"euler": euler, "midpoint": midpoint, "rk4": rk4}
