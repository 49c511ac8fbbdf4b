"""What the public functions ask of a gradient mode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from node_cuda.methods.registry import Method
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats


@dataclass(frozen=True)
class AdjointSpec:
    """The user's adjoint_* arguments, as given; None takes the forward solve's."""

    rtol: Any = None
    atol: Any = None
    method: str | None = None
    options: Mapping[str, Any] | None = None
    params: Iterable[Tensor] | None = None


@dataclass(frozen=True)
class SolveSpec:
    """A problem, the method to solve it by, where to count the cost, and method and options as the user gave them.

    checkpoints: the states that the discrete adjoint may keep; None: one a step; "auto": as many as memory allows.
    """

    problem: Problem
    method: Method
    stats: Stats
    method_name: str | None
    options: Mapping[str, Any] | None
    adjoint: AdjointSpec
    checkpoints: int | str | None = None
