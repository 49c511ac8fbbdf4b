"""The arguments of a solve, as the public functions pass them to a gradient mode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from node_cuda._typing import Tolerance
from node_cuda.methods.registry import Method
from node_cuda.problem.problem import Problem, check_tolerance
from node_cuda.solution import Stats


class AdjointSpec(NamedTuple):
    """The user's adjoint_* arguments, unchanged. None stands for the value of the forward solve."""

    rtol: Any = None
    atol: Any = None
    method: str | None = None
    options: Mapping[str, Any] | None = None
    params: Iterable[Tensor] | None = None


class SolveSpec(NamedTuple):
    """A problem, the method, the statistics to fill in, and the method's name and options as the user gave them.

    checkpoints: the number of states that the discrete adjoint may keep. None: one for each step. "auto": as many as
    the memory allows. wants_status: the caller reads the status, which on a fixed grid costs a host read.
    """

    problem: Problem
    method: Method
    stats: Stats
    method_name: str | None
    options: Mapping[str, Any] | None
    adjoint: AdjointSpec
    checkpoints: int | str | None = None
    wants_status: bool = True

    def backward_method(self) -> str | None:
        """Return the name of the backward solve's method, by default the forward one. Raises ValueError."""
        name, given = self.adjoint.method, self.adjoint
        if name is None or name == self.method_name:
            return self.method_name
        if self.options is not None and given.options is None:
            raise ValueError(
                "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`; got "
                f"{name!r} and {self.method_name!r}. Pass `adjoint_options=dict(...)` as well."
            )
        return name

    def backward_tolerances(self) -> tuple[Tolerance, Tolerance]:
        """Return rtol and atol of the backward solve, by default the forward ones. Raises as `check_tolerance`."""
        problem, given = self.problem, self.adjoint
        if given.rtol is None and given.atol is None:
            return problem.norm.rtol, problem.norm.atol
        rtol, atol = (
            forward if backward is None else check_tolerance(name, backward, problem.layout, problem.y0)
            for name, forward, backward in (
                ("adjoint_rtol", problem.norm.rtol, given.rtol),
                ("adjoint_atol", problem.norm.atol, given.atol),
            )
        )
        return rtol, atol
