"""The time of an event has the gradient of the implicit function theorem."""

from __future__ import annotations

import math

import pytest
import torch
from problems import F64, precise, relative_difference
from torch import nn

from node_cuda import odeint, odeint_adjoint, odeint_event

G = 9.81
T0 = torch.tensor(0.0, dtype=F64)
START = torch.tensor([10.0, 2.0], dtype=F64)  # height and speed of a ball
LANDING = (2.0 + math.sqrt(4.0 + 2 * G * 10.0)) / G


def ground(t, y):
    return y[0]


class Ball(nn.Module):
    """Height and speed of a ball. Its gravity is a parameter of the field only."""

    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.tensor(G, dtype=F64))

    def forward(self, t, y):
        return torch.stack([y[1], -self.g.expand_as(y[1])])


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4"])
@pytest.mark.parametrize("solver", [odeint, odeint_adjoint], ids=["odeint", "odeint_adjoint"])
def test_the_time_of_an_event_has_the_gradient_of_the_implicit_function(solver, method):
    """T = (v + sqrt(v^2 + 2 g h)) / g."""
    ball = Ball()
    y0 = START.clone().requires_grad_()
    event_t, ys = odeint_event(ball, y0, T0, event_fn=ground, odeint_interface=solver, **precise(method))
    grads = torch.autograd.grad(event_t, [y0, ball.g], retain_graph=True)
    landing = (y0[1] + torch.sqrt(y0[1] ** 2 + 2 * ball.g * y0[0])) / ball.g
    truth = torch.autograd.grad(landing, [y0, ball.g])
    assert relative_difference(grads, truth) < 1e-4

    speed = torch.autograd.grad(ys[-1, 1], [y0, ball.g])
    landing_speed = -torch.sqrt(y0[1] ** 2 + 2 * ball.g * y0[0])
    truth = torch.autograd.grad(landing_speed, [y0, ball.g])
    assert relative_difference(speed, truth) < 1e-4


@pytest.mark.parametrize("gradient", ["adjoint", "discrete", "auto"])
def test_the_time_of_an_event_has_its_gradient_inside_inference_mode_too(gradient):
    ball, y0, t = Ball(), START.clone().requires_grad_(), torch.tensor([0.0, 9.0], dtype=F64)
    event_t, _ = odeint_adjoint(ball, y0, t, event_fn=ground, gradient=gradient, **precise("dopri5"))
    with torch.inference_mode():
        found = torch.autograd.grad(event_t, [y0, ball.g])
    landing = (y0[1] + torch.sqrt(y0[1] ** 2 + 2 * ball.g * y0[0])) / ball.g
    assert relative_difference(found, torch.autograd.grad(landing, [y0, ball.g])) < 1e-4


def test_the_time_of_an_event_in_reversed_time_has_its_gradient():
    ball = Ball()
    y0 = START.clone().requires_grad_()
    event_t, _ = odeint_event(
        ball,
        y0,
        T0,
        event_fn=lambda t, y: y[0] - 5.0,
        reverse_time=True,
        rtol=1e-9,
        atol=1e-9,
        odeint_interface=odeint_adjoint,
    )
    grads = torch.autograd.grad(event_t, [y0, ball.g])
    past = (y0[1] - torch.sqrt(y0[1] ** 2 + 2 * ball.g * (y0[0] - 5.0))) / ball.g
    truth = torch.autograd.grad(past, [y0, ball.g])
    assert relative_difference(grads, truth) < 1e-5


def test_the_starting_time_of_an_event_has_its_gradient():
    """An autonomous fall that begins later ends later by the same time: dT/dt0 = 1."""
    for solver in (odeint, odeint_adjoint):
        t0 = torch.tensor(0.3, dtype=F64, requires_grad=True)
        event_t, _ = odeint_event(Ball(), START, t0, event_fn=ground, odeint_interface=solver, rtol=1e-9, atol=1e-9)
        (grad,) = torch.autograd.grad(event_t, t0)
        assert event_t.item() == pytest.approx(LANDING + 0.3, abs=1e-6)
        assert float(grad) == pytest.approx(1.0, abs=1e-4)


def test_a_bouncing_ball_bounces_again_and_again():
    ball, t, y = Ball(), T0, START.clone().requires_grad_()
    start = y
    times = []
    for _ in range(3):
        t, ys = odeint_event(
            ball, y, t, event_fn=lambda t, y: y[0] + 1e-12, odeint_interface=odeint_adjoint, rtol=1e-9, atol=1e-9
        )
        times.append(t.item())
        y = torch.stack([ys[-1, 0].clamp(min=0.0) + 1e-7, -0.8 * ys[-1, 1]])
    impact = math.sqrt(4.0 + 2 * G * 10.0)
    assert times[1] - times[0] == pytest.approx(2 * 0.8 * impact / G, rel=1e-4)
    assert times[2] - times[1] == pytest.approx(2 * 0.64 * impact / G, rel=1e-4)
    (grad,) = torch.autograd.grad(t, start)
    assert grad.isfinite().all() and grad.abs().min() > 0


class Growth(nn.Module):
    """y' = a y, so that y0 = 1 reaches 2 at t* = ln(2) / a."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7, dtype=F64))

    def forward(self, t, y):
        return tuple(self.a * part for part in y) if isinstance(y, tuple) else self.a * y


class Level(nn.Module):
    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(2.0, dtype=F64))

    def forward(self, t, y):
        return (y[1] if isinstance(y, tuple) else y).reshape(-1)[0] - self.level


@pytest.mark.parametrize("state", ["one number", "a matrix", "a tuple"])
@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
def test_the_time_of_an_event_of_odeint_adjoint_has_its_gradient(gradient, state):
    """y(t*) has its derivative at constant t*, as in torchdiffeq."""
    func, level = Growth(), Level()
    one = torch.ones(1, dtype=F64, requires_grad=True)
    y0 = {"one number": one, "a matrix": one.expand(2, 3), "a tuple": (one.expand(2), one.expand(1, 2))}[state]
    event_t, y = odeint_adjoint(
        func, y0, torch.tensor([0.0, 1.0], dtype=F64), event_fn=level, rtol=1e-10, atol=1e-10, gradient=gradient
    )
    a, t = 0.7, math.log(2.0) / 0.7
    found = torch.autograd.grad(event_t, (func.a, level.level, one), retain_graph=True)
    for g, right in zip(found, (-math.log(2.0) / a**2, 1 / (2 * a), [-1 / a]), strict=True):
        torch.testing.assert_close(g, torch.tensor(right, dtype=F64), rtol=0, atol=1e-6)
    end = (y[1] if isinstance(y, tuple) else y)[-1].reshape(-1)[0]
    assert float(torch.autograd.grad(end, func.a)[0]) == pytest.approx(2.0 * t, abs=1e-6)


@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
def test_the_shift_of_an_event_is_counted_once_through_odeint_event(interface):
    func, level = Growth(), Level()
    event_t, y = odeint_event(
        func, torch.ones(1, dtype=F64), T0, event_fn=level, odeint_interface=interface, rtol=1e-10, atol=1e-10
    )
    (of_t,) = torch.autograd.grad(event_t, func.a, retain_graph=True)
    of_y = torch.autograd.grad(y[-1].sum(), (func.a, level.level))
    assert float(of_t) == pytest.approx(-math.log(2.0) / 0.7**2, abs=1e-6)
    assert float(of_y[0]) == pytest.approx(0.0, abs=1e-6) and float(of_y[1]) == pytest.approx(1.0, abs=1e-6)


def test_the_time_of_an_event_of_plain_odeint_has_no_gradient():
    event_t, _ = odeint(
        Growth(), torch.ones(1, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64), event_fn=Level(), rtol=1e-6, atol=1e-6
    )
    assert not event_t.requires_grad and event_t.numpy() == pytest.approx(math.log(2.0) / 0.7, abs=1e-5)
