"""Names for the shapes of things that flow through the solver."""

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
"""The user's norm: of a tensor (or of a tuple of tensors where the state is a tuple), to one number."""

Tolerance: TypeAlias = float | Tensor
"""rtol or atol: one number, or a tensor that broadcasts against the state."""

Row: TypeAlias = Sequence[tuple[int, "float | Tensor"]]
"""The non-zero entries of a row of coefficients: pairs of stage index and coefficient (0-d tensors on the tape)."""
