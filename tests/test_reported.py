"""What people who train neural ODEs reported of torchdiffeq or of this package, each with its right value."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from problems import F64
from torch import nn

from node_cuda import SolveError, odeint, odeint_adjoint, status

T = torch.tensor([0.0, 1.0], dtype=F64)


def decay(t, y):
    return -y


# ------------------------------------------------------------------ fields that differentiate
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4"])
def test_a_field_may_differentiate_by_its_state_where_y0_requires_grad(method):
    """y' = -grad |y|^2 = -2 y (torchdiffeq issues 151, 154, 209, 226)."""

    def gradient_flow(t, y):
        return -torch.autograd.grad(y.square().sum(), y, create_graph=True)[0]

    y0 = torch.tensor([0.5, -1.0], dtype=F64, requires_grad=True)
    options = dict(step_size=0.01) if method == "rk4" else None
    y = odeint(gradient_flow, y0, T, rtol=1e-8, atol=1e-8, method=method, options=options)[-1]
    (g,) = torch.autograd.grad(y.sum(), y0)
    torch.testing.assert_close(y, y0 * math.exp(-2), rtol=0, atol=1e-6)
    torch.testing.assert_close(g, torch.full_like(g, math.exp(-2)), rtol=0, atol=1e-6)


# ------------------------------------------------------------------ exceptions that travel
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
def test_a_method_that_reads_tolerances_asks_for_them(method):
    with pytest.raises(TypeError, match="rtol must be a number or a tensor; got None"):
        odeint(decay, torch.ones(1, dtype=F64), T, method=method, rtol=None)


def test_an_event_on_a_fixed_grid_asks_for_atol_alone():
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


# ------------------------------------------------------------------ transforms
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, of jvp
@pytest.mark.parametrize("recording", [True, False])
def test_forward_mode_goes_through_a_field_whose_parameters_want_gradients(recording):
    """y' = w y: the derivative of y(1) in the direction v is expm(w) v."""
    w = nn.Parameter(torch.tensor([[0.0, 1.0], [-1.0, 0.3]], dtype=F64))
    y0, v = torch.tensor([0.3, -0.2], dtype=F64), torch.ones(2, dtype=F64)
    with torch.set_grad_enabled(recording):
        _, tangent = torch.func.jvp(lambda y: odeint(lambda t, y: w @ y, y, T, rtol=1e-8, atol=1e-8)[-1], (y0,), (v,))
    torch.testing.assert_close(tangent.detach(), torch.matrix_exp(w.detach()) @ v, rtol=0, atol=1e-6)


def test_vmap_over_odeint_names_the_way_out():
    """torchdiffeq issues 217 and 282; `odeint_adjoint` gives exp(-1) for each sample."""
    samples = torch.ones(3, 2, dtype=F64)
    with pytest.raises(RuntimeError, match=r'odeint_adjoint.*gradient="discrete"'):
        torch.func.vmap(lambda y: odeint(decay, y, T)[-1])(samples)
    y = torch.func.vmap(lambda y: odeint_adjoint(decay, y, T, adjoint_params=())[-1])(samples)
    torch.testing.assert_close(y, torch.full_like(y, math.exp(-1)), rtol=0, atol=1e-6)
