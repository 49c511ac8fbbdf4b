"""A neural ODE as a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from node_cuda._arguments import ATOL, RTOL, check_gradient, refuse_unknown
from node_cuda._eager import eager
from node_cuda._typing import AdjointArguments, Func, GradientName, MethodName, NoArguments
from node_cuda._user_code import of_y_alone, takes
from node_cuda.compiled import with_own_graphs
from node_cuda.methods.registry import lookup
from node_cuda.odeint import solve
from node_cuda.problem.problem import check_func, check_times
from node_cuda.solution import Solution, Stats
from node_cuda.status import InvalidInput, InvalidType

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NeuralODE(nn.Module):
    """y(t) of dy/dt = func(t, y) as a layer: `NeuralODE(func)(y0, t)`, or `NeuralODE(func, t)(y0)` in a Sequential.

    func: an nn.Module of (t, y). t: the times, if the call gives none. They are kept in double, outside of parameters
    and buffers, so that `.half()` and `.to(dtype)` do not change them; a t that requires a gradient is kept as it is.
    last_only: return the state at the last time alone. gradient, checkpoints: as those of `solve`, by default "auto".
    integral: as that of `solve`; its parameters are the layer's, if it is an nn.Module. The other arguments are those
    of `odeint_adjoint`. With options=dict(cuda_graph=True) the layer keeps the captured graphs. stats: the statistics
    of the last call; nfe_backward is filled in when the gradient is computed. Wrong arguments raise here, before the
    first call.
    """

    def __init__(
        self,
        func: nn.Module,
        t: Tensor | None = None,
        *,
        last_only: bool = False,
        rtol: Any = RTOL,
        atol: Any = ATOL,
        method: MethodName | None = None,
        options: Mapping[str, Any] | None = None,
        adjoint_rtol: Any = None,
        adjoint_atol: Any = None,
        adjoint_method: MethodName | None = None,
        adjoint_options: Mapping[str, Any] | None = None,
        adjoint_params: Iterable[Tensor] | None = None,
        gradient: GradientName = "auto",
        checkpoints: int | Literal["auto"] | None = None,
        integral: Callable[[Tensor, Any, Any], Tensor] | None = None,
        **unknown: Unpack[NoArguments],
    ) -> None:
        super().__init__()
        refuse_unknown("NeuralODE", unknown)
        check_func(func, "NeuralODE(func, t)")
        if isinstance(func, nn.Module) and takes(func, 1):
            name = type(func).__name__
            raise InvalidType(f"func must take (t, y); got a {name}, which takes y alone. {of_y_alone(func)}")
        check_gradient(gradient, checkpoints)
        if not isinstance(func, nn.Module) and adjoint_params is None and gradient != "backprop":
            raise InvalidInput(
                f"NeuralODE needs an nn.Module as func, to find its parameters; got a {type(func).__name__}. Write a "
                "module with `def forward(self, t, y)`, whose parameters the layer then has. A func without parameters "
                "works as it is with `NeuralODE(func, adjoint_params=())`."
            )
        lookup(method, options)
        if adjoint_method is not None or adjoint_options is not None:
            lookup(method if adjoint_method is None else adjoint_method, adjoint_options)
        if t is not None:
            check_times(t)
        if adjoint_params is not None and not isinstance(adjoint_params, Tensor):
            adjoint_params = tuple(adjoint_params)  # each call reads them
        self.func = func
        self.t = t if t is None or t.requires_grad else t.detach().to("cpu", torch.float64)
        self.last_only = last_only
        self.gradient: GradientName = gradient
        self.integral = integral
        given = {
            "rtol": (rtol, RTOL),
            "atol": (atol, ATOL),
            "method": (method, None),
            "options": (options, None),
            "adjoint_rtol": (adjoint_rtol, None),
            "adjoint_atol": (adjoint_atol, None),
            "adjoint_method": (adjoint_method, None),
            "adjoint_options": (adjoint_options, None),
            "adjoint_params": (adjoint_params, None),
            "checkpoints": (checkpoints, None),
        }
        self.solver = with_own_graphs({name: value for name, (value, default) in given.items() if value is not default})
        self.stats: Stats | None = None

    @eager
    def forward(self, y0: Any, t: Tensor | None = None) -> Any:
        """Return y at the times t, of shape (len(t), *y0.shape), or of y0's shape with last_only; or a tuple of such.

        With an integral, or with a func made by `regularized`, return (y, `Solution.integral`).
        """
        t = self.t if t is None else t
        if t is None:
            raise InvalidInput(
                "NeuralODE needs the times t, at the call or before; got none. Use `NeuralODE(func, t)` or `layer(y0, "
                "t)`, for example with `t = torch.tensor([0.0, 1.0])`."
            )
        solution = self.solution(self.func, y0, t)
        ys, integral = solution.ys, solution.integral
        if self.last_only:
            ys = tuple(part[-1] for part in ys) if isinstance(ys, tuple) else ys[-1]
            integral = None if integral is None else integral[-1]
        return ys if integral is None else (ys, integral)

    def solution(self, func: Func, y0: Any, t: Tensor) -> Solution[Any]:
        """Solve for this func with the arguments of the layer, and keep the statistics."""
        solution = solve(func, y0, t, gradient=self.gradient, integral=self.integral, **self.solver)
        self.stats = solution.stats
        return solution

    def extra_repr(self) -> str:
        """Return the settings of the solve as text."""
        times = [] if self.t is None else [f"{len(self.t)} times t from {self.t[0]:g} to {self.t[-1]:g}"]
        shown = {"last_only": True} if self.last_only else {}
        shown |= {"gradient": self.gradient, **self.solver}
        return ", ".join((*times, *(f"{name}={value!r}" for name, value in shown.items())))


def refuse_others(name: str, solver: Mapping[str, Any]) -> None:
    """Raise InvalidType for arguments of the layer `name` that are no arguments of a solver."""
    refuse_unknown(name, {argument: x for argument, x in solver.items() if argument not in _KNOWN})


_KNOWN = frozenset(AdjointArguments.__annotations__)
