"""Gradients by autograd through the solver: exact for the computed steps, in memory that grows with their number.

Only accepted steps stay on the tape: the graph of a rejected one goes with its tensors.
"""

from __future__ import annotations

from torch import Tensor

from node_cuda._typing import EventFunc
from node_cuda.host_loop import solve_event, solve_outputs
from node_cuda.methods import SCIPY, Method, make_loop
from node_cuda.options import ScipyOptions
from node_cuda.problem import Problem
from node_cuda.scipy_bridge import solve_scipy
from node_cuda.solution import Stats
from node_cuda.status import Status, Unsupported

MAX_EVENT_STEPS = 20000
"""How long a fixed grid goes on looking for an event, as in torchdiffeq."""


def outputs(problem: Problem, method: Method, stats: Stats) -> tuple[Tensor, Status]:
    """y at the problem's times, on the tape where autograd records (scipy's steps are not on any tape)."""
    if isinstance(method.options, ScipyOptions):
        return solve_scipy(problem, method.options, stats)
    loop, interpolant = make_loop(problem, method, stats)
    return solve_outputs(loop, interpolant, method.options.throw)


def event(problem: Problem, method: Method, stats: Stats, event_fn: EventFunc) -> tuple[float, Tensor]:
    """The event's time and y there, on the tape where autograd records (the time is not)."""
    if method.name == SCIPY:
        raise Unsupported('method="scipy_solver" finds no events. Use "dopri5", or a fixed grid with a step_size.')
    loop, interpolant = make_loop(problem, method, stats, endless=True)
    return solve_event(loop, interpolant, event_fn, None if method.adaptive else MAX_EVENT_STEPS)
