"""The solution as a function of time."""

from __future__ import annotations

import bisect
from collections.abc import Callable

import torch
from torch import Tensor

from node_cuda._eager import eager
from node_cuda._torch_modes import recorded
from node_cuda._typing import State
from node_cuda.loop.assemble import make_loop
from node_cuda.loop.host_loop import HostLoop
from node_cuda.loop.scipy_solver import ScipySolve
from node_cuda.methods.interpolation import Interpolant, position
from node_cuda.methods.registry import Method, for_one_output
from node_cuda.options import ScipyOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import InvalidInput

At = Callable[[float, "Tensor | None"], Tensor]


class DenseSolution:
    """y(t) for any t between the two ends of a solve.

    Called with a float or a tensor of times of any shape, on any device; returns y of shape (*t.shape, *y0.shape), or
    a tuple of such. Differentiable as the solve was, and in t. Holds the stages of every step.
    """

    def __init__(self, problem: Problem, at: At, stats: Stats) -> None:
        self.stats = stats
        self._problem = problem
        self._at = at

    @eager
    def __call__(self, t_eval: float | Tensor) -> State:
        """y(t_eval). Raises InvalidInput for a time outside the solve."""
        problem = self._problem
        t = t_eval if isinstance(t_eval, Tensor) else torch.as_tensor(t_eval, dtype=torch.float64)
        on_tape = recorded(t)
        flat = t.reshape(-1)
        ys = [
            self._at(self._inside(value, t.dtype), flat[i] if on_tape else None)
            for i, value in enumerate(flat.detach().cpu().double().tolist())
        ]
        stacked = torch.stack(ys) if ys else problem.y0.new_empty((0, *problem.y0.shape))
        return problem.layout.unflatten(stacked.reshape(*t.shape, *problem.y0.shape), t.shape)

    def _inside(self, t: float, dtype: torch.dtype) -> float:
        """The user's time as solver time, if it lies in the solve."""
        problem = self._problem
        first, last = problem.times[0], problem.times[-1]
        # A time in single precision is as near to the end as single precision gets.
        slack = torch.finfo(dtype).eps * max(abs(first), abs(last)) if dtype.is_floating_point else 0.0
        if not first - slack <= problem.direction * t <= last + slack:
            low, high = sorted((problem.direction * first, problem.direction * last))
            raise InvalidInput(f"t_eval must lie between {low:g} and {high:g}; got {t:g}. Solve over a longer time.")
        return min(max(problem.direction * t, first), last)


def solve_dense(problem: Problem, method: Method, stats: Stats) -> DenseSolution:
    """Solve from the problem's first time to its last, and keep the solution as a function."""
    if method.options.cuda_graph:
        stats.why = "the stages of every step are kept by the host"
    if isinstance(method.options, ScipyOptions):
        solve = ScipySolve(problem, method.options, stats)
        if solve.failure is not None:
            raise solve.failure
        return DenseSolution(problem, lambda s, _: solve.at(s), stats)
    loop, interpolant = make_loop(problem, for_one_output(method), stats, anywhere=True)
    return DenseSolution(problem, _by_steps(loop, interpolant), stats)


def _by_steps(loop: HostLoop, interpolant: Interpolant) -> At:
    """y at a solver time, from the steps of a solve that is run here."""
    problem, pieces = loop.problem, []
    for step in loop.steps():
        k = interpolant.prepare(step)
        # Kept for later, when func may have written its buffers again.
        pieces.append((step, k if torch.is_grad_enabled() or problem.field.copies_output else [x.clone() for x in k]))
        if step.t1 >= problem.times[-1]:
            break
    loop.stats.nfe = problem.field.nfe
    starts = [step.t0 for step, _ in pieces]

    def at(s: float, t: Tensor | None) -> Tensor:
        step, k = pieces[max(bisect.bisect_right(starts, s) - 1, 0)]
        return interpolant.evaluate(step, k, position(step, s, problem.direction, t))

    return at
