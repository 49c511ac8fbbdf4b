"""Which stepper takes the steps of an implicit method."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.methods.implicit.esdirk import EsdirkSteps
from node_cuda.methods.implicit.rosenbrock import RosenbrockSteps
from node_cuda.methods.implicit.tableau import Esdirk, Implicit
from node_cuda.options import ImplicitOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import users_level

HELD = 100.0
"""In eps: the smallest rtol that a state's dtype holds in a stiff problem (docs/stiff.md)."""

ImplicitSteps = EsdirkSteps | RosenbrockSteps


def implicit_steps(
    problem: Problem,
    arithmetic: Arithmetic,
    tableau: Implicit,
    options: ImplicitOptions,
    stats: Stats,
    *,
    everywhere: bool,
) -> ImplicitSteps:
    """The stepper of this method. everywhere: outputs may be asked for at times that are not known yet."""
    rtol = problem.norm.rtol
    least, dtype = float(rtol.min()) if isinstance(rtol, Tensor) else rtol, problem.y0.dtype.to_real()
    if least < HELD * torch.finfo(dtype).eps:
        warnings.warn(
            f"rtol = {least:g} is less than {dtype} holds in a stiff problem, where large terms cancel in func: the "
            "solve may end, and be wrong. Use `y0.double()`, or rtol=1e-4.",
            stacklevel=users_level(),
        )
    if isinstance(tableau, Esdirk):
        return EsdirkSteps(problem, arithmetic, tableau, options, stats, everywhere=everywhere)
    return RosenbrockSteps(problem, arithmetic, tableau, options, stats, everywhere=everywhere)
