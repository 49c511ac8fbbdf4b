"""A neural ODE as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from node_cuda._eager import eager
from node_cuda._typing import State
from node_cuda.compiled import with_own_graphs
from node_cuda.odeint import solve
from node_cuda.solution import Stats


class NeuralODE(nn.Module):
    """y(t) of dy/dt = func(t, y) as a layer: `NeuralODE(func)(y0, t)`.

    func: an nn.Module of (t, y). gradient: "adjoint" (constant memory), "discrete" or "backprop". integral: as in
    `solve`; if it is an nn.Module, its parameters are parameters of the layer. The other arguments are those of
    `odeint_adjoint`. With options=dict(cuda_graph=True) the layer keeps the captured graphs. stats: the statistics of
    the last call; nfe_backward is filled in when the gradient is computed.
    """

    def __init__(
        self,
        func: nn.Module,
        *,
        gradient: str = "adjoint",
        integral: Callable[[Tensor, Any, Any], Tensor] | None = None,
        **solver: Any,
    ) -> None:
        super().__init__()
        self.func = func
        self.gradient = gradient
        self.integral = integral
        self.solver = with_own_graphs(solver)
        self.stats: Stats | None = None

    @eager
    def forward(self, y0: State, t: Tensor) -> State | tuple[State, Tensor]:
        """Return y at the times t, of shape (len(t), *y0.shape), or a tuple of such tensors.

        With an integral, or a func made by `regularized`, return (y, `Solution.integral`).
        """
        solution = solve(self.func, y0, t, gradient=self.gradient, integral=self.integral, **self.solver)
        self.stats = solution.stats
        return solution.ys if solution.integral is None else (solution.ys, solution.integral)

    def extra_repr(self) -> str:
        """Return the settings of the solve as text."""
        return ", ".join(f"{name}={value!r}" for name, value in {"gradient": self.gradient, **self.solver}.items())
