"""A neural ODE as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from node_cuda._typing import State
from node_cuda.odeint import solve
from node_cuda.solution import Stats


class NeuralODE(nn.Module):
    """y(t) of dy/dt = func(t, y) as a layer: `NeuralODE(func)(y0, t)`.

    func: an nn.Module of (t, y). gradient: "adjoint" (constant memory), "discrete" or "backprop". The other arguments
    are those of `odeint_adjoint`. stats: what the last call cost; nfe_backward is filled in when the gradient is taken.
    """

    def __init__(self, func: nn.Module, *, gradient: str = "adjoint", **solver: Any) -> None:
        super().__init__()
        self.func = func
        self.gradient = gradient
        self.solver = solver
        self.stats: Stats | None = None

    def forward(self, y0: State, t: Tensor) -> State:
        """y at the times t, of shape (len(t), *y0.shape), or a tuple of such."""
        solution = solve(self.func, y0, t, gradient=self.gradient, **self.solver)
        self.stats = solution.stats
        return solution.ys

    def extra_repr(self) -> str:
        """How it is solved."""
        return ", ".join(f"{name}={value!r}" for name, value in {"gradient": self.gradient, **self.solver}.items())
