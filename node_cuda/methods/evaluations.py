"""The field at the nodes of a step: its times, on which side of the step's ends, and what the tape sees of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from node_cuda.kernels.arithmetic import Arithmetic, Stage
from node_cuda.kernels.stage_times import HERE, JUST_AFTER, JUST_BEFORE, Interval
from node_cuda.methods.step import ProposedStep, Span, Step
from node_cuda.methods.tableau import SparseRow
from node_cuda.problem.problem import Problem


class Evaluations:
    """What the steppers of Runge-Kutta methods share.

    inside: stages at the ends of a step are evaluated on the step's own side, one rounding away, so that a field that
    is discontinuous there is never asked on the other side.
    """

    def __init__(self, problem: Problem, arithmetic: Arithmetic, *, inside: bool) -> None:
        self.field = problem.field
        self.arithmetic = arithmetic
        self.inside = inside
        self.end = JUST_BEFORE if inside else HERE

    def interval(self, t0: float, move: ProposedStep) -> Interval:
        """The step from t0; its size a 0-d tensor where the tape must see it."""
        if move.span is None:
            return self.arithmetic.interval(t0, move.t1, move.h)
        start, stop = move.span
        clock = self.arithmetic.clock
        return self.arithmetic.interval(t0, move.t1, move.h, (stop - start).to(clock.device, clock.dtype))

    def f(self, t: Tensor, z: Tensor) -> Tensor:
        """The field at (t, z), as the primitives can read it."""
        return self.arithmetic.as_contiguous(self.field(t, z))

    def slope_at(self, at: Interval, span: Span | None, y1: Tensor, inside: bool) -> Tensor:
        """f(t1, y1) at the end of a step; inside: on the step's own side."""
        return self.f(self.times(at, [1.0], JUST_BEFORE if inside else HERE, span)[0], y1)

    def slope_at_end(self, step: Step) -> Tensor:
        """f(t1, y1), for interpolation."""
        return self.slope_at(step.at, step.span, step.y1, inside=False)

    def prepared(self, nodes: Sequence[float], rows: Sequence[SparseRow]) -> list[Stage]:
        """Stages at t0 + c h, each with its row over those before it."""
        return [self.arithmetic.stage(row, c, self.end) for c, row in zip(nodes, rows, strict=True)]

    def start_time(self, t0: float, span: Span | None, inside: bool) -> Tensor:
        """t0, or with `inside` the number just after it."""
        at = self.arithmetic.interval(t0, t0, 0.0)
        start = self.arithmetic.times(at, [0.0], JUST_AFTER if inside else HERE)[0]
        return start if span is None else _with_gradient_of(span[0], start)

    def slots(self, at: Interval, nodes: Sequence[float], span: Span | None) -> tuple[Tensor, ...]:
        """The stages' times, to be filled by the stages; on the tape they must be there before."""
        if span is None:
            return self.arithmetic.slots(at, nodes, self.end)
        return self.times(at, nodes, self.end, span)

    def times(self, at: Interval, nodes: Sequence[float], side: int, span: Span | None) -> tuple[Tensor, ...]:
        """The times at these nodes."""
        times = self.arithmetic.times(at, nodes, side)
        if span is None:
            return times
        start, stop = span
        return tuple(_with_gradient_of(start + c * (stop - start), t) for c, t in zip(nodes, times, strict=True))


def _with_gradient_of(source: Tensor, value: Tensor) -> Tensor:
    """`value` exactly, with the gradient of `source`."""
    source = source.to(value)
    return source + (value - source).detach()
