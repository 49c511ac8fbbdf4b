"""gradient="auto": "discrete" where it can be taken, else "adjoint" with the reason; no new errors."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import F64, MLP, linspace, loss_of
from torch import nn
from torch.nn.utils import parametrizations

from node_cuda import InvalidInput, NeuralODE, odeint_adjoint, odeint_event, solve
from node_cuda.gradients.discrete import mode

Y = torch.tensor([[0.7, -0.4], [0.1, 0.2]], dtype=F64)
T = linspace(0.0, 1.0, 5)


def run(func=None, *, gradient="auto", **given):
    """(statistics, y, gradients) of one solve and its backward pass."""
    func = MLP(hidden=4) if func is None else func
    y0, t = Y.clone().requires_grad_(), T.clone().requires_grad_()
    torch.manual_seed(3)
    solution = solve(func, y0, t, gradient=gradient, **given)
    return solution.stats, solution.ys, torch.autograd.grad(loss_of(solution.ys), [y0, t, *func.parameters()])


def same(a, b):
    return torch.equal(a[1], b[1]) and all(torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))


# ------------------------------------------------------------------ discrete
@pytest.mark.parametrize("given", [{}, dict(method="rk4"), dict(options=dict(jump_t=[0.5]))], ids=str)
def test_the_discrete_adjoint_is_taken_where_it_can_be(given):
    auto, discrete = run(**given), run(gradient="discrete", **given)
    assert same(auto, discrete) and auto[0].graph_of == "step"
    assert auto[0].why_gradient is None and "why_gradient" not in repr(auto[0])


def test_as_many_states_are_kept_as_the_memory_allows(monkeypatch):
    monkeypatch.setattr(mode, "slots_for", lambda size, device: 9)
    assert run()[0].checkpoint_slots == 9
    stats = run(checkpoints=1)[0]
    assert (stats.checkpoint_slots, stats.peak_checkpoints) == (1, 1) and stats.recomputed_steps > 0


def test_batch_normalization_in_training_is_a_function_of_its_batch():
    class Normed(MLP):
        def __init__(self):
            super().__init__(hidden=4)
            self.norm = nn.BatchNorm1d(2, dtype=F64)

        def forward(self, t, y):
            return super().forward(t, self.norm(y))

    auto = run(Normed())
    assert auto[0].why_gradient is None and same(auto, run(Normed(), gradient="discrete"))


# ------------------------------------------------------------------ adjoint, and why
ADJOINT = {
    "another method": (dict(method="explicit_adams"), "method='explicit_adams' is no Runge-Kutta method"),
    "scipy": (dict(method="scipy_solver", rtol=1e-3, atol=1e-3), "no Runge-Kutta method"),
    "rtol": (dict(adjoint_rtol=1e-5), 'adjoint_rtol was given, which only "adjoint" reads'),
    "atol": (dict(adjoint_atol=1e-5), "adjoint_atol was given"),
    "method": (dict(adjoint_method="tsit5"), "adjoint_method was given"),
    "options": (dict(adjoint_options=dict(norm="seminorm")), "adjoint_options was given"),
    "a check": (dict(options=dict(check_reconstruction=True)), 'options["check_reconstruction"] was given'),
    "deferred": (dict(options=dict(cuda_graph=True, throw="deferred")), "a deferred solve has no gradient"),
}


@pytest.mark.parametrize("checkpoints", [None, 2])
@pytest.mark.parametrize("case", ADJOINT)
def test_elsewhere_the_adjoint_is_taken_for_a_reason(case, checkpoints):
    given, why = ADJOINT[case]
    auto = run(checkpoints=checkpoints, **given)
    assert why in auto[0].why_gradient and why.split()[0] in repr(auto[0])
    assert auto[0].graph_of is None and same(auto, run(gradient="adjoint", **given))


def test_callbacks_of_the_backward_solve_are_called():
    class Told(MLP):
        steps = 0

        def callback_accept_step_adjoint(self, t, y, dt):
            self.steps += 1

    func = Told(hidden=4)
    stats, *_ = run(func)
    assert stats.why_gradient == 'func has callback_accept_step_adjoint, which only "adjoint" calls'
    assert func.steps > 0


@pytest.mark.parametrize("mute", [torch.no_grad, torch.inference_mode])
def test_without_autograd_no_state_is_kept(mute):
    with mute():
        stats = solve(MLP(hidden=4), Y, T, gradient="auto").stats
    assert stats.why_gradient == "autograd is off, so nothing has to be kept for a gradient"
    assert stats.peak_checkpoints == 0 and stats.checkpoint_slots is None


# ------------------------------------------------------------------ fields of chance
class Dropped(MLP):
    """Two of its draws in training are not the same: each keeps about half of 64 numbers."""

    def forward(self, t, y):
        kept = nn.functional.dropout(torch.arange(1.0, 65.0, dtype=y.dtype).sqrt(), 0.5, self.training)
        return super().forward(t, y * kept.mean())


CHANCE = "func is non-deterministic: a second call at the same t and y differs"


def test_dropout_is_the_adjoint_with_its_warning_and_its_draws():
    """An error of a default would stop a training that ran; the gradient is no worse than by "adjoint"."""
    with pytest.warns(UserWarning, match='a second call.*or use gradient="backprop"') as heard:
        auto = run(Dropped(hidden=4), method="rk4")
    assert len(heard) == 1 and heard[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adjoint = run(Dropped(hidden=4), method="rk4", gradient="adjoint")
    assert same(auto, adjoint)
    assert auto[0].why_gradient == CHANCE and auto[0].checkpoint_slots is None
    assert auto[0].nfe == adjoint[0].nfe + 2, "the look at func"
    assert run(Dropped(hidden=4).eval())[0].why_gradient is None


def test_a_spectral_norm_in_training_is_no_error():
    class Normed(nn.Sequential):
        def forward(self, t, y):
            return torch.tanh(super().forward(y))

    func = Normed(parametrizations.spectral_norm(nn.Linear(2, 2, dtype=F64)))
    assert run(func, method="rk4")[0].why_gradient == CHANCE


def test_a_field_of_chance_up_to_an_event_is_no_error():
    y0 = Y.clone().requires_grad_()
    with pytest.warns(UserWarning, match="a second call"):
        solution = solve(
            Dropped(hidden=4),
            y0,
            T[:2],
            event_fn=lambda t, y: t - 0.4,
            method="rk4",
            options=dict(step_size=0.1),
            gradient="auto",
        )
    assert solution.stats.why_gradient == CHANCE
    loss_of(solution.ys).backward()
    assert y0.grad is not None and y0.grad.isfinite().all()


# ------------------------------------------------------------------ with what else a solve has
@pytest.mark.parametrize("method, other", [("dopri5", "discrete"), ("explicit_adams", "adjoint")])
def test_an_event_has_the_gradients_of_the_mode_that_is_taken(method, other):
    def of(gradient):
        func, y0 = MLP(hidden=4), Y.clone().requires_grad_()
        options = {} if method == "dopri5" else dict(step_size=0.1)
        event_t, ys = odeint_event(
            func,
            y0,
            T[0],
            event_fn=lambda t, y: t - 0.4 - 0.1 * torch.tanh(y).sum(),
            odeint_interface=odeint_adjoint,
            method=method,
            options=options,
            gradient=gradient,
        )
        return torch.autograd.grad(event_t + loss_of(ys), [y0, *func.parameters()])

    assert all(torch.equal(a, b) for a, b in zip(of("auto"), of(other), strict=True))


def test_an_integral_is_solved_by_the_discrete_adjoint():
    def of(gradient):
        func = MLP(hidden=4)
        found = solve(func, Y, T, gradient=gradient, integral=lambda t, y, dy: dy.square().sum())
        return found.stats, torch.autograd.grad(found.integral[-1], [func.w1])[0]

    (stats, auto), (_, discrete) = of("auto"), of("discrete")
    assert stats.why_gradient is None and torch.equal(auto, discrete)


@pytest.mark.parametrize("method", ["dopri5", "explicit_adams"])
def test_parameters_that_can_be_read_once_and_functions_get_their_gradient(method):
    inner = MLP(hidden=4)
    ys = odeint_adjoint(
        lambda t, y: inner(t, y), Y, T, method=method, gradient="auto", adjoint_params=(p for p in inner.parameters())
    )
    loss_of(ys).backward()
    assert inner.w1.grad is not None and inner.w1.grad.abs().max() > 0


def test_a_function_without_parameters_is_told_to_name_them():
    with pytest.raises(ValueError, match=r"adjoint_params=\(\)"):
        solve(lambda t, y: -y, Y, T, gradient="auto")


@pytest.mark.parametrize("method", ["dopri5", "explicit_adams"])
def test_transforms_pass(method):
    def loss(y0):
        return loss_of(odeint_adjoint(func, y0, T, method=method, gradient="auto"))

    func = MLP(hidden=4)
    y0 = Y.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(y0), y0)
    assert torch.equal(torch.func.grad(loss)(Y), expected)
    rows = torch.func.vmap(torch.func.grad(loss))(Y)
    assert torch.equal(rows, torch.stack([torch.func.grad(loss)(y) for y in Y]))


# ------------------------------------------------------------------ who takes it
def test_it_is_the_default_of_the_layer_and_of_nothing_else():
    func = MLP(hidden=4)
    layer = NeuralODE(func, T)
    loss_of(layer(Y)).backward()
    assert layer.gradient == "auto" and layer.stats.why_gradient is None and layer.stats.graph_of == "step"
    assert "discrete" not in type(odeint_adjoint(func, Y, T).grad_fn).__name__
    assert hasattr(odeint_adjoint(func, Y, T).grad_fn, "adjoint_options"), "that of the adjoint, as in torchdiffeq"
    assert solve(lambda t, y: -y, Y, T).stats.why_gradient is None, "backprop asks for no parameters"


def test_checkpoints_belong_to_discrete_and_auto():
    assert NeuralODE(MLP(hidden=4), checkpoints=3).solver["checkpoints"] == 3
    with pytest.raises(InvalidInput, match='belongs to gradient="discrete" and "auto"; got gradient=\'adjoint\''):
        NeuralODE(MLP(hidden=4), checkpoints=3, gradient="adjoint")
    with pytest.raises(InvalidInput, match="must be a number of states"):
        solve(MLP(hidden=4), Y, T, gradient="auto", checkpoints=0)


def test_an_implicit_method_that_is_given_to_the_adjoint_stores_its_solution():
    func, y0 = MLP(dim=2), torch.ones(2, dtype=F64)

    def gradients(mode):
        solution = solve(func, y0, linspace(0.0, 1.0, 3), method="kvaerno5", gradient=mode, adjoint_rtol=1e-6)
        return torch.autograd.grad(solution.ys[-1].sum(), tuple(func.parameters())), solution.stats

    (found, stats), (expected, _) = gradients("auto"), gradients("adjoint")
    assert stats.why_gradient is not None and "adjoint_rtol" in stats.why_gradient
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
