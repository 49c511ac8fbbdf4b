"""A captured forward solve: it does the same as `loop.outputs.solve_outputs`, without the host in the loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from node_cuda.cuda_graphs.cache import captured_or_why, fallback_reason, key_of
from node_cuda.cuda_graphs.captured import CapturedSolve, OnFinish, failure_of
from node_cuda.cuda_graphs.device_loop import OutputLoop, release, set_apart
from node_cuda.cuda_graphs.first_run_check import Outcome, Trial, refuted
from node_cuda.kernels.fused import Fused
from node_cuda.kernels.step_control import ControllerSnapshot
from node_cuda.loop.assemble import arithmetic_of, make_loop
from node_cuda.loop.grids import grid_of
from node_cuda.loop.outputs import solve_outputs
from node_cuda.loop.step_control import wrong_at_start
from node_cuda.methods.registry import Method
from node_cuda.options import Common, FixedOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import SolveError, Status


class CapturedForward(CapturedSolve):
    """The captured graphs of a forward solve: its beginning, and its step with a way to repeat it."""

    def __init__(self, problem: Problem, method: Method, points: Sequence[float] | None, tier: str | None) -> None:
        super().__init__(problem, tier)
        # Later solves outside inference mode write into this memory too.
        with self.recorder.aside(), torch.inference_mode(False), torch.no_grad():
            own = set_apart(problem)
            arithmetic = arithmetic_of(own)
            assert isinstance(arithmetic, Fused)
            self.loop = loop = self.make_loop(own, method, arithmetic, points)
            self._begin, step = self.record(loop.begin, loop.attempt)
            self.repeat, self.why = self.recorder.repeat(step, loop.control)
        release(own)

    def make_loop(
        self, problem: Problem, method: Method, arithmetic: Fused, points: Sequence[float] | None
    ) -> OutputLoop:
        """Return the loop to capture."""
        return OutputLoop(problem, method, arithmetic, points=points)

    def run(self, problem: Problem, points: Sequence[float] | None) -> Tensor:
        """Launch the solve, and return y at the problem's times. The host reads nothing."""
        self.follow()
        self.loop.rebind(problem.y0, problem.times, problem.norm, points)
        self._begin.replay()
        self.repeat.run()
        return self.loop.ys.clone()


def try_captured(
    problem: Problem, method: Method, stats: Stats, why: str | None = None
) -> tuple[Tensor, Status] | None:
    """Return (y at the problem's times, status) by a captured solve, or None if the host loop must solve.

    Then `stats.why` gives the reason. why: a reason that is already known, or None.
    """
    options = method.options
    why = why or fallback_reason(problem, method) or _gradient_obstacle(problem)
    points = points_of(problem, method) if why is None else None
    found: CapturedForward | str = captured_or_why(
        options,
        why,
        lambda: ("forward", *key_of(problem, method), points and len(points)),
        problem,
        lambda: CapturedForward(problem, method, points, options.cuda_graph.tier),
    )
    if isinstance(found, str):
        stats.why = found
        return None
    with found.lock:
        return solve_captured(found, problem, method, stats, points)


def points_of(problem: Problem, method: Method) -> tuple[float, ...] | None:
    """Return the points of the grid, or None if the method has none."""
    return tuple(grid_of(problem, method.options)[0]) if isinstance(method.options, FixedOptions) else None


def solve_captured(
    captured: CapturedForward, problem: Problem, method: Method, stats: Stats, points: Sequence[float] | None
) -> tuple[Tensor, Status] | None:
    """Run a captured solve, and read its status unless throw="deferred". The caller holds the lock of `captured`.

    Returns None if the first-run check failed; then the host loop must solve.
    """
    options, loop = method.options, captured.loop
    trial = Trial("solve", captured.repeat.tier, loop.y)
    trial.begin(stats)
    stats.loop, stats.why = captured.repeat.tier, captured.why
    ys = captured.run(problem, points)
    run = captured.begun(loop.control, stats, _account(problem, loop, ys, options), options)
    if trial.due:
        end = (run or stats.pending[-1]).end(stats)
        status = Status.SUCCESS if end is None else end.status
        found = Outcome(status, [ys], (stats.accepted, stats.rejected))
        if not trial.agrees(stats, found, lambda: _by_the_host(problem, method, points)):
            stats.why = refuted(captured.device)
            return None
    if run is None:
        return ys, Status.PENDING
    failure = run.end(stats)
    if failure is not None and loop.adaptive:
        if options.raises:
            raise failure
        stats.reached = failure.t, loop.y.clone()
    return ys, Status.SUCCESS if failure is None else failure.status


def _by_the_host(problem: Problem, method: Method, points: Sequence[float] | None) -> Outcome:
    """Run the same solve in the host loop, with a new field and separate statistics."""
    own, stats = problem._replace(field=problem.field_of(problem.func), callbacks={}), Stats()
    with torch.no_grad():
        ys, status = solve_outputs(*make_loop(own, method, stats, points=points), False)
    return Outcome(status, [ys], (stats.accepted, stats.rejected))


def _account(problem: Problem, loop: OutputLoop, ys: Tensor, options: Common) -> OnFinish:
    """Return the callback for the end of this solve. It fills in the statistics and returns the SolveError, or None."""
    direction, times = problem.direction, problem.times
    # A grid judges no step, so ys is checked. The check is launched now, because the user may write into ys later.
    finite = None if loop.adaptive else torch.isfinite(ys).reshape(len(ys), -1).all(1)
    # A deferred status is read later: then the next solve has overwritten k1, and y0 would keep the user's graph alive.
    began = None if options.throw == "deferred" else (problem.norm, problem.y0, loop.k1)

    def on_finish(now: ControllerSnapshot, stats: Stats) -> SolveError | None:
        stats.nfe = loop.cost(now, stats)
        detail = None
        if now.never_began:
            if began is not None:
                detail = wrong_at_start(*began)
            else:
                detail = "y0 or func(t0, y0) is not finite, or not finite after division by atol + rtol * |y0|."
        failure = failure_of(now, direction, stats, options, detail)
        if failure is None and finite is not None:
            stats.host_reads += 1
            reached: list[bool] = finite.tolist()
            if not reached[-1]:
                t = times[reached.index(False) - 1]  # as `Solution.check` says it
                failure = SolveError(Status.NON_FINITE, direction * t, stats)
        return failure

    return on_finish


def _gradient_obstacle(problem: Problem) -> str | None:
    if torch.is_grad_enabled() and _wants_gradient(problem):
        return 'autograd records the steps; gradient="adjoint" and "discrete" capture them, and so does torch.no_grad()'
    return None


def _wants_gradient(problem: Problem) -> bool:
    func = problem.func
    if problem.y0.requires_grad or problem.t.requires_grad or not isinstance(func, nn.Module):
        return True
    return any(p.requires_grad for p in func.parameters())
