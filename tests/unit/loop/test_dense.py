"""Dense output: the solution at any time in its interval, with every method."""

from __future__ import annotations

import math

import pytest
import torch
from problems import BY_NAME, F64, Counting, linspace, precise, relative_difference
from shim.pretend_gpu import CUDA

from node_cuda import METHODS, odeint, odeint_dense

T0 = torch.tensor(0.0, dtype=F64)


Y = torch.tensor([1.0, -2.0], dtype=F64)


def timed(t, y):
    return y * torch.cos(t)


def exact(t):
    return Y * torch.exp(torch.sin(t) - math.sin(0.25))[..., None]


def dense(method, t0=0.25, t1=2.0, func=timed, y0=Y, **options):
    arguments = precise(method)
    options = arguments.pop("options") | options
    return odeint_dense(
        func, y0, torch.tensor(t0, dtype=F64), torch.tensor(t1, dtype=F64), options=options, **arguments
    )


DENSE_LIMIT = {"euler": 3e-2, "implicit_euler": 3e-2, "fehlberg2": 5e-2, "adaptive_heun": 1e-2, "bosh3": 1e-2}


@pytest.mark.parametrize("method", [m for m in METHODS if m != "scipy_solver"])
def test_dense_output_is_the_solution_at_any_time_with_every_method(method):
    y = dense(method)
    times = torch.tensor([0.25, 0.3, 0.777, 1.0, 1.99, 2.0], dtype=F64)
    for t in times:
        assert y(t).shape == (2,)
        assert relative_difference(y(t), exact(t)) < DENSE_LIMIT.get(method, 1e-3)


@pytest.mark.parametrize("backwards", [False, True])
def test_dense_output_of_a_tuple_state_is_a_tuple(backwards):
    problem = BY_NAME["tuple"]
    t = linspace(2.0, 0.0, 5) if backwards else linspace(0.0, 2.0, 5)
    y = odeint_dense(problem.make(), problem.y0, t[0], t[-1], rtol=1e-8, atol=1e-10)
    angle, speed = y(t)
    ys = odeint(problem.make(), problem.y0, t, rtol=1e-8, atol=1e-10)
    assert angle.shape == speed.shape == (5, 2, 2)
    assert relative_difference((angle, speed), ys) < 1e-8
    one = y(t[2])
    assert one[0].shape == (2, 2) and relative_difference(one, tuple(part[2] for part in ys)) < 1e-8


def test_dense_output_outside_of_its_interval_is_an_error():
    y = dense("dopri5")
    for t in (0.2, 2.1):
        with pytest.raises((ValueError, IndexError, AssertionError)):
            y(torch.tensor(t, dtype=F64))


def test_dense_output_is_that_of_torchdiffeq(torchdiffeq):
    t0, t1 = torch.tensor(0.25, dtype=F64), torch.tensor(2.0, dtype=F64)
    theirs = torchdiffeq.odeint_dense(timed, Y, t0, t1, rtol=1e-6, atol=1e-8)
    ours = odeint_dense(timed, Y, t0, t1, rtol=1e-6, atol=1e-8)
    for t in linspace(0.26, 1.99, 11):
        assert relative_difference(ours(t), theirs(t)) < 1e-9


def test_dense_output_can_be_differentiated():
    y0 = Y.clone().requires_grad_()
    rate = torch.tensor(1.0, dtype=F64, requires_grad=True)
    y = odeint_dense(
        lambda t, y: rate * y * torch.cos(t),
        y0,
        torch.tensor(0.25, dtype=F64),
        torch.tensor(2.0, dtype=F64),
        rtol=1e-9,
        atol=1e-9,
    )
    t = torch.tensor(1.3, dtype=F64)
    grads = torch.autograd.grad(y(t).sum(), [y0, rate])
    truth = torch.autograd.grad((y0 * torch.exp(rate * (torch.sin(t) - math.sin(0.25)))).sum(), [y0, rate])
    assert relative_difference(grads, truth) < 1e-5


def test_dense_output_of_a_complex_state():
    y0 = torch.tensor([1.0 + 1j], dtype=torch.complex128)
    y = odeint_dense(lambda t, y: 2j * y, y0, T0, T0 + 1, rtol=1e-8, atol=1e-8)
    assert relative_difference(y(T0 + 0.5), y0 * torch.exp(torch.tensor(1j, dtype=torch.complex128))) < 1e-5


def test_dense_output_of_dopri8_uses_its_accurate_interpolant():
    """A method of order 8 with outputs of a quartic loses two digits there."""
    t = linspace(0.25, 2.0, 57)
    arguments = precise("dopri8")
    by_default = relative_difference(odeint(timed, Y, t, **arguments), exact(t))
    arguments["options"] = {**arguments["options"], "dense": "accurate"}
    accurate = relative_difference(odeint(timed, Y, t, **arguments), exact(t))
    dense_error = relative_difference(dense("dopri8")(t), exact(t))
    assert dense_error == pytest.approx(accurate, rel=1e-3) and accurate < by_default / 3


@pytest.mark.parametrize("method", ["bosh3", "adaptive_heun", "fehlberg2"])
def test_an_accurate_interpolant_that_costs_nothing_is_the_default(method):
    """The outputs of bosh3 are as accurate as its steps; torchdiffeq's are 10,000 times worse. The outputs of the
    methods of order 2 are almost as accurate as their steps here (but see the parabola above)."""
    t = linspace(0.25, 2.0, 57)
    errors, nfe = {}, {}
    for choice in ("default", "accurate", "torchdiffeq"):
        arguments = precise(method)
        func = Counting(timed)
        ys = odeint(func, Y, t, **{**arguments, "options": {**arguments["options"], "dense": choice}})
        errors[choice], nfe[choice] = relative_difference(ys, exact(t)), func.nfe
    assert errors["default"] == errors["accurate"] != errors["torchdiffeq"]
    assert method != "bosh3" or errors["default"] < errors["torchdiffeq"] / 1000
    assert len(set(nfe.values())) == 1


@pytest.mark.gpu
def test_dense_output_stays_on_its_device():
    y = odeint_dense(timed, Y.to(CUDA), torch.tensor(0.0).to(CUDA), torch.tensor(1.0).to(CUDA))
    assert y(torch.tensor(0.5).to(CUDA)).device.type == CUDA.type
    assert y(torch.tensor(0.5)).device.type == CUDA.type
