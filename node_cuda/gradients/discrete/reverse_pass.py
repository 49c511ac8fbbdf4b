"""The reverse pass of the discrete adjoint over the steps of a solve, from the last one to the first, on the host."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from node_cuda.gradients.autograd import Saved
from node_cuda.gradients.changed import Comparison
from node_cuda.gradients.discrete.implicit_step import ImplicitStepAdjoint
from node_cuda.gradients.discrete.step_adjoint import (
    Cotangent,
    Evaluation,
    Outputs,
    StageTable,
    StepAdjoint,
    of_times,
)
from node_cuda.gradients.discrete.trajectory import State, Trajectory
from node_cuda.gradients.discrete.whole_step import WholeStepAdjoint, is_small
from node_cuda.gradients.members import Members
from node_cuda.gradients.reached import UsedParameters
from node_cuda.kernels.arithmetic import Arithmetic, position
from node_cuda.loop.assemble import arithmetic_of
from node_cuda.loop.progress import Progress
from node_cuda.methods.registry import Method
from node_cuda.problem.field import VectorField
from node_cuda.problem.problem import Problem


class Solved(NamedTuple):
    """A solve as its reverse pass needs it.

    times: the output times in solver time; the first one is the start. at_event: the last one is that of an event.
    failed: the solve did not reach all of them. form: the stages of the method, None for an implicit one. members:
    those of func, for messages. what: the gradient mode as the user writes it.
    """

    trajectory: Trajectory
    times: tuple[float, ...]
    at_event: bool
    failed: bool
    method: Method
    form: StageTable | None
    members: Members
    what: str


class ReversePass:
    """The reverse pass. grad_ys: dL/dy at the outputs. wants_grid: dL/dgrid is wanted, which is exact."""

    def __init__(
        self,
        solved: Solved,
        problem: Problem,
        saved: Saved,
        grad_ys: Tensor,
        wants_grid: bool,
        reached: UsedParameters,
    ) -> None:
        ys, self.params = saved.ys, saved.params
        # A view of ys itself would keep the graph alive, and the graph keeps the trajectory alive.
        problem = problem._replace(y0=ys.detach()[0], times=solved.times)
        self.problem, self.ys, self.grid = problem, ys, saved.grid if wants_grid else None
        self.trajectory, self.times, self.at_event = solved.trajectory, solved.times, solved.at_event
        self.trajectory.begin(problem.y0)
        self.arithmetic = arithmetic_of(problem)
        self.sums = self.arithmetic.sums(self.params, with_error=False)
        self.recomputed_steps = 0
        self.shows = solved.method.options.progress
        # In half precision, small cotangents would be lost in a sum of many.
        wide = torch.promote_types(ys.dtype, torch.float32)
        self.cotangents = self.arithmetic
        if wide != ys.dtype and type(self.arithmetic) is not Arithmetic:
            # Plain PyTorch accepts operands of both dtypes.
            self.cotangents = Arithmetic(problem.y0, problem.direction, problem.norm, problem.times)
        self.adjoint: StepAdjoint | ImplicitStepAdjoint
        if solved.form is None:
            self.adjoint = ImplicitStepAdjoint(
                problem, self.arithmetic, solved.method, self.params, self.sums, reached, timed=wants_grid
            )
        else:
            kind = WholeStepAdjoint if is_small(problem, self.arithmetic, self.params, wants_grid) else StepAdjoint
            arithmetics = self.arithmetic, self.cotangents
            self.adjoint = kind(problem, *arithmetics, solved.form, self.params, self.sums, reached, timed=wants_grid)
        self.comparison = Comparison(problem, solved.members, solved.what, self.adjoint.plain)
        if self.trajectory.replayed is not None:
            self.adjoint.first = self._compare
        assert isinstance(problem.field, VectorField)
        problem.field.watch_again()
        if self.trajectory.seen is not None:
            self.comparison.judge(*self.trajectory.seen, self.trajectory.steps[-1].at)
        # A failed solve gives NaN for the outputs it did not reach. Their gradients are not used.
        finite = torch.isfinite(ys).reshape(len(ys), -1).all(1) if solved.failed else None
        self.reached = len(ys) if finite is None else max(int(finite.sum()), 1)
        self.grad_ys = self.cotangents.as_contiguous((grad_ys if finite is None else grad_ys[: self.reached]).to(wide))

    def run(self, t: Tensor, wants_t: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Do the reverse pass, and return (dL/dy0, dL/dt or None, dL/dgrid or None)."""
        steps, times = self.trajectory.steps, self.times[: self.reached]
        exact = self.grid is not None
        # On the state's device, even if t is on another one, so that no step waits for a copy.
        dtype = of_times(self.ys.dtype)
        adj_t = self.ys.new_zeros(len(t), dtype=dtype) if wants_t else None
        adj_grid = None if self.grid is None else self.ys.new_zeros(len(self.grid), dtype=dtype)
        flowing = Cotangent(torch.zeros_like(self.grad_ys[0]))
        stop = len(times)

        def advance(n: int, state: State) -> State:
            self.recomputed_steps += 1
            return self.adjoint.advance(steps[n], state, steps[n + 1])

        def back(n: int, state: State) -> None:
            nonlocal flowing, stop
            at = steps[n].at
            first = bisect_right(times, at.t0, 1, stop)
            places = [1.0 if s == at.t1 else position(at, s) for s in times[first:stop]]
            outputs = Outputs(first, self.grad_ys[first:stop], places) if places else None
            before = steps[max(n - 1, 0)].at
            shared = bisect_right(times, before.t0) < bisect_left(times, before.t1)
            flowing, timed = self.adjoint.back(steps[n], state, flowing, outputs, shared=shared)
            if timed is not None and adj_grid is not None:
                adj_grid[n + 1] += timed.size
                adj_grid[n] += timed.start - timed.size
                for m, x, slope in zip(range(first, stop), places, timed.places, strict=True):
                    rate = slope / at.signed
                    adj_grid[n + 1] -= x * rate
                    adj_grid[n] -= (1.0 - x) * rate
                    if adj_t is not None:
                        adj_t[m] += rate
            stop = first

        if self.shows and steps:
            shown, bar = self._shown(back)
            try:
                self.trajectory.reverse(advance, shown)
            finally:
                bar.close()
        else:
            self.trajectory.reverse(advance, back)
        if adj_t is not None and not exact:
            self._times_by_the_flow(adj_t, flowing.lam)
        adj_y0 = (flowing.lam + self.grad_ys[0]).reshape(self.problem.y0.shape).to(self.ys.dtype)
        return (
            adj_y0,
            None if adj_t is None else adj_t.to(t),
            None if adj_grid is None or self.grid is None else adj_grid.to(self.grid),
        )

    def _shown(self, back: Callable[[int, State], None]) -> tuple[Callable[[int, State], None], Progress]:
        """Return `back` with a bar of the steps that are done."""
        steps, direction = self.trajectory.steps, self.problem.direction
        bar = Progress((steps[-1].at.t1, steps[0].at.t0), direction, backwards=True)

        def shown(n: int, state: State) -> None:
            back(n, state)
            at = steps[n].at
            bar.show(at.t0, -direction * at.h, self.adjoint.nfe, 0)

        return shown, bar

    def _compare(self, stage: Evaluation) -> None:
        """Compare the first evaluation with the forward solve's, to find out whether func has changed.

        The first evaluation is a stage of the last step, and the forward solve kept its value.
        """
        before, at = self.trajectory.replayed, self.trajectory.steps[-1].at
        differ = self.comparison.differ
        if before is not None and stage.k is not None and differ(stage.k, before, stage.z.detach(), at):
            self.comparison.judge(stage.t.detach(), stage.z.detach(), before, at)

    def _times_by_the_flow(self, adj_t: Tensor, lam0: Tensor) -> None:
        """Write dL/dt by the exact flow. The time of an event does not depend on t[1], so it needs dL/dt_0 only."""
        asked = range(1 if self.at_event else self.reached) if len(self.times) > 1 else ()
        if isinstance(self.adjoint, ImplicitStepAdjoint):
            for m in asked[1:]:
                adj_t[m] = self.adjoint.rates[m]
            asked = asked[:1]
        self.adjoint.nfe += len(asked)
        by_the_flow(adj_t, asked, self.problem, self.ys, self.grad_ys, lam0, self.cotangents.real_dot)

    def of_params(self) -> list[Tensor]:
        """Return dL/dtheta, each in the dtype of its parameter."""
        return [g.type_as(p) for g, p in zip(self.sums.total, self.params, strict=True)]


def by_the_flow(
    adj_t: Tensor,
    asked: Iterable[int],
    problem: Problem,
    ys: Tensor,
    grad_ys: Sequence[Tensor] | Tensor,
    lam0: Tensor,
    real_dot: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Write dL/dt of the exact flow into the entries `asked` of adj_t. One evaluation of the field for each entry."""
    for m in asked:
        f = problem.field(problem.t[m].to(ys.device, problem.time_dtype), ys[m])
        adj_t[m] = real_dot(-lam0 if m == 0 else grad_ys[m], f)
