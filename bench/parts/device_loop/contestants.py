"""The contestants and the cases of device_loop.py, with their targets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from parts.common.libraries import DIFFRAX, OURS, RIVAL
from parts.common.modes import ADJOINT, BACKPROP, DISCRETE
from parts.device_loop.captured import LOOPS, CapturedSolve, OurTraining, TheirTraining
from parts.solve.cases import Case
from parts.solve.diffrax_contestant import DiffraxContestant
from parts.solve.solving import Contestant, Problem, TorchContestant

Contestants = Mapping[str, Callable[[Problem], Contestant]]
HOST, WHILE = f"{OURS} host", f"{OURS} while"  # contestants of the section solves
THEIR_ADJOINT = f"{RIVAL} {ADJOINT}"
HOST_ADJOINT, WHILE_ADJOINT, WHILE_DISCRETE = (
    f"{OURS} {gradient}, {loop}" for gradient, loop in ((ADJOINT, "host"), (ADJOINT, "while"), (DISCRETE, "while"))
)

SOLVES: Contestants = {
    RIVAL: functools.partial(TorchContestant, RIVAL),
    DIFFRAX: DiffraxContestant,
    **{f"{OURS} {name}": functools.partial(CapturedSolve, loop=loop) for name, loop in LOOPS.items()},
}
TRAININGS: Contestants = {
    THEIR_ADJOINT: TheirTraining,
    **{
        f"{OURS} {ADJOINT}, {name}": functools.partial(OurTraining, loop=loop, gradient=ADJOINT)
        for name, loop in LOOPS.items()
    },
    WHILE_DISCRETE: functools.partial(OurTraining, loop=LOOPS["while"], gradient=DISCRETE),
}


def case(timed: str, gradient: str, batch: int, dim: int, hidden: int, t_end: float) -> Case:
    """A case at rtol and atol 1e-6."""
    return Case(timed, gradient, batch, dim, hidden, t_end, rtol=1e-6, atol=1e-6)


NO_SLOWER = 0.95
"""Two equal programs may differ by this factor in a run."""

# Contestant -> {other contestant: promised ratio, the time of the other over its time}.
Promises = Mapping[str, Mapping[str, float]]
SMALL: Promises = {WHILE: {RIVAL: 15.0, DIFFRAX: 1.0}}
LARGE: Promises = {WHILE: {RIVAL: 1.0, HOST: NO_SLOWER}}
TRAINED: Promises = {WHILE_ADJOINT: {THEIR_ADJOINT: 10.0}}
SOLVE_CASES = (
    (case("forward", BACKPROP, 16, 2, 50, t_end=5.0), SMALL),
    (case("forward", BACKPROP, 128, 64, 64, t_end=5.0), SMALL),
    (case("forward", BACKPROP, 4096, 1024, 1024, t_end=1.0), LARGE),
)
TRAINING_CASES = (
    (case("step", ADJOINT, 16, 2, 50, t_end=5.0), TRAINED),
    (case("step", ADJOINT, 128, 64, 64, t_end=5.0), TRAINED),
)
QUICK_SOLVE_CASES = ((case("forward", BACKPROP, 4, 2, 8, t_end=1.0), SMALL),)
QUICK_TRAINING_CASES = ((case("step", ADJOINT, 4, 2, 8, t_end=1.0), TRAINED),)
