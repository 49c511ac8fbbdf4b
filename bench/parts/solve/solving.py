"""One case solved by one contestant: its results, their cost and error, and a run for the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from parts.common import libraries, modes
from parts.common.fields import Counted, CountsSteps, MLPField, SineField
from parts.common.timing import seconds
from parts.solve.cases import Case

EXACT_ELEMENTS = 2**17  # of the batch at a time: autograd keeps the whole exact solve in memory
# The largest relative error allowed: ERROR_PER_RTOL * rtol, as rtol bounds the error of one step only, plus
# ERROR_PER_EPS roundings, which dominate in float32 at rtol = 1e-7.
ERROR_PER_RTOL = 100.0
ERROR_PER_EPS = 200.0
ROUNDS = 41  # at most, of each row


class Quantities(NamedTuple):
    """The results of a case: ys (outputs, batch, dim) and, unless the case is forward, the gradients of the loss."""

    ys: Tensor
    grad_y0: Tensor | None = None
    grad_parameters: Tensor | None = None


class Solved(NamedTuple):
    """Results and their cost: evaluations, accepted steps of the forward solve. None: the library does not count."""

    quantities: Quantities
    nfe: int | None
    nfe_backward: int | None
    accepted: int | None


class Contestant(Protocol):
    """A library, ready to run a case."""

    def solved(self) -> Solved:
        """One run, with its counts."""
        ...

    def timed(self) -> float:
        """One run; returns the seconds of its timed part."""
        ...


class Problem(NamedTuple):
    """A case with its field and initial state, the same for all contestants."""

    case: Case
    field: Counted
    y0: Tensor

    @property
    def t(self) -> Tensor:
        """Evenly spaced times from 0 to t_end."""
        return torch.linspace(0.0, self.case.t_end, self.case.outputs, device=self.y0.device, dtype=self.y0.dtype)


def make_problem(case: Case, device: torch.device) -> Problem:
    """The problem of a case, always with the same parameters and initial state."""
    torch.manual_seed(0)
    field = Counted(SineField() if case.hidden is None else MLPField(case.dim, case.hidden))
    y0 = torch.randn(case.batch, case.dim, device=device).to(case.dtype)
    return Problem(case, field.to(device, case.dtype), y0)


class TorchContestant:
    """node_cuda, on the path in its name, or torchdiffeq."""

    def __init__(self, name: str, problem: Problem) -> None:
        self.name = name
        self.problem = problem
        self.solver = modes.mode(name, problem.case.gradient).solver
        self.options = {"rtol": problem.case.rtol, "atol": problem.case.atol, "method": "dopri5"}

    def solved(self) -> Solved:
        """One run with its counts."""
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
        """One run; the clock leaves out what the case does not time."""
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
        """ys and the number of accepted steps. Counting costs time, so timed runs do not use this."""
        case, field, _ = self.problem
        if self.name == libraries.RIVAL:
            counting = CountsSteps(field)
            return self.solver(counting, start, self.problem.t, **self.options), counting.accepted
        solve = libraries.function(self.name, "solve")
        solution = solve(field, start, self.problem.t, **self.options, gradient=case.gradient)
        return solution.ys, solution.stats.accepted


def loss_of(ys: Tensor, batch: int) -> Tensor:
    """sum of y(t_end)^2 / batch: a sum over the rows, so that the exact solve can take them in parts."""
    return ys[-1].square().sum() / batch


def flat_gradient(field: torch.nn.Module) -> Tensor | None:
    """The gradients of all parameters as one vector; None if there are none."""
    gradients = [p.grad.flatten() for p in field.parameters() if p.grad is not None]
    return torch.cat(gradients) if gradients else None


def exact(problem: Problem) -> Quantities:
    """The exact results in float64: by a formula, or by dopri8 with rtol 1e-12 and backpropagation.

    The rows of the batch are independent, so a wide batch is solved in parts.
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
    # By torchdiffeq if it is installed: an independent reference.
    by = libraries.RIVAL if libraries.installed(libraries.RIVAL) else libraries.REFERENCE
    odeint = libraries.function(by, "odeint")

    def solve(start: Tensor, t: Tensor) -> Tensor:
        with libraries.path(by):
            return odeint(exact_field, start, t, rtol=1e-12, atol=1e-14, method="dopri8")

    return solve, exact_field


def largest_error(found: Quantities, expected: Quantities) -> float:
    """The largest relative error of the results, each in the Euclidean norm."""
    errors = [
        torch.linalg.vector_norm(a.double() - b).item() / torch.linalg.vector_norm(b).item()
        for a, b in zip(found, expected, strict=True)
        if a is not None and b is not None
    ]
    return max(errors)


def mistake(name: str, case: Case, error: float) -> str | None:
    """A sentence if the error is larger than allowed, or NaN; else None."""
    allowed = ERROR_PER_RTOL * case.rtol + ERROR_PER_EPS * torch.finfo(case.dtype).eps
    if error <= allowed:
        return None
    return (
        f"{name} misses the exact solution of `{case.name}` by {error:.1e} (relative); its tolerances allow "
        f"{allowed:.1e}. Nothing is timed. Run `make test`."
    )


def checked(name: str, contestant: Contestant, case: Case, expected: Quantities) -> dict[str, Any]:
    """The cost and the error of a contestant's solution, with `failed` if the error is too large."""
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
