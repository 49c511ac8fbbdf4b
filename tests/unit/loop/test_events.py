"""Events end a solve where a function of time and state is zero; dense output is the solution at any time."""

from __future__ import annotations

import math

import pytest
import torch
from problems import BY_NAME, F64, Counting, linspace, relative_difference
from shim.pretend_gpu import CUDA
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


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
def test_the_event_of_a_parabola_is_where_it_is_by_every_adaptive_method(method, reverse):
    """Steps of a parabola are exact and grow, so that the interpolant alone decides (torchdiffeq issue 199)."""
    sign = -1.0 if reverse else 1.0

    def parabola(t, y):
        return torch.stack([sign * y[1], torch.full_like(y[1], -sign)])

    start = torch.tensor([10.0, 1.0], dtype=F64)
    event_t, _ = odeint_event(
        parabola, start, T0, event_fn=ground, method=method, rtol=1e-8, atol=1e-8, reverse_time=reverse
    )
    assert float(event_t) == pytest.approx(sign * (1.0 + math.sqrt(21.0)), abs=1e-6)


def event_of_a_wave(**options):
    """y = sin(t) falls below -0.9 at pi + asin(0.9) and is above it again 0.9 later; a step of dopri5 is longer."""
    func = Counting(lambda t, y: torch.stack([y[1], -y[0]]))
    solution = solve(
        func, torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64), rtol=1e-6, atol=1e-6,
        method=options.pop("method", "dopri5"), event_fn=lambda t, y: y[0] + 0.9, options=options,
    )  # fmt: skip
    return float(solution.event_t), func.nfe


def test_two_crossings_in_one_step_are_found_where_points_inside_are_looked_at():
    loose = dict(first_step=1.3, min_step=1.3)
    right = math.pi + math.asin(0.9)
    missed, _ = event_of_a_wave(**loose)
    found, nfe = event_of_a_wave(**loose, event_checks=8)
    assert missed > right + 1.0 and found == pytest.approx(right, abs=0.02)  # as good as such steps are
    assert nfe == 1 + 6 * 4  # four steps, the points inside of them cost nothing


def test_only_the_step_of_an_event_pays_for_the_accurate_interpolant_of_dopri8():
    accurate, paid = event_of_a_wave(method="dopri8")
    quartic, free = event_of_a_wave(method="dopri8", dense="torchdiffeq")
    right = math.pi + math.asin(0.9)
    assert paid == free + TABLEAUS["dopri8"].accurate.extra
    assert abs(accurate - right) < 1e-5 < abs(quartic - right)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint", "discrete"])
def test_points_inside_a_step_are_looked_at_in_every_gradient_mode(gradient):
    options = dict(first_step=1.3, min_step=1.3, event_checks=8)
    y0 = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    solution = solve(
        lambda t, y: torch.stack([y[1], -y[0]]), y0, torch.tensor([0.0, 1.0], dtype=F64), rtol=1e-6, atol=1e-6,
        event_fn=lambda t, y: y[0] + 0.9, options=options, gradient=gradient, adjoint_params=(),
    )  # fmt: skip
    t = float(solution.event_t.detach())
    assert t == pytest.approx(math.pi + math.asin(0.9), abs=0.02)
    (g,) = torch.autograd.grad(solution.ys[-1, 0], y0)  # y[0] = y0[0] cos t + y0[1] sin t
    torch.testing.assert_close(g, torch.tensor([math.cos(t), math.sin(t)], dtype=F64), rtol=0, atol=0.02)


@pytest.mark.parametrize("checks", [-1, 2.5, True])
def test_points_inside_a_step_are_a_whole_number(checks):
    with pytest.raises(ValueError, match="event_checks"):
        event_of_a_wave(event_checks=checks)


def test_an_event_function_that_returns_a_bool_is_refused():
    with pytest.raises(TypeError, match="numbers that change their sign"):
        odeint_event(fall, START, T0, event_fn=lambda t, y: y[0] > 0.0)


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
    """y(t*) keeps its derivative at the fixed t*, as in torchdiffeq."""
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
def test_the_movement_of_an_event_is_counted_once_through_odeint_event(interface):
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


def test_dense_output_of_dopri8_is_its_accurate_one():
    """A method of order 8 with outputs of a quartic loses two digits there."""
    t = linspace(0.25, 2.0, 57)
    arguments = settings("dopri8")
    by_default = relative_difference(odeint(timed, Y, t, **arguments), exact(t))
    arguments["options"] = {**arguments["options"], "dense": "accurate"}
    accurate = relative_difference(odeint(timed, Y, t, **arguments), exact(t))
    dense_error = relative_difference(dense("dopri8")(t), exact(t))
    assert dense_error == pytest.approx(accurate, rel=1e-3) and accurate < by_default / 3


@pytest.mark.parametrize("method", ["bosh3", "adaptive_heun", "fehlberg2"])
def test_an_accurate_interpolant_that_costs_nothing_is_the_default(method):
    """The outputs of bosh3 are as good as its steps, and torchdiffeq's are 10,000 times worse; those of the methods of
    order 2 are not far from their steps here (but see the parabola above)."""
    t = linspace(0.25, 2.0, 57)
    errors, nfe = {}, {}
    for choice in ("default", "accurate", "torchdiffeq"):
        arguments = settings(method)
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
