"""One case of cases.py by one contestant: what it computes, at which cost, how far off; and a run of it to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from parts.common import libraries, modes
from parts.common.fields import Counted, CountsSteps, MLPField, SineField
from parts.common.timing import seconds
from parts.solve.cases import Case

EXACT_ELEMENTS = 2**17  # of a batch at a time: the tape of the exact solution is kept in memory
# How far a solve may miss the exact solution: so many times rtol, which bounds the error of one step only, plus so
# many roundings, which is all that float32 leaves of rtol = 1e-7.
ERROR_PER_RTOL = 100.0
ERROR_PER_EPS = 200.0
ROUNDS = 41  # at most, of each row


class Quantities(NamedTuple):
    """What a case computes: ys (outputs, batch, dim) and, but for a forward case, the gradients of the loss."""

    ys: Tensor
    grad_y0: Tensor | None = None
    grad_parameters: Tensor | None = None


class Solved(NamedTuple):
    """Quantities and what they cost: evaluations of the field, accepted steps forward. None: the library keeps none."""

    quantities: Quantities
    nfe: int | None
    nfe_backward: int | None
    accepted: int | None


class Contestant(Protocol):
    """A library, ready to run a case."""

    def solved(self) -> Solved:
        """One run, with all that is counted."""
        ...

    def timed(self) -> float:
        """Seconds of the part that is timed, of one run."""
        ...


class Problem(NamedTuple):
    """A case with its field and start, the same for all contestants."""

    case: Case
    field: Counted
    y0: Tensor

    @property
    def t(self) -> Tensor:
        """Evenly spaced times from 0 to t_end."""
        return torch.linspace(0.0, self.case.t_end, self.case.outputs, device=self.y0.device, dtype=self.y0.dtype)


def make_problem(case: Case, device: torch.device) -> Problem:
    """Always the same parameters and start for a case."""
    torch.manual_seed(0)
    field = Counted(SineField() if case.hidden is None else MLPField(case.dim, case.hidden))
    y0 = torch.randn(case.batch, case.dim, device=device).to(case.dtype)
    return Problem(case, field.to(device, case.dtype), y0)


class TorchContestant:
    """node_cuda, by the path in its name, or torchdiffeq."""

    def __init__(self, name: str, problem: Problem) -> None:
        self.name = name
        self.problem = problem
        self.solver = modes.mode(name, problem.case.gradient).solver
        self.options = {"rtol": problem.case.rtol, "atol": problem.case.atol, "method": "dopri5"}

    def solved(self) -> Solved:
        """See `Contestant`."""
        case, field, y0 = self.problem
        field.zero_grad()
        field.reset()
        with_gradient = case.timed != "forward"
        start = y0.clone().requires_grad_(with_gradient)
        with libraries.path(self.name):
            with torch.set_grad_enabled(with_gradient):
                ys, accepted = self._counted(start)
            nfe = field.reset()
            if not with_gradient:
                return Solved(Quantities(ys), nfe, 0, accepted)
            loss_of(ys, case.batch).backward()
        return Solved(Quantities(ys.detach(), start.grad, flat_gradient(field)), nfe, field.reset(), accepted)

    def timed(self) -> float:
        """See `Contestant`."""
        case, field, y0 = self.problem
        field.zero_grad()
        with libraries.path(self.name):
            if case.timed == "forward":
                with torch.no_grad():
                    return seconds(lambda: self._forward(y0), y0.device)
            if case.timed == "step":
                return seconds(self._step, y0.device)
            loss = loss_of(self._forward(y0.clone().requires_grad_()), case.batch)
            return seconds(loss.backward, y0.device)

    def _forward(self, start: Tensor) -> Tensor:
        return self.solver(self.problem.field, start, self.problem.t, **self.options)

    def _step(self) -> None:
        start = self.problem.y0.clone().requires_grad_()
        loss_of(self._forward(start), self.problem.case.batch).backward()

    def _counted(self, start: Tensor) -> tuple[Tensor, int]:
        """ys and the accepted steps, counted as the library offers it: not in the runs that are timed."""
        case, field, _ = self.problem
        if self.name == libraries.RIVAL:
            counting = CountsSteps(field)
            return self.solver(counting, start, self.problem.t, **self.options), counting.accepted
        solve = libraries.function(self.name, "solve")
        solution = solve(field, start, self.problem.t, **self.options, gradient=case.gradient)
        return solution.ys, solution.stats.accepted


def loss_of(ys: Tensor, batch: int) -> Tensor:
    """A sum over the rows of the batch, so that the exact solution can take them a part at a time."""
    return ys[-1].square().sum() / batch


def flat_gradient(field: torch.nn.Module) -> Tensor | None:
    """That of all parameters, None where there are none."""
    gradients = [p.grad.flatten() for p in field.parameters() if p.grad is not None]
    return torch.cat(gradients) if gradients else None


def exact(problem: Problem) -> Quantities:
    """The exact quantities in float64: by a formula, or by dopri8 with rtol 1e-12, differentiated by backpropagation.

    The rows of the batch do not depend on each other, so a wide batch is taken a part at a time.
    """
    case, y0 = problem.case, problem.y0
    solve, exact_field = _exact_solver(problem)
    t = torch.linspace(0.0, case.t_end, case.outputs, device=y0.device, dtype=torch.float64)
    needs_gradient = case.timed != "forward"
    parts, gradients = [], []
    with torch.set_grad_enabled(needs_gradient):
        for rows in y0.split(max(1, EXACT_ELEMENTS // case.dim)):
            start = rows.double().clone().requires_grad_(needs_gradient)
            ys = solve(start, t)
            parts.append(ys.detach())
            if needs_gradient:
                loss_of(ys, case.batch).backward()
                gradients.append(start.grad)
    ys = torch.cat(parts, dim=1)
    if not needs_gradient:
        return Quantities(ys)
    return Quantities(ys, torch.cat(gradients), flat_gradient(exact_field))


def _exact_solver(problem: Problem) -> tuple[Callable[[Tensor, Tensor], Tensor], torch.nn.Module]:
    case, field, y0 = problem
    if case.hidden is None:
        return SineField.exact, field
    exact_field = Counted(MLPField(case.dim, case.hidden)).to(y0.device, torch.float64)
    exact_field.load_state_dict({name: value.double() for name, value in field.state_dict().items()})
    # torchdiffeq's word rather than ours, where it is there.
    by = libraries.RIVAL if libraries.installed(libraries.RIVAL) else libraries.REFERENCE
    odeint = libraries.function(by, "odeint")

    def solve(start: Tensor, t: Tensor) -> Tensor:
        with libraries.path(by):
            return odeint(exact_field, start, t, rtol=1e-12, atol=1e-14, method="dopri8")

    return solve, exact_field


def largest_error(found: Quantities, expected: Quantities) -> float:
    """Largest relative error of the quantities, each in the Euclidean norm."""
    errors = [
        torch.linalg.vector_norm(a.double() - b).item() / torch.linalg.vector_norm(b).item()
        for a, b in zip(found, expected, strict=True)
        if a is not None and b is not None
    ]
    return max(errors)


def mistake(name: str, case: Case, error: float) -> str | None:
    """What is wrong with a solution that is so far off, as a sentence; None: nothing. NaN is wrong as well."""
    allowed = ERROR_PER_RTOL * case.rtol + ERROR_PER_EPS * torch.finfo(case.dtype).eps
    if error <= allowed:
        return None
    return (
        f"{name} misses the exact solution of `{case.name}` by {error:.1e} (relative), more than the {allowed:.1e} "
        "that its tolerances allow: nothing is timed. See `make test`."
    )


def checked(name: str, contestant: Contestant, case: Case, expected: Quantities) -> dict[str, Any]:
    """What a contestant's solution cost and how far off it is; `failed` if that is too far."""
    solved = contestant.solved()
    error = largest_error(solved.quantities, expected)
    record: dict[str, Any] = {
        "nfe": solved.nfe,
        "nfe_backward": solved.nfe_backward,
        "accepted": solved.accepted,
        "error": error,
    }
    wrong = mistake(name, case, error)
    return record if wrong is None else record | {"failed": wrong}
