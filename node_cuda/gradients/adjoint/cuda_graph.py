"""The captured backward solve of the adjoint method: `BackwardSolve` without the host in its loop.

    begin, steps | land, steps | land, steps | ... end

The device takes the steps from one output back to the output before it, and pauses there. `land` resets y to the stored
state, adds dL/dy of that output to a, and lets the device continue. The host reads nothing in between.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from node_cuda.cuda_graphs.cache import captured_or_why, fallback_reason, key_of
from node_cuda.cuda_graphs.captured import CapturedSolve, OnFinish, failure_of
from node_cuda.cuda_graphs.device_loop import DeviceLoop, release, with_field_of_its_own
from node_cuda.cuda_graphs.first_run_check import Outcome, Trial, refuted
from node_cuda.gradients.adjoint.backward_solve import Backward, BackwardSolve, Found
from node_cuda.gradients.leaves import with_leaves
from node_cuda.gradients.reached import UsedParameters
from node_cuda.kernels.fused import Fused, can_sum
from node_cuda.kernels.step_control import ControllerSnapshot
from node_cuda.loop.grids import grid_of
from node_cuda.options import FixedOptions
from node_cuda.solution import Stats
from node_cuda.status import SolveError, Status


class CapturedAdjoint(CapturedSolve):
    """The captured graphs of a backward solve. timed: it computes dL/dt too."""

    def __init__(self, backward: Backward, points: Sequence[float] | None, tier: str | None, *, timed: bool) -> None:
        super().__init__(backward.problem, tier)
        count = len(backward.problem.times)
        with self.recorder.aside(), torch.no_grad():
            forward, params = with_leaves(backward.forward, backward.params, backward.ys[-1])
            own = with_field_of_its_own(forward)
            self.reached = UsedParameters(range(len(params)))
            solve = BackwardSolve(backward.apart(own, params), self.reached)
            assert isinstance(solve.arithmetic, Fused)
            self.arithmetic, self.gradient, self.field = solve.arithmetic, solve.gradient, solve.field
            self.loop = DeviceLoop(
                solve.problem,
                solve.method,
                solve.arithmetic,
                points=points,
                stops=solve.problem.times[1:],
                pauses=True,
                quadrature=solve.gradient,
            )
            self.y, self.a = backward.parts(self.loop.y)
            self._time_dtype = own.time_dtype
            self._y_there, self._g = torch.empty_like(self.y), torch.empty_like(self.a)
            self._dot = torch.zeros((), dtype=torch.float64, device=self.device)
            self.nfe: dict[str, int] = {"begin": 0, "land": 0, "end": 0}
            parts = [
                self._counted("begin", self._begin_at_last, timed=timed),
                self.loop.attempt,
                *([self._counted("land", self._go_on, timed=timed)] if count > 2 else []),
                *([self._rate_at_first] if timed else []),
            ]
            self._begin, step, *rest = self.record(*parts)
            self._end = rest.pop() if timed else None
            self._land = rest.pop() if rest else None
            self.repeat, self.why = self.recorder.repeat(step, self.loop.control)
        release(own)

    def run(self, backward: Backward, points: Sequence[float] | None, *, timed: bool) -> Found:
        """Launch the backward solve, and return copies of (dL/dt or None, dL/dy0, dL/dtheta), without a host read."""
        self.follow()
        problem, ys, grad_ys = backward.problem, backward.ys, backward.grad_ys
        # On the device, even if t is on another one, so that nothing waits for a copy.
        adj_t = torch.zeros(len(ys), dtype=torch.float64, device=self.device) if timed else None
        self.loop.rebind(problem.y0, problem.times, problem.norm, points, problem.times[1:])
        self._g.copy_(grad_ys[-1])
        self._begin.replay()
        for m in range(len(ys) - 1, 0, -1):  # from output m back to output m - 1
            self.repeat.run()
            if adj_t is not None:
                adj_t[m].copy_(self._dot)
            self._y_there.copy_(ys[m - 1])
            self._g.copy_(grad_ys[m - 1])
            if m > 1 and self._land is not None:
                self._land.replay()
        if adj_t is not None and self._end is not None:
            self._end.replay()
            adj_t[0].copy_(self._dot)
        return adj_t, self.a + grad_ys[0], self.gradient.gradients(copies=True)

    def on_finish(self, direction: float, *, timed: bool) -> OnFinish:
        """Return the callback for the end of this solve, which fills in the statistics and may return a SolveError.

        direction: the direction of the backward solve.
        """
        tstops = len(self.loop.times) - 2
        around = self.nfe["begin"] + tstops * self.nfe["land"] + timed * self.nfe["end"]

        def on_finish(now: ControllerSnapshot, stats: Stats) -> SolveError | None:
            own = Stats()
            stats.nfe_backward += around - self.loop.first_nfe + self.loop.cost(now, own)
            own.nfe = stats.nfe_backward
            return failure_of(now, direction, own)

        return on_finish

    def _begin_at_last(self, *, timed: bool) -> None:
        """Begin at the last output. [y, a] and the gradient of that output are already in place."""
        self.loop.begin()
        if timed:
            self._rate_here()

    def _go_on(self, *, timed: bool) -> None:
        """Continue at an output: reset y to the stored state, and add dL/dy to a."""
        self.y.copy_(self._y_there)
        self.a.add_(self._g)
        self.loop.resume()
        if timed:
            self._rate_here()

    def _rate_here(self) -> None:
        """Compute dL/dt_m = dL/dy(t_m) . f(t_m, y_m) at the output where an interval begins."""
        slope = self.loop.k1 if self.loop.adaptive else self.loop.slope()
        f = slope.chunk(2)[0].view(self.y.shape)
        self._dot.copy_(self.arithmetic.real_dot(self._g, f))

    def _rate_at_first(self) -> None:
        """Compute dL/dt_0 = -a(t_0) . f(t_0, y_0)."""
        before = self.field.nfe
        t = (self.arithmetic.device_times[-1] * self.loop.problem.direction).to(self._time_dtype)
        f = self.field.f_alone(t, self._y_there)
        self._dot.copy_(self.arithmetic.real_dot(self.a, f).neg())
        self.nfe["end"] = self.field.nfe - before

    def _counted(self, name: str, work: Callable[..., None], *, timed: bool) -> Callable[[], None]:
        """Return a function that does the work and counts its field evaluations in `nfe`."""

        def counted() -> None:
            before = self.field.nfe
            work(timed=timed)
            self.nfe[name] = self.field.nfe - before

        return counted


def try_captured(
    backward: Backward, used: UsedParameters, stats: Stats, why: str | None, *, timed: bool
) -> Found | None:
    """Return (dL/dt or None, dL/dy0, dL/dtheta) by a captured backward solve, or None if `BackwardSolve` must do it.

    Then `stats.why_backward` gives the reason. why: a reason that is already known, or None.
    """
    method, problem = backward.method, backward.problem
    options = method.options
    why = why or _fallback_reason(backward)
    points = _points(backward) if why is None and isinstance(options, FixedOptions) else None
    found: CapturedAdjoint | str = captured_or_why(
        options,
        why,
        lambda: (
            "adjoint",
            *key_of(problem, method),
            points and len(points),
            (backward.ys.shape[1:], backward.forward.layout, timed),
            (backward.params_norm.rtol, backward.params_norm.atol, backward.params_in_norm),
            tuple((p.data_ptr(), p.shape, p.stride(), p.dtype) for p in backward.params),
        ),
        backward.forward,
        lambda: CapturedAdjoint(backward, points, options.cuda_graph.tier, timed=timed),
    )
    if isinstance(found, str):
        stats.why_backward = found
        return None
    trial = Trial("backward solve", found.repeat.tier, backward.ys)
    trial.begin(stats)
    stats.loop_backward, stats.why_backward = found.repeat.tier, found.why
    control = found.loop.control
    with found.lock:
        adj_t, adj_y0, adj_params = found.run(backward, points, timed=timed)
        adj_t = None if adj_t is None else adj_t.to(backward.t)
        ok = control.succeeded
        run = found.begun(control, stats, found.on_finish(problem.direction, timed=timed), options)
        failure = None if run is None else run.end(stats)
    if trial.due:
        end = (run or stats.pending[-1]).end(stats)
        outcome = _outcome(end, adj_t, adj_y0, adj_params)
        # If the states of a deferred solve are already NaN, there is nothing to compare.
        comparable = run is not None or end is None
        if comparable and not trial.agrees(stats, outcome, lambda: _by_the_host(backward, timed=timed)):
            stats.why_backward = refuted(found.device)
            return None
    used.reach_as(found.reached)
    if failure is not None:
        raise failure
    if run is None:  # the status has not been read back yet
        adj_t = None if adj_t is None else torch.where(ok, adj_t, math.nan)
        adj_y0, *adj_params = (torch.where(ok, g, math.nan) for g in (adj_y0, *adj_params))
    return adj_t, adj_y0, adj_params


def _by_the_host(backward: Backward, *, timed: bool) -> Outcome:
    """Run the same backward solve in the host loop, with a new field."""
    forward, params = backward.forward, backward.params
    own = forward._replace(field=forward.field_of(forward.func))
    try:
        found = BackwardSolve(backward.apart(own, params), UsedParameters(range(len(params)))).run(timed)
    except SolveError as failure:
        return Outcome(failure.status, ())
    return _outcome(None, *found)


def _outcome(end: SolveError | None, adj_t: Tensor | None, adj_y0: Tensor, adj_params: Sequence[Tensor]) -> Outcome:
    return Outcome(Status.SUCCESS, [adj_t, adj_y0, *adj_params]) if end is None else Outcome(end.status, ())


def _fallback_reason(backward: Backward) -> str | None:
    """Return the reason why a backward solve cannot be captured, or None. Only reasons known before the capture."""
    if backward.settings.checks:
        return "check_reconstruction compares states on the host"
    if backward.forward.adjoint_callbacks:
        return "func has callbacks for the backward pass"
    if not can_sum(backward.params, backward.problem.y0.device):
        return "a parameter is on another device than the state, or its dtype or layout is not one of the kernels'"
    return fallback_reason(backward.problem, backward.method)


def _points(backward: Backward) -> tuple[float, ...]:
    """Return the points of the grids of all intervals, joined to one grid."""
    options = backward.method.options
    assert isinstance(options, FixedOptions)
    grids = [grid_of(backward.interval(i, backward.problem.y0), options)[0] for i in range(len(backward.t) - 1)]
    return (*itertools.chain.from_iterable(grid[:-1] for grid in grids), grids[-1][-1])
