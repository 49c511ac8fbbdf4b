"""The discrete adjoint of a compiled solve: what it records, how it repeats calls, and what it does with func.

The graphs run without the compiler here. unit/native/test_reverse.py has the methods and the kinds of states.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native import Timed, start
from native_gradients import CLOSE, close, compare_gradients, gradients, loss_of
from problems import F64, linspace
from torch import nn

from node_cuda import NeuralODE, Status, solve
from node_cuda.gradients.discrete import native
from node_cuda.native import build
from node_cuda.native.cache import NativeCache
from node_cuda.status import InvalidField

pytestmark = pytest.mark.usefixtures("interpreted")
T = linspace(0.0, 1.0, 3)
HEUN = dict(method="adaptive_heun", rtol=3e-2, atol=3e-2)
EULER = dict(method="euler", options=dict(step_size=0.3))


def compare(func: Any, y0: Any = None, t: torch.Tensor = T, **solver: Any) -> Any:
    return compare_gradients(func, start() if y0 is None else y0, t, gradient="discrete", **solver)


def recorded(field: Any, *, compiled: Any = "require", **solver: Any) -> tuple[Any, list[torch.Tensor]]:
    """Return a discrete solve, and what its loss is differentiated by."""
    y0 = start().requires_grad_()
    options = dict(solver.pop("options", {}), compile=compiled)
    return solve(field, y0, T, gradient="discrete", options=options, **solver), [y0, *field.parameters()]


# ------------------------------------------------------------------ checkpoints and repeated passes
@pytest.mark.parametrize("method", ["adaptive_heun", "bosh3"])
def test_checkpoints_repeat_calls_and_a_second_pass_gives_the_same(method):
    """With room for 8 states a call records 4 steps, and the states at the start of two calls are kept."""
    field = Timed()
    tols = dict(rtol=1e-3, atol=1e-3) if method == "bosh3" else dict(rtol=1e-2, atol=1e-2)
    options = dict(first_step=0.0625, max_step=0.0625)
    expected, of = recorded(field, compiled=False, method=method, options=options, **tols)
    expected = torch.autograd.grad(loss_of(expected), of)
    found, of = recorded(field, method=method, options=options, checkpoints=8, **tols)
    loss, nfe = loss_of(found), []
    assert found.stats.accepted >= 16
    for _ in range(3):
        close(torch.autograd.grad(loss, of, retain_graph=True), expected, CLOSE)
        nfe.append(found.stats.nfe_backward)
    assert found.stats.loop_backward == "native"
    assert found.stats.checkpoint_slots == 8 and 4 <= found.stats.peak_checkpoints <= 8
    assert found.stats.recomputed_steps > 0
    assert nfe[2] - nfe[1] > nfe[0]  # a repeated pass goes through the solve first


def test_all_steps_are_kept_without_a_limit_and_a_second_pass_recomputes_none():
    found, of = recorded(Timed(), **HEUN)
    loss = loss_of(found)
    first, second = (torch.autograd.grad(loss, of, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert found.stats.peak_checkpoints == found.stats.accepted and found.stats.recomputed_steps == 0
    assert found.stats.checkpoint_slots is None


def test_a_call_records_what_fits_into_its_memory(monkeypatch):
    monkeypatch.setattr(native, "BYTES", 3 * 48)  # three states of 6 doubles
    found = compare(Timed(), **EULER)
    assert found.stats.host_reads == 2 + 2 + 2  # the times; 4 steps in 2 calls; and 2 of the reverse loop


# ------------------------------------------------------------------ how a solve ends
class Fails(Timed):
    """NaN from t = 0.6 on."""

    def forward(self, t, y):
        return super().forward(t, y) * torch.where(t < 0.6, 1.0, torch.nan)


def test_a_solve_that_fails_half_way_has_the_gradient_of_the_outputs_that_it_reached():
    options = dict(throw=False, first_step=0.125, max_step=0.125, dfactor=0.25)
    found = compare(Fails(), method="adaptive_heun", rtol=1e-1, atol=1e-1, options=options)
    assert found.status is Status.NON_FINITE and torch.isfinite(found.ys[1]).all() and torch.isnan(found.ys[2]).all()


def test_a_solve_that_fails_in_its_first_step_has_the_gradient_of_its_start():
    class FailsAtOnce(Timed):
        def forward(self, t, y):
            return super().forward(t, y) * torch.nan

    found = compare(FailsAtOnce(), options=dict(throw=False), **HEUN)
    assert found.status is Status.NON_FINITE and found.stats.accepted == 0


# ------------------------------------------------------------------ beside the state
def test_an_integral():
    compare(Timed(), integral=lambda t, y, dy: dy.square().sum(-1), **EULER)


def test_the_gradient_by_the_times():
    field = Timed()
    for t in (T, T.flip(0)):
        compare(field, t=t, wants_t=True, **HEUN)


# ------------------------------------------------------------------ parameters and tensors of func
class Layers(nn.Module):
    """A weight that two layers share, a parameter that is not used, a frozen one, and a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
        self.b.weight = self.a.weight
        self.unused = nn.Parameter(torch.ones(3, dtype=F64))
        self.frozen = nn.Parameter(torch.tensor(0.5, dtype=F64), requires_grad=False)
        self.register_buffer("scale", torch.tensor([0.5, -1.0], dtype=F64))
        self.rate = 1.5

    def forward(self, t, y):
        return self.b(torch.tanh(self.a(y))) * self.scale * self.frozen * self.rate


def test_a_shared_weight_an_unused_parameter_and_a_buffer():
    field = Layers()
    compare(field, **EULER)
    field.scale.mul_(2.0)
    compare(field, **EULER)


def test_parameters_that_are_passed():
    scale, other = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.5, 2.0))
    given = dict(adjoint_params=(scale, other), params=(scale, other))
    compare(lambda t, y: -scale * y * torch.cos(t), **given, **EULER)


class Flow(nn.Module):
    """A continuous normalizing flow with the exact trace, by autograd.grad inside of the field."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(self, t, state):
        z, _ = state
        with torch.enable_grad():
            z = z.requires_grad_(True)
            dz = self.net(torch.cat([z, t.expand(len(z), 1)], 1))
            trace = sum(torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
        return dz, -trace.unsqueeze(1)


def test_the_exact_trace_of_a_flow():
    compare(Flow(), (start(), torch.zeros(3, 1, dtype=F64)), **EULER)


def test_autocast_around_the_solve_holds_in_the_backward_pass():
    class Rounded(Timed):
        def forward(self, t, y):
            rounds.append(torch.is_autocast_enabled("cpu"))
            return super().forward(t, y)

    rounds, grads = [], []
    for options in ({}, dict(compile="require")):
        y0, field = start(torch.float32).requires_grad_(), Rounded(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(
                solve(field, y0, T, gradient="discrete", method="euler", options=dict(options, step_size=0.3))
            )
        rounds.clear()
        grads.append(torch.autograd.grad(loss, [y0, *field.parameters()]))
        assert rounds and all(rounds)
    close(grads[1], grads[0], 1e-2)  # products are rounded to 8 bits


# ------------------------------------------------------------------ func is changed before backward()
CHANGES = {
    "an attribute": lambda field: setattr(field, "rate", 2.0),
    "a buffer in place": lambda field: field.scale.mul_(2.0),
    "train and eval": lambda field: field.eval(),
}


def test_a_func_that_was_changed_is_refused():
    kept = NativeCache()
    for name, change in CHANGES.items():
        field = Layers()
        found, _ = recorded(field, compiled=kept, **EULER)
        change(field)
        with pytest.raises(InvalidField, match="was changed between the forward and the backward pass"):
            loss_of(found).backward()
        assert field.a.weight.grad is None, name


# ------------------------------------------------------------------ training
def test_a_training_loop_builds_its_graphs_once(monkeypatch):
    """Three steps of SGD give the parameters of the host's training. "auto" takes "discrete"."""
    built = []
    interpret = build.native
    monkeypatch.setattr(build, "native", lambda *given: built.append(1) or interpret(*given))
    trained = []
    for compiled in (False, True):
        layer = NeuralODE(Timed(), T, gradient="auto", options=dict(compile=compiled), **HEUN)
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


def test_the_seconds_of_both_builds_are_told_by_the_first_solve():
    field, seconds = Timed(), []
    for _ in range(2):
        found, of = recorded(field, **EULER)
        before = found.stats.compile_seconds
        torch.autograd.grad(loss_of(found), of)
        seconds.append((before, found.stats.compile_seconds))
    assert 0 < seconds[0][0] < seconds[0][1] and seconds[1] == (0.0, 0.0)


# ------------------------------------------------------------------ reasons for the host
def test_a_solve_that_is_not_compiled_says_why_and_has_the_gradient_of_the_host():
    field = Timed()
    for solver, why in (
        (dict(EULER, checkpoints=3), "checkpoints=3 leaves no room to record the steps of a call"),
        (dict(EULER, wants_t=True), "dL/dt of a fixed grid is computed step by step"),
        (dict(method="kvaerno3", rtol=3e-2, atol=3e-2), "kvaerno3 is no explicit Runge-Kutta method"),
    ):
        options = solver.pop("options", {})
        _, expected = gradients(field, start(), T, gradient="discrete", options=options, **solver)
        found, grads = gradients(field, start(), T, gradient="discrete", options=dict(options, compile=True), **solver)
        close(grads, expected, CLOSE)
        assert why in str(found.stats.why) and found.stats.loop_backward == "host"
        with pytest.raises(ValueError, match='"compile"] is "require"'):
            gradients(field, start(), T, gradient="discrete", options=dict(options, compile="require"), **solver)
