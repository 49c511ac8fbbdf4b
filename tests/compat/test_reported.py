"""Problems that users of neural ODEs reported for torchdiffeq or for this package, each with the right value."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from problems import F64
from torch import nn

from node_cuda import SolveError, Status, odeint, odeint_adjoint, solve, status

T = torch.tensor([0.0, 1.0], dtype=F64)


def decay(t, y):
    return -y


# ------------------------------------------------------------------ fields that differentiate
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4"])
def test_a_field_may_differentiate_by_its_state_if_y0_requires_grad(method):
    """y' = -grad |y|^2 = -2 y (torchdiffeq issues 151, 154, 209, 226)."""

    def gradient_flow(t, y):
        return -torch.autograd.grad(y.square().sum(), y, create_graph=True)[0]

    y0 = torch.tensor([0.5, -1.0], dtype=F64, requires_grad=True)
    options = dict(step_size=0.01) if method == "rk4" else None
    y = odeint(gradient_flow, y0, T, rtol=1e-8, atol=1e-8, method=method, options=options)[-1]
    (g,) = torch.autograd.grad(y.sum(), y0)
    torch.testing.assert_close(y, y0 * math.exp(-2), rtol=0, atol=1e-6)
    torch.testing.assert_close(g, torch.full_like(g, math.exp(-2)), rtol=0, atol=1e-6)


# ------------------------------------------------------------------ exceptions in other processes
def test_a_solve_error_arrives_from_another_process_with_its_fields():
    with pytest.raises(SolveError) as caught:
        odeint(lambda t, y: y * y, torch.ones(1, dtype=F64), 2.0 * T)  # blows up at t = 1
    sent, arrived = caught.value, pickle.loads(pickle.dumps(caught.value))
    assert isinstance(arrived, SolveError) and str(arrived) == str(sent)
    assert (arrived.status, arrived.t, arrived.stats) == (sent.status, sent.t, sent.stats)
    assert arrived.t == pytest.approx(1.0, abs=1e-3)


EXCEPTIONS = [x for x in vars(status).values() if isinstance(x, type) and issubclass(x, Exception)]


@pytest.mark.parametrize("kind", [x for x in EXCEPTIONS if x is not SolveError])
def test_every_exception_and_warning_pickles(kind):
    arrived = pickle.loads(pickle.dumps(kind("what is wrong")))
    assert type(arrived) is kind and str(arrived) == "what is wrong"


# ------------------------------------------------------------------ arguments
@pytest.mark.parametrize("method, steps", [("euler", 50), ("rk4", 50), ("explicit_adams", 50)])
@pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
def test_a_fixed_grid_needs_no_tolerances(solver, method, steps):
    """flow_matching passes None to a fixed method."""
    y0 = torch.ones(1, dtype=F64)
    arguments = dict(adjoint_params=()) if solver is odeint_adjoint else {}
    y = solver(decay, y0, T, method=method, options=dict(step_size=1 / steps), rtol=None, atol=None, **arguments)
    exact = (1 - 1 / steps) ** steps if method == "euler" else math.exp(-1)
    assert float(y[-1]) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "implicit_adams", "scipy_solver"])
def test_a_method_that_uses_tolerances_requires_them(method):
    with pytest.raises(TypeError, match="rtol must be a number or a tensor; got None"):
        odeint(decay, torch.ones(1, dtype=F64), T, method=method, rtol=None)


def test_an_event_on_a_fixed_grid_requires_only_atol():
    def solve(atol):
        return odeint(
            decay, torch.ones(1, dtype=F64), T, method="rk4", options=dict(step_size=0.1), rtol=None, atol=atol,
            event_fn=lambda t, y: y - 0.5,
        )  # fmt: skip

    with pytest.raises(TypeError, match="the event's time is found to within atol"):
        solve(None)
    assert float(solve(1e-9)[0]) == pytest.approx(math.log(2.0), abs=1e-3)  # linear between steps


def test_adjoint_params_may_be_a_single_tensor():
    """y(1) = y0 expm(w) (torchdiffeq issue 178: its rows were taken for the parameters)."""
    w = nn.Parameter(torch.tensor([[-1.0, 0.5], [0.0, -2.0]], dtype=F64))
    y0 = torch.ones(1, 2, dtype=F64)
    odeint_adjoint(lambda t, y: y @ w, y0, T, adjoint_params=w, rtol=1e-8, atol=1e-8)[-1].sum().backward()
    (right,) = torch.autograd.grad((y0 @ torch.matrix_exp(w)).sum(), w)
    torch.testing.assert_close(w.grad, right, rtol=0, atol=1e-5)


def test_the_adjoint_norm_that_a_solution_shows_returns_a_tensor(torchdiffeq):
    """torchdiffeq's own norm_tests read it."""
    p = torch.rand(7, requires_grad=True)

    def value(solver):
        xs = solver(lambda t, x: x, torch.ones(2, 2), torch.tensor([0.0, 1.0]), adjoint_params=(p,))
        norm = xs.grad_fn.adjoint_options["norm"]
        return norm((torch.tensor(0.5), torch.full((4,), 3.0), torch.full((4,), -2.0), torch.full((7,), 4.0)))

    assert isinstance(value(odeint_adjoint), torch.Tensor) and value(odeint_adjoint).shape == ()
    assert value(odeint_adjoint) == value(torchdiffeq.odeint_adjoint) == 4.0


# ------------------------------------------------------------------ dL/dt0 by the adjoint
def of_times(func, y0=1.0, span=(0.0, 1.0), solver=odeint_adjoint, **options):
    """Return dL/dt0, dL/dt1 and y(t1) for L = y(t1), and the number of evaluations in the backward pass."""
    t = torch.tensor(span, dtype=F64, requires_grad=True)
    y = solver(func, torch.full((1,), y0, dtype=F64), t, rtol=1e-8, atol=1e-8, adjoint_params=(), options=options)
    (g,) = torch.autograd.grad(y[-1].sum(), t)
    return g.tolist(), float(y[-1].detach())


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)], ids=["forwards", "backwards"])
def test_dt0_of_an_autonomous_field_has_no_error_of_an_unstable_backward_solve(span, torchdiffeq):
    """The backward solve reconstructs y with an error that grows by e^20."""
    sign = span[1] - span[0]

    def contracting(t, y):
        return -20.0 * sign * torch.tanh(y)

    (of_t0, of_t1), y1 = of_times(contracting, span=span)
    rate = -20.0 * sign * math.tanh(y1)
    assert of_t1 == pytest.approx(rate, rel=1e-12) and of_t0 == pytest.approx(-rate, rel=1e-12)
    theirs, _ = of_times(contracting, span=span, solver=torchdiffeq.odeint_adjoint)
    assert of_t0 == pytest.approx(theirs[0], rel=1e-6)


def number_of_time(t, y):
    return math.cos(float(t.detach())) * y


def table(t, y):
    return torch.ones_like(y) * [1.0, 3.0][int(t.detach() >= 0.5)]


def graph_of_time(t, y):
    return torch.cos(t) * y


@pytest.mark.parametrize(
    ("func", "options", "of_t0"),
    [
        (number_of_time, {}, lambda y1: -y1),  # y1 = y0 exp(sin t1 - sin t0)
        (graph_of_time, {}, lambda y1: -y1),
        (table, dict(jump_t=[0.5]), lambda y1: -1.0),
        (table, {}, lambda y1: -1.0),
        (lambda t, y: torch.ones_like(y) * (1.0 + float(t.detach() >= 0.9)), dict(jump_t=[0.9]), lambda y1: -1.0),
    ],
    ids=["a number", "in the graph", "a table and its jump", "a table", "a jump that no probe sees"],
)
def test_dt0_of_a_field_with_time_is_that_of_its_start(func, options, of_t0):
    (found, _), y1 = of_times(func, **options)
    assert found == pytest.approx(of_t0(y1), abs=1e-4)


def test_dt0_costs_no_evaluation_if_t_requires_no_gradient():
    def nfe(wants):
        t = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=wants)
        s = solve(decay, torch.ones(1, dtype=F64, requires_grad=True), t, gradient="adjoint", adjoint_params=())
        s.ys[-1].sum().backward()
        return s.stats.nfe_backward

    assert nfe(True) == nfe(False) + 1 + 4  # f(t0, y0), and four times at one state


# ------------------------------------------------------------------ how far a solve came
def oscillating(t, y):
    """y = y0 exp(sin(50 t) / 50)."""
    return torch.cos(50 * t) * y


@pytest.mark.parametrize("gradient", ["backprop", "adjoint", "discrete"])
@pytest.mark.parametrize("end", [5.0, -5.0], ids=["forwards", "backwards"])
def test_a_solve_that_used_up_its_steps_reports_how_far_it_came(gradient, end):
    """torchdiffeq issue 278."""
    y0, t = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True), torch.tensor([0.0, end], dtype=F64)
    options = dict(max_num_steps=5, throw=False)
    s = solve(oscillating, y0, t, options=options, gradient=gradient, adjoint_params=())
    assert s.status is Status.MAX_STEPS and 0.0 < abs(s.t_reached) < 5.0 and not s.y_reached.requires_grad
    right = y0.detach() * torch.exp(torch.sin(50 * s.t_reached) / 50)
    torch.testing.assert_close(s.y_reached, right, rtol=0, atol=1e-4)


def test_with_a_tuple_and_an_integral_the_reached_state_has_the_form_of_y0():
    y0 = (torch.ones(2, dtype=F64), torch.ones(1, 3, dtype=F64))
    options = dict(max_num_steps=5, throw=False)
    s = solve(
        lambda t, y: tuple(oscillating(t, part) for part in y), y0, 5.0 * T, options=options,
        integral=lambda t, y, dy: y[0].sum(),
    )  # fmt: skip
    assert [part.shape for part in s.y_reached] == [part.shape for part in y0]
    torch.testing.assert_close(s.y_reached[1][0, :2], s.y_reached[0], rtol=1e-12, atol=0)


def test_a_successful_solve_reports_its_end():
    s = solve(decay, torch.ones(1, dtype=F64), T)
    assert s.t_reached == 1.0 and torch.equal(s.y_reached, s.ys[-1])


def test_a_blow_up_and_an_event_that_never_comes_report_how_far_they_came():
    s = solve(lambda t, y: y * y, torch.ones(1, dtype=F64), 2.0 * T, options=dict(throw=False))
    assert float(s.t_reached) == pytest.approx(1.0, abs=1e-3) and float(s.y_reached) > 1e3
    s = solve(
        decay, torch.ones(1, dtype=F64), T, options=dict(throw=False, max_num_steps=7), event_fn=lambda t, y: y + 1.0
    )
    assert s.status is Status.NO_EVENT
    assert float(s.y_reached) == pytest.approx(math.exp(-float(s.t_reached)), abs=1e-6)


@pytest.mark.parametrize("solver", ["RK45", "Radau"])
def test_scipys_solvers_report_how_far_they_came(solver):
    s = solve(
        lambda t, y: y * y, torch.ones(1, dtype=F64), 2.0 * T, method="scipy_solver", rtol=1e-6, atol=1e-6,
        options=dict(throw=False, solver=solver),
    )  # fmt: skip
    assert s.status is not Status.SUCCESS and float(s.t_reached) == pytest.approx(1.0, abs=1e-2)
    assert bool(torch.isfinite(s.y_reached).all())


def test_a_fixed_grid_reports_its_last_finite_output():
    def bounded(t, y):
        return -y if t < 0.5 else y * math.nan

    s = solve(bounded, torch.ones(1), torch.linspace(0, 1, 5), method="euler", options=dict(throw=False))
    assert s.status is Status.NON_FINITE and s.t_reached == 0.5 and float(s.y_reached) == pytest.approx(0.75**2)


# ------------------------------------------------------------------ transforms
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, of jvp
@pytest.mark.parametrize("recording", [True, False])
def test_forward_mode_works_if_the_parameters_of_the_field_require_gradients(recording):
    """y' = w y: the derivative of y(1) in the direction v is expm(w) v."""
    w = nn.Parameter(torch.tensor([[0.0, 1.0], [-1.0, 0.3]], dtype=F64))
    y0, v = torch.tensor([0.3, -0.2], dtype=F64), torch.ones(2, dtype=F64)
    with torch.set_grad_enabled(recording):
        _, tangent = torch.func.jvp(lambda y: odeint(lambda t, y: w @ y, y, T, rtol=1e-8, atol=1e-8)[-1], (y0,), (v,))
    torch.testing.assert_close(tangent.detach(), torch.matrix_exp(w.detach()) @ v, rtol=0, atol=1e-6)


def test_vmap_over_odeint_names_the_alternative():
    """torchdiffeq issues 217 and 282; `odeint_adjoint` gives exp(-1) for each sample."""
    samples = torch.ones(3, 2, dtype=F64)
    with pytest.raises(RuntimeError, match=r'odeint_adjoint.*gradient="discrete"'):
        torch.func.vmap(lambda y: odeint(decay, y, T)[-1])(samples)
    y = torch.func.vmap(lambda y: odeint_adjoint(decay, y, T, adjoint_params=())[-1])(samples)
    torch.testing.assert_close(y, torch.full_like(y, math.exp(-1)), rtol=0, atol=1e-6)
