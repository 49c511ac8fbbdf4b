"""The adjoint method with a compiled backward solve: its options, its norm, its statistics, and what func may do.

The graphs run without the compiler here. unit/native/test_adjoint.py has the methods and the kinds of states.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from native import Timed, start
from native_gradients import CLOSE, close, compare_gradients, gradients, loss_of
from problems import F64, linspace
from torch import nn

from node_cuda import NeuralODE, SolveError, Status, odeint_adjoint, solve
from node_cuda.native import build
from node_cuda.native.cache import NativeCache
from node_cuda.status import InvalidField

pytestmark = pytest.mark.usefixtures("interpreted")
T = linspace(0.0, 1.0, 3)
HEUN = dict(method="adaptive_heun", rtol=3e-2, atol=3e-2)
EULER = dict(method="euler", options=dict(step_size=0.3))


def compare(func: Any, y0: Any = None, t: torch.Tensor = T, **solver: Any) -> Any:
    return compare_gradients(func, start() if y0 is None else y0, t, gradient="adjoint", **solver)


# ------------------------------------------------------------------ options of the backward solve
def test_the_norm_with_and_without_the_gradients_of_the_parameters():
    """They take other steps."""
    field, nfe = Timed(), []
    for options in ({}, dict(norm="seminorm")):
        tols = dict(rtol=1e-1, atol=1e-1, adjoint_rtol=1e-3, adjoint_atol=1e-3)
        found = compare(field, method="adaptive_heun", adjoint_options=options, **tols)
        nfe.append(found.stats.nfe_backward)
    assert nfe[0] > nfe[1]


def test_a_method_tolerances_and_options_for_the_backward_solve_alone():
    field = Timed()
    backward = dict(adjoint_method="adaptive_heun", adjoint_rtol=1e-2, adjoint_atol=1e-2)
    nfe = []
    for step in (0.05, 0.2):
        found = compare(field, **EULER, **backward, adjoint_options=dict(max_step=step))
        nfe.append(found.stats.nfe_backward)
    assert nfe[0] > nfe[1] > found.stats.nfe


def test_a_backward_solve_that_is_not_compiled_after_one_that_is():
    found, grads = gradients(
        Timed(), start(), T, gradient="adjoint", options=dict(compile=True), adjoint_options=dict(compile=False), **HEUN
    )
    _, expected = gradients(Timed(), start(), T, gradient="adjoint", **HEUN)
    close(grads, expected, CLOSE)
    assert (found.stats.loop, found.stats.loop_backward) == ("native", "host")


REASONS = {
    "check_reconstruction compares y at each output on the host": dict(
        **HEUN, adjoint_options=dict(check_reconstruction=True)
    ),
    "a custom norm is Python": dict(**HEUN, adjoint_options=dict(norm=lambda parts: parts[1].abs().max())),
    "explicit_adams is no explicit Runge-Kutta method": dict(
        **HEUN, adjoint_method="explicit_adams", adjoint_options=dict(step_size=0.1)
    ),
}


@pytest.mark.parametrize("why", REASONS)
def test_a_backward_solve_that_is_not_compiled_says_why(why):
    field = Timed()
    found, grads = gradients(field, start(), T, gradient="adjoint", options=dict(compile=True), **REASONS[why])
    _, expected = gradients(field, start(), T, gradient="adjoint", **REASONS[why])
    close(grads, expected, CLOSE)
    assert found.stats.loop_backward == "host" and why in str(found.stats.why_backward)


def test_a_func_that_cannot_be_inspected_says_why_in_both_passes():
    field = Timed()
    field.hidden = torch.ones(2, dtype=torch.complex128).conj()
    options = dict(EULER["options"], compile=True)
    found, grads = gradients(field, start(), T, gradient="adjoint", options=options, method="euler")
    _, expected = gradients(field, start(), T, gradient="adjoint", **EULER)
    close(grads, expected, CLOSE)
    assert found.stats.loop == found.stats.loop_backward == "host"
    assert "conjugate or negative view" in str(found.stats.why) and found.stats.why == found.stats.why_backward


# ------------------------------------------------------------------ how a solve ends
class Fails(Timed):
    """NaN from t = 0.6 on."""

    def forward(self, t, y):
        return super().forward(t, y) * torch.where(t < 0.6, 1.0, torch.nan)


def test_a_solve_that_fails_half_way_has_the_gradient_of_the_outputs_that_it_reached():
    options = dict(throw=False, first_step=0.125, max_step=0.125, dfactor=0.25)
    found = compare(Fails(), method="adaptive_heun", rtol=1e-1, atol=1e-1, options=options)
    assert found.status is Status.NON_FINITE and torch.isfinite(found.ys[1]).all() and torch.isnan(found.ys[2]).all()


def test_a_solve_that_fails_in_its_first_interval_has_the_gradient_of_its_start():
    class FailsAtOnce(Timed):
        def forward(self, t, y):
            return super().forward(t, y) * torch.nan

    options = dict(throw=False, compile="require")
    found, (of_y0, of_w) = gradients(FailsAtOnce(), start(), T, gradient="adjoint", options=options, **HEUN)
    weights = torch.cos(torch.arange(6, dtype=F64)).view(3, 2)
    assert found.status is Status.NON_FINITE and torch.equal(of_y0, weights)
    assert of_w is None or not of_w.any()


def test_a_backward_solve_that_fails_raises_the_error_of_the_host():
    messages = []
    for compiled in (False, "require"):
        with pytest.raises(SolveError) as raised:
            gradients(
                Timed(),
                start(),
                T,
                gradient="adjoint",
                options=dict(compile=compiled),
                adjoint_options=dict(max_num_steps=3, first_step=0.01, max_step=0.01, compile=compiled),
                **HEUN,
            )
        messages.append(str(raised.value).split("(nfe")[0])
        assert raised.value.status is Status.MAX_STEPS
    assert messages[0] == messages[1]


# ------------------------------------------------------------------ beside the state
def test_an_integral():
    compare(Timed(), integral=lambda t, y, dy: dy.square().sum(-1), **HEUN)


@pytest.mark.parametrize("solver", [HEUN, EULER])
def test_the_gradient_by_the_times(solver):
    field = Timed()
    if solver is HEUN:
        for t in (T, T.flip(0)):
            compare(field, t=t, wants_t=True, **HEUN)
        return
    _, grads = gradients(
        field, start(), T, gradient="adjoint", wants_t=True, method="euler", options=dict(step_size=0.3, compile=True)
    )
    _, expected = gradients(field, start(), T, gradient="adjoint", wants_t=True, **EULER)
    close(grads, expected, CLOSE)


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
                solve(field, y0, T, gradient="adjoint", method="euler", options=dict(options, step_size=0.3))
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


def test_a_func_that_was_changed_is_refused_by_both_backward_passes():
    kept = NativeCache()
    for backward in ({}, dict(compile=False)):
        for name, change in CHANGES.items():
            field = Layers()
            y0, options = start().requires_grad_(), dict(EULER["options"], compile=kept)
            solver = dict(method="euler", options=options, adjoint_options=dict(EULER["options"], **backward))
            loss = loss_of(solve(field, y0, T, gradient="adjoint", **solver))
            change(field)
            with pytest.raises(InvalidField, match="was changed between the forward and the backward pass"):
                loss.backward()
            assert field.a.weight.grad is None, name


def test_a_buffer_that_was_replaced_is_that_of_the_forward_pass_and_the_host_solves():
    grads, given = [], Layers()
    for replaced in (False, True):
        field, y0 = copy.deepcopy(given), start().requires_grad_()
        found = solve(field, y0, T, gradient="adjoint", method="euler", options=dict(step_size=0.3, compile=True))
        if replaced:
            field.scale = torch.ones(2, dtype=F64)
        grads.append(torch.autograd.grad(loss_of(found), [y0, field.a.weight]))
        assert found.stats.loop_backward == ("host" if replaced else "native")
        assert "tensors in the place of its own" in str(found.stats.why_backward) or not replaced
    close(*grads, CLOSE)


# ------------------------------------------------------------------ training
def test_a_training_loop_builds_its_graphs_once(monkeypatch):
    """Three steps of SGD give the parameters of the host's training, by odeint_adjoint and by the layer."""
    built = []
    interpret = build.native
    monkeypatch.setattr(build, "native", lambda *given: built.append(1) or interpret(*given))
    trained = []
    for compiled in (False, True):
        field = Timed()
        options = dict(compile=compiled)
        layer = NeuralODE(field, T, gradient="adjoint", options=options, **HEUN)
        optimizer = torch.optim.SGD(field.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(start()).square().sum().backward()
            optimizer.step()
        stats: Any = layer.stats
        assert stats.loop_backward == ("native" if compiled else "host")
        trained.append(field.w.detach().clone())
    assert len(built) == 2
    assert torch.allclose(trained[0], trained[1], rtol=CLOSE) and not torch.equal(trained[0], Timed().w)


def test_odeint_adjoint_and_a_second_pass():
    field, y0 = Timed(), start().requires_grad_()
    ys = odeint_adjoint(field, y0, T, options=dict(EULER["options"], compile="require"), method="euler")
    first, second = (torch.autograd.grad(ys.sum(), [y0, field.w], retain_graph=True) for _ in range(2))
    expected = torch.autograd.grad(odeint_adjoint(field, y0, T, **EULER).sum(), [y0, field.w])
    close(first, expected, CLOSE)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
