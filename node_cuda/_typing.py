"""Type names for the arguments and values of a solve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar

from torch import Tensor

State: TypeAlias = Tensor | tuple[Tensor, ...]
"""What the user integrates: one tensor of any shape, or a tuple of them."""

Func: TypeAlias = Callable[[Tensor, Any], Any]
"""The user's vector field: `func(t, y) -> dy/dt`, t a 0-d tensor, y and dy/dt of the state's structure."""

EventFunc: TypeAlias = Callable[[Tensor, Any], Tensor]
"""The user's event function: `event_fn(t, y) -> Tensor`; an event is where an element changes its sign."""

Norm: TypeAlias = Callable[[Any], "Tensor | float"]
"""The user's norm: a function of a tensor (or of a tuple of tensors if the state is a tuple) that returns one
number."""

Tolerance: TypeAlias = float | Tensor
"""rtol or atol: one number, or a tensor that broadcasts against the state."""

Row: TypeAlias = Sequence[tuple[int, "float | Tensor"]]
"""The non-zero entries of a row of coefficients: pairs of stage index and coefficient (0-d tensors on the tape)."""

MethodName: TypeAlias = Literal[
    "euler",
    "midpoint",
    "heun2",
    "heun3",
    "rk4",
    "adaptive_heun",
    "fehlberg2",
    "bosh3",
    "dopri5",
    "tsit5",
    "bosh5",
    "dopri8",
    "explicit_adams",
    "implicit_adams",
    "fixed_adams",
    "rodas5p",
    "kvaerno3",
    "kvaerno5",
    "trbdf2_adaptive",
    "implicit_euler",
    "implicit_midpoint",
    "trapezoid",
    "radauIIA3",
    "gl4",
    "radauIIA5",
    "gl6",
    "sdirk2",
    "trbdf2",
    "scipy_solver",
]
"""The names in `node_cuda.METHODS`."""

GradientName: TypeAlias = Literal["auto", "backprop", "adjoint", "discrete"]
"""How gradients flow through a solve."""

S = TypeVar("S", Tensor, tuple[Tensor, ...])
"""The type of a state."""

S_co = TypeVar("S_co", covariant=True)
"""The type of a state, of what holds a solution."""


class SolverArguments(TypedDict, total=False):
    """What `odeint` takes by name, but for event_fn."""

    rtol: Any
    atol: Any
    method: MethodName | None
    options: Mapping[str, Any] | None


class AdjointArguments(SolverArguments, total=False):
    """What `odeint_adjoint` takes by name, but for event_fn."""

    adjoint_rtol: Any
    adjoint_atol: Any
    adjoint_method: MethodName | None
    adjoint_options: Mapping[str, Any] | None
    adjoint_params: Iterable[Tensor] | None
    gradient: GradientName
    checkpoints: int | Literal["auto"] | None


class NoArguments(TypedDict):
    """No further arguments by name: a type checker refuses them, and at run time a message says what to type."""
