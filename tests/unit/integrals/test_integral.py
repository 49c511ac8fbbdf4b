"""solve(..., integral=g): int g dt beside y, in every mode; regularized(func): the penalties of Finlay et al. 2020."""

from __future__ import annotations

import contextlib
import math
import warnings

import pytest
import torch
from problems import BY_NAME, F64, MLP, Counting, as_tuple, flat, is_adaptive, linspace, loss_of
from problems import max_difference as plain_max_difference
from problems import relative_difference as plain_relative_difference
from tolerances import GRADCHECK, ROUNDING, rtol_and_limit
from torch import nn

from node_cuda import (
    METHODS,
    TABLEAUS,
    InvalidField,
    InvalidInput,
    InvalidType,
    NeuralODE,
    Status,
    Unsupported,
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
    regularized,
    solve,
)
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS

MODES = ("backprop", "adjoint", "discrete")
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
Y = torch.tensor([[1.5, -0.5], [0.3, 2.0], [-1.0, 0.7]], dtype=F64)
A = torch.tensor([[-0.3, 1.2], [-0.8, 0.1]], dtype=F64)
EPS = torch.tensor([[0.3, -1.1], [2.0, 0.4], [-0.7, 0.9]], dtype=F64)
T = linspace(0.0, 1.5, 4)

# The discrete adjoint and backpropagation add the same float64 terms in another order.
SAME = 1e-10
# The adjoint solves both passes with these tolerances: the error is the sum of both, times the growth of a solve.
BY_ADJOINT = dict(rtol=1e-8, atol=1e-8)
ADJOINT_ERROR = 1e-5
# dL/dt: backprop differentiates the interpolant, and its slope has only order 4. The other modes evaluate func.
TIME_ERROR = 1e-4


def detached(state):
    return tuple(x.detach() for x in as_tuple(state))


def max_difference(a, b):
    return plain_max_difference(detached(a), detached(b))


def relative_difference(a, b):
    return plain_relative_difference(detached(a), detached(b))


def decay(t, y):
    return -y


def squared(t, y, dy):
    """Return |dy|^2 of each sample."""
    return dy.square().sum(-1)


def decayed(t, y0=Y):
    """Return int |dy|^2 of the decay."""
    return 0.5 * (1 - torch.exp(-2 * (t - t[0])))[:, None] * y0.square().sum(-1)


class Weighted(nn.Module):
    """An integrand of t, y and dy, with a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, -0.2], dtype=F64))

    def forward(self, t, y, dy):
        return torch.stack([(dy**2 @ self.weight).sum(), torch.cos(t) * (y @ self.weight).square().sum()])


# ------------------------------------------------------------------ the integral
@pytest.mark.parametrize("method", METHODS)
def test_the_integral_is_the_closed_form_with_every_method_and_costs_no_evaluation_of_func(method):
    options = dict(dense="accurate") if is_adaptive(method) else dict(step_size=0.01)
    if method == "scipy_solver":
        options = {}
    rtol, limit = rtol_and_limit(method, 1e-6)
    limit = max(limit, 2e-2 if method in ("euler", "implicit_euler") else 1e-4)  # grids of h = 0.01, linear in between
    func = Counting(decay)
    solution = solve(func, Y, T, integral=squared, method=method, options=options, rtol=rtol, atol=rtol)
    assert solution.integral.shape == (4, 3) and solution.integral.dtype == F64
    assert torch.equal(solution.integral[0], torch.zeros(3, dtype=F64))
    assert relative_difference(solution.integral, decayed(T)) < limit
    assert solution.ys.shape == (4, 3, 2)
    assert func.nfe == solution.stats.nfe


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_the_integral_is_that_of_a_state_augmented_by_hand_in_torchdiffeq(torchdiffeq, method):
    func = MLP(dim=2, seed=1)
    by_hand = Counting(lambda t, state: (func(t, state[0]), squared(t, state[0], func(t, state[0]))))
    expected = torchdiffeq.odeint(by_hand, (Y, torch.zeros(3, dtype=F64)), T, method=method, rtol=1e-6, atol=1e-7)
    options = dict(dense="torchdiffeq") if method == "bosh3" else None
    solution = solve(func, Y, T, integral=squared, method=method, rtol=1e-6, atol=1e-7, options=options)
    assert relative_difference(solution.ys, expected[0]) < SAME
    assert relative_difference(solution.integral, expected[1]) < SAME
    assert solution.stats.nfe == by_hand.nfe


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,)])
def test_an_integrand_has_any_shape(shape):
    solution = solve(decay, Y, T, integral=lambda t, y, dy: torch.cos(t).expand(shape))
    assert solution.integral.shape == (4, *shape)
    # cos has been integrated to rtol = 1e-7.
    assert torch.allclose(solution.integral, torch.sin(T).reshape(4, *[1] * len(shape)).expand(4, *shape), atol=1e-6)


@pytest.mark.parametrize("y0", [torch.tensor(2.0, dtype=F64), torch.ones(2), torch.ones(1, 2, dtype=torch.float32)])
def test_the_integral_has_the_dtype_of_y0_for_every_dtype_of_the_integrand(y0):
    solution = solve(decay, y0, T.to(y0.dtype), integral=lambda t, y, dy: y.sum().double(), rtol=1e-4, atol=1e-4)
    assert solution.integral.dtype == y0.dtype == solution.ys.dtype
    assert solution.ys.shape == (4, *y0.shape)
    assert float(solution.integral[-1]) == pytest.approx(float(y0.sum()) * (1 - math.exp(-1.5)), rel=1e-3)


def test_beside_a_complex_state_a_real_integrand_has_a_real_integral_and_a_complex_one_a_complex_one():
    row = BY_NAME["complex"]
    real = solve(row.make(), row.y0, row.t, integral=lambda t, y, dy: y.abs().square().sum())
    both = solve(row.make(), row.y0, row.t, integral=lambda t, y, dy: dy)
    assert real.integral.dtype == F64 and both.integral.dtype == torch.complex128
    # The integral of dy/dt is y - y0; rtol is 1e-7.
    assert max_difference(both.integral, both.ys - row.y0) < 1e-6


def test_a_tuple_state_reaches_the_integrand_as_a_tuple_and_comes_back_as_one():
    row = BY_NAME["tuple"]
    solution = solve(row.make(), row.y0, row.t, integral=lambda t, y, dy: y[1].sum() + 0 * dy[0].sum())
    angle, speed = solution.ys
    assert angle.shape == speed.shape == (4, 2, 2)
    # The angle's derivative is the speed.
    assert max_difference(solution.integral, (angle - angle[0]).sum((1, 2))) < 1e-6


def test_backwards_in_time_the_integral_has_the_sign_of_dt():
    solution = solve(decay, Y, T.flip(0), integral=squared)
    # y grows backwards: int_{1.5}^{t} e^{2 (1.5 - s)} ds |y0|^2
    expected = 0.5 * (1 - torch.exp(2 * (1.5 - T.flip(0))))[:, None] * Y.square().sum(-1)
    assert relative_difference(solution.integral, expected) < 1e-6
    assert (solution.integral[1:] < 0).all()


def test_jump_t_handles_a_jump_of_the_integrand():
    solution = solve(decay, Y, T, integral=lambda t, y, dy: (t > 0.7).to(F64), options=dict(jump_t=[0.7]))
    assert torch.allclose(solution.integral, (T - 0.7).clamp(min=0.0), atol=1e-12)


@pytest.mark.parametrize("gradient", MODES)
def test_the_integral_up_to_an_event_has_two_values_and_event_fn_gets_only_y(gradient):
    def event(t, y):
        assert y.shape == (2,)
        return y[0] - 0.5

    y0 = torch.ones(2, dtype=F64)
    solution = solve(
        decay, y0, T[:2], event_fn=event, integral=lambda t, y, dy: y.sum(), gradient=gradient, adjoint_params=()
    )
    assert float(solution.event_t) == pytest.approx(math.log(2.0), abs=1e-6)
    assert solution.integral.shape == (2,) and float(solution.integral[0]) == 0.0
    assert float(solution.integral[1]) == pytest.approx(1.0, abs=1e-6)
    assert solution.ys.shape == (2, 2)


@pytest.mark.filterwarnings("ignore:t holds one time")
def test_one_time_has_the_integral_zero_without_an_evaluation():
    func = Counting(decay)
    solution = solve(func, Y, T[:1], integral=squared)
    assert torch.equal(solution.integral, torch.zeros(1, 3, dtype=F64))
    assert func.nfe == 0


def test_the_integral_at_a_time_that_was_not_reached_is_nan():
    solution = solve(lambda t, y: y * y, Y[0, :1], linspace(0.0, 2.0, 5), integral=squared, options=dict(throw=False))
    assert solution.status is Status.STEP_UNDERFLOW
    assert torch.equal(solution.integral.isnan(), torch.tensor([False, False, True, True, True]))


def test_without_an_integrand_there_is_no_integral():
    assert solve(decay, Y, T).integral is None


# ------------------------------------------------------------------ its effect on step control
def test_a_fast_integrand_beside_a_slow_state_is_accurate():
    solution = solve(lambda t, y: 0 * y, Y, T, integral=lambda t, y, dy: torch.cos(30 * t))
    # Steps of rtol = 1e-7 over some seven periods.
    assert max_difference(solution.integral, torch.sin(30 * T) / 30) < 1e-6
    assert solution.stats.accepted > 20


def test_a_custom_norm_gets_only_y_and_the_integral_is_still_accurate():
    seen = set()

    def norm(y):
        seen.add(y.shape)
        return y.abs().max()

    solution = solve(lambda t, y: 0 * y, Y, T, integral=lambda t, y, dy: torch.cos(30 * t), options=dict(norm=norm))
    assert seen == {Y.shape}
    assert max_difference(solution.integral, torch.sin(30 * T) / 30) < 1e-6


@pytest.mark.parametrize(
    "mine, by_hand",
    [(torch.tensor([1e-3, 1e-6], dtype=F64), (torch.tensor([1e-3, 1e-6], dtype=F64), 1e-6)), (1e-4, (1e-4, 1e-4))],
)
@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_the_tolerance_of_the_integral_is_the_smallest_of_those_of_y(name, mine, by_hand):
    other = dict(atol=1e-5) if name == "rtol" else dict(rtol=1e-5)
    solution = solve(decay, Y, T, integral=squared, **{name: mine}, **other)
    expected = solve(
        lambda t, state: (-state[0], squared(t, None, -state[0])),
        (Y, torch.zeros(3, dtype=F64)),
        T,
        **{name: by_hand},
        **other,
    )
    assert str(solution.stats) == str(expected.stats)
    assert relative_difference(solution.integral, expected.ys[1]) < SAME


def test_tupled_tolerances_hold_in_both_passes():
    row = BY_NAME["tuple"]
    y0 = tuple(part.clone().requires_grad_() for part in row.y0)
    solution = solve(
        row.make(),
        y0,
        row.t,
        integral=lambda t, y, dy: y[1].square().sum(),
        rtol=(1e-6, 1e-9),
        atol=(1e-6, torch.full((2, 2), 1e-9, dtype=F64)),
        gradient="adjoint",
        adjoint_rtol=(1e-8, 1e-9),
        adjoint_atol=1e-9,
        adjoint_params=(),
    )
    found = torch.autograd.grad(solution.integral[-1], y0)
    exact = solve(row.make(), y0, row.t, integral=lambda t, y, dy: y[1].square().sum(), rtol=1e-10, atol=1e-10)
    # rtol = 1e-6, times the growth of a solve.
    assert relative_difference(found, torch.autograd.grad(exact.integral[-1], y0)) < 1e-5


# ------------------------------------------------------------------ callables of the user get only y
def test_callbacks_of_both_passes_and_norms_of_the_adjoint_get_only_y():
    seen = {}

    class Watched(MLP):
        def callback_step(self, t, y, dt):
            seen["step"] = y.shape

        def callback_step_adjoint(self, t, state, dt):
            seen["adjoint"] = tuple(part.shape for part in state[1:3])

    def norm(parts):
        seen["norm"] = tuple(part.shape for part in parts)
        return max(float(part.abs().max()) if part.numel() else 0.0 for part in parts)

    func = Watched(dim=2)
    solution = solve(func, Y, T, integral=squared, gradient="adjoint", adjoint_options=dict(norm=norm))
    solution.integral[-1].sum().backward()
    assert seen["step"] == Y.shape
    assert seen["adjoint"] == (Y.shape, Y.shape)
    assert seen["norm"] == ((), Y.shape, Y.shape, *(p.shape for p in func.parameters()))


def test_a_grid_constructor_gets_only_y():
    def grid(func, y0, t):
        assert y0.shape == Y.shape and func(t[0], y0).shape == Y.shape
        return linspace(0.0, 1.5, 31)

    solution = solve(decay, Y, T, integral=squared, method="rk4", options=dict(grid_constructor=grid))
    assert relative_difference(solution.integral, decayed(T)) < 1e-3  # linear between the grid's points
    assert solution.stats.accepted == 30


# ------------------------------------------------------------------ its gradients
def gradients_of(gradient, method="dopri5", *, event_fn=None, reverse=False, **arguments):
    """Return the gradients of a loss of y and its integral by y0, t and both modules' parameters."""
    func, integral = MLP(dim=2, seed=1, timed=True), Weighted()
    y0, t = Y.clone().requires_grad_(), (T.flip(0) if reverse else T).clone().requires_grad_()
    if event_fn is not None:
        t = t[:2]
    options = {} if method in (*ADAPTIVE, "scipy_solver") else dict(step_size=0.1)
    arguments = {**BY_ADJOINT, "options": options, **arguments}
    solution = solve(func, y0, t, integral=integral, gradient=gradient, method=method, event_fn=event_fn, **arguments)
    loss = loss_of(solution.ys) + loss_of(solution.integral)
    return torch.autograd.grad(loss, (y0, t, *func.parameters(), *integral.parameters()))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_the_three_modes_have_the_same_gradient_for_y0_times_and_both_modules_parameters(method, reverse):
    # On a grid the adjoint is that of the flow. rk4 with h = 0.1 differs from the flow by about h^4.
    limit = 1e-3 if method == "rk4" else ADJOINT_ERROR
    found = zip(*(gradients_of(gradient, method, reverse=reverse) for gradient in MODES), strict=True)
    for i, (backprop, adjoint, discrete) in enumerate(found):
        time = i == 1 and method == "dopri5"
        assert relative_difference(discrete, backprop) < (TIME_ERROR if time else SAME)
        # Between the points of the grid y is linear, and backprop differentiates that by time: the modes may differ.
        assert relative_difference(adjoint, backprop) < (TIME_ERROR if time else limit) or (i == 1 and not time)


@pytest.mark.parametrize("method", ["scipy_solver", "explicit_adams"])
def test_the_adjoint_of_other_methods_has_the_same_gradient_too(method):
    # LSODA's dense output is of lower order than its steps; Adams takes steps of 0.1, and order 4 builds up.
    rtol, limit = (1e-8, 1e-4) if method == "scipy_solver" else (1e-8, 1e-2)
    expected = gradients_of("backprop", rtol=rtol, atol=rtol)
    found = gradients_of("adjoint", method, rtol=rtol, atol=rtol)
    assert all(
        relative_difference(a, b) < limit for i, (a, b) in enumerate(zip(found, expected, strict=True)) if i != 1
    )


def test_the_gradient_up_to_an_event_is_the_same_in_every_mode():
    def event(t, y):
        return t - 0.77

    expected = gradients_of("backprop", event_fn=event)
    for gradient in ("adjoint", "discrete"):
        found = gradients_of(gradient, event_fn=event)
        # Except for t: for backprop the event's time relative to t[0] is constant, for the others the time itself.
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert i == 1 or relative_difference(a, b) < ADJOINT_ERROR


# Two modes are exact for the steps of a grid; the adjoint is as good as its tolerances.
EXACT = dict(method="rk4", options=dict(step_size=0.25))
CHECKED = dict(backprop=EXACT, discrete=EXACT, adjoint=BY_ADJOINT)


@pytest.mark.parametrize("gradient", MODES)
def test_gradcheck(gradient):
    def integral_of(y0, w):
        return solve(
            lambda t, y: torch.tanh(y @ w) * torch.cos(t),
            y0,
            T[:2],
            integral=lambda t, y, dy: (dy.square() * y).sum(-1),
            gradient=gradient,
            adjoint_params=(w,),
            **CHECKED[gradient],
        ).integral

    # One sample: gradcheck takes two solves for every element.
    atol = 1e-5 if gradient == "adjoint" else GRADCHECK["atol"]
    assert torch.autograd.gradcheck(
        integral_of, (Y[:1].clone().requires_grad_(), A.clone().requires_grad_()), **{**GRADCHECK, "atol": atol}
    )


def test_the_parameters_of_a_replica_are_found_beside_the_integral():
    """DataParallel makes the parameters of a replica plain tensors, computed from the original ones."""

    class Replica(nn.Module):
        _is_replica = True

        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, t, y):
            return y @ self.weight

    weight = A.clone().requires_grad_()
    for func in (Replica(weight * 1.0), regularized(Replica(weight * 1.0), jacobian=1.0, noise=EPS)):
        integral = squared if isinstance(func, Replica) else None
        solution = solve(func, Y, T, integral=integral, gradient="discrete")
        (found,) = torch.autograd.grad(solution.integral[-1].sum(), weight)
        assert found.abs().max() > 0.1


@pytest.mark.parametrize("gradient", MODES)
def test_the_layer_trains_the_integrand_too(gradient):
    layer = NeuralODE(MLP(dim=2), gradient=gradient, integral=Weighted())
    assert any(p is layer.integral.weight for p in layer.parameters())
    ys, integral = layer(Y, T)
    assert ys.shape == (4, 3, 2) and integral.shape == (4, 2)
    integral[-1].sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    assert "integral" in str(layer)


def test_an_integrand_whose_parameters_are_in_no_module_gives_a_warning():
    weight = torch.ones(2, dtype=F64, requires_grad=True)
    with pytest.warns(UserWarning, match="requires a gradient and is not among the parameters of"):
        solve(MLP(dim=2), Y, T, integral=lambda t, y, dy: dy @ weight, gradient="discrete")


# ------------------------------------------------------------------ mistakes
def writes(t, y):
    return y.neg_()


@pytest.mark.parametrize(
    "call, classes, words",
    [
        (lambda: solve(decay, Y, T, integral=3.0), InvalidType, "integral must be callable.*got a float.*lambda"),
        (lambda: solve(decay, Y, T, integral=lambda t, y, dy: 1.0), InvalidField, "must return a tensor; got a float"),
        (lambda: solve(decay, Y, T, integral=lambda t, y, dy: None), InvalidField, "forget `return`"),
        (lambda: solve(decay, Y, T, integral=lambda t, y, dy: 1j * dy), InvalidField, "integral returned.*`out.real`"),
        (
            lambda: solve(decay, Y, T, integral=lambda t, y, dy: dy[dy != 0]),
            InvalidField,
            r"same shape.*got \(6,\).*\(0,\)",
        ),
        (lambda: solve(writes, Y, T, integral=squared), InvalidField, r"func wrote into.*y.clone\(\)"),
        (
            lambda: solve(decay, Y, T, integral=lambda t, y, dy: dy.square_().sum()),
            InvalidField,
            r"integral wrote into.*dy.clone\(\)",
        ),
        (lambda: solve(lambda t, y: y[0], Y, T, integral=squared), InvalidField, r"func must return dy/dt.*got \(2,\)"),
        (lambda: solve(lambda t, y: None, Y, T, integral=squared), InvalidField, "func must return a tensor"),
        (lambda: solve(lambda t, y: 1j * y, Y, T, integral=squared), InvalidField, "func returned.*imaginary"),
        (
            lambda: solve(lambda t, y: y[:1], (Y, Y), T, integral=lambda t, y, dy: y[0]),
            InvalidField,
            "a tuple of 2 tensors.*got 1 of them",
        ),
        (
            lambda: solve(decay, Y, T, integral=Weighted(), gradient="adjoint"),
            ValueError,
            "func must be an nn.Module.*got a function.*adjoint_params",
        ),
        (lambda: regularized(3.0, kinetic=1.0), InvalidType, "func must be callable.*a float"),
        (lambda: regularized(regularized(decay, kinetic=1.0), 1.0), InvalidType, "regularized already"),
        (lambda: regularized(decay), InvalidInput, "kinetic=0 and jacobian=0.*Use"),
        (lambda: regularized(decay, kinetic=-1.0), InvalidInput, "kinetic must be.*not negative; got -1.0"),
        (lambda: regularized(decay, jacobian="1"), InvalidInput, "jacobian must be a number"),
        (lambda: regularized(decay, 1.0, noise="uniform"), InvalidInput, "'gaussian' or 'rademacher'"),
        (lambda: regularized(decay, 1.0, noise=3), InvalidType, "noise must be a tensor"),
        (
            lambda: solve(regularized(decay, jacobian=1.0, noise=EPS[0]), Y, T),
            InvalidInput,
            r"noise must have the shapes.*\(3, 2\).*got \[\(2,\)\]",
        ),
        (lambda: solve(regularized(decay, 1.0, parts=1), Y, T), InvalidInput, "parts must be.*which has 1; got 1"),
        (
            lambda: solve(regularized(decay, 1.0), Y, T, integral=squared),
            InvalidInput,
            "integral was given together with regularized",
        ),
        (
            lambda: solve(regularized(decay, 1.0), Y, T, gradient="discrete"),
            ValueError,
            "func must be an nn.Module.*got a function.*adjoint_params",
        ),
        (lambda: odeint(regularized(decay, 1.0), Y, T), InvalidInput, r"odeint returns y alone.*`solve\(...\)`"),
        (lambda: odeint_adjoint(regularized(decay, 1.0), Y, T), InvalidInput, "odeint_adjoint returns y alone"),
        (lambda: odeint_dense(regularized(decay, 1.0), Y, T[0], T[1]), InvalidInput, "odeint_dense returns y alone"),
        (
            lambda: odeint_event(regularized(decay, 1.0), Y, T[0], event_fn=lambda t, y: y[0, 0]),
            InvalidInput,
            "returns y alone",
        ),
    ],
)
def test_the_error_for_a_mistake_says_what_to_change(call, classes, words):
    with pytest.raises(classes, match=words):
        call()


# ------------------------------------------------------------------ regularized
def linear(t, y):
    return y @ A.T


def test_the_kinetic_penalty_is_the_closed_form_for_each_sample():
    solution = solve(regularized(decay, kinetic=0.3), Y, T)
    assert relative_difference(solution.integral, 0.3 * decayed(T)) < 1e-6


def test_the_jacobian_penalty_of_a_linear_field_is_the_norm_of_its_transpose_times_the_noise():
    """The integral is exact to rounding, because the integrand is constant."""
    solution = solve(regularized(linear, jacobian=0.2, noise=EPS), Y, T)
    expected = 0.2 * (EPS @ A).square().sum(-1) * T[:, None]
    assert relative_difference(solution.integral, expected) < 100 * ROUNDING[F64]


def test_both_penalties_are_added():
    both = solve(regularized(linear, 0.3, 0.2, noise=EPS), Y, T).integral
    one = solve(regularized(linear, kinetic=0.3), Y, T).integral
    other = solve(regularized(linear, jacobian=0.2, noise=EPS), Y, T).integral
    assert relative_difference(both, one + other) < 100 * ROUNDING[F64]


def test_backwards_in_time_penalties_are_positive():
    solution = solve(regularized(linear, 0.3, 0.2, noise=EPS), Y, T.flip(0))
    forward = solve(regularized(lambda t, y: -linear(t, y), 0.3, 0.2, noise=EPS), Y, T)
    assert (solution.integral[1:] > 0).all()
    # The same flow, forwards in time.
    assert relative_difference(solution.integral, forward.integral) < 1e-12


@pytest.mark.parametrize("method", [name for name in METHODS if name != "scipy_solver"])
@pytest.mark.parametrize("weights", [dict(kinetic=1e3), dict(jacobian=1e3)], ids=["kinetic", "jacobian"])
def test_steps_evaluations_and_solution_are_those_of_func_alone(method, weights):
    def recorded(func):
        counting = Counting(MLP(dim=2, seed=3, timed=True))
        options = dict(record_steps=True, **({} if is_adaptive(method) else dict(step_size=0.1)))
        with torch.no_grad():
            solution = solve(func(counting), Y, T, method=method, options=options, rtol=1e-4, atol=1e-5)
        return solution, counting.nfe

    alone, nfe = recorded(lambda func: func)
    with_penalty, nfe_with = recorded(lambda func: regularized(func, **weights))
    assert nfe == nfe_with == with_penalty.stats.nfe == alone.stats.nfe
    assert with_penalty.stats.rejected == alone.stats.rejected
    # The same arithmetic on longer vectors; that of a linear system is another.
    assert relative_difference(torch.tensor(with_penalty.stats.step_times), torch.tensor(alone.stats.step_times)) < 1e-9
    limit = 1e-10 if method in IMPLICIT_TABLEAUS else 1e-12
    assert relative_difference(with_penalty.ys, alone.ys) < limit


@pytest.mark.parametrize("tolerance", [1e-5, torch.tensor([1e-4, 1e-6], dtype=F64)])
def test_penalties_change_no_step_with_a_custom_norm_and_per_element_tolerances(tolerance):
    arguments = dict(rtol=tolerance, atol=tolerance, options=dict(norm=lambda y: y.abs().max()))
    alone, with_penalty = (
        solve(f, Y, T, **arguments) for f in (linear, regularized(linear, kinetic=1e3, jacobian=1e3))
    )
    assert with_penalty.stats.nfe == alone.stats.nfe
    assert relative_difference(with_penalty.ys, alone.ys) < 1e-12


def test_the_steps_of_lsoda_are_those_of_func_alone():
    """The norm of lsoda is the largest element. The norms of scipy's other solvers are means over all elements."""
    alone, with_penalty = (solve(f, Y, T, method="scipy_solver") for f in (linear, regularized(linear, 1e3, 1e3)))
    assert with_penalty.stats.nfe == alone.stats.nfe
    assert relative_difference(with_penalty.ys, alone.ys) < 1e-12


def test_an_integral_of_the_user_takes_part_in_step_control():
    """Without this test, the tests above would pass if no integral took part in step control."""
    alone = solve(linear, Y, T, rtol=1e-4, atol=1e-5)
    beside = solve(linear, Y, T, rtol=1e-4, atol=1e-5, integral=lambda t, y, dy: 1e3 * torch.sin(20 * y).sum())
    assert beside.stats.nfe > alone.stats.nfe


@pytest.mark.parametrize("given", [dict(), dict(adjoint_rtol=1e-13, adjoint_atol=1e-6)], ids=str)
def test_the_backward_steps_do_not_depend_on_the_size_of_the_penalty(given):
    """The penalty is a million times larger, and its weight in the loss is a millionth."""
    func, nfe = MLP(dim=2, seed=3), []
    for size in (1.0, 1e6):
        solution = solve(regularized(func, kinetic=size), Y, T, gradient="adjoint", **given)
        (solution.integral[-1].sum() / size).backward()
        nfe.append(solution.stats.nfe_backward)
    assert nfe[0] == nfe[1]


@pytest.mark.parametrize("gradient", MODES)
def test_func_is_evaluated_once_a_stage(gradient):
    func = Counting(MLP(dim=2, seed=3))
    solution = solve(regularized(func, 0.1, 0.1), Y, T, gradient=gradient)
    assert func.nfe == solution.stats.nfe
    loss_of(solution.integral).backward()
    assert gradient != "adjoint" or func.nfe == solution.stats.nfe + solution.stats.nfe_backward


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_noise_is_drawn_once_a_solve_and_again_by_the_same_seed(noise):
    func = regularized(linear, jacobian=1.0, noise=noise)
    torch.manual_seed(5)
    first, second = solve(func, Y, T).integral, solve(func, Y, T).integral
    torch.manual_seed(5)
    assert torch.equal(solve(func, Y, T).integral, first)
    assert not torch.equal(first, second)
    # Constant over a solve: the integral of a linear field's penalty grows like t.
    assert relative_difference(first, first[-1] * T[:, None] / T[-1]) < 1e-12


def test_rademacher_noise_is_exact_for_an_elementwise_field():
    """eps^2 = 1, so the penalty is the sum of the squared slopes."""
    slopes = torch.tensor([2.0, -0.5], dtype=F64)
    solution = solve(regularized(lambda t, y: slopes * y, jacobian=1.0, noise="rademacher"), Y, T)
    assert relative_difference(solution.integral[-1], slopes.square().sum().expand(3) * T[-1]) < 1e-12


def test_gaussian_noise_has_the_frobenius_norm_as_its_mean():
    y0 = torch.zeros(4000, 2, dtype=F64)
    solution = solve(regularized(linear, jacobian=1.0), y0, T[:2], method="rk4")
    # The variance of |A^T eps|^2 is 2 |A^T A|^2: a standard error of 0.03, four of which are allowed.
    assert float(solution.integral[-1].mean() / T[1]) == pytest.approx(float(A.square().sum()), abs=0.15)


@pytest.mark.parametrize(
    "y0, shape",
    [(Y, (3,)), (Y[0], ()), (Y[0, 0], ()), (Y.reshape(1, 3, 2), (1,)), (Y[:0], (0,))],
    ids=["batch", "vector", "number", "images", "empty"],
)
@pytest.mark.parametrize("weights", [dict(kinetic=1.0), dict(jacobian=1.0)], ids=["kinetic", "jacobian"])
def test_the_penalty_is_one_number_a_sample(y0, shape, weights):
    method = "dopri5" if y0.numel() else "rk4"  # no error to choose steps by
    assert solve(regularized(decay, **weights), y0, T, method=method).integral.shape == (4, *shape)


class Flow(nn.Module):
    """(z, logp) of a continuous normalizing flow, which computes a divergence."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(A.clone())

    def forward(self, t, state):
        z, _ = state
        return z @ self.A.T, self.A.trace().expand(len(z))


@pytest.mark.parametrize("parts", [0, -2, (0,), None], ids=str)
def test_parts_selects_the_components_of_the_penalty(parts):
    state = (Y, torch.zeros(3, dtype=F64))
    noise = (EPS, torch.zeros(3, dtype=F64)) if parts is None else EPS
    solution = solve(regularized(Flow(), 0.5, 0.2, parts=parts, noise=noise), state, T)
    assert solution.integral.shape == (4, 3)
    kinetic = solve(Flow(), state, T, integral=lambda t, y, dy: 0.5 * dy[0].square().sum(-1)).integral
    if parts is None:
        kinetic = kinetic + 0.5 * T[:, None] * A.trace().square()
    expected = kinetic + 0.2 * T[:, None] * (EPS @ A).square().sum(-1)
    assert relative_difference(solution.integral, expected) < 1e-6


def test_components_without_a_common_first_dimension_have_one_number():
    solution = solve(regularized(lambda t, y: y, kinetic=1.0), (Y, Y[0]), T)
    assert solution.integral.shape == (4,)
    alone = solve(regularized(lambda t, y: y, kinetic=1.0, parts=0), (Y, Y[0]), T)
    assert alone.integral.shape == (4, 3)


def test_a_complex_field_has_a_real_penalty():
    rate = -0.2 + 3j
    y0 = BY_NAME["complex"].y0[:, None]
    solution = solve(regularized(lambda t, y: rate * y, jacobian=1.0, noise=torch.ones_like(y0)), y0, T)
    assert solution.integral.dtype == F64
    assert relative_difference(solution.integral, abs(rate) ** 2 * T[:, None].expand(4, 2)) < 1e-12


def test_a_field_without_a_slope_has_no_jacobian_penalty():
    for func in (lambda t, y: torch.ones_like(y), lambda t, y: y.detach() * 2, lambda t, y: t * A.sum() + 0 * Y):
        assert not solve(regularized(func, jacobian=1.0), Y, T).integral.any()


def test_a_field_that_writes_into_its_argument_gets_a_copy():
    for weights in (dict(kinetic=1.0), dict(jacobian=1.0, noise=EPS)):
        found = solve(regularized(writes, **weights), Y, T).integral
        assert relative_difference(found, solve(regularized(decay, **weights), Y, T).integral) < 1e-12


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_if_nothing_requires_a_gradient(context):
    with context():
        solution = solve(regularized(lambda t, y: y * torch.cos(t), jacobian=0.1, noise=EPS), Y, T)
        assert not solution.ys.requires_grad and not solution.integral.requires_grad
    # int_0^t cos^2
    expected = 0.5 * (T + torch.sin(T) * torch.cos(T))[:, None] * 0.1 * EPS.square().sum(-1)
    assert relative_difference(solution.integral, expected) < 1e-6


def test_calling_a_regularized_field_calls_func():
    func = MLP(dim=2)
    wrapped = regularized(func, kinetic=0.1)
    assert torch.equal(wrapped(T[0], Y), func(T[0], Y))
    assert [id(p) for p in wrapped.parameters()] == [id(p) for p in func.parameters()]
    assert "kinetic=0.1, jacobian=0" in str(wrapped)


# ------------------------------------------------------------------ the gradients of regularized
def penalty_gradients(gradient, weights, *, func=None, y0=Y, integral=None, method="dopri5"):
    """Return the gradients of a loss of y and the penalty by y0, t and the parameters."""
    func = MLP(dim=2, seed=1, timed=True) if func is None else func
    starts = [part.clone().requires_grad_() for part in ((y0,) if isinstance(y0, torch.Tensor) else y0)]
    t = T.clone().requires_grad_()
    field = func if integral is not None else regularized(func, **weights)
    state = starts[0] if isinstance(y0, torch.Tensor) else tuple(starts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a new leaf in the graph would give the warning for a tensor of the user
        solution = solve(field, state, t, gradient=gradient, integral=integral, method=method, **BY_ADJOINT)
    loss = loss_of(solution.ys) + loss_of(solution.integral)
    return torch.autograd.grad(loss, (*starts, t, *func.parameters()))


@pytest.mark.parametrize("gradient", MODES)
def test_the_penalty_is_that_of_the_same_integral_written_by_hand(gradient):
    """The field is tanh(y W^T). Its Jacobian is diag(1 - tanh^2) W."""

    class Known(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(A.clone())

        def forward(self, t, y):
            return torch.tanh(y @ self.W.T)

    func = Known()

    def by_hand(t, y, dy):
        return 0.3 * dy.square().sum(-1) + 0.7 * (((1 - dy.square()) * EPS) @ func.W).square().sum(-1)

    expected = penalty_gradients(gradient, {}, func=func, integral=by_hand)
    found = penalty_gradients(gradient, dict(kinetic=0.3, jacobian=0.7, noise=EPS), func=func)
    # The steps of the former do not depend on the penalty, which is of the size of y1 and has no known tolerance.
    assert all(relative_difference(a, b) < 1e-4 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("gradient", MODES)
def test_the_gradient_of_a_flow_with_parts_and_of_an_unused_first_parameter(gradient):
    class Spare(Flow):
        def __init__(self):
            super().__init__()
            self.A, self.spare = nn.Parameter(A.clone()), nn.Parameter(torch.ones(2))

        def parameters(self, recurse=True):
            return reversed(list(super().parameters(recurse)))

    func = Spare()
    solution = solve(
        regularized(func, jacobian=1.0, parts=0, noise=EPS), (Y, torch.zeros(3, dtype=F64)), T, gradient=gradient
    )
    (found,) = torch.autograd.grad(solution.integral[-1].sum(), (func.A,))
    # d/dA |A^T eps|^2 T = 2 T eps eps^T A, summed over the samples: rtol counts, though the integrand is constant,
    # as the adjoint integrates it backwards beside z.
    assert relative_difference(found, 2 * T[-1] * EPS.T @ (EPS @ A)) < 1e-6


@pytest.mark.parametrize("gradient", MODES)
def test_the_gradient_of_a_field_that_is_no_module(gradient):
    w = A.clone().requires_grad_()
    solution = solve(
        regularized(lambda t, y: y @ w.T, jacobian=1.0, noise=EPS), Y, T, gradient=gradient, adjoint_params=iter((w,))
    )
    (found,) = torch.autograd.grad(solution.integral[-1].sum(), (w,))
    assert relative_difference(found, 2 * T[-1] * EPS.T @ (EPS @ A)) < 1e-6


@pytest.mark.parametrize("method", ["rk4", "explicit_adams"])
def test_the_penalty_has_the_same_gradient_on_fixed_grids(method):
    backprop = penalty_gradients("backprop", dict(kinetic=0.5, jacobian=0.5, noise=EPS), method=method)
    other = "discrete" if method == "rk4" else "adjoint"
    found = penalty_gradients(other, dict(kinetic=0.5, jacobian=0.5, noise=EPS), method=method)
    # Three steps of 0.5: the adjoint of Adams is of the flow.
    limit = SAME if method == "rk4" else 0.3
    assert all(relative_difference(a, b) < limit for a, b in zip(found, backprop, strict=True))


def test_a_penalty_of_backprop_is_differentiable_twice():
    w = A.clone().requires_grad_()
    solution = solve(regularized(lambda t, y: y @ w.T, jacobian=1.0, noise=EPS), Y, T)
    (first,) = torch.autograd.grad(solution.integral[-1].sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), w)
    ones = torch.ones_like(A)
    assert relative_difference(second, 2 * T[-1] * EPS.T @ (EPS @ ones)) < 1e-10


@pytest.mark.parametrize("gradient", MODES)
def test_the_layer_returns_the_penalty_and_training_lowers_it(gradient):
    layer = NeuralODE(regularized(MLP(dim=2, seed=1), 0.1, 0.1), gradient=gradient, rtol=1e-4, atol=1e-4)
    penalties = []
    for _ in range(4):
        torch.manual_seed(0)  # the same noise, to compare
        ys, penalty = layer(Y, T)
        assert ys.shape == (4, 3, 2) and penalty.shape == (4, 3)
        parameters = list(layer.parameters())
        gradients = torch.autograd.grad(penalty[-1].mean(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= 0.2 * g
        penalties.append(float(penalty[-1].detach().mean()))
    assert penalties == sorted(penalties, reverse=True)
    assert layer.stats.nfe_backward > 0 or gradient == "backprop"


def test_the_penalty_up_to_an_event_is_that_of_the_path_to_it():
    y0 = torch.ones(1, 2, dtype=F64)
    solution = solve(regularized(decay, kinetic=1.0), y0, T[:2], event_fn=lambda t, y: y[0, 0] - 0.5)
    # int_0^{log 2} 2 e^{-2t} dt
    assert float(solution.integral[1, 0]) == pytest.approx(0.75, abs=1e-6)
    assert flat(solution.ys).numel() == 4


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_under_torch_func_noise_is_drawn_once_or_refused_for_each_sample(noise):
    def penalty(y0):
        return solve(regularized(MLP(dim=2, seed=1), jacobian=1.0, noise=noise), y0, T, gradient="adjoint").integral

    y0 = Y.clone().requires_grad_()
    torch.manual_seed(1)
    (expected,) = torch.autograd.grad(penalty(y0)[-1].sum(), y0)
    torch.manual_seed(1)
    assert torch.equal(torch.func.grad(lambda y: penalty(y)[-1].sum())(Y), expected)
    assert torch.func.vmap(penalty, randomness="same")(Y).shape == (3, 4)
    with pytest.raises(Unsupported, match=r"each sample of torch\.func\.vmap.*`noise=`"):
        torch.func.vmap(penalty, randomness="different")(Y)
