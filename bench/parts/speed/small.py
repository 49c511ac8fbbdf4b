"""Measures one row of small states: node_cuda, torchdiffeq and the loop by hand, in turn, after a check of all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parts.common import modes
from parts.common.fields import Counted
from parts.common.libraries import OURS, RIVAL
from parts.common.modes import ADJOINT, BACKPROP, DISCRETE
from parts.common.timing import Spread, cpu_seconds, interleaved
from parts.solve.solving import ERROR_PER_EPS, ERROR_PER_RTOL, Quantities, largest_error
from parts.speed.loops import LOOPS
from parts.speed.small_cases import FORWARD, SmallCase

HAND = "loop by hand"
ROUNDS = 101  # at most, of each row
BUDGET = 1.0  # seconds of timing for each row; there are always at least three rounds
# Allowed in bfloat16: its eight bits lose much in sums over many steps, and a gradient that is missing or double is
# wrong by 1.
BFLOAT16_ERROR = 0.5
Solver = Callable[[nn.Module, Tensor, Tensor], Tensor]


def measure_small(case: SmallCase, device: torch.device, rounds: int) -> dict[str, Any]:
    """One row: checks every contestant, then times all. Raises SystemExit if a result is wrong."""
    field, y0, t = case.field(device), case.start(device), case.t(device)
    record: dict[str, dict[str, Any]] = {}
    contestants = solvers(case)
    expected = {gradient: reference(case, gradient, field, y0, t) for gradient, _ in contestants.values()}
    for name, (gradient, solver) in contestants.items():
        found, nfe, nfe_backward = solved(case, solver, field, y0, t)
        error = largest_error(found, expected[gradient])
        if not error <= allowed(case):
            raise SystemExit(
                f"{name} misses the result of `{case.name}` by {error:.1e} (relative); {allowed(case):.1e} is allowed. "
                "Nothing is timed. Run `make test`."
            )
        record[name] = {"gradient": gradient, "nfe": nfe, "nfe_backward": nfe_backward, "error": error}

    def timer(solver: Solver) -> Callable[[], float]:
        return lambda: cpu_seconds(lambda: once(case, solver, field, y0, t), device)

    sample = interleaved([timer(solver) for _, solver in contestants.values()], rounds=rounds, budget=BUDGET)
    for place, name in enumerate(contestants):
        record[name]["milliseconds"] = Spread.of([1e3 * took[place] for took in sample])
        record[name]["ratio"] = Spread.of([took[place] / took[0] for took in sample])  # to the time of node_cuda
    return {"case": case.name, "rounds": len(sample), "contestants": record}


def solvers(case: SmallCase) -> dict[str, tuple[str, Solver]]:
    """The contestants of a case, node_cuda first: each with the name of its gradient and its solver.

    torchdiffeq has no discrete adjoint and takes part with its adjoint. The loop by hand has backpropagation only.
    """
    ours = BACKPROP if case.timed == FORWARD else case.timed
    theirs = ADJOINT if ours == DISCRETE else ours
    found = {name: (gradient, by_library(case, name, gradient)) for name, gradient in ((OURS, ours), (RIVAL, theirs))}
    return found | ({HAND: (BACKPROP, by_hand(case))} if case.fixed else {})


def by_library(case: SmallCase, library: str, gradient: str) -> Solver:
    """The call of a library, with no more arguments than the case needs."""
    solver = modes.mode(library, gradient).solver
    arguments = {"method": case.method} | ({} if case.fixed else {"rtol": case.rtol, "atol": case.atol})
    return lambda field, y0, t: solver(field, y0, t, **arguments)


def by_hand(case: SmallCase) -> Solver:
    """The loop by hand. Its outputs are the last state alone, of shape (1, *y0)."""
    loop = LOOPS[case.method]
    return lambda field, y0, t: loop(field, y0, t[:-1], case.h)[None]


def outputs(case: SmallCase, solver: Solver, field: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
    """The outputs that the loss has: all, or the last, of shape (outputs, *y0)."""
    ys = solver(field, y0, t)
    return ys if case.every else ys[-1:]


def gradients(ys: Tensor, y0: Tensor, field: nn.Module) -> tuple[Tensor, ...]:
    """The gradients of y0 and of all parameters. The loss is the mean over outputs and samples of |y|^2."""
    return torch.autograd.grad(ys.square().sum() / (ys.shape[0] * ys.shape[1]), [y0, *field.parameters()])


def once(case: SmallCase, solver: Solver, field: nn.Module, y0: Tensor, t: Tensor) -> None:
    """One run of what is timed."""
    if case.timed == FORWARD:
        with torch.no_grad():
            outputs(case, solver, field, y0, t)
        return
    start = y0.detach().requires_grad_()
    gradients(outputs(case, solver, field, start, t), start, field)


def solved(case: SmallCase, solver: Solver, field: nn.Module, y0: Tensor, t: Tensor) -> tuple[Quantities, int, int]:
    """The results of one run, and the evaluations forward and backward."""
    counted, start = Counted(field), y0.detach().requires_grad_(case.timed != FORWARD)
    with torch.set_grad_enabled(case.timed != FORWARD):
        ys = outputs(case, solver, counted, start, t)
    nfe = counted.reset()
    if case.timed == FORWARD:
        return Quantities(ys), nfe, 0
    grad_y0, *rest = gradients(ys, start, counted)
    return Quantities(ys.detach(), grad_y0, torch.cat([grad.flatten() for grad in rest])), nfe, counted.reset()


def reference(case: SmallCase, gradient: str, field: nn.Module, y0: Tensor, t: Tensor) -> Quantities:
    """The results in float64, from the same parameters and initial state.

    On a fixed grid they are those of the same steps: by the loop by hand, or by torchdiffeq's adjoint where the
    gradient is that of the adjoint, which these steps define. Otherwise they are exact: dopri8 with rtol 1e-12.
    """
    exact = case._replace(dtype=torch.float64)
    if not case.fixed:
        exact, gradient = exact._replace(method="dopri8", rtol=1e-12, atol=1e-14), BACKPROP
    of_steps = by_hand(exact) if case.fixed and gradient != ADJOINT else by_library(exact, RIVAL, gradient)
    return solved(exact, of_steps, copy.deepcopy(field).double(), y0.double(), t.double())[0]


def allowed(case: SmallCase) -> float:
    """The largest relative error of a correct result."""
    if case.dtype is torch.bfloat16:
        return BFLOAT16_ERROR
    return ERROR_PER_EPS * torch.finfo(case.dtype).eps + (0.0 if case.fixed else ERROR_PER_RTOL * case.rtol)
