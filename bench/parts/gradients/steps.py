"""Computes the gradient of a problem by a mode, and the reference gradients for its errors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parts.common import libraries
from parts.common.fields import Counted
from parts.common.libraries import OURS, REFERENCE, RIVAL
from parts.common.modes import LIMIT, MODES
from parts.gradients.problems import GradientProblem
from parts.solve.solving import flat_gradient


class Gradients(NamedTuple):
    """The gradients of y0 and of all parameters (one vector), and the evaluations forward and backward."""

    y0: Tensor
    parameters: Tensor
    nfe: int
    nfe_backward: int


class Step:
    """A problem with a mode; `step()` solves and differentiates it."""

    def __init__(self, problem: GradientProblem, mode: str, device: torch.device) -> None:
        self.problem, self.solver = problem, MODES[mode].solver
        self.field, self.y0, self.t = problem.field(device), problem.start(device), problem.t(device)

    def __call__(self, part: float = 1.0) -> Gradients:
        """Solves over this part of the time interval, and returns the gradients."""
        self.field.zero_grad(set_to_none=False)
        self.field.reset()
        start = self.y0.clone().requires_grad_()
        arguments = {"rtol": self.problem.rtol, "atol": self.problem.atol, "method": "dopri5", "options": dict(LIMIT)}
        loss = self.problem.loss(self.solver(self.field, start, part * self.t, **arguments))
        nfe = self.field.reset()
        loss.backward()
        return collected(self.field, start, nfe)


def collected(field: Counted, start: Tensor, nfe: int) -> Gradients:
    """The gradients, those of the parameters copied, because the next step overwrites them."""
    parameters = flat_gradient(field)
    assert parameters is not None and start.grad is not None
    return Gradients(start.grad, parameters, nfe, field.reset())


def exact(problem: GradientProblem, device: torch.device) -> Gradients:
    """The exact gradient: float64, dopri8 at rtol 1e-12, backpropagation; by torchdiffeq if it is installed."""
    by = RIVAL if libraries.installed(RIVAL) else REFERENCE
    return _in_float64(problem, device, by, rtol=1e-12, atol=1e-14, method="dopri8")


def of_same_steps(problem: GradientProblem, device: torch.device) -> Gradients:
    """The gradient in float64 over the steps of node_cuda's float32 solve, by its backpropagation.

    The steps are forced: the tolerances reject none, the first proposed step spans the whole interval, and `step_t`
    cuts every step at the next recorded time.
    """
    solve = libraries.function(OURS, "solve")
    tolerances = {"rtol": problem.rtol, "atol": problem.atol, "method": "dopri5"}
    with torch.no_grad():
        solution = solve(
            problem.field(device),
            problem.start(device),
            problem.t(device),
            **tolerances,
            options={"record_steps": True, **LIMIT},
        )
    times = torch.tensor(solution.stats.step_times, dtype=torch.float64, device=device)
    forced = {"step_t": times[1:], "first_step": float(times[-1] - times[0])}
    return _in_float64(problem, device, REFERENCE, rtol=1e30, atol=1e30, method="dopri5", options=forced)


def _in_float64(problem: GradientProblem, device: torch.device, by: str, **arguments: Any) -> Gradients:
    field = problem.field(device, torch.float64)
    start = problem.start(device, torch.float64).requires_grad_()
    with libraries.path(by):
        ys = libraries.function(by, "odeint")(field, start, problem.t(device, torch.float64), **arguments)
        nfe = field.reset()
        problem.loss(ys).backward()
    return collected(field, start, nfe)


def difference(found: Gradients, expected: Gradients) -> float:
    """The larger of the relative errors of both gradients, each in the Euclidean norm."""
    pairs = ((found.y0, expected.y0), (found.parameters, expected.parameters))
    errors = [torch.linalg.vector_norm(a.double() - b) / torch.linalg.vector_norm(b) for a, b in pairs]
    return torch.stack(errors).max().item()  # NaN if one of them is NaN
