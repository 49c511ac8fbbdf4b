"""Is func in the backward pass what it was in the forward pass? Its value decides, never an attribute.

A gradient by hand asks func again, later. Meanwhile the user may have given it another graph, new noise, or the next
input. One evaluation of the forward pass is kept, and compared with one that the backward pass makes anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from node_cuda.gradients.context import autocasts
from node_cuda.gradients.members import Members
from node_cuda.kernels.arithmetic import position
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.stage_times import HERE, JUST_AFTER, JUST_BEFORE, Clock, Interval
from node_cuda.methods.adams import Adams
from node_cuda.methods.explicit_rk import ExplicitRK
from node_cuda.methods.interpolation import dense_of
from node_cuda.methods.step import Step, Stepper
from node_cuda.problem.problem import Problem
from node_cuda.status import InvalidField

ROUNDING = 100.0
"""In eps of the state's dtype, of the largest element: what another order of the same operations may change."""
FEWER_BITS = 0.02
"""Of the largest element: the same, where products may be taken in TF32 or under autocast."""
UNNOTICED = 0.01
"""Of the tolerance: a change of a step that the error control does not see."""
STEADY = 1e-4
"""Of a difference: how far two answers of a field that was changed once may lie apart."""
GUESSED, INTERPOLATION = 0.05, 30.0
"""How far the slope of an interpolant may lie from the field: of the largest slope, and in tolerances."""

Ask = Callable[[Tensor, Tensor], Tensor]


class Evaluated(NamedTuple):
    """One evaluation in the last step of a solve: f at a node of the step, and at z.

    slope: of y at the last output, where the backward solve begins; exact: that is f itself, else it is the slope of
    the interpolant. None: nothing is expected there.
    """

    at: Interval
    node: float
    side: int
    z: Tensor
    f: Tensor
    slope: Tensor | None = None
    exact: bool = False


class LastStep:
    """Told of every accepted step, and keeps the last one."""

    def __init__(self) -> None:
        self._step: Step | None = None
        self._stepper: Stepper | None = None

    def watch(self, stepper: Stepper | None = None) -> Callable[[Step], None]:
        """Return the function that a loop with this stepper calls with its steps. None: the loop of `plain_grid`."""
        self._stepper = stepper
        return self._take

    def evaluated(self, end: float, members: Members) -> Evaluated | None:
        """What to keep of the step, in which the last output lies at the solver time `end`; the step is let go."""
        step, stepper = self._step, self._stepper
        self._step = self._stepper = None
        if step is None:
            return None
        if isinstance(stepper, ExplicitRK) and stepper.tableau.adaptive and stepper.tableau.fsal:
            exact = end == step.t1
            slope = step.k[-1] if exact else _slope(step, stepper, end)
            return Evaluated(step.at, 1.0, JUST_BEFORE, step.y1, step.k[-1], slope, exact)
        # No evaluation of the backward pass is known beforehand: only a tensor that was written asks for one.
        if not members.tensors:
            return None
        if stepper is None:
            return Evaluated(step.at, 0.0, HERE, step.y0, step.k[0])
        if not isinstance(stepper, (ExplicitRK, Adams)):
            return None
        if isinstance(stepper, ExplicitRK) and stepper.tableau.carry_last_stage:  # the first stage is no f at y0
            z = stepper.arithmetic.combine(step.y0, step.k, stepper.tableau.rows[1], step.at.dt)
            return Evaluated(step.at, stepper.tableau.nodes[1], JUST_BEFORE, z, step.k[1])
        return Evaluated(step.at, 0.0, JUST_AFTER if stepper.inside else HERE, step.y0, step.k[0])

    def _take(self, step: Step) -> None:
        self._step = step


class Comparison:
    """Compares what func answers in the backward pass with what it answered in the forward pass.

    what: the gradient mode, as the user calls it. ask: evaluates func.
    """

    def __init__(self, problem: Problem, members: Members, what: str, ask: Ask) -> None:
        self.norm: ErrorNorm = problem.norm
        self.clock = Clock(problem.direction, problem.time_dtype, problem.y0.device)
        self.members = members
        self.what = what
        self.ask = ask
        kind = problem.y0.device.type
        fewer = autocasts(kind) or (kind == "cuda" and problem.time_dtype is torch.float32)
        self._rounding = max(ROUNDING * torch.finfo(problem.time_dtype).eps, FEWER_BITS if fewer else 0.0)

    def begin(self, kept: Evaluated, f: Tensor, z: Tensor) -> None:
        """f at z is the first evaluation of a backward solve; asks func again only if it looks changed."""
        suspect = self.members.rewritten()
        if kept.slope is not None and not suspect:
            suspect = self.differ(f, kept.slope, z, kept.at) if kept.exact else self._off(f, kept.slope, z, kept.at)
        if suspect:
            (t,) = self.clock.at_nodes(kept.at, (kept.node,), kept.side)
            self.judge(t, kept.z, kept.f, kept.at)

    def judge(self, t: Tensor, z: Tensor, f: Tensor, at: Interval) -> None:
        """Raise if func, which answered f at (t, z), has another answer by now."""
        again = self.ask(t, z)
        if not self.differ(again, f, z, at):
            return
        change = (again - f).abs().max()
        if not bool((self.ask(t, z) - again).abs().max() <= STEADY * change):
            return  # by chance, or by what func itself writes in each evaluation
        found = self.members.changes()
        raise InvalidField(
            f"func was changed between the forward and the backward pass: at t = {float(t):.6g} its dy/dt is off by "
            f"{float(change):.3g}, of {float(f.abs().max()):.3g}, for the same y. "
            f"{found or 'No attribute tells why (a list, a closure, the data of a parameter?)'}. {self.what} asks func "
            "again, and needs the same answers. Call backward() before the change, take a func for each setting, make "
            'what changes a tensor attribute that is replaced (`func.A = new`), or use gradient="backprop".'
        )

    def differ(self, a: Tensor, b: Tensor, z: Tensor, at: Interval) -> bool:
        """By more than rounding, and by more than a step at z would notice. One host read, two if not the same bits."""
        if torch.equal(a, b):
            return False
        off = (a - b).abs()
        counts = (off > self._rounding * b.abs().max()) & (off * at.h > UNNOTICED * self.norm.scale(z.abs()))
        return bool(counts.any())

    def _off(self, f: Tensor, slope: Tensor, z: Tensor, at: Interval) -> bool:
        """f is not what the slope of the interpolant says, by more than it may be off. Mostly one host read."""
        off = f - slope
        largest, size = torch.stack([torch.linalg.vector_norm(x, math.inf) for x in (off, slope)]).tolist()
        if not largest > GUESSED * size:
            return False
        return bool((off.abs() * at.h > INTERPOLATION * self.norm.scale(z.abs())).any())


def _slope(step: Step, stepper: ExplicitRK, s: float) -> Tensor | None:
    """dy/dt at the solver time s in a step, of the interpolant that needs no stages beyond the method's."""
    dense = dense_of(stepper.tableau, "default")
    if dense.extra:
        return None
    x, row = position(step.at, s), []
    for j, weights in dense.slope_rows:
        value = 0.0
        for weight in weights:
            value = value * x + weight
        row.append((j, value if j else value - 1.0))  # the first slope is what the others are added to
    return stepper.arithmetic.combine(step.k[0], step.k, row, 1.0)
