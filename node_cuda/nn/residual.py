"""A residual block with a continuous depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from node_cuda._typing import AdjointArguments
from node_cuda._user_code import takes
from node_cuda.methods.registry import lookup
from node_cuda.nn.neural_ode import NeuralODE, refuse_others
from node_cuda.options import AdaptiveOptions
from node_cuda.status import InvalidInput, InvalidType

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ODEBlock(NeuralODE):
    """A residual network of one block with a continuous depth: `ODEBlock(f)(h)` is h(depth) of dh/dt = f(h), h(0) = h.

    Residual networks "build complicated transformations by composing a sequence of transformations to a hidden state"
    (Chen et al. 2018, arXiv:1806.07366):

        h_{t+1} = h_t + f(h_t, theta_t)                 (1)

    "What happens as we add more layers and take smaller steps? In the limit, we parameterize the continuous dynamics of
    hidden units using an ordinary differential equation":

        dh(t)/dt = f(h(t), t, theta)                    (2)

    Euler's method with steps of size 1 is (1): `ODEBlock(f, depth=n, steps=n, method="euler")` computes n residual
    layers `h = h + f(h)`. The default method, dopri5, chooses its steps by the error in units of rtol and atol.

    f: an nn.Module of h, or of (t, h) with timed=True, which returns a tensor of h's shape. Layers with different
    parameters are a function of (t, h) that chooses them by t. depth: the end of the interval that starts at 0. steps:
    the number of equal steps, for a method on a fixed grid ("euler", "midpoint", "rk4", ...). The other arguments are
    those of NeuralODE. Raises as NeuralODE, and InvalidInput for a depth or steps that do not fit.
    """

    def __init__(
        self,
        f: nn.Module,
        depth: float = 1.0,
        *,
        steps: int | None = None,
        timed: bool = False,
        **solver: Unpack[AdjointArguments],
    ) -> None:
        refuse_others("ODEBlock", solver)
        if not callable(f) or isinstance(f, type):
            got, use = f"a {type(f).__name__}", "Use for example nn.Linear(2, 2)."
            if isinstance(f, type):
                name = f.__name__
                got = f"the class {name}, whose call makes an object"
                use = f"Make the object first: `f = {name}(...)`, then `ODEBlock(f)`."
            raise InvalidType(f"f must be an nn.Module of h; got {got}. {use}")
        if takes(f, 1 if timed else 2):
            needed, got = ("(t, h)", "h alone") if timed else ("h alone", "(t, h)")
            use = "ODEBlock(f)" if timed else "ODEBlock(f, timed=True)"
            raise InvalidType(
                f"f must take {needed} with timed={timed}; got a {type(f).__name__}, which takes {got}. Use `{use}`."
            )
        if isinstance(depth, bool) or not isinstance(depth, (int, float)) or not 0 < depth < float("inf"):
            raise InvalidInput(f"depth must be a positive number, the end of the interval; got {depth!r:.60}. Use 1.0.")
        super().__init__(
            f if timed else Autonomous(f),
            torch.linspace(0.0, depth, 1 + _checked(steps, solver), dtype=torch.float64),
            last_only=True,
            **solver,
        )


class Autonomous(nn.Module):
    """f(h) as a field of (t, h)."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """Return f(h)."""
        return self.f(h)


def _checked(steps: int | None, solver: AdjointArguments) -> int:
    """Return the number of intervals between output times. Raises InvalidInput if steps do not fit the method."""
    method, options = solver.get("method"), solver.get("options")
    chosen = lookup(method, options, quiet=True)
    by_error = isinstance(chosen.options, AdaptiveOptions) or chosen.name == "scipy_solver"
    if steps is None:
        if by_error or {"step_size", "grid_constructor"} & set(options or {}):
            return 1
        raise InvalidInput(
            f"ODEBlock needs steps with method={method!r}, whose step size is fixed; got none. Use for example "
            f"`ODEBlock(f, steps=10, method={method!r})`."
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidInput(f"steps must be a number of steps, 1 or more; got {steps!r:.60}. Use for example 10.")
    if by_error:
        raise InvalidInput(
            f"steps={steps} belongs to a fixed grid; got it with method={chosen.name!r}, which chooses its steps by "
            'rtol and atol. Drop steps, or use method="euler", "midpoint" or "rk4".'
        )
    return steps
