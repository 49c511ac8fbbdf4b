"""What a step is, whoever takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from node_cuda.kernels.arithmetic import ErrorTerm
from node_cuda.kernels.stage_times import Interval

Span = tuple[Tensor, Tensor]
"""The ends of a step as 0-d tensors in the user's time, where the tape must see them."""


class ProposedStep(NamedTuple):
    """A step to be tried: its end and size in solver time, and its ends where the tape must see them.

    h is what t1 was made from, and not t1 - t0, which is another number once t1 is rounded.
    """

    t1: float
    h: float
    span: Span | None = None


@dataclass(slots=True)
class Step:
    """A step over the interval `at` from y0 to y1, accepted or not.

    k: the stages, k[0] at the start. error: the partial error, and last: the stage and its b - b_hat that complete it
    (see `Arithmetic.error_ratio`); None for methods without an estimate. jump: the field is discontinuous at t1.
    unsolved: the equations of an implicit step were not solved; its error is one that rejects it.
    """

    at: Interval
    y0: Tensor
    y1: Tensor
    k: list[Tensor]
    error: Tensor | None = None
    last: tuple[Tensor, float] | None = None
    span: Span | None = None
    jump: bool = False
    unsolved: bool = False

    @property
    def t0(self) -> float:
        """Where it starts, in solver time."""
        return self.at.t0

    @property
    def t1(self) -> float:
        """Where it ends, in solver time."""
        return self.at.t1


class Stepper(Protocol):
    """Takes single steps. k1 is the field at the step's start where it is known already."""

    def first(self, t0: float, y0: Tensor, span: Span | None, inside: bool) -> Tensor | None:
        """The field at the start of the solve, or None if this stepper always evaluates it anew. inside: beyond a
        jump at t0."""
        ...

    def attempt(self, t0: float, move: ProposedStep, y0: Tensor, k1: Tensor | None) -> Step:
        """A step, not judged yet."""
        ...

    def carry(self, step: Step) -> Tensor | None:
        """What the next step starts with, after `step` was accepted."""
        ...

    def slope_at_end(self, step: Step) -> Tensor:
        """f(t1, y1), for interpolation."""
        ...


class Quadrature(ErrorTerm, Protocol):
    """Integrates, beside the state, what the field never reads: the integrands come with the field's evaluations. Its
    errors take part in the norm."""

    def begin(self) -> None:
        """A step is tried: forget what was added for one that was not accepted."""
        ...

    def wants(self, needed: bool) -> None:
        """Announce an evaluation of the field: are its integrands needed?"""
        ...

    def take(self) -> Sequence[Tensor | None]:
        """The integrands of the last evaluation; None for zeros."""
        ...

    def add(
        self, integrands: Sequence[Tensor | None], weight: float, error_weight: float, at: Interval | None = None
    ) -> None:
        """Add them, so many times, to this step's sum and its error estimate; with `at` times its signed size."""
        ...
