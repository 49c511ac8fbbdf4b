"""The discrete adjoint: exact gradients of the computed solution, from the states that the accepted steps began with.

Autograd does not record the forward solve. The backward pass recomputes each accepted step from the state it began
with, and propagates the cotangents back through it (`step_adjoint`). The result is that of autograd through the same
steps, with the memory of one step's graph. The step sizes are constants, because the exact flow does not depend on
them. For an adaptive solve dL/dt_m = dL/dy(t_m) . f(t_m, y_m) and dL/dt_0 = -dL/dy_0 . f(t_0, y_0). For a fixed grid
dL/dt is exact too. Zhuang et al. 2020, arXiv:2006.02493; Matsubara, Miyatake and Yaguchi 2021, arXiv:2102.09750.
"""

from __future__ import annotations

import torch
from torch import Tensor

from node_cuda._typing import EventFunc
from node_cuda.cuda_graphs.first_run_check import Outcome, Trial, refuted
from node_cuda.gradients.autograd import DifferentiableSolve, Gradients, Saved, refuse_transforms
from node_cuda.gradients.discrete import cuda_graph_forward, cuda_graph_reverse, native
from node_cuda.gradients.discrete.checkpoints import slots_for
from node_cuda.gradients.discrete.cuda_graph_forward import SavedTrajectory, why_not_recorded
from node_cuda.gradients.discrete.reverse_pass import ReversePass, Solved, by_the_flow
from node_cuda.gradients.discrete.step_adjoint import StageTable, adaptive_form, grid_form, of_times
from node_cuda.gradients.discrete.trajectory import Trajectory
from node_cuda.gradients.parameters import Parameters
from node_cuda.gradients.reached import UsedParameters
from node_cuda.kernels.reference import real_dot
from node_cuda.loop import plain_grid
from node_cuda.loop.assemble import arithmetic_of, find_event, make_loop
from node_cuda.loop.grids import grid_of
from node_cuda.loop.host_loop import HostLoop
from node_cuda.loop.outputs import grid_status, solve_outputs
from node_cuda.loop.request import SolveSpec
from node_cuda.methods.explicit_rk import ExplicitRK
from node_cuda.methods.implicit.steps import ImplicitSteps
from node_cuda.methods.interpolation import dense_of
from node_cuda.methods.registry import Method
from node_cuda.methods.step import Step
from node_cuda.native.cache import refused
from node_cuda.native.tracing import Refused
from node_cuda.options import AdaptiveOptions, FixedOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import InvalidField, Status, Unsupported


def outputs(request: SolveSpec) -> tuple[Tensor, Status]:
    """Return y at the problem's times and the status of the solve. The gradient of y is by the discrete adjoint."""
    options = request.method.options
    if plain_grid.applies(request.problem, request.method):
        slots = _slots(request, 1)
        if slots is None or slots >= len(request.problem.times) - 1:
            task = _DiscreteSolve(request, None, None, plain=True)
            return task(), task.status
    points, grid = grid_of(request.problem, options) if isinstance(options, FixedOptions) else (None, None)
    task = _DiscreteSolve(request, None, points, taped_grid=grid is not None)
    return task(grid), task.status


def event(request: SolveSpec, event_fn: EventFunc) -> tuple[Tensor, Tensor]:
    """Return the time of the event, without a gradient, and [y0, y at the event], with the discrete adjoint."""
    refuse_transforms("An event")
    return _DiscreteSolve(request, event_fn, None).event()


SAME = 1e-3
"""The relative difference of the outputs by which two loops over the same steps may differ in float32."""


class _DiscreteSolve(DifferentiableSolve):
    """A solve that records its steps, and the reverse pass over them.

    points: the grid of the steps in solver time, if it is known before the solve. plain: `loop.plain_grid` takes the
    steps, and all states are kept. times: the output times in solver time; the first one is the start.
    """

    what = 'gradient="discrete"'
    replays = True
    trajectory: Trajectory
    record: SavedTrajectory | None = None
    compiled: native.Record | None = None
    times: tuple[float, ...]

    def __init__(
        self,
        request: SolveSpec,
        event_fn: EventFunc | None,
        points: list[float] | None,
        *,
        taped_grid: bool = False,
        plain: bool = False,
    ) -> None:
        super().__init__(request, Parameters(request.problem.func, request.adjoint.params, "discrete adjoint"))
        self.form = None if request.method.implicit is not None else _form(request)
        self.event_fn = event_fn
        self.points = points
        self.taped_grid = taped_grid
        self.plain = plain

    @property
    def method(self) -> Method:
        """That of the solve."""
        return self._request.method

    def solve(self, request: SolveSpec) -> Tensor:
        """Solve, and record the steps."""
        problem, method, stats = request.problem, request.method, request.stats
        endless = self.event_fn is not None
        if method.options.cuda_graph:
            recorded = cuda_graph_forward.try_captured(request, self._why_not_recorded(request))
            if recorded is not None:
                ys, self.status, self.record = recorded
                self.times = problem.times
                return ys
            stats.why_backward = stats.why
        if method.options.compile:
            compiled = native.try_native(request, self._why_not_compiled(request))
            if compiled is not None:
                ys, self.status, self.compiled = compiled
                self.times = problem.times
                return ys
            stats.why_backward = stats.why
        if self.plain:
            begun, last = list[Tensor](), list[Step]()
            ys = plain_grid.solve_grid(problem, method, stats, last.append, begun)
            self.trajectory = Trajectory.of_grid(begun, last[0] if last else None, problem)
            if request.wants_status or not method.options.raises:  # the gradient of a failed solve is partial
                self.status = grid_status(ys, stats)
            self.times = problem.times
            return ys
        loop, interpolant = make_loop(problem, method, stats, points=self.points, endless=endless)
        self.trajectory = _recorded(loop, request, None if self.points is None else len(self.points) - 1)
        if self.event_fn is None:
            ys, self.status = solve_outputs(loop, interpolant, method.options.raises)
            self.times = problem.times
            return ys
        self.at, y = find_event(loop, interpolant, method, self.event_fn)
        self.times = problem.times[0], problem.direction * self.at
        return torch.stack([problem.y0, y])

    def _why_not_recorded(self, request: SolveSpec) -> str | None:
        if self.event_fn is not None:
            return "an event is looked for by the host"
        if self.taped_grid:
            return "dL/dt of a fixed grid is computed by the host"
        problem = request.problem
        return self.replaced(problem) or why_not_recorded(problem, request.method, self.parameters.wanted)

    def _why_not_compiled(self, request: SolveSpec) -> str | None:
        if self.event_fn is not None:
            return "an event is looked for by the host"
        if self.taped_grid:
            return "dL/dt of a fixed grid is computed step by step"
        return self.replaced(request.problem)

    def _by_native(
        self, record: native.Record, problem: Problem, saved: Saved, grad_ys: Tensor, wants_t: bool
    ) -> Gradients:
        """Return the gradients by the compiled reverse loop."""
        stats, wanted = self.stats, self.parameters.wanted
        try:
            if (why := self.replaced(problem)) is not None:
                raise Refused(refused(self.method, why))
            lam, of_params = native.gradients(record, problem, grad_ys, saved.params, wanted, stats)
        except Refused as why:
            stats.why_backward = str(why)
            self._record_by_the_host(problem, saved.ys)
            return self._walked(problem, saved, grad_ys, wants_t, False, self.reached(problem), stats)
        adj_t = None
        if wants_t:
            adj_t = saved.ys.new_zeros(len(saved.t), dtype=of_times(saved.ys.dtype))
            reached = int(torch.isfinite(saved.ys).reshape(len(saved.ys), -1).all(1).sum())
            by_the_flow(adj_t, range(reached), problem, saved.ys, grad_ys, lam, real_dot)
            stats.nfe_backward += reached
            adj_t = adj_t.to(saved.t)
        return Gradients(adj_t, None, lam + grad_ys[0], of_params)

    def _record_by_the_host(self, problem: Problem, ys: Tensor) -> None:
        """Take the steps of a compiled solve again in the host loop, because its backward pass cannot be compiled.

        Raises InvalidField if the outputs are not those of the compiled solve.
        """
        self.compiled = None
        problem = problem._replace(y0=ys[0].detach(), field=problem.field_of(problem.func))
        again = Stats()
        loop, interpolant = make_loop(problem, self.method, again, points=self.points)
        self.trajectory = _recorded(loop, self._request._replace(problem=problem), None)
        outputs, _ = solve_outputs(loop, interpolant, throw=False)
        self.stats.recomputed_steps += again.accepted
        if not torch.allclose(outputs, ys, rtol=SAME, atol=SAME * float(ys.abs().nan_to_num().max()), equal_nan=True):
            raise InvalidField(
                "func was changed between the forward and the backward pass: the host takes the steps of the compiled "
                f"solve again ({self.stats.why_backward}), and they end elsewhere. Call backward() before the change, "
                'or use gradient="backprop".'
            )

    def gradients(self, problem: Problem, saved: Saved, grad_ys: Tensor, wants_t: bool, wants_grid: bool) -> Gradients:
        """Return the gradients, by a captured reverse pass or by the host."""
        stats = self.stats
        if self.compiled is not None:
            return self._by_native(self.compiled, problem, saved, grad_ys, wants_t)
        if self.record is not None:
            trial = Trial("backward pass", stats.loop, saved.ys)
            compared = trial.due and self._looked_at(self.record)
            trial.begin(stats)
            reached = self.reached(problem)
            found = self._by_graphs(self.record, problem, saved, grad_ys, wants_t, reached)
            if found is not None:

                def by_the_host() -> Outcome:
                    return _outcome(self._walked(problem, saved, grad_ys, wants_t, False, UsedParameters(()), Stats()))

                if not compared or trial.agrees(stats, _outcome(found), by_the_host):
                    reached.check(saved.params)
                    return found
                stats.why_backward = refuted(trial.device)
            if not self._looked_at(self.record):
                raise Unsupported(
                    f"The backward pass of a deferred solve that failed must be captured, and {stats.why_backward}."
                )
        return self._walked(problem, saved, grad_ys, wants_t, wants_grid, self.reached(problem), stats)

    def _looked_at(self, record: SavedTrajectory) -> bool:
        """Wait for the end of a deferred solve. Return False if not all its steps are recorded."""
        if record.count is None and self.stats.pending[0].end(self.stats) is None:
            count = self.stats.accepted
            record.count = count if count <= record.owner.capacity else None
        return record.count is not None

    def _walked(
        self,
        problem: Problem,
        saved: Saved,
        grad_ys: Tensor,
        wants_t: bool,
        wants_grid: bool,
        reached: UsedParameters,
        stats: Stats,
    ) -> Gradients:
        """Return the gradients by a reverse pass of the host."""
        if self.record is not None:
            self.trajectory = self.record.trajectory(arithmetic_of(problem))
            stats.host_reads += 1
        failed = self.status not in (Status.SUCCESS, Status.PENDING)
        solved = Solved(
            self.trajectory, self.times, self.at is not None, failed, self.method, self.form, self.members, self.what
        )
        walk = ReversePass(solved, problem, saved, grad_ys, wants_grid, reached)
        adj_y0, adj_t, adj_grid = walk.run(saved.t, wants_t)
        reached.check(saved.params)
        stats.nfe_backward += walk.adjoint.nfe
        stats.recomputed_steps += walk.recomputed_steps
        stats.peak_checkpoints = max(stats.peak_checkpoints, self.trajectory.checkpoints.peak)
        stats.graph_of = "stage" if walk.adjoint.at_once is False else "step"
        return Gradients(adj_t, adj_grid, adj_y0, walk.of_params())

    def _by_graphs(
        self,
        record: SavedTrajectory,
        problem: Problem,
        saved: Saved,
        grad_ys: Tensor,
        wants_t: bool,
        reached: UsedParameters,
    ) -> Gradients | None:
        """Return the gradients by a captured reverse pass, or None if the host must do it."""
        why = self.replaced(problem)
        if self.status not in (Status.SUCCESS, Status.PENDING):
            why = "the solve did not reach its end"
        method, params, stats = self._request.method, saved.params, self.stats
        assert self.form is not None
        found = cuda_graph_reverse.try_captured(
            record, problem, method, self.form, grad_ys, params, reached, stats, why
        )
        if found is None:
            return None
        lam, of_params = found
        adj_t = None
        if wants_t:
            adj_t = saved.ys.new_zeros(len(saved.t), dtype=of_times(saved.ys.dtype))
            by_the_flow(adj_t, range(len(adj_t)), problem, saved.ys, grad_ys, lam, real_dot)
            stats.nfe_backward += len(adj_t)
            adj_t = adj_t.to(saved.t)
        return Gradients(adj_t, None, lam + grad_ys[0], of_params)


def _outcome(found: Gradients) -> Outcome:
    return Outcome(Status.SUCCESS, [found.t, found.y0, *found.params])


def _recorded(loop: HostLoop, request: SolveSpec, steps: int | None) -> Trajectory:
    """Return the trajectory that the loop will fill. steps: the number of steps, if it is known."""
    stepper = loop.stepper
    assert isinstance(stepper, ExplicitRK | ImplicitSteps)
    tableau = stepper.tableau
    tensors = 2 if tableau.carry_last_stage and not tableau.fsal else 1
    return Trajectory.of(loop, stepper, _slots(request, tensors + request.method.options.compensated), steps)


def _slots(request: SolveSpec, tensors: int) -> int | None:
    """Return the number of states that may be kept, None for all. tensors: how many like y0 a state has."""
    slots, y0 = request.checkpoints, request.problem.y0
    if isinstance(slots, str):  # "auto"
        slots = slots_for(tensors * y0.numel() * y0.itemsize, y0.device)
    request.stats.checkpoint_slots = slots
    return slots


def _form(request: SolveSpec) -> StageTable:
    """Return the method's stages for the backward pass. Raises Unsupported for a method that is not Runge-Kutta."""
    method, options = request.method, request.method.options
    if method.tableau is None:
        raise Unsupported(
            f'gradient="discrete" replays the steps of Runge-Kutta methods; got method={method.name!r}. '
            'Use gradient="adjoint", or method="dopri5" or "rk4".'
        )
    if isinstance(options, AdaptiveOptions):
        return adaptive_form(method.tableau, dense_of(method.tableau, options.dense))
    assert isinstance(options, FixedOptions)
    return grid_form(method.tableau, inside=options.perturb, cubic=options.interp != "linear")
