"""Compares the gradients of compiled solves with those of the host loop, and with finite differences.

CASES are those of both adjoint methods. Each takes a function `compare(func, y0=start(), t=T, **solver)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from native import Timed, start
from problems import F64, linspace, relative_difference
from torch import Tensor, nn

from node_cuda import NeuralODE, Solution, Status, solve
from node_cuda.native import build

# In float64: roundings in other orders, which the backward pass carries from step to step.
CLOSE = 1e-10
# In float32: a hundred roundings of 6e-8.
CLOSE_IN_FLOAT = 1e-5

T = linspace(0.0, 1.0, 3)
HEUN: dict[str, Any] = dict(method="adaptive_heun", rtol=3e-2, atol=3e-2)
EULER: dict[str, Any] = dict(method="euler", options=dict(step_size=0.3))


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
    found, grads = gradients(func, y0, t, gradient=gradient, options=dict(options, compile=True), **solver)
    assert (found.stats.loop, found.stats.loop_backward) == ("native", "native")
    of_y0, of_w = (g for g in grads if g is not None)
    for value, g in zip(expected, (of_y0, of_w), strict=True):
        assert abs(float(g.view(-1)[1]) - value) <= limit * abs(value), (g, value)


# ------------------------------------------------------------------ cases of both adjoint methods
class Fails(Timed):
    """NaN from t = 0.6 on."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(t, y) * torch.where(t < 0.6, 1.0, torch.nan)


class FailsAtOnce(Timed):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(t, y) * torch.nan


class Layers(nn.Module):
    """A weight that two layers share, a parameter that is not used, a frozen one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
        self.b.weight = self.a.weight
        self.unused = nn.Parameter(torch.ones(3, dtype=F64))
        self.frozen = nn.Parameter(torch.tensor(0.5, dtype=F64), requires_grad=False)
        self.register_buffer("scale", torch.tensor([0.5, -1.0], dtype=F64))
        self.rate = 1.5

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(y))) * self.scale * self.frozen * self.rate


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda field: setattr(field, "rate", 2.0),
    "a buffer in place": lambda field: field.scale.mul_(2.0),
    "train and eval": lambda field: field.eval(),
}
"""What a user may do with Layers between the forward and the backward pass."""


class Flow(nn.Module):
    """A continuous normalizing flow with the exact trace, by autograd.grad inside of the field."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z, _ = state
        with torch.enable_grad():
            z = z.requires_grad_(True)
            dz = self.net(torch.cat([z, t.expand(len(z), 1)], 1))
            trace: Any = sum(torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
        return dz, -trace.unsqueeze(1)


def a_solve_that_fails_half_way(compare: Callable[..., Any]) -> None:
    """It has the gradient of the outputs that it reached."""
    options = dict(throw=False, first_step=0.125, max_step=0.125, dfactor=0.25)
    found = compare(Fails(), method="adaptive_heun", rtol=1e-1, atol=1e-1, options=options)
    assert found.status is Status.NON_FINITE and torch.isfinite(found.ys[1]).all() and torch.isnan(found.ys[2]).all()


def a_shared_weight_an_unused_parameter_and_a_buffer(compare: Callable[..., Any]) -> None:
    field = Layers()
    compare(field, **EULER)
    field.scale.mul_(2.0)
    compare(field, **EULER)


def parameters_that_are_passed(compare: Callable[..., Any]) -> None:
    scale, other = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.5, 2.0))
    given = dict(adjoint_params=(scale, other), params=(scale, other))
    compare(lambda t, y: -scale * y * torch.cos(t), **given, **EULER)


CASES: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "a solve that fails half way": a_solve_that_fails_half_way,
    "an integral": lambda compare: compare(Timed(), integral=lambda t, y, dy: dy.square().sum(-1), **HEUN),
    "a shared weight, an unused parameter and a buffer": a_shared_weight_an_unused_parameter_and_a_buffer,
    "parameters that are passed": parameters_that_are_passed,
    "the exact trace of a flow": lambda compare: compare(Flow(), (start(), torch.zeros(3, 1, dtype=F64)), **EULER),
}


def autocast_holds_in_the_backward_pass(gradient: str) -> None:
    """Assert that func runs under autocast in a backward pass outside of it, and that its gradient is the host's."""

    class Rounded(Timed):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            rounds.append(torch.is_autocast_enabled("cpu"))
            return super().forward(t, y)

    rounds, grads = [], []
    for options in ({}, dict(compile="require")):
        y0, field = start(torch.float32).requires_grad_(), Rounded(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            solver = dict(gradient=gradient, method="euler", options=dict(options, step_size=0.3))
            loss = loss_of(solve(field, y0, T, **solver))  # pyright: ignore[reportArgumentType]
        rounds.clear()
        grads.append(torch.autograd.grad(loss, [y0, *field.parameters()]))
        assert rounds and all(rounds)
    close(grads[1], grads[0], 1e-2)  # products are rounded to 8 bits


def trains_as_the_host_and_builds_two_graphs(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that three steps of SGD give the parameters of the host's training, by one graph for each pass.

    "auto" takes "discrete".
    """
    built, interpret, trained = [], build.native, []
    monkeypatch.setattr(build, "native", lambda *given: built.append(1) or interpret(*given))
    for compiled in (False, True):
        layer = NeuralODE(Timed(), T, gradient=gradient, options=dict(compile=compiled), **HEUN)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(start()).square().sum().backward()
            optimizer.step()
        stats: Any = layer.stats
        assert stats.loop_backward == ("native" if compiled else "host") and stats.why_gradient is None
        trained.append(layer.func.w.detach().clone())
    assert len(built) == 2
    assert torch.allclose(trained[0], trained[1], rtol=CLOSE) and not torch.equal(trained[0], Timed().w)
