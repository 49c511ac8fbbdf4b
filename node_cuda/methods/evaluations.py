"""The field at the nodes of a step: the times of the nodes, their side at the ends of the step, and their gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from node_cuda.kernels.arithmetic import Arithmetic, Stage
from node_cuda.kernels.stage_times import HERE, JUST_AFTER, JUST_BEFORE, Interval
from node_cuda.methods.step import ProposedStep, Span, Step
from node_cuda.methods.tableau import SparseRow
from node_cuda.problem.problem import Problem


class Evaluations:
    """The part that the steppers of all Runge-Kutta methods have in common.

    inside: evaluate the stages at the two ends of a step one rounding inside the step, so that a field with a
    discontinuity there is never evaluated on the other side.
    """

    def __init__(self, problem: Problem, arithmetic: Arithmetic, *, inside: bool) -> None:
        self.field = problem.field
        self.f = arithmetic.contiguous(problem.field)
        """The field, with its output in a form that the primitives can read."""
        self.arithmetic = arithmetic
        self.inside = inside
        self.end = JUST_BEFORE if inside else HERE

    def interval(self, t0: float, move: ProposedStep) -> Interval:
        """Return the step from t0. Its size is a 0-d tensor where autograd records it."""
        if move.span is None:
            return self.arithmetic.interval(t0, move.t1, move.h)
        start, stop = move.span
        clock = self.arithmetic.clock
        return self.arithmetic.interval(t0, move.t1, move.h, (stop - start).to(clock.device, clock.dtype))

    def slope_at(self, at: Interval, span: Span | None, y1: Tensor, inside: bool) -> Tensor:
        """Return f(t1, y1) at the end of a step. inside: evaluate just before t1."""
        return self.f(self.times(at, [1.0], JUST_BEFORE if inside else HERE, span)[0], y1)

    def slope_at_end(self, step: Step) -> Tensor:
        """Return f(t1, y1), for interpolation."""
        return self.slope_at(step.at, step.span, step.y1, inside=False)

    def prepared(self, nodes: Sequence[float], rows: Sequence[SparseRow]) -> list[Stage]:
        """Prepare stages at t0 + c h, each with its row over the earlier stages."""
        return [self.arithmetic.stage(row, c, self.end) for c, row in zip(nodes, rows, strict=True)]

    def start_time(self, t0: float, span: Span | None, inside: bool) -> Tensor:
        """Return t0, or with `inside` the number just after it."""
        at = self.arithmetic.interval(t0, t0, 0.0)
        start = self.arithmetic.times(at, [0.0], JUST_AFTER if inside else HERE)[0]
        return start if span is None else _with_gradient_of(span[0], start)

    def slots(self, at: Interval, nodes: Sequence[float], span: Span | None) -> tuple[Tensor, ...]:
        """Return tensors for the times of the stages, which fill them; they are filled at once if autograd records."""
        if span is None:
            return self.arithmetic.slots(at, nodes, self.end)
        return self.times(at, nodes, self.end, span)

    def times(self, at: Interval, nodes: Sequence[float], side: int, span: Span | None) -> tuple[Tensor, ...]:
        """Return the times at these nodes."""
        times = self.arithmetic.times(at, nodes, side)
        if span is None:
            return times
        start, stop = span
        return tuple(_with_gradient_of(start + c * (stop - start), t) for c, t in zip(nodes, times, strict=True))


def _with_gradient_of(source: Tensor, value: Tensor) -> Tensor:
    """Return the exact value of `value` with the gradient of `source`."""
    source = source.to(value)
    return source + (value - source).detach()
