"""odeint: autograd's gradient of the computed steps (gradient="backprop")."""

from __future__ import annotations

import pytest
import torch
from problems import F64, MLP, TimedLinear, linspace, loss_of, relative_difference
from tolerances import GRADCHECK, rtol_and_limit

from node_cuda import TABLEAUS, odeint, odeint_adjoint, solve

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
FIXED = [name for name, tableau in TABLEAUS.items() if not tableau.adaptive]
ADAMS = ["explicit_adams", "implicit_adams"]
Y = torch.tensor([0.7, -0.4], dtype=F64)
W = torch.tensor([[0.3, -1.1], [0.8, 0.2]], dtype=F64)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def curved(w):
    """A field that depends on t, is not linear in y, and has the parameter w."""
    return lambda t, y: torch.tanh(y @ w.T) * torch.cos(t) + 0.1 * y * y


GRID, CUBIC = dict(step_size=0.3), dict(step_size=0.3, interp="cubic")


# The interpolation, and a grid made of the output times, are the same for every one-step method.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [(name, GRID) for name in (*FIXED, *ADAMS)] + [(name, o) for name in ("rk4", *ADAMS) for o in ({}, CUBIC)],
    ids=str,
)
def test_gradcheck_through_a_fixed_grid(method, options):
    """The inputs are y0, t and the parameters. Inner grid points move with t[0], and the last one moves with t[-1]."""
    if method in ADAMS:
        options = dict(options, max_order=4)
        if method == "implicit_adams":
            options = dict(options, max_iters=40)
    t = torch.tensor([0.0, 0.25, 0.45, 0.8, 1.0, 1.3], dtype=F64)

    def run(y0, t, w):
        # (a loose tolerance would stop the iteration of implicit_adams early, after a varying number of iterations)
        return odeint(curved(w), y0, t, rtol=1e-12, atol=1e-12, method=method, options=options)

    assert torch.autograd.gradcheck(run, (leaf(Y), leaf(t), leaf(W)), **GRADCHECK)


REPLAYED = torch.tensor([0.25, 0.5, 0.8, 1.1, 1.5], dtype=F64)  # the accepted steps, frozen
OUTPUTS = torch.tensor([0.0, 0.1, 0.4, 0.65, 0.9, 1.3], dtype=F64)  # inside steps: interpolants have kinks between them


# Where an accurate interpolant costs no stage, it is the default.
INTERPOLANTS = [(name, None) for name in ADAPTIVE] + [
    (name, "accurate") for name in ADAPTIVE if (accurate := TABLEAUS[name].accurate) is not None and accurate.extra
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dense"), INTERPOLANTS)
def test_gradcheck_through_an_adaptive_method_with_the_accepted_steps_replayed(method, dense):
    """Every step ends at a `step_t`, so only the first step, which begins at t[0], changes with the inputs."""
    options = dict(step_t=REPLAYED, first_step=1.0) | (dict(dense=dense) if dense else {})
    times = solve(
        curved(W), Y, OUTPUTS, rtol=1e3, atol=1e3, method=method, options=dict(options, record_steps=True)
    ).stats.step_times
    assert times == [0.0, *REPLAYED.tolist()]

    def run(y0, t, w):
        return odeint(curved(w), y0, t, rtol=1e3, atol=1e3, method=method, options=options)

    assert torch.autograd.gradcheck(run, (leaf(Y), leaf(OUTPUTS), leaf(W)), **GRADCHECK)


def test_gradcheck_when_time_runs_backwards():
    options = dict(step_t=-REPLAYED, first_step=1.0)

    def run(y0, t, w):
        return odeint(curved(w), y0, t, rtol=1e3, atol=1e3, options=options)

    assert torch.autograd.gradcheck(run, (leaf(Y), leaf(-OUTPUTS), leaf(W)), **GRADCHECK)


def test_gradcheck_of_a_tuple_state():
    def run(a, b, t, w):
        def func(t, state):
            return torch.tanh(state[0] @ w.T) * state[1].sum(), -state[1] * torch.cos(t) + state[0][:1]

        return odeint(func, (a, b), t, rtol=1e3, atol=1e3, options=dict(step_t=REPLAYED, first_step=1.0))

    b = torch.tensor([[0.5]], dtype=F64)
    assert torch.autograd.gradcheck(run, (leaf(Y), leaf(b), leaf(OUTPUTS), leaf(W)), **GRADCHECK)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradcheck_of_a_complex_state(method):
    options = dict(step_t=REPLAYED, first_step=1.0) if method == "dopri5" else {}

    def run(y0, t, w):
        return odeint(
            lambda t, y: (w * y + 1j * y.conj()) * torch.cos(t),
            y0,
            t,
            rtol=1e3,
            atol=1e3,
            method=method,
            options=options,
        )

    y0 = torch.tensor([0.5 + 0.2j, -0.3j], dtype=torch.complex128)
    w = torch.tensor([0.3 + 1j, -0.5 + 0.1j], dtype=torch.complex128)
    assert torch.autograd.gradcheck(run, (leaf(y0), leaf(OUTPUTS), leaf(w)), **GRADCHECK)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_second_derivatives_through_odeint(method):
    options = dict(step_t=REPLAYED, first_step=1.0) if method == "dopri5" else {}

    def run(y0, w):
        return odeint(curved(w), y0, OUTPUTS[::2], rtol=1e3, atol=1e3, method=method, options=options)

    assert torch.autograd.gradgradcheck(run, (leaf(Y), leaf(W)), **GRADCHECK)


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_the_gradient_of_an_adaptive_solve_is_that_of_the_solution(method):
    """No step is frozen here: the steps change with the inputs, but the effect is below the tolerance."""
    func = TimedLinear()
    y0, t = leaf(Y), leaf(linspace(0.0, 1.5, 4))
    rtol, limit = rtol_and_limit(method, 1e-6)
    options = {} if method in ADAPTIVE else dict(step_size=1 / 64)
    if method not in ADAPTIVE:
        limit = 100 * max((1 / 64) ** TABLEAUS[method].order, (1 / 64) ** 2 / 20)
    ys = odeint(func, y0, t, rtol=rtol, atol=rtol, method=method, options=options)
    # (dL/dt of outputs inside a step is the slope of its interpolant: of a lower order than the outputs themselves)
    grads = torch.autograd.grad(loss_of(ys), [y0, func.A])
    exact = torch.autograd.grad(loss_of(func.exact(y0, t)), [y0, func.A])
    assert relative_difference(tuple(grads), tuple(exact)) <= max(limit, 3e-3 if method == "bosh3" else 0)


def test_only_inputs_that_require_a_gradient_get_one():
    func = MLP()
    func.b1.requires_grad_(False)
    t = linspace(0.0, 1.0, 3)
    odeint(func, Y, t).sum().backward()
    assert func.w1.grad is not None and func.b1.grad is None
    assert t.grad is None and not t.requires_grad


def test_a_solve_of_constants_needs_no_gradient():
    assert not odeint(lambda t, y: -y, Y, linspace(0.0, 1.0, 3)).requires_grad
    assert not odeint_adjoint(lambda t, y: -y, Y, linspace(0.0, 1.0, 3), adjoint_params=()).requires_grad
