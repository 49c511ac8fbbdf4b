"""node_cuda, torchdiffeq and torchode on a problem of peers.py."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from parts.common import modes
from parts.common.fields import Counted
from parts.common.libraries import OURS, RIVAL, TORCHODE, function
from parts.common.modes import ADJOINT, BACKPROP, DISCRETE
from parts.peers.problems import Problem, gradients
from parts.solve.solving import Quantities

COMPILED = "compiled"


class Solved(NamedTuple):
    """Results and their cost. nfe: None where the library does not count; steps: attempts, or None."""

    quantities: Quantities
    nfe: int | None
    nfe_backward: int
    steps: int | None


class Contestant(Protocol):
    """A library with one way to differentiate, ready to run a problem."""

    def solved(self) -> Solved:
        """One run, with its counts."""
        ...

    def run(self) -> Any:
        """One run of what is timed."""
        ...


class TorchContestant:
    """What node_cuda, torchdiffeq and torchode have in common. options: further arguments of the solver."""

    def __init__(self, problem: Problem, rtol: float) -> None:
        self.problem = problem
        self.rtol = rtol
        self.field = Counted(problem.field())
        self.t = problem.t()

    def forward(self, field: torch.nn.Module, y0: Tensor) -> tuple[Tensor, int | None]:
        """ys of shape (times, samples, dim) and the number of steps, if it is known."""
        raise NotImplementedError

    def run(self) -> None:
        y0 = self.problem.start()
        with torch.set_grad_enabled(self.problem.gradient):
            ys, _ = self.forward(self.field.field, y0.requires_grad_(self.problem.gradient))
        if self.problem.gradient:
            gradients(ys, y0, self.field.field)

    def solved(self) -> Solved:
        y0 = self.problem.start().requires_grad_(self.problem.gradient)
        self.field.reset()
        with torch.set_grad_enabled(self.problem.gradient):
            ys, steps = self.forward(self.field, y0)
        nfe = self.field.reset()
        found = gradients(ys, y0, self.field) if self.problem.gradient else ()
        return Solved(Quantities(ys.detach(), *found), nfe, self.field.reset(), steps)


class Ours(TorchContestant):
    """node_cuda with a gradient mode."""

    def __init__(self, problem: Problem, rtol: float, gradient: str, **options: Any) -> None:
        super().__init__(problem, rtol)
        self.solve = function(OURS, "solve")
        self.arguments = {"gradient": gradient} | ({"options": options} if options else {})

    def forward(self, field: torch.nn.Module, y0: Tensor) -> tuple[Tensor, int | None]:
        found = self.solve(field, y0, self.t, rtol=self.rtol, atol=self.rtol, method="dopri5", **self.arguments)
        self.stats = found.stats
        return found.ys, found.stats.accepted + found.stats.rejected

    def solved(self) -> Solved:
        """The counts are those of the statistics: native code does not call the field of a compiled solve."""
        return super().solved()._replace(nfe=self.stats.nfe, nfe_backward=self.stats.nfe_backward)


class Torchdiffeq(TorchContestant):
    """torchdiffeq with backpropagation or its adjoint."""

    def __init__(self, problem: Problem, rtol: float, gradient: str) -> None:
        super().__init__(problem, rtol)
        self.solver = modes.mode(RIVAL, gradient).solver

    def forward(self, field: torch.nn.Module, y0: Tensor) -> tuple[Tensor, int | None]:
        return self.solver(field, y0, self.t, rtol=self.rtol, atol=self.rtol, method="dopri5"), None


class Torchode(TorchContestant):
    """torchode, which chooses the steps of each sample; backpropagation through the solver."""

    def __init__(self, problem: Problem, rtol: float) -> None:
        super().__init__(problem, rtol)
        self.torchode = importlib.import_module(TORCHODE)
        self.t = self.t.expand(problem.samples, -1).contiguous()

    def forward(self, field: torch.nn.Module, y0: Tensor) -> tuple[Tensor, int | None]:
        torchode = self.torchode
        term = torchode.ODETerm(field)
        control = torchode.IntegralController(atol=self.rtol, rtol=self.rtol, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
        found = solver.solve(torchode.InitialValueProblem(y0=y0, t_eval=self.t))
        return found.ys.transpose(0, 1), int(found.stats["n_steps"].max())


def ours(problem: Problem, rtol: float, *, quick: bool = False) -> dict[str, Any]:
    """The contestants of node_cuda; the first is the one that the others are compared with. quick: compile nothing."""
    gradient_modes = (DISCRETE, ADJOINT, BACKPROP) if problem.gradient else (BACKPROP,)
    found: dict[str, Any] = {}
    for gradient in gradient_modes:
        name = f"{OURS} {gradient}" if problem.gradient else OURS
        found[name] = lambda gradient=gradient: Ours(problem, rtol, gradient)
    if not quick:
        found[f"{OURS} {COMPILED}"] = lambda: Ours(problem, rtol, gradient_modes[0], compile=True)
    return found


def torchdiffeqs(problem: Problem, rtol: float) -> dict[str, Any]:
    """The contestants of torchdiffeq."""
    if not problem.gradient:
        return {RIVAL: lambda: Torchdiffeq(problem, rtol, BACKPROP)}
    return {f"{RIVAL} {mode}": lambda mode=mode: Torchdiffeq(problem, rtol, mode) for mode in (ADJOINT, BACKPROP)}


def torchodes(problem: Problem, rtol: float) -> dict[str, Any]:
    """The contestant of torchode."""
    return {TORCHODE: lambda: Torchode(problem, rtol)}
