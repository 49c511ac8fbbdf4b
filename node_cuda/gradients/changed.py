"""Check that func has not changed between the forward and the backward pass. Its values decide, not its attributes.

The adjoint and the discrete adjoint evaluate func again later. Meanwhile the user may have given it another graph, new
noise, or the next input. One evaluation of the forward pass is kept, and compared with one that the backward pass makes
anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from node_cuda._torch_modes import numbers
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
"""The rounding error that another order of the same operations may cause: in eps, relative to the largest element."""
FEWER_BITS = 0.02
"""The same, relative to the largest element, if products may be computed in TF32 or under autocast."""
UNNOTICED = 0.01
"""The part of the tolerance by which a step may change without notice by the error control."""
STEADY = 1e-4
"""The part of the change by which two new evaluations may differ, if the field was changed once."""
GUESSED, INTERPOLATION = 0.05, 30.0
"""The difference allowed between an interpolant's slope and the field: relative to the slope, and in tolerances."""

Ask = Callable[[Tensor, Tensor], Tensor]


class Evaluated(NamedTuple):
    """One evaluation in the last step of a solve: f at a node of the step, and at z.

    slope: dy/dt at the last output, where the backward solve begins; None if it is not known. exact: the slope is f
    itself; else it is that of the interpolant.
    """

    at: Interval
    node: float
    side: int
    z: Tensor
    f: Tensor
    slope: Tensor | None = None
    exact: bool = False


class LastStep:
    """Receives every accepted step, and keeps the last one."""

    def __init__(self) -> None:
        self.seen: Any = None
        """What func reached in a compiled solve, which shows no steps."""
        self._step: Step | None = None
        self._stepper: Stepper | None = None

    def watch(self, stepper: Stepper | None = None) -> Callable[[Step], None]:
        """Return the function that a loop with this stepper calls with its steps. None: the loop of `plain_grid`."""
        self._stepper = stepper
        return self._take

    def evaluated(self, end: float, members: Members) -> Evaluated | None:
        """Return what to keep of the last step, and drop it. The last output lies in it, at solver time `end`."""
        step, stepper = self._step, self._stepper
        self._step = self._stepper = None
        if step is None:
            return None
        if isinstance(stepper, ExplicitRK) and stepper.tableau.adaptive and stepper.tableau.fsal:
            exact = end == step.t1
            slope = step.k[-1] if exact else _slope(step, stepper, end)
            return Evaluated(step.at, 1.0, JUST_BEFORE, step.y1, step.k[-1], slope, exact)
        # The first evaluation of the backward pass is not known here. func is checked only if its tensors were written.
        if not members.tensors:
            return None
        if stepper is None:
            return Evaluated(step.at, 0.0, HERE, step.y0, step.k[0])
        if not isinstance(stepper, (ExplicitRK, Adams)):
            return None
        if isinstance(stepper, ExplicitRK) and stepper.tableau.carry_last_stage:  # the first stage is not f at y0
            z = stepper.arithmetic.combine(step.y0, step.k, stepper.tableau.rows[1], step.at.dt)
            return Evaluated(step.at, stepper.tableau.nodes[1], JUST_BEFORE, z, step.k[1])
        return Evaluated(step.at, 0.0, JUST_AFTER if stepper.inside else HERE, step.y0, step.k[0])

    def _take(self, step: Step) -> None:
        self._step = step


class Comparison:
    """Compares the values of func in the backward pass with those in the forward pass.

    what: the gradient mode as the user writes it. ask: evaluates func.
    """

    def __init__(self, problem: Problem, members: Members, what: str, ask: Ask) -> None:
        self.norm: ErrorNorm = problem.norm
        self.clock = Clock(problem.direction, problem.time_dtype, problem.y0.device)
        self.members = members
        self.what = what
        self.ask = ask

    def begin(self, kept: Evaluated, f: Tensor, z: Tensor) -> None:
        """Check f at z, the first evaluation of a backward solve. Evaluate func again only if it seems changed."""
        suspect = self.members.rewritten()
        if kept.slope is not None and not suspect:
            suspect = self.differ(f, kept.slope, z, kept.at) if kept.exact else self._off(f, kept.slope, z, kept.at)
        if suspect:
            (t,) = self.clock.at_nodes(kept.at, (kept.node,), kept.side)
            self.judge(t, kept.z, kept.f, kept.at)

    def judge(self, t: Tensor, z: Tensor, f: Tensor, at: Interval) -> None:
        """Raise InvalidField if func, which returned f at (t, z), now returns another value."""
        again = self.ask(t, z)
        if not self.differ(again, f, z, at):
            return
        change = (again - f).abs().max()
        if not bool((self.ask(t, z) - again).abs().max() <= STEADY * change):
            return  # func is non-deterministic, or changes its own state in each evaluation
        found = self.members.changes()
        raise InvalidField(
            f"func was changed between the forward and the backward pass: at t = {float(t):.6g} its dy/dt differs by "
            f"{float(change):.3g}, of {float(f.abs().max()):.3g}, for the same y. "
            f"{found or 'No attribute tells why (a list, a closure, the data of a parameter?)'}. {self.what} evaluates "
            "func again, and needs the same values. Call backward() before the change, use one func for each setting, "
            'keep what changes in a tensor attribute and replace it (`func.A = new`), or use gradient="backprop".'
        )

    def differ(self, a: Tensor, b: Tensor, z: Tensor, at: Interval) -> bool:
        """Return whether a and b differ by more than rounding, and by more than a step at z would notice.

        One host read; two if the bits differ.
        """
        if torch.equal(a, b):
            return False
        off = (a - b).abs()
        counts = (off > _rounding(z) * b.abs().max()) & (off * at.h > UNNOTICED * self.norm.scale(z.abs()))
        return bool(counts.any())

    def _off(self, f: Tensor, slope: Tensor, z: Tensor, at: Interval) -> bool:
        """Return whether f differs from the interpolant's slope by more than is allowed. Usually one host read."""
        off = f - slope
        largest, size = numbers(torch.stack([torch.linalg.vector_norm(x, math.inf) for x in (off, slope)]))
        if not largest > GUESSED * size:
            return False
        return bool((off.abs() * at.h > INTERPOLATION * self.norm.scale(z.abs())).any())


def _rounding(y: Tensor) -> float:
    """Return the difference that rounding may cause between two evaluations at y, relative to the largest element."""
    dtype, kind = y.dtype.to_real(), y.device.type
    fewer = autocasts(kind) or (kind == "cuda" and dtype is torch.float32)
    return max(ROUNDING * torch.finfo(dtype).eps, FEWER_BITS if fewer else 0.0)


def _slope(step: Step, stepper: ExplicitRK, s: float) -> Tensor | None:
    """Return dy/dt of the interpolant at the solver time s in a step; None if it needs stages beyond the method's."""
    dense = dense_of(stepper.tableau, "default")
    if dense.extra:
        return None
    x, row = position(step.at, s), []
    for j, weights in dense.slope_rows:
        value = 0.0
        for weight in weights:
            value = value * x + weight
        row.append((j, value if j else value - 1.0))  # the sum starts with the first slope
    return stepper.arithmetic.combine(step.k[0], step.k, row, 1.0)
