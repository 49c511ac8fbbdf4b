"""The outputs of a solve: y at the problem's times, filled in as the steps reach them."""

from __future__ import annotations

import bisect
import cmath
import math

import torch
from torch import Tensor

from node_cuda._torch_modes import batched, recorded, transformed
from node_cuda.loop.host_loop import HostLoop
from node_cuda.methods.interpolation import Interpolant, position
from node_cuda.methods.step import Step
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import SolveError, Status


def solve_outputs(loop: HostLoop, interpolant: Interpolant, throw: bool) -> tuple[Tensor, Status]:
    """Return y at the problem's times, of shape (len(times), *y0.shape), and the status of the solve.

    The interpolant is evaluated only in steps with an output. With throw=False a failed solve returns NaN for the times
    that it did not reach.
    """
    problem = loop.problem
    outputs = _Outputs(problem)
    status = Status.SUCCESS
    try:
        if outputs.missing:
            for step in loop.steps():
                if problem.times[outputs.count] <= step.t1:
                    outputs.take(step, interpolant)
                    if not outputs.missing:
                        break
    except SolveError as failure:
        if throw:
            raise
        status = failure.status
        outputs.fill_missing()
    loop.stats.nfe = problem.field.nfe
    ys = outputs.stacked()
    if status is Status.SUCCESS and not loop.selector.judges:
        status = grid_status(ys, loop.stats)
    return ys, status


def grid_status(ys: Tensor, stats: Stats) -> Status:
    """The status of a solve on a fixed grid, which returns NaN as torchdiffeq does. One host read, or two."""
    if ys.shape[0] < 2 or batched(ys):
        return Status.SUCCESS
    stats.host_reads += 1
    last = ys[-1].detach()
    # The sum of finite numbers is finite unless it overflows, and is cheaper.
    if cmath.isfinite(last.sum().item()):
        return Status.SUCCESS
    stats.host_reads += 1
    return Status.SUCCESS if bool(torch.isfinite(last).all()) else Status.NON_FINITE


class _Outputs:
    """y at the problem's times, filled in as the steps reach them: one tensor, or a list while autograd records.

    A list, because autograd would copy one tensor for every output that is written into it. The transforms of
    torch.func also do not allow writing into every tensor.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.count = 1
        in_list = torch.is_grad_enabled() or transformed()
        self._list: list[Tensor] | None = [problem.y0] if in_list else None
        y0 = problem.y0
        self._slab = y0 if self._list else y0.new_empty((len(problem.times), *y0.shape))
        if self._list is None:
            self._slab[0] = y0

    @property
    def missing(self) -> int:
        """The number of outputs that are not reached yet."""
        return len(self.problem.times) - self.count

    def take(self, step: Step, interpolant: Interpolant) -> None:
        """Compute all outputs in this step; in one call where autograd does not record."""
        k = interpolant.prepare(step)
        first, times = self.count, self.problem.times
        self.count = bisect.bisect_right(times, step.t1, lo=first)
        if self._list is None:
            interpolant.outputs(step, k, first, self._slab[first : self.count])
        elif self._taped(step, k):
            self._list.extend(output_at(step, k, interpolant, self.problem, i) for i in range(first, self.count))
        else:
            rows = step.y0.new_empty((self.count - first, *step.y0.shape))
            interpolant.outputs(step, k, first, rows)
            self._list.extend(rows.unbind())

    def _taped(self, step: Step, k: list[Tensor]) -> bool:
        """Return whether autograd, forward mode or a transform records the outputs of this step."""
        return transformed() or self.problem.t.requires_grad or any(x.requires_grad for x in (step.y0, step.y1, *k))

    def fill_missing(self) -> None:
        """Write NaN for the times that the solve did not reach."""
        if self._list is not None:
            self._list.extend([torch.full_like(self.problem.y0, math.nan)] * self.missing)
        else:
            self._slab[self.count :].fill_(math.nan)

    def stacked(self) -> Tensor:
        """Return the outputs as one tensor."""
        return self._slab if self._list is None else torch.stack(self._list)


def output_at(step: Step, k: list[Tensor], interpolant: Interpolant, problem: Problem, i: int) -> Tensor:
    """Return output i, which lies in this step, as autograd records it."""
    t = problem.t[i] if recorded(problem.t) else None
    if t is None and problem.times[i] == step.t1:
        return step.y1
    return interpolant.evaluate(step, k, position(step, problem.times[i], problem.direction, t))
