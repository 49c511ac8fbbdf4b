"""Fixed grids: their steps, the interpolation between them, and the methods that need them."""

from __future__ import annotations

import math

import pytest
import torch
from problems import BY_NAME, F64, Counting, linspace, max_difference, order_of, relative_difference

from node_cuda import TABLEAUS, odeint, solve
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS

# High Adams orders are unstable at the step sizes used here (the eleventh's stability interval is below 1/1000).
ADAMS = dict(explicit_adams=dict(max_order=4), implicit_adams=dict(max_order=4))
EXPLICIT = [name for name, tableau in TABLEAUS.items() if not tableau.adaptive] + [*ADAMS]
IMPLICIT = [name for name, tableau in IMPLICIT_TABLEAUS.items() if not tableau.adaptive]
FIXED = EXPLICIT + IMPLICIT
Y = torch.tensor([1.0, -2.0], dtype=F64)


def timed(t, y):
    return y * torch.cos(t)


def exact(t, y0=Y):
    return y0 * torch.exp(torch.sin(t))[:, None]


def step_times(method="rk4", t=None, **options) -> list[float]:
    t = linspace(0.0, 1.0, 3) if t is None else t
    # (only the functional iteration of implicit_adams uses the tolerances)
    options = dict(options, record_steps=True)
    return solve(timed, Y, t, rtol=1e-2, atol=1e-2, method=method, options=options).stats.step_times


# ------------------------------------------------------------------ the grid
@pytest.mark.parametrize("method", FIXED)
def test_without_options_the_steps_are_the_output_times(method):
    t = torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=F64)
    assert step_times(method, t) == pytest.approx(t.tolist(), abs=0)


@pytest.mark.parametrize("method", FIXED)
def test_step_size_gives_equal_steps_and_the_last_one_ends_at_the_last_output(method):
    assert step_times(method, step_size=0.3) == pytest.approx([0.0, 0.3, 0.6, 0.9, 1.0], abs=1e-15)


def test_a_step_size_that_divides_the_interval_gives_no_tiny_last_step():
    assert step_times(step_size=0.1) == pytest.approx([i / 10 for i in range(11)], abs=1e-12)


def test_a_step_size_may_be_a_tensor():
    assert step_times(step_size=torch.tensor(0.25)) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0], abs=1e-15)


def test_a_step_size_longer_than_the_interval_gives_one_step():
    assert step_times(step_size=5.0) == [0.0, 1.0]


def test_the_grid_constructor_gives_the_ends_of_the_steps():
    seen = []

    def grid(func, y0, t):
        seen.append((func, y0, t))
        return torch.tensor([0.0, 0.125, 0.5, 1.0], dtype=F64)

    assert step_times(grid_constructor=grid) == [0.0, 0.125, 0.5, 1.0]
    func, y0, t = seen[0]
    assert torch.equal(y0, Y)
    assert torch.equal(t, linspace(0.0, 1.0, 3))
    assert torch.allclose(func(t[1], y0), timed(t[1], Y)), "the grid may look at the field"


def test_the_grid_constructor_gets_and_gives_the_users_times_when_time_runs_backwards():
    seen = []

    def grid(func, y0, t):
        seen.append(t.clone())
        return torch.tensor([1.0, 0.5, 0.125, 0.0], dtype=F64)

    t = linspace(1.0, 0.0, 3)
    assert step_times(t=t, grid_constructor=grid) == [1.0, 0.5, 0.125, 0.0]
    assert torch.equal(seen[0], t)


def test_the_grid_constructor_of_a_tuple_state_gets_the_flat_state():
    problem, seen = BY_NAME["tuple"], []

    def grid(func, y0, t):
        seen.append(y0.shape)
        return t

    odeint(problem.make(), problem.y0, problem.t, method="rk4", options=dict(grid_constructor=grid))
    assert seen == [(8,)]


# ------------------------------------------------------------------ between the steps
@pytest.mark.parametrize(("interp", "order"), [("linear", 2), ("cubic", 4)])
def test_every_interpolation_has_its_order(interp, order):
    t = linspace(0.0, 1.0, 38)
    errors = []
    for h in (1 / 8, 1 / 16):
        ys = odeint(timed, Y, t, method="rk4", options=dict(step_size=h, interp=interp))
        errors.append(max_difference(ys, exact(t)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_outputs_on_the_grid_are_the_steps_themselves(interp):
    on_grid = odeint(timed, Y, linspace(0.0, 1.0, 9), method="rk4")
    finer = odeint(timed, Y, linspace(0.0, 1.0, 9), method="rk4", options=dict(step_size=0.125, interp=interp))
    assert relative_difference(finer, on_grid) < 1e-14


def test_linear_outputs_cost_no_evaluation():
    for outputs in (2, 11, 101):
        func = Counting(timed)
        odeint(func, Y, linspace(0.0, 1.0, outputs), method="rk4", options=dict(step_size=0.1))
        assert func.nfe == 40


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_interpolation_agrees_with_torchdiffeq(method, torchdiffeq):
    for interp in ("linear", "cubic"):
        arguments = dict(method=method, options=dict(step_size=0.07, interp=interp))
        ours = odeint(timed, Y, linspace(0.0, 1.0, 17), **arguments)
        theirs = torchdiffeq.odeint(timed, Y, linspace(0.0, 1.0, 17), **arguments)
        assert relative_difference(ours, theirs) < 1e-13


# ------------------------------------------------------------------ discontinuities
def jump(t, y):
    """A field with a jump at t = 1/2. Its value at t = 1/2 itself is far from both sides."""
    slope = torch.where(t < 0.5, 1.0, 3.0)
    return torch.where(t == 0.5, 1000.0, slope) * torch.ones_like(y)


@pytest.mark.parametrize("method", ["euler", "heun2", "rk4"])
def test_perturb_never_evaluates_on_a_grid_point(method):
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    ys = odeint(jump, torch.zeros(1, dtype=F64), t, method=method, options=dict(perturb=True))
    assert ys[:, 0].tolist() == pytest.approx([0.0, 0.5, 2.0], abs=1e-12)


def test_without_perturb_the_grid_point_itself_is_evaluated():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    ys = odeint(jump, torch.zeros(1, dtype=F64), t, method="euler")
    assert float(ys[-1]) > 100


def test_perturb_shifts_into_the_step_when_time_runs_backwards():
    t = torch.tensor([1.0, 0.5, 0.0], dtype=F64)
    ys = odeint(jump, torch.zeros(1, dtype=F64), t, method="heun2", options=dict(perturb=True))
    assert ys[:, 0].tolist() == pytest.approx([0.0, -1.5, -2.0], abs=1e-12)


# ------------------------------------------------------------------ every fixed method on every problem
@pytest.mark.parametrize("name", ["linear", "nonautonomous", "reversed", "complex"])
@pytest.mark.parametrize("method", FIXED)
def test_every_fixed_method_solves_every_kind_of_problem(method, name):
    problem = BY_NAME[name]
    order = 3 if method in ADAMS else order_of(method)
    options = dict(step_size=1 / 64, **ADAMS.get(method, {}))
    ys = odeint(problem.make(), problem.y0, problem.t, method=method, options=options)
    truth = torch.stack([problem.exact(t) for t in problem.t])
    # the local error constant of these problems is below 100 for every method, as their rates are below 3
    # (linear interpolation between the steps adds an error of second order)
    assert relative_difference(ys, truth) <= 100 * max((1 / 64) ** order, (1 / 64) ** 2 / 20)


@pytest.mark.parametrize("method", FIXED)
def test_a_fixed_method_takes_a_tuple(method):
    problem = BY_NAME["tuple"]
    options = dict(step_size=0.1, **ADAMS.get(method, {}))
    angle, speed = odeint(problem.make(), problem.y0, problem.t, rtol=1e-5, method=method, options=options)
    assert angle.shape == speed.shape == (len(problem.t), 2, 2)
    fine = odeint(problem.make(), problem.y0, problem.t, rtol=1e-8, atol=1e-10)
    assert relative_difference((angle, speed), fine) < (0.2 if method in ("euler", "implicit_euler") else 0.02)


@pytest.mark.parametrize("method", FIXED)
def test_steps_are_counted_and_none_is_rejected(method):
    func = Counting(timed)
    stats = solve(func, Y, linspace(0.0, 1.0, 3), method=method, options=dict(step_size=0.1)).stats
    assert (stats.accepted, stats.rejected, stats.nfe) == (10, 0, func.nfe)


@pytest.mark.parametrize("method", EXPLICIT)
def test_a_fixed_method_needs_no_host_read_for_each_step(method):
    """The grid is known before the solve, so the number of host reads does not grow with the steps."""
    if method == "implicit_adams":
        pytest.skip("its functional iteration tests for convergence")
    reads = [
        solve(timed, Y, linspace(0.0, 1.0, 2), method=method, options=dict(step_size=1 / n)).stats.host_reads
        for n in (8, 64)
    ]
    assert reads[0] == reads[1]


@pytest.mark.parametrize("method", ["rk4", "implicit_adams"])
def test_callback_step_sees_every_step_of_the_grid(method):
    steps = []

    class Field(torch.nn.Module):
        def forward(self, t, y):
            return timed(t, y)

        def callback_step(self, t0, y0, dt):
            steps.append((float(t0), y0.clone(), float(dt)))

    ys = odeint(Field(), Y, linspace(0.0, 1.0, 5), rtol=1e-2, atol=1e-2, method=method)
    assert [t0 for t0, _, _ in steps] == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert [dt for _, _, dt in steps] == pytest.approx([0.25] * 4)
    assert torch.equal(torch.stack([y0 for _, y0, _ in steps]), ys[:-1])
