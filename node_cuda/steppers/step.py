"""What a step is, whoever takes it, and the times at which a step asks for the field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Span = tuple[Tensor, Tensor]
"""The ends of a step as 0-d tensors in the user's time, where the tape must see them."""


class Move(NamedTuple):
    """A step to be tried: its end and size in solver time, and its ends where the tape must see them.

    h is what t1 was made from, and not t1 - t0, which is another number once t1 is rounded.
    """

    t1: float
    h: float
    span: Span | None = None


@dataclass(slots=True)
class Step:
    """A step from (t0, y0) to (t1, y1) in solver time, of size h > 0, accepted or not.

    dt: the signed step in the user's time, a 0-d tensor where the tape must see it. k: the stages, k[0] at the start.
    error: the partial error, and last: the stage and weight that complete it (see `kernels.reference.error_ratio`);
    None for methods without an estimate. jump: the field is discontinuous at t1.
    """

    t0: float
    t1: float
    h: float
    dt: float | Tensor
    y0: Tensor
    y1: Tensor
    k: list[Tensor]
    error: Tensor | None = None
    last: tuple[Tensor, float] | None = None
    span: Span | None = None
    jump: bool = False


class Stepper(Protocol):
    """Takes single steps. k1 is the field at the step's start where it is known already."""

    def first(self, t0: float, y0: Tensor, span: Span | None, inside: bool) -> Tensor | None:
        """The field at the start of the solve, or None if this stepper always evaluates it anew. inside: beyond a
        jump at t0."""
        ...

    def attempt(self, t0: float, move: Move, y0: Tensor, k1: Tensor | None) -> Step:
        """A step, not judged yet."""
        ...

    def carry(self, step: Step) -> Tensor | None:
        """What the next step starts with, after `step` was accepted."""
        ...

    def slope_at_end(self, step: Step) -> Tensor:
        """f(t1, y1), for interpolation."""
        ...


class Quadrature(Protocol):
    """Integrates, beside the state, what the field never reads: the integrands come with the field's evaluations."""

    def begin(self) -> None:
        """A step is tried: forget what was added for one that was not accepted."""
        ...

    def wants(self, needed: bool) -> None:
        """Announce an evaluation of the field: are its integrands needed?"""
        ...

    def take(self) -> Sequence[Tensor]:
        """The integrands of the last evaluation."""
        ...

    def add(self, integrands: Sequence[Tensor], weight: float, error_weight: float) -> None:
        """Add them to this step's sum, and to its error estimate."""
        ...


class Clock:
    """Makes the 0-d tensors t that the field sees: fresh ones, in the state's real dtype, in the user's time."""

    def __init__(self, direction: float, dtype: torch.dtype, device: torch.device) -> None:
        self.direction = direction
        self.dtype = dtype
        self.device = device
        info = torch.finfo(dtype)
        self._bits = round(-math.log2(info.eps)) + 1
        self._least = math.frexp(info.smallest_normal)[1] - self._bits

    def tensors(self, times: Sequence[float]) -> tuple[Tensor, ...]:
        """One 0-d tensor for each solver time, views of one fresh vector."""
        return torch.tensor([self.direction * s for s in times], dtype=self.dtype, device=self.device).unbind()

    def before(self, s: float) -> float:
        """The largest number of this dtype before s, in solver time: the inside of a step that ends at s."""
        return self._neighbour(s, -1)

    def after(self, s: float) -> float:
        """The smallest number of this dtype after s, in solver time: the inside of a step that starts at s."""
        return self._neighbour(s, 1)

    def _neighbour(self, s: float, sign: int) -> float:
        """nextafter(round(s), sign * inf) in this dtype."""
        if self.dtype is torch.float64:
            return math.nextafter(s, sign * math.inf)
        if s == 0.0:
            return sign * math.ldexp(1.0, self._least)
        exponent = max(math.frexp(s)[1] - self._bits, self._least)
        rounded = round(math.ldexp(s, -exponent))  # an integer number of units in the last place, ties to even
        if abs(rounded) == 2 ** (self._bits - 1) and rounded * sign < 0 and exponent > self._least:
            return math.ldexp(2 * rounded + sign, exponent - 1)  # towards zero from a power of two: half a unit
        return math.ldexp(rounded + sign, exponent)
