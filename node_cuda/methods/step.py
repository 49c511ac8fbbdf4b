"""The types of a step: `ProposedStep`, `Step`, and the protocols of steppers and quadratures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from node_cuda.kernels.arithmetic import ErrorTerm
from node_cuda.kernels.stage_times import Interval

Span = tuple[Tensor, Tensor]
"""The ends of a step as 0-d tensors in the user's time, where autograd records them."""


class ProposedStep(NamedTuple):
    """A step to try: its end and size in solver time, and its ends as tensors where autograd records them.

    t1 was computed from h. So h is not exactly t1 - t0, because t1 is rounded.
    """

    t1: float
    h: float
    span: Span | None = None


class Seen(NamedTuple):
    """An evaluation of the field: f(t, z) = f."""

    t: Tensor
    z: Tensor
    f: Tensor


@dataclass(slots=True)
class Step:
    """A step over the interval `at` from y0 to y1, accepted or not.

    k: the stages, k[0] at the start. error: the partial error. last: the stage and its b - b_hat that complete the
    error (see `Arithmetic.error_ratio`). Both are None for methods without an estimate. jump: the field is
    discontinuous at t1. unsolved: the equations of an implicit step were not solved; its error rejects the step. lost:
    what y1 lost by rounding, of a compensated solve.
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
    lost: Tensor | None = None

    @property
    def t0(self) -> float:
        """The start of the step, in solver time."""
        return self.at.t0

    @property
    def t1(self) -> float:
        """The end of the step, in solver time."""
        return self.at.t1


class Stepper(Protocol):
    """Takes single steps. k1 is the field at the start of the step, or None if it must be evaluated."""

    def first(self, t0: float, y0: Tensor, span: Span | None, inside: bool) -> Tensor | None:
        """Return the field at the start of the solve, or None if this stepper evaluates it in every step.

        inside: the field is discontinuous at t0, so evaluate it just after t0.
        """
        ...

    def attempt(self, t0: float, move: ProposedStep, y0: Tensor, k1: Tensor | None) -> Step:
        """Take a step. The step selector accepts or rejects it later."""
        ...

    def carry(self, step: Step) -> Tensor | None:
        """Return k1 of the step after `step`, which was accepted, or None if it must be evaluated."""
        ...

    def slope_at_end(self, step: Step) -> Tensor:
        """Return f(t1, y1), for interpolation."""
        ...


class Quadrature(ErrorTerm, Protocol):
    """Integrates quantities that the field does not depend on.

    Each evaluation of the field also returns their integrands. The errors of these integrals take part in the norm.
    """

    def begin(self) -> None:
        """Start a step: discard the sums of a step that was rejected."""
        ...

    def wants(self, needed: bool) -> None:
        """Announce an evaluation of the field, and say whether its integrands are needed."""
        ...

    def take(self) -> Sequence[Tensor | None]:
        """Return the integrands of the last evaluation; None stands for zeros."""
        ...

    def add(
        self, integrands: Sequence[Tensor | None], weight: float, error_weight: float, at: Interval | None = None
    ) -> None:
        """Add weighted integrands to the sum of this step and to its error estimate; with `at` also times its signed
        size."""
        ...
