"""Chooses the stepper of an implicit method."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.methods.implicit.coupled import CoupledSteps
from node_cuda.methods.implicit.dirk import DirkSteps
from node_cuda.methods.implicit.equations import HELD
from node_cuda.methods.implicit.rosenbrock import RosenbrockSteps
from node_cuda.methods.implicit.tableau import Dirk, FullyImplicit, Implicit
from node_cuda.options import FixedImplicitOptions, ImplicitOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import users_level

ImplicitSteps = DirkSteps | CoupledSteps | RosenbrockSteps


def implicit_steps(
    problem: Problem,
    arithmetic: Arithmetic,
    tableau: Implicit,
    options: ImplicitOptions | FixedImplicitOptions,
    stats: Stats,
    *,
    everywhere: bool,
) -> ImplicitSteps:
    """Return the stepper of this method. everywhere: outputs may be asked for at times that are not known yet."""
    if isinstance(tableau, FullyImplicit):
        assert isinstance(options, FixedImplicitOptions)
        return CoupledSteps(problem, arithmetic, tableau, options, stats)
    if tableau.adaptive:
        _warn_of_rounding(problem)
    if isinstance(tableau, Dirk):
        return DirkSteps(problem, arithmetic, tableau, options, stats, everywhere=everywhere)
    assert isinstance(options, ImplicitOptions)
    return RosenbrockSteps(problem, arithmetic, tableau, options, stats, everywhere=everywhere)


def _warn_of_rounding(problem: Problem) -> None:
    rtol = problem.norm.rtol
    least, dtype = float(rtol.min()) if isinstance(rtol, Tensor) else rtol, problem.y0.dtype.to_real()
    if least < HELD * torch.finfo(dtype).eps:
        warnings.warn(
            f"rtol = {least:g} is less than {dtype} holds in a stiff problem, where large terms cancel in func: the "
            "solve may end, and be wrong. Use `y0.double()`, or rtol=1e-4.",
            stacklevel=users_level(),
        )
