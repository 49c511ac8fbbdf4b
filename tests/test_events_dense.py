"""Events end a solve where a function of time and state is zero; dense output is the solution at any time."""

from __future__ import annotations

import math

import pytest
import torch
from problems import BY_NAME, F64, Counting, linspace, relative_difference
from torch import nn

from node_cuda import METHODS, TABLEAUS, Status, odeint, odeint_adjoint, odeint_dense, odeint_event, solve

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
G = 9.81
T0 = torch.tensor(0.0, dtype=F64)
START = torch.tensor([10.0, 2.0], dtype=F64)  # height and speed of a ball
LANDING = (2.0 + math.sqrt(4.0 + 2 * G * 10.0)) / G


def fall(t, y):
    return torch.stack([y[1], torch.full_like(y[1], -G)])


def ground(t, y):
    return y[0]


def settings(method):
    if method in ADAPTIVE:
        rtol = 1e-5 if TABLEAUS[method].order < 3 else 1e-8
        # (the default interpolant of bosh3 is of second order only, and its steps through a parabola grow and grow)
        options = dict(max_step=0.05) if method == "bosh3" else {}
        return dict(method=method, rtol=rtol, atol=rtol, options=options)
    extra = dict(max_order=4) if "adams" in method else {}
    # (the state of a fixed grid is linear between its steps unless it is asked to be cubic)
    return dict(method=method, rtol=1e-8, atol=1e-8, options=dict(step_size=0.01, interp="cubic", **extra))


# ------------------------------------------------------------------ events
@pytest.mark.parametrize("method", [m for m in METHODS if m != "scipy_solver"])
def test_the_event_is_found_with_every_method(method):
    event_t, ys = odeint(fall, START, torch.stack([T0, T0 + 1]), event_fn=ground, **settings(method))
    limit = {"euler": 0.05, "bosh3": 1e-3}.get(method, 1e-4)
    assert float(event_t) == pytest.approx(LANDING, abs=limit)
    assert ys.shape == (2, 2)
    assert torch.equal(ys[0], START)
    assert float(ys[1, 0]) == pytest.approx(0.0, abs=1e-3)
    assert float(ys[1, 1]) == pytest.approx(2.0 - G * LANDING, rel=limit)


@pytest.mark.parametrize(
    "solver",
    [odeint, lambda *args, **kw: odeint_adjoint(*args, adjoint_params=(), **kw)],
    ids=["odeint", "odeint_adjoint"],
)
def test_odeint_event_finds_it_through_either_interface(solver):
    event_t, ys = odeint_event(fall, START, T0, event_fn=ground, odeint_interface=solver, rtol=1e-8, atol=1e-8)
    assert event_t.shape == () and event_t.dtype == F64
    assert float(event_t) == pytest.approx(LANDING, abs=1e-6)
    assert float(ys[-1, 0]) == pytest.approx(0.0, abs=1e-6)


def test_the_second_time_gives_the_direction_only():
    early = odeint(fall, START, torch.tensor([0.0, 0.001], dtype=F64), event_fn=ground)[0]
    late = odeint(fall, START, torch.tensor([0.0, 50.0], dtype=F64), event_fn=ground)[0]
    assert float(early) == float(late)


def test_an_event_in_the_past_is_found_by_running_backwards():
    """The ball was at height 5 on its way up."""
    past = (2.0 - math.sqrt(4.0 + 2 * G * 5.0)) / G
    event_t, ys = odeint_event(
        fall, START, T0, event_fn=lambda t, y: y[0] - 5.0, reverse_time=True, rtol=1e-8, atol=1e-8
    )
    assert float(event_t) == pytest.approx(past, abs=1e-6)
    assert float(ys[-1, 0]) == pytest.approx(5.0, abs=1e-6)


def test_an_event_may_depend_on_time_alone():
    event_t, _ = odeint_event(fall, START, T0, event_fn=lambda t, y: t - 0.37)
    assert float(event_t) == pytest.approx(0.37, abs=1e-7)
    event_t, _ = odeint_event(fall, START, T0, event_fn=lambda t, y: t + 0.37, reverse_time=True)
    assert float(event_t) == pytest.approx(-0.37, abs=1e-7)


def test_the_first_of_several_events_ends_the_solve():
    def walls(t, y):
        return torch.stack([y[0], 0.5 - t, y[1] + 100.0])

    event_t, _ = odeint_event(fall, START, T0, event_fn=walls)
    assert float(event_t) == pytest.approx(0.5, abs=1e-6)


def test_the_sign_at_the_start_does_not_matter():
    for sign in (1.0, -1.0):
        event_t, _ = odeint_event(fall, START, T0, event_fn=lambda t, y, sign=sign: sign * y[0])
        assert float(event_t) == pytest.approx(LANDING, abs=1e-6)


def test_an_event_at_the_start_ends_the_solve_there():
    event_t, ys = odeint(fall, START, torch.stack([T0, T0 + 1]), event_fn=lambda t, y: y[0] - 10.0)
    assert float(event_t) == 0.0
    assert torch.allclose(ys[1], START)


def test_the_event_of_a_tuple_state_sees_a_tuple():
    def func(t, state):
        _height, speed = state
        return speed, torch.full_like(speed, -G)

    def event(t, state):
        assert isinstance(state, tuple)
        return state[0]

    for solver in (odeint, lambda *args, **kw: odeint_adjoint(*args, adjoint_params=(), **kw)):
        event_t, (height, speed) = odeint_event(func, (START[0], START[1]), T0, event_fn=event, odeint_interface=solver)
        assert height.shape == speed.shape == (2,)
        assert float(event_t) == pytest.approx(LANDING, abs=1e-6)


def test_the_event_is_as_exact_as_atol_says():
    for atol in (1e-3, 1e-9):
        event_t, _ = odeint(fall, START, torch.stack([T0, T0 + 1]), event_fn=ground, rtol=1e-9, atol=atol)
        assert abs(float(event_t) - LANDING) <= atol


def test_per_element_tolerances_do_not_break_the_search_of_an_event():
    atol = torch.tensor([1e-8, 1e-6], dtype=F64)
    event_t, _ = odeint(fall, START, torch.stack([T0, T0 + 1]), event_fn=ground, atol=atol)
    assert float(event_t) == pytest.approx(LANDING, abs=1e-6)


def test_a_solution_carries_the_time_of_its_event():
    func = Counting(fall)
    solution = solve(func, START, torch.stack([T0, T0 + 1]), event_fn=ground)
    assert float(solution.event_t) == pytest.approx(LANDING, abs=1e-6)
    assert solution.status is Status.SUCCESS
    assert solution.stats.nfe == func.nfe


def test_the_event_is_that_of_torchdiffeq(torchdiffeq):
    def pendulum(t, y):
        return torch.stack([y[1], -torch.sin(y[0]) - 0.1 * y[1]])

    y0 = torch.tensor([1.2, 0.0], dtype=F64)
    for reverse in (False, True):
        arguments = dict(event_fn=lambda t, y: y[0] - 0.1, reverse_time=reverse, rtol=1e-7, atol=1e-9)
        ours, ys = odeint_event(pendulum, y0, T0, **arguments)
        theirs, zs = torchdiffeq.odeint_event(pendulum, y0, T0, **arguments)
        assert float(ours) == pytest.approx(float(theirs), abs=3e-9)
        assert relative_difference(ys, zs) < 1e-8


# ------------------------------------------------------------------ gradients through events
class Ball(nn.Module):
    """Height and speed under a gravity to be learned, the parameter being part of the field only."""

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
    event_t, ys = odeint_event(ball, y0, T0, event_fn=ground, odeint_interface=solver, **settings(method))
    grads = torch.autograd.grad(event_t, [y0, ball.g], retain_graph=True)
    landing = (y0[1] + torch.sqrt(y0[1] ** 2 + 2 * ball.g * y0[0])) / ball.g
    truth = torch.autograd.grad(landing, [y0, ball.g])
    assert relative_difference(grads, truth) < 1e-4

    speed = torch.autograd.grad(ys[-1, 1], [y0, ball.g])
    landing_speed = -torch.sqrt(y0[1] ** 2 + 2 * ball.g * y0[0])
    truth = torch.autograd.grad(landing_speed, [y0, ball.g])
    assert relative_difference(speed, truth) < 1e-4


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
    """An autonomous fall lands as much later as it begins: dT/dt0 = 1."""
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


# ------------------------------------------------------------------ dense output
Y = torch.tensor([1.0, -2.0], dtype=F64)


def timed(t, y):
    return y * torch.cos(t)


def exact(t):
    return Y * torch.exp(torch.sin(t) - math.sin(0.25))[..., None]


def dense(method, t0=0.25, t1=2.0, func=timed, y0=Y, **options):
    arguments = settings(method)
    options = arguments.pop("options") | options
    return odeint_dense(
        func, y0, torch.tensor(t0, dtype=F64), torch.tensor(t1, dtype=F64), options=options, **arguments
    )


DENSE_LIMIT = {"euler": 3e-2, "fehlberg2": 5e-2, "adaptive_heun": 1e-2, "bosh3": 1e-2}


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


@pytest.mark.parametrize("method", ["dopri8", "bosh3"])
def test_dense_output_of_a_method_with_a_poor_interpolant_is_its_accurate_one(method):
    """A method of order 8 with outputs of a quartic, or of order 3 with outputs of order 2, loses two digits there."""
    t = linspace(0.25, 2.0, 57)
    arguments = settings(method)
    by_default = relative_difference(odeint(timed, Y, t, **arguments), exact(t))
    arguments["options"] = {**arguments["options"], "dense": "accurate"}
    accurate = relative_difference(odeint(timed, Y, t, **arguments), exact(t))
    dense_error = relative_difference(dense(method)(t), exact(t))
    assert dense_error == pytest.approx(accurate, rel=1e-3) and accurate < by_default / 3


@pytest.mark.gpu
def test_dense_output_stays_on_its_device():
    y = odeint_dense(timed, Y.cuda(), torch.tensor(0.0).cuda(), torch.tensor(1.0).cuda())
    assert y(torch.tensor(0.5).cuda()).device.type == "cuda"
    assert y(torch.tensor(0.5)).device.type == "cuda"
