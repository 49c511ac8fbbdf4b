"""The forward solve of every gradient mode. If autograd records it, it is gradient="backprop".

Backprop is exact for the computed steps. Its memory grows with their number. Only accepted steps stay in the graph; the
graph of a rejected step is freed with its tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from node_cuda._typing import EventFunc
from node_cuda.cuda_graphs.cache import fallback_reason
from node_cuda.cuda_graphs.forward import try_captured
from node_cuda.gradients.changed import LastStep
from node_cuda.loop import plain_grid
from node_cuda.loop.assemble import find_event, make_loop
from node_cuda.loop.outputs import grid_status, solve_outputs
from node_cuda.loop.request import SolveSpec
from node_cuda.loop.scipy_solver import solve_scipy
from node_cuda.methods.registry import SCIPY
from node_cuda.native.cache import refused
from node_cuda.native.forward import try_native
from node_cuda.options import ScipyOptions
from node_cuda.status import Status, Unsupported


def outputs(request: SolveSpec, why: str | None = None, last: LastStep | None = None) -> tuple[Tensor, Status]:
    """Return y at the problem's times, and the status. y is on the tape if autograd records, except for scipy's steps.

    why: the reason not to capture the solve, if there is one. last: receives the steps that the host takes.
    """
    problem, method = request.problem, request.method
    if isinstance(method.options, ScipyOptions):
        request.stats.why = fallback_reason(problem, method) if method.options.cuda_graph else None
        if method.options.compile:
            request.stats.why = refused(method, f"{method.name} is no explicit Runge-Kutta method")
        return solve_scipy(problem, method.options, request.stats)
    if method.options.cuda_graph:
        done = try_captured(problem, method, request.stats, why)
        if done is not None:
            return done
    if method.options.compile:
        done = try_native(problem, method, request.stats, why, last)
        if done is not None:
            return done
    if plain_grid.applies(problem, method):
        ys = plain_grid.solve_grid(problem, method, request.stats, None if last is None else last.watch())
        return ys, grid_status(ys, request.stats) if request.wants_status else Status.SUCCESS
    loop, interpolant = make_loop(problem, method, request.stats)
    if last is not None:
        loop.accepted = last.watch(loop.stepper)
    return solve_outputs(loop, interpolant, method.options.raises)


def event(request: SolveSpec, event_fn: EventFunc, last: LastStep | None = None) -> tuple[Tensor, Tensor]:
    """Return the event's time (no gradient), and y0 and y there, on the tape if autograd records.

    last: receives the steps.
    """
    problem, method = request.problem, request.method
    if method.name == SCIPY:
        raise Unsupported('method="scipy_solver" finds no events. Use "dopri5", or a fixed grid with a step_size.')
    if method.options.cuda_graph:
        request.stats.why = "an event is looked for by the host"
    if method.options.compile:
        request.stats.why = refused(method, "an event is looked for by the host")
    loop, interpolant = make_loop(problem, method, request.stats, endless=True)
    if last is not None:
        loop.accepted = last.watch(loop.stepper)
    at, y = find_event(loop, interpolant, method, event_fn)
    return torch.tensor(at, dtype=problem.t.dtype, device=problem.t.device), torch.stack([problem.y0, y])
