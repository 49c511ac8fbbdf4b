"""scipy.integrate.solve_ivp as a method: on the CPU in double, for stiff problems. Not differentiable by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from node_cuda.options import ScipyOptions
from node_cuda.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import SolveError, Status
from node_cuda.steppers.step import Clock


class ScipySolve:
    """One call of solve_ivp from the problem's first time to its last, complex and flattened states included."""

    def __init__(self, problem: Problem, options: ScipyOptions, stats: Stats) -> None:
        self.problem = problem
        self.clock = Clock(problem.direction, problem.time_dtype, problem.y0.device)
        limits: dict[str, Any] = {"max_step": options.max_step}
        if options.solver == "LSODA":
            limits["min_step"] = options.min_step
        tolerance = {"rtol": self._numpy(problem.norm.rtol), "atol": self._numpy(problem.norm.atol)}
        self.result = solve_ivp(
            self._field,
            (problem.times[0], problem.times[-1]),
            self._to_numpy(problem.y0),
            method=options.solver,
            dense_output=True,
            **tolerance,
            **limits,
        )
        stats.nfe, stats.accepted = problem.field.nfe, len(self.result.t) - 1
        if options.record_steps:
            stats.step_times = [problem.direction * float(s) for s in self.result.t]
        self.reached = float(self.result.t[-1])
        self.failure = None
        if self.result.status != 0:
            finite = bool(np.isfinite(self.result.y[:, -1]).all())
            status = Status.STEP_UNDERFLOW if finite else Status.NON_FINITE
            self.failure = SolveError(status, problem.direction * self.reached, stats, f"scipy: {self.result.message}")

    def at(self, s: float) -> Tensor:
        """y at a solver time, as a tensor like y0; NaN beyond what was reached."""
        y = self.result.sol(s) if s <= self.reached else np.full(self.problem.y0.numel(), np.nan)
        return torch.from_numpy(np.asarray(y)).to(self.problem.y0).reshape(self.problem.y0.shape)

    def _field(self, s: float, y: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(y).to(self.problem.y0).reshape(self.problem.y0.shape)
        with torch.no_grad():
            f = self.problem.field(self.clock.tensors([s])[0], state)
        return self.problem.direction * self._to_numpy(f)

    @staticmethod
    def _to_numpy(x: Tensor) -> np.ndarray:
        x = x.detach().cpu().reshape(-1)
        return x.to(torch.complex128 if x.is_complex() else torch.float64).numpy()

    def _numpy(self, tolerance: float | Tensor) -> float | np.ndarray:
        if not isinstance(tolerance, Tensor):
            return tolerance
        return self._to_numpy(tolerance.expand(self.problem.y0.shape))


def solve_scipy(problem: Problem, options: ScipyOptions, stats: Stats) -> tuple[Tensor, Status]:
    """y at the problem's times, of shape (len(times), *y0.shape), and how the solve ended. Never on the tape."""
    if len(problem.times) == 1:
        return problem.y0.detach().clone()[None], Status.SUCCESS
    solve = ScipySolve(problem, options, stats)
    if solve.failure is not None and options.throw:
        raise solve.failure
    ys = torch.stack([problem.y0.detach(), *(solve.at(s) for s in problem.times[1:])])
    return ys, Status.SUCCESS if solve.failure is None else solve.failure.status
