"""Compares compiled solves with those of the host loop."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from problems import F64, relative_difference
from torch import Tensor, nn

from node_cuda import Solution, solve

# In float64: a few roundings in other orders. The step sizes carry them from step to step.
CLOSE = 1e-12
# In float32: a hundred roundings of 6e-8.
CLOSE_IN_FLOAT = 1e-5


def first_of(count: int, cases: Iterable[Any]) -> list[Any]:
    """Return the cases for `parametrize`; only the first ones without `--compiled`, because each traces its graphs."""
    return [
        case if i < count else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.compiled)
        for i, case in enumerate(cases)
    ]


class Timed(nn.Module):
    """A small field of t and y, with one matrix."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.2, -1.5], [1.0, -0.3]], dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.w) * (1.5 + torch.cos(3 * t))


@functools.cache
def shared() -> Timed:
    """Return one field for all tests that do not change it. A solve of a kind that was traced is not traced again."""
    return Timed()


def start(dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.1]], dtype=dtype)


def counts(solution: Solution[Any]) -> tuple[int, int, int]:
    stats = solution.stats
    return stats.nfe, stats.accepted, stats.rejected


def pair(func: Any, y0: Any, t: Tensor, *, options: Any = None, **solver: Any) -> tuple[Solution[Any], Solution[Any]]:
    """Return the solution by the host loop, and by the compiled loop."""
    options = dict(options or {})
    with torch.no_grad():
        eager = solve(func, y0, t, options=options, **solver)
        native = solve(func, y0, t, options=dict(options, compile=True), **solver)
    assert (native.stats.loop, native.stats.why) == ("native", None)
    assert eager.stats.loop == "host"
    return eager, native


def same(eager: Solution[Any], native: Solution[Any], limit: float = CLOSE) -> None:
    """Assert that both solves took the same steps, with the same end and the same outputs."""
    assert counts(native) == counts(eager)
    assert native.status is eager.status
    assert math.isclose(native.t_reached, eager.t_reached, rel_tol=limit)
    parts = [(x.ys if isinstance(x.ys, tuple) else (x.ys,)) for x in (eager, native)]
    for a, b in zip(*parts, strict=True):
        assert b.shape == a.shape and b.dtype == a.dtype
        assert torch.equal(torch.isnan(a), torch.isnan(b))
        assert relative_difference(torch.nan_to_num(b), torch.nan_to_num(a)) <= limit
    if eager.failed_after is not None:
        assert native.failed_after is not None
        assert math.isclose(native.failed_after[0], eager.failed_after[0], rel_tol=limit)
        assert relative_difference(native.failed_after[1], eager.failed_after[1]) <= limit


def compare(func: Any, y0: Any, t: Tensor, *, limit: float = CLOSE, **solver: Any) -> Solution[Any]:
    """Assert that the compiled solve is that of the host loop, and return it."""
    eager, native = pair(func, y0, t, **solver)
    same(eager, native, limit)
    return native


def reason(func: Any, y0: Any, t: Tensor, **solver: Any) -> str:
    """Return why a solve is not compiled. Its result is that of the host loop."""
    options = dict(solver.pop("options", None) or {})
    state = torch.get_rng_state()
    eager = solve(func, y0, t, options=options, **solver)
    torch.set_rng_state(state)
    found = solve(func, y0, t, options=dict(options, compile=True), **solver)
    assert found.stats.loop == "host"
    pairs = zip(*((x.ys if isinstance(x.ys, tuple) else (x.ys,)) for x in (found, eager)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and counts(found) == counts(eager)
    assert found.stats.why is not None
    return found.stats.why
