"""Gradients: of the computed solution through `odeint`, of the exact solution through `odeint_adjoint`."""

from __future__ import annotations

import math

import pytest
import torch
from problems import BY_NAME, F64, MLP, Counting, Parted, TimedLinear, as_tuple, linspace, loss_of, relative_difference
from tolerances import GLOBAL_ERROR_OVER_RTOL, GRADCHECK, SLOPE, rtol_and_limit
from torch import nn

import node_cuda
from node_cuda import TABLEAUS, InvalidInput, ReconstructionWarning, odeint, odeint_adjoint, solve

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


# ------------------------------------------------------------------ odeint: the gradient of what was computed
@pytest.mark.parametrize("options", [dict(), dict(step_size=0.3), dict(step_size=0.3, interp="cubic")], ids=str)
@pytest.mark.parametrize("method", [*FIXED, *ADAMS])
def test_gradcheck_through_a_fixed_grid(method, options):
    """For y0, t and the parameters; with a step size the inner grid points move with t[0], the last with t[-1]."""
    if method in ADAMS:
        options = dict(options, max_order=4)
        if method == "implicit_adams":
            options = dict(options, max_iters=40)
    t = torch.tensor([0.0, 0.25, 0.45, 0.8, 1.0, 1.3], dtype=F64)

    def run(y0, t, w):
        # (a loose tolerance would stop the functional iteration of implicit_adams early, at another place each time)
        return odeint(curved(w), y0, t, rtol=1e-12, atol=1e-12, method=method, options=options)

    assert torch.autograd.gradcheck(run, (leaf(Y), leaf(t), leaf(W)), **GRADCHECK)


REPLAYED = torch.tensor([0.25, 0.5, 0.8, 1.1, 1.5], dtype=F64)  # the accepted steps, frozen
OUTPUTS = torch.tensor([0.0, 0.1, 0.4, 0.65, 0.9, 1.3], dtype=F64)  # inside of steps: interpolants have kinks between


@pytest.mark.parametrize("dense", [None, "accurate"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_gradcheck_through_an_adaptive_method_with_the_accepted_steps_replayed(method, dense):
    """Every step ends on a `step_t`, so that no step moves with the inputs but the first, which begins at t[0]."""
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
    """Nothing frozen here: steps move with the inputs, by less than the tolerance lets them matter."""
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


def test_gradients_flow_to_what_the_caller_asks_for_and_to_nothing_else():
    func = MLP()
    func.b1.requires_grad_(False)
    t = linspace(0.0, 1.0, 3)
    odeint(func, Y, t).sum().backward()
    assert func.w1.grad is not None and func.b1.grad is None
    assert t.grad is None and not t.requires_grad


def test_a_solve_of_constants_needs_no_gradient():
    assert not odeint(lambda t, y: -y, Y, linspace(0.0, 1.0, 3)).requires_grad
    assert not odeint_adjoint(lambda t, y: -y, Y, linspace(0.0, 1.0, 3), adjoint_params=()).requires_grad


# ------------------------------------------------------------------ odeint_adjoint: the gradient of the solution
def adjoint_gradients(rtol, method=None, t=None, options=None, **arguments):
    """Gradients for (y0, t, A) of a loss of the whole solution, and the exact ones."""
    func = TimedLinear()
    y0, t = leaf(torch.stack([Y, 2 * Y + 1])), leaf(linspace(0.0, 1.5, 4) if t is None else t)
    ys = odeint_adjoint(func, y0, t, rtol=rtol, atol=rtol * 1e-2, method=method, options=options, **arguments)
    computed = torch.autograd.grad(loss_of(ys), [y0, t, func.A])
    exact = torch.autograd.grad(loss_of(func.exact(y0, t)), [y0, t, func.A])
    return computed, exact


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adjoint_gradients_are_exact_to_the_tolerance(method):
    rtol, limit = rtol_and_limit(method, 1e-6)
    # the solution itself is right at the ends of steps; between them only as good as the default interpolant
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


def test_scipy_solver_has_gradients_by_the_adjoint_only():
    pytest.importorskip("scipy")
    computed, exact = adjoint_gradients(1e-7, "scipy_solver")
    assert relative_difference(computed, exact) <= GLOBAL_ERROR_OVER_RTOL * 1e-7
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


def test_the_gradient_of_time_costs_nothing_unless_it_is_wanted():
    nfe = []
    for wanted in (False, True):
        func = Counting(TimedLinear())
        t = linspace(0.0, 3.0, 4).requires_grad_(wanted)
        ys = odeint_adjoint(func, leaf(Y), t)
        before = func.nfe
        ys.sum().backward()
        nfe.append(func.nfe - before)
    assert nfe[0] < nfe[1] or nfe[0] <= 0.7 * nfe[1] + 10


# ------------------------------------------------------------------ the way back
class Contracting(nn.Module):
    """dz/dt = -rate (z - g(z)): backwards, errors grow by exp(rate * time) and more."""

    def __init__(self, rate):
        super().__init__()
        self.rate, self.w = rate, nn.Parameter(W.clone())

    def forward(self, t, y):
        return -self.rate * (y - 0.3 * torch.tanh(y @ self.w.T))


CHECKED = dict(check_reconstruction=True)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "scipy_solver"])
def test_a_field_that_contracts_is_told_of_where_its_way_back_is_unstable(method):
    y0, t = leaf(Y), linspace(0.0, 5.0, 2)
    ys = odeint_adjoint(Contracting(4.0), y0, t, rtol=1e-5, atol=1e-7, method=method, options=CHECKED)
    with pytest.warns(ReconstructionWarning, match=r'rebuilt backwards at t = 0, .* tolerances.*gradient="discrete"'):
        ys.sum().backward()


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_warning_is_for_the_one_who_asked_in_either_options(name):
    t = linspace(0.0, 5.0, 2)
    where = dict(options=CHECKED) if name == "forward" else dict(adjoint_options=CHECKED)
    quiet = odeint_adjoint(Contracting(4.0), leaf(Y), t, rtol=1e-5, atol=1e-7)
    quiet.sum().backward()
    ys = odeint_adjoint(Contracting(4.0), leaf(Y), t, rtol=1e-5, atol=1e-7, **where)
    with pytest.warns(ReconstructionWarning):
        ys.sum().backward()


@pytest.mark.parametrize("gradient", ["backprop", "discrete"])
def test_a_check_of_what_is_not_rebuilt_is_refused(gradient):
    with pytest.raises(InvalidInput, match=r'check_reconstruction"\] belongs to gradient="adjoint".*Drop the option'):
        solve(MLP(), leaf(Y), linspace(0.0, 1.0, 2), gradient=gradient, options=CHECKED)


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("n", [2, 20])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("make", [MLP, TimedLinear])
def test_a_field_whose_way_back_is_fair_is_not_warned_of(make, tolerance, n, direction):
    solution = solve(
        make(), leaf(Y), direction * linspace(0.0, 2.0, n), rtol=tolerance, atol=tolerance, gradient="adjoint",
        options=CHECKED,
    )  # fmt: skip
    loss_of(solution.ys).backward()
    assert 0 < solution.stats.reconstruction_error < 100


def test_outputs_on_the_way_set_the_state_right_again():
    """With twenty outputs each stretch back is a twentieth, and the errors stay what the steps make."""
    t = linspace(0.0, 5.0, 20)
    solution = solve(Contracting(4.0), leaf(Y), t, rtol=1e-5, atol=1e-7, gradient="adjoint", options=CHECKED)
    loss_of(solution.ys).backward()
    assert solution.stats.reconstruction_error < 100


def test_the_error_is_that_of_the_rebuilt_state_in_tolerances():
    """y' = -8 y from an output that is off by one part in 1e4, as the forward tolerance let it be, back over T = 1."""
    y0, t = leaf(torch.ones(1, dtype=F64)), linspace(0.0, 1.0, 2)
    solution = solve(
        lambda t, y: -8 * y, y0, t, rtol=1e-4, atol=0.0, gradient="adjoint", adjoint_params=(), adjoint_rtol=1e-10,
        adjoint_atol=0.0, options=dict(dense="accurate", **CHECKED),
    )  # fmt: skip
    with pytest.warns(ReconstructionWarning):
        solution.ys[-1].sum().backward()
    off = abs(float(solution.ys[-1].detach()) / math.exp(-8) - 1)  # y backwards is y(1) exp(8), to 1e-10
    assert solution.stats.reconstruction_error == pytest.approx(off / 1e-10, rel=1e-3)


# ------------------------------------------------------------------ parameters
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_unused_parameters_get_zeros_and_fixed_ones_are_left_alone(method):
    func = Parted(W)
    odeint_adjoint(func, leaf(Y), linspace(0.0, 1.0, 3), method=method).sum().backward()
    assert torch.equal(func.unused.grad, torch.zeros(3, 2, dtype=F64))
    assert func.fixed.grad is None
    assert func.used.grad.abs().min() > 0


def test_a_field_that_depends_on_no_input_has_zero_gradients():
    y0, p = leaf(Y), leaf(W)
    odeint_adjoint(lambda t, y: torch.ones_like(y), y0, linspace(0.0, 1.0, 3), adjoint_params=(p,)).sum().backward()
    assert torch.allclose(y0.grad, torch.full((2,), 3.0, dtype=F64))
    assert torch.equal(p.grad, torch.zeros_like(W))


def test_adjoint_params_may_be_a_generator_and_need_not_be_parameters():
    w = leaf(W)
    scaled = w * 2  # not a leaf
    ys = odeint_adjoint(
        curved(scaled), Y, linspace(0.0, 1.0, 2), rtol=1e-9, atol=1e-9, adjoint_params=(p for p in (scaled,))
    )
    (grad,) = torch.autograd.grad(loss_of(ys), w)
    (truth,) = torch.autograd.grad(loss_of(odeint(curved(2 * w), Y, linspace(0.0, 1.0, 2), rtol=1e-9, atol=1e-9)), w)
    assert relative_difference(grad, truth) < 1e-6


def test_parameters_of_many_shapes_and_of_another_precision():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scalar = nn.Parameter(torch.tensor(0.5))  # float32 beside a float64 state
            self.matrix = nn.Parameter(W.clone())
            self.empty = nn.Parameter(torch.zeros(0, dtype=F64))

        def forward(self, t, y):
            return self.scalar.double() * torch.tanh(y @ self.matrix.T) + self.empty.sum()

    func = Mixed()
    ys = odeint_adjoint(func, Y, linspace(0.0, 1.0, 2), rtol=1e-8, atol=1e-8)
    grads = torch.autograd.grad(loss_of(ys), [func.scalar, func.matrix, func.empty])
    truth = torch.autograd.grad(
        loss_of(odeint(func, Y, linspace(0.0, 1.0, 2), rtol=1e-8, atol=1e-8)), [func.scalar, func.matrix]
    )
    assert [g.dtype for g in grads] == [torch.float32, F64, F64]
    assert relative_difference(grads[1], truth[1]) < 1e-6
    assert relative_difference(grads[0], truth[0]) < 1e-5
    assert grads[2].shape == (0,)


def test_parameters_may_change_after_the_backward_pass():
    func = MLP()
    optimizer = torch.optim.SGD(func.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = odeint_adjoint(func, Y, linspace(0.0, 1.0, 3), rtol=1e-5, atol=1e-5)[-1].square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_the_gradient_of_some_outputs_only():
    """The cotangent of the others is zero; also where autograd sends no gradient at all."""
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


def test_one_output_time_passes_the_gradient_through():
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


def test_the_backward_pass_has_tolerances_and_a_method_of_its_own():
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


def test_jumps_are_met_backwards_when_time_runs_backwards():
    """torchdiffeq takes jump_t of the backward pass with the wrong sign there and pays with 248 instead of 75 calls."""

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


def rms(x):
    return x.abs().square().mean().sqrt()


def default_norm(tensors):
    return max(rms(x) for x in tensors)


def semi_norm(tensors):
    return max(rms(x) for x in tensors[:3])


def backward_cost(norm=None, hidden=64):
    class Wiggling(MLP):
        def forward(self, t, y):
            return super().forward(t, y) * torch.sin(20 * t)

    func = Counting(Wiggling(hidden=hidden))
    options = {} if norm is None else dict(adjoint_options=dict(norm=norm))
    ys = odeint_adjoint(func, leaf(torch.stack([Y, 3 * Y])), linspace(0.0, 1.0, 2), rtol=1e-6, atol=1e-6, **options)
    before = func.nfe
    ys.sum().backward()
    return func.nfe - before


def test_a_custom_norm_that_is_the_default_gives_the_same_backward_pass():
    assert backward_cost(default_norm) == backward_cost()


def test_a_custom_norm_that_leaves_the_parameters_out_is_the_seminorm():
    assert backward_cost(semi_norm) == backward_cost("seminorm")


def test_the_seminorm_costs_no_more_evaluations():
    assert backward_cost("seminorm") <= backward_cost()


def test_a_custom_adjoint_norm_sees_time_state_adjoint_and_parameters():
    seen = []

    def norm(tensors):
        seen.append(tuple(x.shape for x in tensors))
        assert isinstance(tensors, tuple)
        return default_norm(tensors)

    func = Parted(W)
    func.fixed.requires_grad_(True)
    y0 = leaf(torch.stack([Y, Y, Y]))
    odeint_adjoint(func, y0, linspace(0.0, 1.0, 2), adjoint_options=dict(norm=norm)).sum().backward()
    assert set(seen) == {((), (3, 2), (3, 2), (2, 2), (3, 2), (2,))}


def test_a_custom_adjoint_norm_of_a_tuple_state_sees_its_components():
    seen = []

    def norm(tensors):
        seen.append(tuple(x.shape for x in tensors))
        return default_norm(tensors)

    w = leaf(W)
    ys = odeint_adjoint(
        lambda t, s: (s[0] @ w, -s[1]),
        (leaf(Y), torch.ones((), dtype=F64)),
        linspace(0.0, 1.0, 2),
        adjoint_params=(w,),
        adjoint_options=dict(norm=norm),
    )
    ys[0].sum().backward()
    assert set(seen) == {((), (2,), (), (2,), (), (2, 2))}


def test_the_forward_norm_measures_the_state_in_the_backward_pass_too():
    calls = []

    def norm(y):
        calls.append(y.shape)
        return y.abs().max()

    ys = odeint_adjoint(TimedLinear(), leaf(Y), linspace(0.0, 1.0, 2), options=dict(norm=norm))
    forward = len(calls)
    ys.sum().backward()
    assert len(calls) > forward and set(calls) == {(2,)}


# ------------------------------------------------------------------ the live dictionary, as torchdiffeq's tests use it
def spy_on(options, seen):
    inner = options["norm"]
    assert callable(inner)

    def spy(tensors):
        value = inner(tensors)
        seen.append((tuple(x.shape for x in tensors), [x.clone() for x in tensors], torch.as_tensor(value).clone()))
        return value

    options["norm"] = spy


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [dict(), dict(adjoint_options={}), dict(adjoint_options=dict(norm="seminorm"))],
    ids=["default", "empty options", "seminorm"],
)
def test_the_norm_of_the_backward_pass_can_be_replaced_after_the_forward_pass(shape, arguments):
    params = (torch.rand(7, requires_grad=True), torch.rand((), requires_grad=True))
    ys = odeint_adjoint(
        lambda t, y: y, torch.full(shape, 1.0), torch.tensor([0.0, 1.0]), adjoint_params=params, **arguments
    )
    seen = []
    spy_on(ys.grad_fn.adjoint_options, seen)
    ys.sum().backward()
    assert seen
    for shapes, tensors, value in seen:
        assert shapes == ((), shape, shape, (7,), ())
        expected = (semi_norm if "norm" in arguments.get("adjoint_options", {}) else default_norm)(tensors)
        assert value.shape == ()
        assert float(value) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)


def test_the_dictionary_of_a_tuple_state_lies_two_views_below_its_first_component():
    x0 = torch.tensor(1.0), torch.tensor([[0.5, 0.5], [0.1, 0.1]])
    params = (torch.rand(7, requires_grad=True),)
    ys = odeint_adjoint(lambda t, y: y, x0, torch.tensor([0.0, 1.0]), adjoint_params=params)
    options = ys[0].grad_fn.next_functions[0][0].next_functions[0][0].adjoint_options
    seen = []
    spy_on(options, seen)
    ys[0].sum().backward()
    assert seen and all(shapes == ((), (5,), (5,), (7,)) for shapes, _, _ in seen)


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
def test_adjoint_callbacks_tell_of_every_backward_step_in_the_users_time(backwards):
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


# ------------------------------------------------------------------ double backward, nested use


def test_a_neural_ode_module_is_the_adjoint_of_its_field():
    func = MLP()
    y0 = leaf(Y)
    module = node_cuda.NeuralODE(func)
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
