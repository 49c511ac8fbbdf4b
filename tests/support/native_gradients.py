"""Compares the gradients of compiled solves with those of the host loop, and with finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from native import Timed
from problems import F64, relative_difference
from torch import Tensor, nn

from node_cuda import Solution, solve

# In float64: roundings in other orders, which the backward pass carries from step to step.
CLOSE = 1e-10
# In float32: a hundred roundings of 6e-8.
CLOSE_IN_FLOAT = 1e-5


def parts_of(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def loss_of(solution: Solution[Any]) -> Tensor:
    """Return a loss in which each element of each output has another weight. Outputs that are NaN have none."""
    total = torch.zeros((), dtype=F64)
    for ys in (*parts_of(solution.ys), *([] if solution.integral is None else [solution.integral])):
        real = torch.view_as_real(ys) if ys.is_complex() else ys
        weights = torch.cos(torch.arange(real.numel(), dtype=F64)).reshape(real.shape).to(real.dtype)
        total = total + torch.where(torch.isfinite(real), weights * real, 0.0).sum()
    return total


def gradients(
    func: Any, y0: Any, t: Tensor, *, wants_t: bool = False, params: Sequence[Tensor] = (), **solver: Any
) -> tuple[Solution[Any], list[Tensor | None]]:
    """Return the solution, and the gradients by y0, by t if wanted, and by the parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in parts_of(y0)]
    t = t.detach().clone().requires_grad_(wants_t)
    begin: Any = tuple(leaves) if isinstance(y0, tuple) else leaves[0]
    found = solve(func, begin, t, **solver)
    own = [p for p in func.parameters() if p.requires_grad] if isinstance(func, nn.Module) else []
    of = [*leaves, *([t] if wants_t else []), *own, *params]
    return found, list(torch.autograd.grad(loss_of(found), of, allow_unused=True))


def close(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], limit: float) -> None:
    """Assert that the gradients are equal. One without a gradient is None, or zeros."""
    assert any(g is not None and g.abs().sum() > 0 for g in expected)
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            assert all(x is None or not x.any() for x in (a, b))
            continue
        assert a.shape == b.shape and a.dtype == b.dtype
        if b.numel():
            assert relative_difference(a, b) <= limit, (a, b)


def compare_gradients(
    func: Any, y0: Any, t: Tensor, *, gradient: str, options: Any = None, limit: float = CLOSE, **solver: Any
) -> Solution[Any]:
    """Assert that the gradients of the compiled solve are those of the host loop. Return the compiled solution."""
    options = dict(options or {})
    eager, expected = gradients(func, y0, t, gradient=gradient, options=options, **solver)
    native, found = gradients(func, y0, t, gradient=gradient, options=dict(options, compile=True), **solver)
    stats = native.stats
    assert (stats.loop, stats.loop_backward, stats.why, stats.why_backward) == ("native", "native", None, None)
    assert eager.stats.loop_backward == "host"
    assert (native.stats.accepted, native.stats.rejected) == (eager.stats.accepted, eager.stats.rejected)
    close(found, expected, limit)
    return native


def by_differences(func: Timed, y0: Tensor, t: Tensor, **solver: Any) -> list[float]:
    """Return central differences of the loss of the host's solve, by an element of y0 and by one of func's matrix."""
    step, found = 1e-6, []

    def loss(y: Tensor) -> float:
        with torch.no_grad():
            return float(loss_of(solve(func, y, t, **solver)))

    for changed in (y0.clone(), func.w.detach()):
        element, values = changed.view(-1)[1:2], []
        old = element.clone()
        for sign in (1.0, -1.0):
            element.copy_(old + sign * step)
            values.append(loss(y0 if changed.data_ptr() == func.w.data_ptr() else changed))
        element.copy_(old)
        found.append((values[0] - values[1]) / (2 * step))
    return found


def agrees_with_differences(
    func: Timed, y0: Tensor, t: Tensor, *, gradient: str, limit: float, options: Any, **solver: Any
) -> None:
    """Assert that the gradients of a compiled solve are the differences of the loss."""
    expected = by_differences(func, y0, t, options=options, **solver)
    found, grads = gradients(func, y0, t, gradient=gradient, options=dict(options, compile="require"), **solver)
    assert found.stats.loop_backward == "native"
    of_y0, of_w = (g for g in grads if g is not None)
    for value, g in zip(expected, (of_y0, of_w), strict=True):
        assert abs(float(g.view(-1)[1]) - value) <= limit * abs(value), (g, value)
