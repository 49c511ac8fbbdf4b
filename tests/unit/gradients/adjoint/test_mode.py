"""odeint_adjoint: the gradient of the solution by the continuous adjoint method."""

from __future__ import annotations

import math

import pytest
import torch
from problems import BY_NAME, F64, MLP, Counting, TimedLinear, as_tuple, linspace, loss_of, relative_difference
from tolerances import GLOBAL_ERROR_OVER_RTOL, SLOPE, rtol_and_limit
from torch import nn

import node_cuda
from node_cuda import TABLEAUS, InvalidInput, SolveError, Status, odeint, odeint_adjoint

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
FIXED = [name for name, tableau in TABLEAUS.items() if not tableau.adaptive]
ADAMS = ["explicit_adams", "implicit_adams"]
Y = torch.tensor([0.7, -0.4], dtype=F64)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


# ------------------------------------------------------------------ odeint_adjoint: the gradient of the solution
def adjoint_gradients(rtol, method=None, t=None, options=None, **arguments):
    """Return the gradients for (y0, t, A) of a loss of the whole solution, and the exact ones."""
    func = TimedLinear()
    y0, t = leaf(torch.stack([Y, 2 * Y + 1])), leaf(linspace(0.0, 1.5, 4) if t is None else t)
    ys = odeint_adjoint(func, y0, t, rtol=rtol, atol=rtol * 1e-2, method=method, options=options, **arguments)
    computed = torch.autograd.grad(loss_of(ys), [y0, t, func.A])
    exact = torch.autograd.grad(loss_of(func.exact(y0, t)), [y0, t, func.A])
    return computed, exact


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adjoint_gradients_are_exact_to_the_tolerance(method):
    rtol, limit = rtol_and_limit(method, 1e-6)
    # the solution is accurate at the ends of steps; between them it has the error of the default interpolant
    t = linspace(0.0, 1.5, 4)
    computed, exact = adjoint_gradients(rtol, method, t, options=dict(step_t=t[1:]))
    for name, ours, truth in zip(("y0", "t", "A"), computed, exact, strict=True):
        assert relative_difference(ours, truth) <= limit, name


@pytest.mark.parametrize("method", [*FIXED, *ADAMS])
def test_adjoint_gradients_on_a_fixed_grid_have_the_order_of_the_method(method):
    errors = []
    extra = dict(max_order=4) if method in ADAMS else {}
    for steps in (32, 64):
        t = linspace(0.0, 1.0, 2)
        computed, exact = adjoint_gradients(
            1e-12,
            method,
            t,
            options=dict(step_size=1 / steps, **extra, **(dict(max_iters=30) if method == "implicit_adams" else {})),
        )
        errors.append(relative_difference(computed, exact))
    order = TABLEAUS[method].order if method in TABLEAUS else {"explicit_adams": 3, "implicit_adams": 4}[method]
    assert math.log2(errors[0] / errors[1]) >= order - 2 * SLOPE
    assert errors[1] < 0.1


def test_scipy_solver_has_gradients_only_by_the_adjoint():
    pytest.importorskip("scipy")
    computed, exact = adjoint_gradients(1e-7, "scipy_solver")
    assert relative_difference(computed, exact) <= GLOBAL_ERROR_OVER_RTOL * 1e-7
    with pytest.warns(UserWarning, match="y0 requires a gradient, and scipy computes outside of autograd"):
        ys = odeint(lambda t, y: -y, leaf(Y), linspace(0.0, 1.0, 2), method="scipy_solver")
    assert not ys.requires_grad


@pytest.mark.parametrize("rtol", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("arguments", [{}, dict(adjoint_options=dict(norm="seminorm"))], ids=["default", "seminorm"])
def test_the_error_of_the_adjoint_follows_the_tolerance(rtol, arguments):
    computed, exact = adjoint_gradients(rtol, **arguments)
    assert relative_difference(computed, exact) <= GLOBAL_ERROR_OVER_RTOL * rtol


@pytest.mark.parametrize("backwards", [False, True])
def test_the_adjoint_of_a_network_agrees_with_backprop_at_a_tolerance_of_1e_12(backwards):
    func = MLP(dim=3, seed=4, timed=True)
    y0 = leaf(BY_NAME["mlp"].y0)
    t = leaf(linspace(1.5, -0.5, 4) if backwards else linspace(0.0, 2.0, 4))
    wanted = [y0, *func.parameters()]
    truth = torch.autograd.grad(
        loss_of(odeint(func, y0, t, rtol=1e-12, atol=1e-12, method="dopri8", options=dict(dense="accurate"))), wanted
    )
    for method in ("dopri5", "dopri8", "tsit5"):
        rtol = 1e-7
        ys = odeint_adjoint(func, y0, t, rtol=rtol, atol=rtol, method=method, options=dict(dense="accurate"))
        grads = torch.autograd.grad(loss_of(ys), wanted)
        assert relative_difference(tuple(grads), tuple(truth)) <= GLOBAL_ERROR_OVER_RTOL * rtol, method


def test_time_gradients_are_right_when_time_runs_backwards():
    computed, exact = adjoint_gradients(1e-7, t=linspace(1.5, -0.3, 4))
    assert relative_difference(computed, exact) <= GLOBAL_ERROR_OVER_RTOL * 1e-7


def test_the_gradient_of_time_costs_nothing_unless_it_is_required():
    nfe = []
    for wanted in (False, True):
        func = Counting(TimedLinear())
        t = linspace(0.0, 3.0, 4).requires_grad_(wanted)
        ys = odeint_adjoint(func, leaf(Y), t)
        before = func.nfe
        ys.sum().backward()
        nfe.append(func.nfe - before)
    assert nfe[0] < nfe[1] or nfe[0] <= 0.7 * nfe[1] + 10


def test_the_gradient_of_some_outputs_only():
    """The cotangent of the other outputs is zero, even if autograd sends no gradient at all."""
    func, y0 = TimedLinear(), leaf(Y)
    t = linspace(0.0, 1.5, 4)
    ys = odeint_adjoint(func, y0, t, rtol=1e-8, atol=1e-8)
    (grad,) = torch.autograd.grad(ys[1, 0], y0)
    (truth,) = torch.autograd.grad(func.exact(y0, t)[1, 0], y0)
    assert relative_difference(grad, truth) < 1e-6
    one, _two = odeint_adjoint(
        lambda t, s: (func(t, s[0]), s[1]), (y0, Y), t, adjoint_params=(func.A,), rtol=1e-8, atol=1e-8
    )
    (grad,) = torch.autograd.grad(one[1, 0], y0)
    assert relative_difference(grad, truth) < 1e-6


@pytest.mark.filterwarnings("ignore:t holds one time")
def test_with_one_output_time_the_gradient_of_y0_is_that_of_the_output():
    for solver in (odeint, lambda *args: odeint_adjoint(*args, adjoint_params=())):
        y0 = leaf(Y)
        (grad,) = torch.autograd.grad(solver(lambda t, y: -y, y0, linspace(0.0, 0.0, 1)).sum(), y0)
        assert torch.equal(grad, torch.ones_like(Y))


# ------------------------------------------------------------------ states
def test_a_tuple_state_gets_the_gradients_of_its_components():
    problem = BY_NAME["tuple"]
    starts = tuple(leaf(part) for part in problem.y0)
    ys = odeint_adjoint(problem.make(), starts, problem.t, rtol=1e-8, atol=1e-8, adjoint_params=())
    grads = torch.autograd.grad(loss_of(ys), starts)
    truth = torch.autograd.grad(loss_of(odeint(problem.make(), starts, problem.t, rtol=1e-10, atol=1e-10)), starts)
    assert relative_difference(grads, truth) < 1e-6


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_complex_gradients_are_right_for_y0_parameters_and_time(method):
    """y' = i w y cos t; torchdiffeq's dL/dt lacks a conjugate here."""
    y0 = leaf(torch.tensor([1.0 + 0.5j, -0.3 + 0.2j], dtype=torch.complex128))
    w = leaf(torch.tensor(1.5 - 0.2j, dtype=torch.complex128))
    t = leaf(linspace(0.2, 1.7, 3))
    options = dict(step_size=0.005) if method == "rk4" else {}
    ys = odeint_adjoint(
        lambda t, y: 1j * w * y * torch.cos(t),
        y0,
        t,
        rtol=1e-8,
        atol=1e-8,
        method=method,
        options=options,
        adjoint_params=(w,),
    )
    grads = torch.autograd.grad(loss_of(ys), [y0, w, t])
    exact = y0 * torch.exp(1j * w * (torch.sin(t) - torch.sin(t[0])))[:, None]
    truth = torch.autograd.grad(loss_of(exact), [y0, w, t])
    assert not grads[2].is_complex()
    for ours, right in zip(grads, truth, strict=True):
        assert float((ours - right).abs().max() / right.abs().max()) < 1e-5


def test_single_precision_gradients():
    func = MLP(dtype=torch.float32)
    y0 = torch.randn(8, 2).requires_grad_()
    ys = odeint_adjoint(func, y0, torch.linspace(0, 1, 4), rtol=1e-4, atol=1e-6)
    grads = torch.autograd.grad(loss_of(ys), [y0, *func.parameters()])
    truth = torch.autograd.grad(
        loss_of(odeint(func, y0, torch.linspace(0, 1, 4), rtol=1e-6, atol=1e-7)), [y0, *func.parameters()]
    )
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert relative_difference(grads, truth) < 1e-2


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 3)], ids=str)
def test_states_of_any_shape_have_gradients(shape):
    y0, rate = leaf(torch.rand(shape, dtype=F64) + 0.5), leaf(torch.tensor(0.7, dtype=F64))
    t = linspace(0.0, 1.0, 3)
    ys = odeint_adjoint(lambda t, y: rate * y * torch.cos(t), y0, t, rtol=1e-8, atol=1e-8, adjoint_params=(rate,))
    exact = y0 * torch.exp(rate * torch.sin(t)).reshape(-1, *[1] * len(shape))
    grads = torch.autograd.grad(loss_of(ys), [y0, rate])
    truth = torch.autograd.grad(loss_of(exact), [y0, rate])
    assert grads[0].shape == shape
    assert relative_difference(grads, truth) < 1e-6


# ------------------------------------------------------------------ tolerances, options and norms of the backward pass
def test_tupled_tolerances_hold_for_the_adjoint_too():
    """torchdiffeq answers 'tupled rtol' of a tuple state with an AssertionError in the backward pass."""
    problem = BY_NAME["tuple"]
    starts = tuple(leaf(part) for part in problem.y0)
    ys = odeint_adjoint(problem.make(), starts, problem.t, rtol=(1e-8, 1e-9), atol=(1e-8, 1e-9), adjoint_params=())
    grads = torch.autograd.grad(loss_of(ys), starts)
    truth = torch.autograd.grad(loss_of(odeint(problem.make(), starts, problem.t, rtol=1e-10, atol=1e-10)), starts)
    assert relative_difference(grads, truth) < 1e-6


def test_per_element_tolerances_hold_for_the_adjoint_too():
    tolerances = dict(rtol=torch.tensor([1e-8, 1e-9], dtype=F64), atol=torch.tensor([1e-9, 1e-8], dtype=F64))
    func, y0, t = TimedLinear(), leaf(Y), linspace(0.0, 1.5, 3)
    grads = torch.autograd.grad(loss_of(odeint_adjoint(func, y0, t, **tolerances)), [y0, func.A])
    truth = torch.autograd.grad(loss_of(func.exact(y0, t)), [y0, func.A])
    assert relative_difference(grads, truth) < 1e-6


def test_the_backward_pass_has_separate_tolerances_and_a_separate_method():
    def backward_nfe(**arguments):
        func = Counting(TimedLinear())
        ys = odeint_adjoint(func, leaf(Y), linspace(0.0, 2.0, 2), rtol=1e-6, atol=1e-6, **arguments)
        before = func.nfe
        ys.sum().backward()
        return func.nfe - before

    assert (
        backward_nfe(adjoint_rtol=1e-3, adjoint_atol=1e-3)
        < backward_nfe()
        < backward_nfe(adjoint_rtol=1e-9, adjoint_atol=1e-9)
    )
    grid = dict(adjoint_method="rk4", adjoint_options=dict(step_size=0.5))
    assert 16 <= backward_nfe(**grid) <= 18


def test_backward_steps_end_at_jumps_when_time_runs_backwards():
    """torchdiffeq uses jump_t of the backward pass with the wrong sign there, and needs 248 instead of 75 calls."""

    class Jumping(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0, dtype=F64))

        def forward(self, t, y):
            return self.w * torch.where(t < 0.5, 1.0, -3.0) * y

    nfe, grads = [], []
    for t in (linspace(0.0, 1.0, 2), linspace(1.0, 0.0, 2)):
        func = Counting(Jumping())
        y0 = leaf(Y)
        ys = odeint_adjoint(func, y0, t, rtol=1e-8, atol=1e-8, options=dict(jump_t=torch.tensor([0.5], dtype=F64)))
        before = func.nfe
        ys[-1].sum().backward()
        nfe.append(func.nfe - before)
        grads.append((y0.grad, func.func.w.grad))
    growth = math.exp(0.5 - 1.5)
    assert torch.allclose(grads[0][0], torch.full((2,), growth, dtype=F64), rtol=1e-6)
    assert torch.allclose(grads[1][0], torch.full((2,), 1 / growth, dtype=F64), rtol=1e-6)
    assert float(grads[0][1]) == pytest.approx(-growth * float(Y.sum()), rel=1e-6)
    assert float(grads[1][1]) == pytest.approx(float(Y.sum()) / growth, rel=1e-6)
    assert nfe[1] <= 1.5 * nfe[0] + 12


def test_step_times_and_grids_are_the_users_in_a_backward_pass_of_reversed_time():
    seen = []

    def grid(func, y0, t):
        seen.append(t.tolist())
        return torch.linspace(float(t[0]), float(t[-1]), 21, dtype=F64)

    func, y0 = TimedLinear(), leaf(Y)
    t = linspace(1.0, 0.0, 2)
    ys = odeint_adjoint(func, y0, t, method="rk4", options=dict(grid_constructor=grid))
    grads = torch.autograd.grad(loss_of(ys), [y0, func.A])
    assert seen == [[1.0, 0.0], [0.0, 1.0]]
    truth = torch.autograd.grad(loss_of(func.exact(y0, t)), [y0, func.A])
    assert relative_difference(grads, truth) < 1e-5


# ------------------------------------------------------------------ callbacks of the backward pass
class Reporting(TimedLinear):
    def __init__(self):
        super().__init__()
        self.steps: list[tuple[float, tuple, float]] = []
        self.accepted = self.rejected = 0

    def callback_step_adjoint(self, t0, y0, dt):
        assert t0.shape == dt.shape == ()
        self.steps.append((float(t0), tuple(part.shape for part in y0), float(dt)))

    def callback_accept_step_adjoint(self, t0, y0, dt):
        self.accepted += 1

    def callback_reject_step_adjoint(self, t0, y0, dt):
        self.rejected += 1


@pytest.mark.parametrize("backwards", [False, True])
def test_adjoint_callbacks_get_every_backward_step_in_the_users_time(backwards):
    func = Reporting()
    t = linspace(1.0, 0.25, 4) if backwards else linspace(0.25, 1.0, 4)
    ys = odeint_adjoint(func, leaf(Y), t)
    assert not func.steps
    ys.sum().backward()
    assert len(func.steps) == func.accepted + func.rejected > 0
    starts = [t0 for t0, _, _ in func.steps]
    assert all(0.2 <= t0 <= 1.05 for t0 in starts)
    assert starts[0] == float(t[-1])
    assert all(shapes[1] == shapes[2] == (2,) for _, shapes, _ in func.steps)


# ------------------------------------------------------------------ what the loss hands down
@pytest.mark.parametrize("m", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_in_the_gradient_of_the_loss_is_not_blamed_on_the_field(m, value):
    ys = odeint_adjoint(MLP(), Y, linspace(0.0, 1.0, 3))
    weights = torch.ones_like(ys)
    weights[m, 0] = value
    if m == 0:  # it is added to dL/dy0, and nothing is solved with it
        (ys * weights).sum().backward()
        return
    with pytest.raises(SolveError, match=r"NON_FINITE_GRADIENT.*dL/dy.*Look at the loss, not at func") as caught:
        (ys * weights).sum().backward()
    assert caught.value.status is Status.NON_FINITE_GRADIENT and "jump_t" not in str(caught.value)


# ------------------------------------------------------------------ double backward, nested use


def test_a_neural_ode_module_is_the_adjoint_of_its_field():
    func = MLP()
    y0 = leaf(Y)
    module = node_cuda.NeuralODE(func, gradient="adjoint")
    assert set(dict(module.named_parameters()).values()) == set(func.parameters())
    assert len(list(as_tuple(y0))) == 1


def test_gradients_accumulate_like_any_others():
    func = MLP()
    for _ in range(2):
        odeint_adjoint(func, Y, linspace(0.0, 1.0, 3)).sum().backward()
    twice = func.w1.grad.clone()
    func.zero_grad()
    odeint_adjoint(func, Y, linspace(0.0, 1.0, 3)).sum().backward()
    assert torch.allclose(twice, 2 * func.w1.grad)


def test_retain_graph_lets_the_backward_pass_run_twice():
    y0 = leaf(Y)
    loss = odeint_adjoint(MLP(), y0, linspace(0.0, 1.0, 3)).sum()
    (first,) = torch.autograd.grad(loss, y0, retain_graph=True)
    (second,) = torch.autograd.grad(loss, y0)
    assert torch.equal(first, second)


def test_an_implicit_method_for_the_backward_solve_alone_is_refused_in_words():
    with pytest.raises(InvalidInput, match="for both solves"):
        odeint_adjoint(nn.Linear(2, 2), torch.ones(2), torch.linspace(0, 1, 2), adjoint_method="kvaerno5",
                       method="dopri5", adjoint_options={})  # fmt: skip
