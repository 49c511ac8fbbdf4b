"""Events: a solve ends when a function of time and state is zero."""

from __future__ import annotations

import math

import pytest
import torch
from problems import F64, Counting, precise, relative_difference

from node_cuda import METHODS, TABLEAUS, Status, odeint, odeint_adjoint, odeint_event, solve

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
G = 9.81
T0 = torch.tensor(0.0, dtype=F64)
START = torch.tensor([10.0, 2.0], dtype=F64)  # height and speed of a ball
LANDING = (2.0 + math.sqrt(4.0 + 2 * G * 10.0)) / G


def fall(t, y):
    return torch.stack([y[1], torch.full_like(y[1], -G)])


def ground(t, y):
    return y[0]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "scipy_solver"])
def test_the_event_is_found_with_every_method(method):
    event_t, ys = odeint(fall, START, torch.stack([T0, T0 + 1]), event_fn=ground, **precise(method))
    limit = {"euler": 0.05, "implicit_euler": 0.05, "bosh3": 1e-3}.get(method, 1e-4)
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
    """The ball was at height 5 when it went up."""
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


def test_the_event_is_located_to_atol():
    for atol in (1e-3, 1e-9):
        event_t, _ = odeint(fall, START, torch.stack([T0, T0 + 1]), event_fn=ground, rtol=1e-9, atol=atol)
        assert abs(float(event_t) - LANDING) <= atol


def test_per_element_tolerances_do_not_break_the_search_of_an_event():
    atol = torch.tensor([1e-8, 1e-6], dtype=F64)
    event_t, _ = odeint(fall, START, torch.stack([T0, T0 + 1]), event_fn=ground, atol=atol)
    assert float(event_t) == pytest.approx(LANDING, abs=1e-6)


def test_a_solution_has_the_time_of_its_event():
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


# Time that runs backwards is reversed before a method gets it, so one method is enough.
@pytest.mark.parametrize(("method", "reverse"), [*((name, False) for name in ADAPTIVE), ("dopri5", True)])
def test_the_event_of_a_parabola_is_exact_with_every_adaptive_method(method, reverse):
    """The steps of a parabola are exact and large, so the error is that of the interpolant (torchdiffeq issue 199)."""
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


def test_two_crossings_in_one_step_are_found_if_points_inside_are_checked():
    loose = dict(first_step=1.3, min_step=1.3)
    right = math.pi + math.asin(0.9)
    missed, _ = event_of_a_wave(**loose)
    found, nfe = event_of_a_wave(**loose, event_checks=8)
    assert missed > right + 1.0 and found == pytest.approx(right, abs=0.02)  # the accuracy of such steps
    assert nfe == 1 + 6 * 4  # four steps; the points inside them cost nothing


def test_only_the_step_of_an_event_pays_for_the_accurate_interpolant_of_dopri8():
    accurate, paid = event_of_a_wave(method="dopri8")
    quartic, free = event_of_a_wave(method="dopri8", dense="torchdiffeq")
    right = math.pi + math.asin(0.9)
    assert paid == free + TABLEAUS["dopri8"].accurate.extra
    assert abs(accurate - right) < 1e-5 < abs(quartic - right)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint", "discrete"])
def test_points_inside_a_step_are_checked_in_every_gradient_mode(gradient):
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
