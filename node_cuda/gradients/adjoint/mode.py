"""Gradients by the continuous adjoint method, in memory that does not depend on the number of steps.

The backward solve goes from the last time to the first and solves da/dt = -a^T df/dy together with dy/dt = f. At every
output time it adds dL/dy(t_m) to a, and resets y to the stored output. dL/dtheta = int a^T df/dtheta dt is a quadrature
over the steps; dL/dt_m = dL/dy(t_m) . f(t_m, y_m), and dL/dt_0 = -a(t_0) . f(t_0, y_0). Source: Chen et al. 2018,
arXiv:1806.07366; docs/adjoint.md has the derivation.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from node_cuda._typing import EventFunc
from node_cuda.gradients import forward
from node_cuda.gradients.adjoint import native
from node_cuda.gradients.adjoint.autonomy import ignores_time
from node_cuda.gradients.adjoint.backward_solve import Backward, BackwardSettings, BackwardSolve, Found
from node_cuda.gradients.adjoint.cuda_graph import try_captured
from node_cuda.gradients.adjoint.many_outputs import warn_of_many_outputs
from node_cuda.gradients.adjoint.norm import chosen_norm
from node_cuda.gradients.adjoint.plain_grid import GridBackwardSolve
from node_cuda.gradients.autograd import DifferentiableSolve, Gradients, Saved, refuse_transforms
from node_cuda.gradients.changed import Comparison, Evaluated, LastStep
from node_cuda.gradients.parameters import Parameters
from node_cuda.gradients.reached import UsedParameters
from node_cuda.loop.request import SolveSpec
from node_cuda.methods.registry import lookup
from node_cuda.problem.problem import Problem
from node_cuda.status import InvalidInput, SolveError, Status, users_level


def outputs(request: SolveSpec) -> tuple[Tensor, Status]:
    """Return y at the problem's times, with its gradient by the adjoint method, and the status."""
    task = _AdjointSolve(request, None)
    ys = task()
    if request.method.adaptive and ys.requires_grad and task.status is Status.SUCCESS and not task.by_chance:
        warn_of_many_outputs(request, task.settings, max(len(task.samples), 1))
    return ys, task.status


def event(request: SolveSpec, event_fn: EventFunc) -> tuple[Tensor, Tensor]:
    """Return the event's time (no gradient), and y0 and y there, with their gradient by the adjoint method."""
    refuse_transforms("An event")
    return _AdjointSolve(request, event_fn).event()


class _AdjointSolve(DifferentiableSolve):
    """A solve with its backward solve."""

    what = 'gradient="adjoint"'
    replays = False
    kept: Evaluated | None = None
    then: Any = None

    def __init__(self, request: SolveSpec, event_fn: EventFunc | None) -> None:
        super().__init__(request, Parameters(request.problem.func, request.adjoint.params, "adjoint method"))
        self.settings = _settings(request, self.parameters)
        self.shown = {"adjoint_options": self.settings.options}
        self.event_fn = event_fn

    def solve(self, request: SolveSpec) -> Tensor:
        last = LastStep()
        if self.event_fn is not None:
            event_t, ys = forward.event(request, self.event_fn, last)
            self.at = float(event_t)
            self.kept = last.evaluated(request.problem.direction * self.at, self.members)
            return ys
        if not (request.wants_status or request.method.options.raises):
            request = request._replace(wants_status=True)  # the gradient of a failed solve is partial
        options = request.method.options
        why = self.replaced(request.problem) if options.compile or options.cuda_graph else None
        ys, self.status = forward.outputs(request, why, last)
        if self.status is Status.SUCCESS:
            self.kept = last.evaluated(request.problem.times[-1], self.members)
        self.then = last.seen
        # A partial solution has gradients where it was reached. If the status is not known yet, NaN stays NaN.
        self.failed = not request.method.options.raises and self.status not in (Status.SUCCESS, Status.PENDING)
        return ys

    def gradients(self, problem: Problem, saved: Saved, grad_ys: Tensor, wants_t: bool, wants_grid: bool) -> Gradients:
        t, _, ys, params = saved
        event_mode = self.at is not None
        times = t if self.at is None else torch.stack([t[0], torch.tensor(self.at, dtype=t.dtype, device=t.device)])
        # The outputs that a failed solve did not reach are NaN. They give no gradient.
        failed = not event_mode and self.failed
        count = t.shape[0]
        solver_times = [problem.direction * s for s in times.cpu().double().tolist()] if event_mode else problem.times
        if failed:
            count = max(int(torch.isfinite(ys).reshape(len(ys), -1).all(1).sum()), 1)
            times, solver_times, ys, grad_ys = times[:count], solver_times[:count], ys[:count], grad_ys[:count]
        backward = Backward(problem, self.settings, times, solver_times, ys, grad_ys, params)
        used = self.reached(problem)
        try:
            options = backward.method.options
            graphs = options.compile or options.cuda_graph
            found = self._by_graphs(backward, used, wants_t) if graphs else None
            adj_t, adj_y0, adj_params = self._by_the_host(backward, used, wants_t) if found is None else found
        except SolveError as failure:
            raise _of_the_loss(failure, backward.grad_ys) from None
        used.check(params)
        if adj_t is not None and self._is_autonomous(backward):
            adj_t = torch.cat([-adj_t[1:].sum().reshape(1), adj_t[1:]])
        if adj_t is not None and (event_mode or count < t.shape[0]):
            # With an event, t[1] is not the event's time, so only t[0] has a gradient.
            kept = 1 if event_mode else count
            adj_t = torch.cat([adj_t[:kept], torch.zeros_like(t[kept:])])
        return Gradients(adj_t, None, adj_y0, adj_params)

    def _is_autonomous(self, backward: Backward) -> bool:
        """Return whether dL/dt0 follows from the other times. Evaluates func, and reads from the device."""
        if self.settings.jumps or self.status is Status.PENDING or len(backward.t) < 2:
            return False
        before = backward.forward.field.nfe
        found = ignores_time(backward.forward, backward.ys[-1], backward.times[-1])
        self.stats.nfe_backward += backward.forward.field.nfe - before
        return found

    def _by_the_host(self, backward: Backward, used: UsedParameters, wants_t: bool) -> Found:
        if self.then is not None and self.replaced(backward.forward) is None:
            native.refuse_changes(self.then, backward.forward)
        plain = GridBackwardSolve.applies(backward)
        solve = GridBackwardSolve(backward, used) if plain else BackwardSolve(backward, used)
        if self.kept is not None and not self.by_chance:
            compare = Comparison(backward.forward, self.members, self.what, solve.field.f_alone)
            solve.field.first = functools.partial(compare.begin, self.kept)
        found = solve.run(wants_t)
        self.stats.nfe_backward += solve.field.nfe
        if isinstance(solve, BackwardSolve) and solve.reconstruction is not None:
            self.stats.reconstruction_error = solve.reconstruction.worst
            solve.reconstruction.warn()
        return found

    def _by_graphs(self, backward: Backward, used: UsedParameters, wants_t: bool) -> Found | None:
        if backward.method.options.compile:
            why = self.replaced(backward.forward)
            then, wanted = self.then, self.parameters.wanted
            return native.try_native(backward, then, self.stats, why, wanted, wants_t=wants_t)
        return try_captured(backward, used, self.stats, self.replaced(backward.forward), timed=wants_t)


def _of_the_loss(failure: SolveError, grad_ys: Tensor) -> SolveError:
    """Return the failure of the backward solve. If dL/dy is not finite, that is the cause, and not the field."""
    if failure.status is not Status.NON_FINITE or bool(torch.isfinite(grad_ys).all()):
        return failure
    return SolveError(Status.NON_FINITE_GRADIENT, failure.t, failure.stats)


def _settings(request: SolveSpec, parameters: Parameters) -> BackwardSettings:
    """Return the backward solve's settings, by default the forward ones. They are checked before the forward solve."""
    problem, given = request.problem, request.adjoint
    method = request.backward_method()
    inherited = dict(request.options or ())
    inherited.pop("norm", None)
    options = inherited if given.options is None else dict(given.options)
    if inherited.get("compile") and options.get("compile", True):
        options = {"compile": inherited["compile"], **options}
    if inherited.get("cuda_graph") and options.get("cuda_graph", True):
        # These two options do not depend on the method, so adjoint_options keep the forward values by default.
        options = {**{name: inherited[name] for name in ("cuda_graph", "throw") if name in inherited}, **options}
    norm = options.pop("norm", None)
    if callable(norm) and len(parameters.wanted) < len(parameters.every):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will be excluded from the "
            "adjoint pass, and will not appear as a tensor in the adjoint norm.",
            stacklevel=users_level(),
        )
    chosen = lookup(method, options)
    if chosen.implicit is not None:
        raise InvalidInput(
            f"adjoint_method={method!r} is implicit, and rebuilding y backwards explodes for a stiff field; got it "
            f"with method={request.method.name!r}. Use method={method!r} for both solves: then the solution is stored. "
            'Or use gradient="discrete".'
        )
    parsed = chosen.options
    checks = parsed.check_reconstruction or request.method.options.check_reconstruction
    options["norm"] = chosen_norm(problem.layout, norm, request.method.options.norm)
    rtol, atol = request.backward_tolerances()
    jumps = getattr(request.method.options, "jump_t", None) is not None or getattr(parsed, "jump_t", None) is not None
    return BackwardSettings(rtol, atol, method, options, checks, jumps)
