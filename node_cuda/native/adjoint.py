"""The backward loop of the adjoint method over one interval between outputs, as a function of tensors alone.

    dy/dt = f,   da/dt = -a^T df/dy,   dL/dtheta = int a^T df/dtheta dt

y and a are stepped together, and dL/dtheta is summed with the weights of the method. The host sets y and a at each
output, and calls the loop for the next interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from node_cuda._typing import Row
from node_cuda.native.loop import Field, Scheme, first_step_by, fixed_in, grid_interval, judged, stages
from node_cuda.native.numbers import FIRST, Form, Given, Point, Settings, given_in, packed, point_in
from node_cuda.native.reverse import leaves_of, vjp
from node_cuda.native.step import Norm, combine, cut, largest, proposed, real, rms, weighted
from node_cuda.native.tracing import once, while_loop


class Shape(NamedTuple):
    """What is fixed in a backward loop.

    wanted: the tensors of func that get a gradient. per_element: whether rtol, and atol, is a tensor. sizes: the
    segments of y. sums_in_norm: the errors of the sums take part in the norm.
    """

    form: Form
    wanted: tuple[int, ...]
    per_element: tuple[bool, bool]
    sizes: tuple[int, ...] | None
    sums_in_norm: bool


class Slope(NamedTuple):
    """A stage: dy/dt, da/dt, and a^T df/dtheta for each wanted tensor."""

    y: Tensor
    a: Tensor
    sums: list[Tensor]

    @property
    def flat(self) -> list[Tensor]:
        """Its tensors, as a loop carries them."""
        return [self.y, self.a, *self.sums]


Evaluate = Callable[[Tensor, Tensor, Tensor], Slope]
"""The slopes at a solver time, y and a."""


class State(NamedTuple):
    """What the loop carries beside the point. k1: the first stage of the next step. sums: dL/dtheta so far."""

    y: Tensor
    a: Tensor
    k1: Slope
    sums: list[Tensor]

    @property
    def flat(self) -> list[Tensor]:
        """Its tensors, as a loop carries them."""
        return [self.y, self.a, *self.k1.flat, *self.sums]


class Step(NamedTuple):
    """A step that was computed: its signed size, y and a at its two ends, its stages."""

    signed: Tensor
    y0: Tensor
    a0: Tensor
    y1: Tensor
    a1: Tensor
    k: list[Slope]

    @property
    def k_y(self) -> list[Tensor]:
        """dy/dt at the stages."""
        return [x.y for x in self.k]

    @property
    def k_a(self) -> list[Tensor]:
        """da/dt at the stages."""
        return [x.a for x in self.k]


class BackwardLoop:
    """The backward loop, as a function that can be traced. order: of the method, for the first step size."""

    def __init__(self, scheme: Scheme, order: int, shape: Shape, field: Field) -> None:
        self.scheme, self.order, self.shape, self.field = scheme, order, shape, field

    def __call__(self, numbers: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Return the point and the state at the end of the interval, or where the cap on the attempts was met.

        numbers: they hold one output time, the end of the interval. rest: the state, tolerances, func's tensors.
        """
        state, fixed = self._split(rest)
        fixed = [numbers, *fixed]
        p = point_in(numbers[:FIRST])._replace(calls=torch.zeros((), dtype=torch.int64))
        state = state._replace(k1=_slope_in([x.clone() for x in state.k1.flat]))
        if self.scheme.adaptive:
            p, state = self._begin(p, state, fixed)
        y, a, k1, sums = state
        carried = [packed(p), y.clone(), a.clone(), *k1.flat, *(x.clone() for x in sums)]
        return tuple(x.clone() for x in while_loop(self._going, self._body, carried, fixed))

    def _split(self, flat: Sequence[Tensor]) -> tuple[State, Sequence[Tensor]]:
        """Return the state, and what follows it, from the tensors of a loop."""
        n = len(self.shape.wanted)
        y, a, *rest = flat
        k1, sums, fixed = rest[: 2 + n], rest[2 + n : 2 + 2 * n], rest[2 + 2 * n :]
        return State(y, a, _slope_in(k1), sums), fixed

    def _fixed_in(self, fixed: Sequence[Tensor]) -> tuple[Given, Norm, Sequence[Tensor]]:
        return fixed_in(self.shape.form, self.shape.per_element, self.shape.sizes, fixed)

    def _slopes(self, c: Settings, tensors: Sequence[Tensor], *, sums: bool = True) -> Evaluate:
        """Return what evaluates a stage: f, and one vjp with the cotangent a. sums: also a^T df/dtheta."""

        def evaluate(s: Tensor, y: Tensor, a: Tensor) -> Slope:
            given, leaves = leaves_of(tensors, self.shape.wanted)
            with torch.enable_grad():
                y = y.detach().requires_grad_(True)
                f = self.field(c, s, y, given)
                of_y, *of_leaves = vjp([(f, a)], [y, *(leaves if sums else ())])
            return Slope(f.detach(), -of_y, of_leaves)

        return evaluate

    # ------------------------------------------------------------------ before the first step
    def _begin(self, p: Point, state: State, fixed: Sequence[Tensor]) -> tuple[Point, State]:
        """Find k1 and the first step size where they are not known. Each is a loop of one iteration, or of none."""
        p, state = self._first_stage(p, state, fixed)
        p = self._first_step(p, state, fixed)
        return proposed(self._fixed_in(fixed)[0].c, p, p.attempts == 0), state

    def _first_stage(self, p: Point, state: State, fixed: Sequence[Tensor]) -> tuple[Point, State]:
        """Evaluate k1 if it is not known."""
        k1 = state.k1.flat

        def evaluate(go: Tensor, nfe: Tensor, *flat: Tensor) -> list[Tensor]:
            t_k1, y, a, *fixed = flat[len(k1) :]
            given, _, tensors = self._fixed_in(fixed)
            found = self._slopes(given.c, tensors)(t_k1, y, a)
            return [go - 1, nfe + 1, *found.flat]

        carried = [(p.fresh > 0).long(), p.nfe, *k1]
        _, nfe, *k1 = while_loop(once, evaluate, carried, [p.t_k1, state.y, state.a, *fixed])
        return p._replace(nfe=nfe), state._replace(k1=_slope_in(k1))

    def _first_step(self, p: Point, state: State, fixed: Sequence[Tensor]) -> Point:
        """Find the first step size if it is not known. The sums have no part in it."""

        def propose(go: Tensor, nfe: Tensor, _proposal: Tensor, _status: Tensor, *flat: Tensor) -> list[Tensor]:
            t, y, a, k1_y, k1_a, *fixed = flat
            given, norm, tensors = self._fixed_in(fixed)
            evaluate = self._slopes(given.c, tensors, sums=False)

            def f(s: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
                return evaluate(s, *parts).flat

            proposal, status = first_step_by(given.c, f, norm, self.order, t, [y, a], [k1_y, k1_a])
            return [go - 1, nfe + (status == 0).long(), proposal, status]

        carried = [(p.fresh > 1).long(), p.nfe, p.proposal, p.status]
        y, a, k1, _ = state
        _, nfe, proposal, status = while_loop(once, propose, carried, [p.t, y, a, k1.y, k1.a, *fixed])
        return p._replace(nfe=nfe, proposal=proposal, status=status, fresh=torch.zeros_like(nfe))

    # ------------------------------------------------------------------ the steps
    def _going(self, point: Tensor, *flat: Tensor) -> Tensor:
        """Return whether there is another step to take in this call."""
        _, (numbers, *_) = self._split(flat)
        p, c = point_in(point), given_in(self.shape.form, numbers).c
        return (p.status == 0) & (p.output < 1) & (p.fresh == 0) & (p.calls < c.cap)

    def _body(self, point: Tensor, *flat: Tensor) -> list[Tensor]:
        """Take one step. Return the point and the state after it."""
        state, fixed = self._split(flat)
        given, norm, tensors = self._fixed_in(fixed)
        p, evaluate = point_in(point), self._slopes(given.c, tensors)
        if self.scheme.adaptive:
            return self._attempt(given, norm, evaluate, p, state)
        return self._grid_step(given, evaluate, p, state)

    def _attempt(self, given: Given, norm: Norm, evaluate: Evaluate, p: Point, state: State) -> list[Tensor]:
        """Take a step whose error decides, and move if it is accepted."""
        at = cut(p, given.tstops, given.times[0])
        step = compute(self.scheme, given.c, evaluate, p.t, at.t1, at.h, state)
        ratio = self._ratio(given.c, norm, step, state.sums)
        q, accept = judged(self.scheme, given, p, at, ratio, state.y.dtype)
        q = q._replace(calls=p.calls + 1)
        after = State(step.y1, step.a1, step.k[-1], summed(state.sums, self.scheme.tableau.b_row, step))
        kept = (torch.where(accept, new, old) for new, old in zip(after.flat, state.flat, strict=True))
        return [packed(q), *kept]

    def _grid_step(self, given: Given, evaluate: Evaluate, p: Point, state: State) -> list[Tensor]:
        """Take the step to the next point of the grid. The k1 that is carried is not used on a grid."""
        y, a, unused, sums = state
        tableau = self.scheme.tableau
        t0, t1 = grid_interval(given, p)
        k1 = evaluate(self.scheme.first_time(t0, y.dtype), y, a)
        step = compute(self.scheme, given.c, evaluate, t0, t1, t1 - t0, State(y, a, k1, sums))
        p = p._replace(
            t=t1,
            place=p.place + 1,
            accepted=p.accepted + 1,
            output=(given.times <= t1).sum(),
            nfe=p.nfe + tableau.stages,
            calls=p.calls + 1,
        )
        after = summed(sums, tableau.b_row, step)
        return [packed(p), step.y1, step.a1, *(x.clone() for x in unused.flat), *after]

    def _ratio(self, c: Settings, norm: Norm, step: Step, sums: Sequence[Tensor]) -> Tensor:
        """Return the norm of the embedded error: the largest of those of y, of a, and of the sums."""
        row = self.scheme.b_err
        ratios = [
            norm.ratio(c, weighted(k, row, step.signed), x0, x1)
            for k, x0, x1 in ((step.k_y, step.y0, step.y1), (step.k_a, step.a0, step.a1))
        ]
        if self.shape.sums_in_norm:
            ratios += self._ratios_of_sums(c, step, sums)
        return largest(ratios)

    def _ratios_of_sums(self, c: Settings, step: Step, sums: Sequence[Tensor]) -> list[Tensor]:
        """Return the norms of the sums' embedded errors, by their own tolerances."""
        after = summed(sums, self.scheme.tableau.b_row, step)
        ratios = []
        for x0, x1, error in zip(sums, after, integral(self.scheme.b_err, step, sums), strict=True):
            if x0.numel():
                scale = real(c.atol_sums, x0) + real(c.rtol_sums, x0) * torch.maximum(x0.abs(), x1.abs())
                ratios.append(rms(error / scale))
        return ratios


def _slope_in(flat: Sequence[Tensor]) -> Slope:
    """Return a stage from its tensors."""
    y, a, *sums = flat
    return Slope(y, a, sums)


def compute(scheme: Scheme, c: Settings, evaluate: Evaluate, t0: Tensor, t1: Tensor, h: Tensor, state: State) -> Step:
    """Compute a step of y and a from t0."""
    y, a, k1, _ = state
    signed = c.direction * h
    end = scheme.last_time(t1, y.dtype)

    def add(k: Sequence[Slope], row: Row) -> tuple[Tensor, Tensor]:
        return combine(y, [x.y for x in k], row, signed), combine(a, [x.a for x in k], row, signed)

    k, (y1, a1) = stages(scheme, t0, h, end, k1, add, lambda s, z: evaluate(s, *z))
    return Step(signed, y, a, y1, a1, k)


def integral(row: Row, step: Step, like: Sequence[Tensor]) -> list[Tensor]:
    """Return -signed sum_i w_i a^T df/dtheta_i: the minus turns the integral round, as it runs backwards.

    row: the nonzero weights. like: tensors of the shapes of the result.
    """
    totals = [torch.zeros_like(x) for x in like]
    for i, w in row:
        totals = [t + real(-step.signed * w, g) * g for t, g in zip(totals, step.k[i].sums, strict=True)]
    return totals


def summed(sums: Sequence[Tensor], row: Row, step: Step) -> list[Tensor]:
    """Return the sums after a step. row: the weights of the method."""
    return [x + d for x, d in zip(sums, integral(row, step, sums), strict=True)]
