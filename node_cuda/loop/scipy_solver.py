"""scipy.integrate.solve_ivp as a method, for stiff problems: on the CPU in double precision, not differentiable by
itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from node_cuda._torch_modes import in_transform
from node_cuda._user_code import tell_step
from node_cuda.kernels.stage_times import Clock
from node_cuda.options import ScipyOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import SolveError, Status, Unsupported, UnsupportedTransform

COMPLEX = ("RK45", "RK23", "DOP853", "BDF")
"""The solvers of scipy that support complex states."""


class _NotFinite(Exception):
    """The field was not finite at solver time s. Without this exception scipy would continue, with some solvers for
    ever."""

    def __init__(self, s: float) -> None:
        self.s = s


class ScipySolve:
    """One call of solve_ivp from the problem's first time to its last. Supports complex and flattened states."""

    def __init__(self, problem: Problem, options: ScipyOptions, stats: Stats) -> None:
        # imported here, because it would take half of the time to import this package
        from scipy.integrate import solve_ivp

        _refuse_transforms(problem.t, problem.y0)
        self.problem = problem
        self.clock = Clock(problem.direction, problem.time_dtype, problem.y0.device)
        limits: dict[str, Any] = {"max_step": options.max_step}
        if options.solver == "LSODA":
            limits["min_step"] = options.min_step
        tolerance = {"rtol": self._numpy(problem.norm.rtol), "atol": self._numpy(problem.norm.atol)}
        if problem.y0.is_complex() and options.solver not in COMPLEX:
            raise Unsupported(
                f"scipy's {options.solver} has no complex states; got y0 of {problem.y0.dtype}. Use "
                f'options=dict(solver="{COMPLEX[0]}") or one of {", ".join(COMPLEX[1:])}.'
            )
        self.failure: SolveError | None = None
        self.reached = problem.times[0]
        try:
            self.result = solve_ivp(
                self._field,
                (problem.times[0], problem.times[-1]),
                self._to_numpy(problem.y0),
                method=options.solver,
                dense_output=True,
                **tolerance,
                **limits,
            )
        except _NotFinite as failure:
            stats.nfe = problem.field.nfe
            detail = "func returned NaN or infinity, or scipy stepped to a state that contains them."
            self.failure = SolveError(Status.NON_FINITE, problem.direction * failure.s, stats, detail)
            return
        stats.nfe, stats.accepted = problem.field.nfe, len(self.result.t) - 1
        if options.record_steps:
            stats.step_times = [problem.direction * float(s) for s in self.result.t]
        self.reached = float(self.result.t[-1])
        if self.result.status != 0:
            finite = bool(np.isfinite(self.result.y[:, -1]).all())
            status = Status.STEP_UNDERFLOW if finite else Status.NON_FINITE
            self.failure = SolveError(status, problem.direction * self.reached, stats, f"scipy: {self.result.message}")

    def at(self, s: float) -> Tensor:
        """Return y at a solver time, as a tensor like y0; NaN past the last time that was reached."""
        known = self.failure is None or (hasattr(self, "result") and s <= self.reached)
        y = self.result.sol(s) if known else np.full(self.problem.y0.numel(), np.nan)
        return torch.from_numpy(np.asarray(y)).to(self.problem.y0).reshape(self.problem.y0.shape)

    def _field(self, s: float, y: np.ndarray) -> np.ndarray:
        # A copy: scipy writes into its buffers again, and func may keep its argument.
        state = torch.tensor(y).to(self.problem.y0).reshape(self.problem.y0.shape)
        try:
            with torch.no_grad():
                f = self.problem.field(self.clock.tensors([s])[0], state)
        except (Exception, KeyboardInterrupt) as error:
            tell_step(
                error, f"t = {self.problem.direction * s:.6g}, after {self.problem.field.nfe} evaluations of func."
            )
            raise
        _refuse_transforms(f)
        if not bool(torch.isfinite(f).all()):
            raise _NotFinite(s)
        return self.problem.direction * self._to_numpy(f)

    @staticmethod
    def _to_numpy(x: Tensor) -> np.ndarray:
        x = x.detach().cpu().reshape(-1)
        return x.to(torch.complex128 if x.is_complex() else torch.float64).numpy()

    def _numpy(self, tolerance: float | Tensor) -> float | np.ndarray:
        if not isinstance(tolerance, Tensor):
            return tolerance
        return self._to_numpy(tolerance.expand(self.problem.y0.shape))


def _refuse_transforms(*tensors: Tensor) -> None:
    if any(map(in_transform, tensors)):
        raise UnsupportedTransform(
            "scipy computes with numbers, which no transform of torch.func and no forward mode sees; got a tensor of "
            'one. Use `odeint_adjoint` for grad, vjp, jacrev and vmap; for jvp and jacfwd `odeint`, method="dopri5".'
        )


def solve_scipy(problem: Problem, options: ScipyOptions, stats: Stats) -> tuple[Tensor, Status]:
    """Return y at the problem's times, of shape (len(times), *y0.shape), and the status. Autograd records nothing."""
    if len(problem.times) == 1:
        return problem.y0.detach().clone()[None], Status.SUCCESS
    solve = ScipySolve(problem, options, stats)
    if solve.failure is not None:
        if options.raises:
            raise solve.failure
        at_start = solve.reached == problem.times[0]
        stats.reached = problem.direction * solve.reached, problem.y0.detach() if at_start else solve.at(solve.reached)
    ys = torch.stack([problem.y0.detach(), *(solve.at(s) for s in problem.times[1:])])
    return ys, Status.SUCCESS if solve.failure is None else solve.failure.status
