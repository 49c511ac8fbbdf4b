"""Which stepper takes the steps of an implicit method."""

from __future__ import annotations

from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.methods.implicit.esdirk import EsdirkSteps
from node_cuda.methods.implicit.rosenbrock import RosenbrockSteps
from node_cuda.methods.implicit.tableau import Esdirk, Implicit
from node_cuda.options import ImplicitOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats

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
    if isinstance(tableau, Esdirk):
        return EsdirkSteps(problem, arithmetic, tableau, options, stats, everywhere=everywhere)
    return RosenbrockSteps(problem, arithmetic, tableau, options, stats, everywhere=everywhere)
