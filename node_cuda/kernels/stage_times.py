"""The interval of a step, and the 0-d tensors of time that the field gets in it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

JUST_BEFORE, HERE, JUST_AFTER = -1, 0, 1
"""Sides of the ends of a step: the number just before t1, the ends themselves, the number just after t0."""


class Interval(NamedTuple):
    """A step of size h > 0 from t0 to t1, in solver time.

    t1 was computed from h. So h is not exactly t1 - t0, because t1 is rounded. signed: the step in the user's time,
    direction * h. dt: the same, as a 0-d tensor where autograd records it. native: the interval as the type of the
    compiled module.
    """

    t0: float
    t1: float
    h: float
    signed: float
    dt: float | Tensor
    native: Any = None

    @property
    def taped(self) -> bool:
        """Autograd records the size of the step."""
        return isinstance(self.dt, Tensor)

    def time(self, c: float) -> float:
        """Return t0 + c h, and exactly t1 for c = 1."""
        return self.t1 if c == 1.0 else self.t0 + c * self.h


class Clock:
    """Makes the 0-d tensors t that the field gets: new ones, in the state's real dtype, in the user's time."""

    def __init__(self, direction: float, dtype: torch.dtype, device: torch.device) -> None:
        self.direction = direction
        self.dtype = dtype
        self.device = device

    def tensors(self, times: Sequence[float]) -> tuple[Tensor, ...]:
        """Return one 0-d tensor for each solver time, as views of one new vector."""
        return torch.tensor([self.direction * s for s in times], dtype=self.dtype, device=self.device).unbind()

    def at_nodes(self, at: Interval, nodes: Sequence[float], side: int) -> tuple[Tensor, ...]:
        """Return t0 + c h for each node c, with the ends of the step moved to this side."""
        if not nodes:
            return ()
        return torch.tensor(self.numbers(at, nodes, side), dtype=self.dtype, device=self.device).unbind()

    def numbers(self, at: Interval, nodes: Sequence[float], side: int) -> list[float]:
        """Return the same as numbers."""
        start = self.after(at.t0) if side == JUST_AFTER else at.t0
        end = self.before(at.t1) if side == JUST_BEFORE else at.t1
        sign, t0, h = self.direction, at.t0, at.h
        return [sign * (end if c == 1.0 else start if c == 0.0 else t0 + c * h) for c in nodes]

    def before(self, s: float) -> float:
        """Return the largest number of this dtype before s, in solver time: the inside of a step that ends at s."""
        return self._neighbour(s, -1)

    def after(self, s: float) -> float:
        """Return the smallest number of this dtype after s, in solver time: the inside of a step that starts at s."""
        return self._neighbour(s, 1)

    def _neighbour(self, s: float, sign: int) -> float:
        """Return nextafter(round(s), sign * inf) in this dtype."""
        if self.dtype is torch.float64:
            return math.nextafter(s, sign * math.inf)
        bits, least = _resolution(self.dtype)
        if s == 0.0:
            return sign * math.ldexp(1.0, least)
        exponent = max(math.frexp(s)[1] - bits, least)
        rounded = round(math.ldexp(s, -exponent))  # an integer number of units in the last place, ties to even
        if abs(rounded) == 2 ** (bits - 1) and rounded * sign < 0 and exponent > least:
            # from a power of two towards zero the spacing is half a unit
            return math.ldexp(2 * rounded + sign, exponent - 1)
        return math.ldexp(rounded + sign, exponent)


@functools.cache
def _resolution(dtype: torch.dtype) -> tuple[int, int]:
    """Return the number of bits of the mantissa, and the exponent of the smallest number."""
    info = torch.finfo(dtype)
    bits = round(-math.log2(info.eps)) + 1
    return bits, math.frexp(info.smallest_normal)[1] - bits
