"""Dense output: the solution as a function of time."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any, Generic

import torch
from torch import Tensor

from node_cuda._eager import eager
from node_cuda._torch_modes import numbers, recorded
from node_cuda._typing import S_co
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


class DenseSolution(Generic[S_co]):
    """y(t) for any t between the two ends of a solve.

    Call it with a float or a tensor of times of any shape, on any device. It returns y of shape (*t.shape, *y0.shape),
    or a tuple of such tensors. The result is differentiable in t, and in the same tensors as the solve. The object
    keeps the stages of every step in memory.
    """

    def __init__(self, problem: Problem, at: At, stats: Stats) -> None:
        self.stats = stats
        self._problem = problem
        self._at = at

    def __repr__(self) -> str:
        problem = self._problem
        shapes = ", ".join(str(tuple(shape)) for shape in problem.layout.shapes or (problem.y0.shape,))
        t0, t1 = (problem.direction * problem.times[i] for i in (0, -1))
        return (
            f"DenseSolution(t0 = {t0:.6g}, t1 = {t1:.6g}, y of shape {shapes}, {problem.y0.dtype}, {self.stats}, "
            f"nfe_backward = {self.stats.nfe_backward})"
        )

    @eager
    def __call__(self, t_eval: float | Tensor) -> S_co:
        """Return y(t_eval). Raises InvalidInput for a time outside the solve."""
        problem = self._problem
        t = t_eval if isinstance(t_eval, Tensor) else torch.as_tensor(t_eval, dtype=torch.float64)
        on_tape = recorded(t)
        flat = t.reshape(-1)
        ys = [
            self._at(self._inside(value, t.dtype), flat[i] if on_tape else None)
            for i, value in enumerate(numbers(flat.detach().cpu().double()))
        ]
        stacked = torch.stack(ys) if ys else problem.y0.new_empty((0, *problem.y0.shape))
        state: Any = problem.layout.unflatten(stacked.reshape(*t.shape, *problem.y0.shape), t.shape)
        return state

    def _inside(self, t: float, dtype: torch.dtype) -> float:
        """Return the user's time as solver time. Raises InvalidInput for a time outside the solve."""
        problem = self._problem
        first, last = problem.times[0], problem.times[-1]
        # A time in single precision may miss the end by one rounding.
        slack = torch.finfo(dtype).eps * max(abs(first), abs(last)) if dtype.is_floating_point else 0.0
        if not first - slack <= problem.direction * t <= last + slack:
            low, high = sorted((problem.direction * first, problem.direction * last))
            raise InvalidInput(f"t_eval must lie between {low:g} and {high:g}; got {t:g}. Solve over a longer time.")
        return min(max(problem.direction * t, first), last)


def solve_dense(problem: Problem, method: Method, stats: Stats) -> DenseSolution[Any]:
    """Solve from the problem's first time to its last, and return the solution as a function."""
    if method.options.cuda_graph:
        stats.why = "dense output keeps the stages of every step on the host"
    if isinstance(method.options, ScipyOptions):
        solve = ScipySolve(problem, method.options, stats)
        if solve.failure is not None:
            raise solve.failure
        return DenseSolution(problem, lambda s, _: solve.at(s), stats)
    loop, interpolant = make_loop(problem, for_one_output(method), stats, anywhere=True)
    return DenseSolution(problem, _by_steps(loop, interpolant), stats)


def _by_steps(loop: HostLoop, interpolant: Interpolant) -> At:
    """Run a solve here, and return y as a function of solver time that uses its steps."""
    problem, pieces = loop.problem, []
    for step in loop.steps():
        k = interpolant.prepare(step)
        # Copy the stages if func may write into its buffers again, because they are used later.
        pieces.append((step, k if torch.is_grad_enabled() or problem.field.copies_output else [x.clone() for x in k]))
        if step.t1 >= problem.times[-1]:
            break
    loop.stats.nfe = problem.field.nfe
    starts = [step.t0 for step, _ in pieces]

    def at(s: float, t: Tensor | None) -> Tensor:
        step, k = pieces[max(bisect.bisect_right(starts, s) - 1, 0)]
        return interpolant.evaluate(step, k, position(step, s, problem.direction, t))

    return at
