"""`compile`: a solver for one function, which keeps the CUDA graphs captured for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from node_cuda._typing import Func, S
from node_cuda.cuda_graphs.cache import GraphCache
from node_cuda.odeint import solve
from node_cuda.options import check_mapping
from node_cuda.solution import Solution


class Compiled:
    """`solve` for one func by captured graphs; made by `compile`. graphs: the graphs that were captured so far."""

    def __init__(self, func: Func, solver: Mapping[str, Any]) -> None:
        self.func = func
        self.solver = solver
        self.graphs: GraphCache[Any] = solver["options"]["cuda_graph"]

    def __call__(self, y0: S, t: Tensor) -> Solution[S]:
        """Return the solution at the times t, from y0."""
        return solve(self.func, y0, t, **self.solver)

    def __repr__(self) -> str:
        return f"node_cuda.compile({self.func!r}, {self.solver!r})"


def compile(func: Func, *, tier: str | None = None, **solver: Any) -> Compiled:
    """Return a function of (y0, t) that solves dy/dt = func(t, y) by captured graphs. It returns a Solution.

    The first call with states of a shape captures one step, with func, as a CUDA graph; later calls launch it. The
    graphs are freed together with the returned function. tier: "while", "batches" or None for the best (see `graphs`).
    The other arguments are those of `solve`. If a solve cannot be captured, as on a CPU, the host loop solves, and
    `Solution.stats.why` says why. Raises the exceptions of `solve`, and InvalidInput for another tier.
    """
    check_mapping(solver.get("options"))
    options = dict(solver.get("options") or {})
    if not isinstance(options.get("cuda_graph"), GraphCache):
        options["cuda_graph"] = GraphCache(tier)
    return Compiled(func, {**solver, "options": options})


def with_own_graphs(solver: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a solver that keeps its captured graphs, if the arguments ask for that."""
    options = solver.get("options")
    if options is None or options.get("cuda_graph") is not True:
        return dict(solver)
    return {**solver, "options": {**options, "cuda_graph": GraphCache()}}
