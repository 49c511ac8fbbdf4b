"""`compile`: a solver for one function, which keeps what was captured or compiled for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from node_cuda._parse_options import check_mapping
from node_cuda._typing import Func, S
from node_cuda.cuda_graphs.cache import TIERS, GraphCache
from node_cuda.native.cache import NativeCache
from node_cuda.odeint import solve
from node_cuda.solution import Solution
from node_cuda.status import InvalidInput

NATIVE = "native"


class Compiled:
    """`solve` for one func, captured or compiled; made by `compile`. graphs: what it keeps so far."""

    def __init__(self, func: Func, solver: Mapping[str, Any]) -> None:
        self.func = func
        self.solver = solver
        options = solver["options"]
        self.graphs: GraphCache[Any] | NativeCache = options.get("compile") or options["cuda_graph"]

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
    `Solution.stats.why` says why.

    On the CPU options=dict(compile=True) compiles the loop over steps, with func, to native code. tier="native" demands
    that: a solve that cannot be compiled raises Unsupported. Raises the exceptions of `solve`, and InvalidInput for
    another tier.
    """
    if tier not in (None, NATIVE, *TIERS):
        raise InvalidInput(f"tier must be one of {', '.join(map(repr, (*TIERS, NATIVE)))} or None; got {tier!r}.")
    check_mapping(solver.get("options"))
    options = dict(solver.get("options") or {})
    if tier == NATIVE:
        options["compile"] = "require"
    elif not options.get("compile"):
        options.setdefault("cuda_graph", True)
    if tier in TIERS and not isinstance(options.get("cuda_graph"), GraphCache):
        options["cuda_graph"] = GraphCache(tier)
    return Compiled(func, with_own_graphs({**solver, "options": options}))


def with_own_graphs(solver: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a solver that keeps its captured graphs and its native code, if it asks for them."""
    options = solver.get("options")
    if options is None:
        return dict(solver)
    options = dict(options)
    if options.get("cuda_graph") is True:
        options["cuda_graph"] = GraphCache()
    if (wanted := options.get("compile")) is True or wanted == "require":
        options["compile"] = NativeCache(required=wanted == "require")
    return {**solver, "options": options}
