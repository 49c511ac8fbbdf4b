"""Type names for the arguments and values of a solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

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
"""The nonzero entries of a row of coefficients: pairs of stage index and coefficient (0-d tensors if autograd
records)."""
