"""A compiled solve takes the steps of the host loop, for every option, and returns the same outputs and statistics.

The graphs run without the compiler here. kernels/test_compiled_native.py compiles them. The numbers of options are
inputs of a graph, so that many rows here share one graph: `compare` with the same func traces once for each kind.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from native import CLOSE_IN_FLOAT, Timed, compare, counts, first_of, pair, reason, same, shared, start
from problems import F64, linspace

from node_cuda import TABLEAUS, InvalidInput, NeuralODE, SolveError, Status, odeint, odeint_adjoint, solve
from node_cuda.controllers import Controller
from node_cuda.integrals.regularized import regularized
from node_cuda.loop import step_control
from node_cuda.native import build, forward
from node_cuda.native.cache import NativeCache

pytestmark = pytest.mark.usefixtures("interpreted")

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
SHORT_FIRST = sorted(ADAPTIVE, key=("bosh3", "adaptive_heun", "dopri5", *ADAPTIVE).index)
GRIDS = [name for name, tableau in TABLEAUS.items() if not tableau.adaptive]
WITH_EXTRA_STAGES = [name for name in ADAPTIVE if TABLEAUS[name].accurate and TABLEAUS[name].accurate.extra]
T = linspace(0.0, 2.0, 5)


def tolerance(method: str) -> float:
    """Return an rtol with some ten steps."""
    return {2: 1e-3, 3: 1e-4}.get(TABLEAUS[method].order, 1e-6)


def cache() -> NativeCache:
    return NativeCache(required=True)


@torch.no_grad()
def test_a_long_solve_is_looked_at_as_the_host_does_and_may_end_there(monkeypatch):
    monkeypatch.setattr(step_control, "EARLY", 5)
    monkeypatch.setattr(step_control, "LONG", 9)
    looks, answers = [], {}

    def look(problem, t, y, h, tried, rejected, endless):
        looks.append(tried)
        return answers.get(tried)

    monkeypatch.setattr(forward, "look_at_length", look)
    plain = dict(first_step=0.125, max_step=0.125)
    run = partial(solve, Timed(), start(), T, rtol=1e-3, atol=1e-3)
    found = run(options=dict(compile=cache(), **plain))
    torch.testing.assert_close(found.ys, run(options=plain).ys, rtol=1e-12, atol=0.0)
    assert looks == [5, 9] and found.stats.accepted == 16
    answers[9] = "by chance"
    found = run(options=dict(compile=cache(), throw=False, **plain))
    assert found.status is Status.BY_CHANCE and found.stats.accepted == 9 and float(found.t_reached) == 9 * 0.125


# ------------------------------------------------------------------ methods
@pytest.mark.parametrize("method", first_of(3, SHORT_FIRST))
def test_an_adaptive_method_takes_the_same_steps_in_both_directions(method):
    """A first step that is too long is rejected. Both directions and both tolerances share one graph."""
    field = shared()
    # The default interpolant of dopri8 has order 4: a step size that differs by a rounding shows in its outputs.
    limit = 1e-10 if method == "dopri8" else 1e-12
    rtol = tolerance(method)
    for t, first in ((T, 2.0), (T.flip(0), 2.0), (T, None)):
        found = compare(
            field, start(), t, method=method, rtol=rtol, atol=rtol / 10, options=dict(first_step=first), limit=limit
        )
        assert found.stats.rejected > 0 or first is None


@pytest.mark.parametrize("method", first_of(2, sorted(GRIDS, key=("euler", "rk4", *GRIDS).index)))
def test_a_method_on_a_grid_takes_the_same_steps_in_both_directions(method):
    field = Timed()
    for t in (T, T.flip(0)):
        for size in (0.13, 0.125):  # outputs between points of the grid, and at them
            compare(field, start(), t, method=method, options=dict(step_size=size))


@pytest.mark.parametrize("method", first_of(1, ["rk4", "euler"]))
@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("perturb", [False, True])
def test_the_options_of_a_grid(method, interp, perturb):
    options = dict(interp=interp, perturb=perturb)
    compare(Timed(), start(), T, method=method, options=options)
    compare(Timed(), start(), T, method=method, options=dict(options, step_size=0.3))


def test_a_grid_constructor():
    def points(func, y0, t):
        return torch.tensor([0.0, 0.1, 0.7, 1.2, 1.9, 2.0], dtype=t.dtype)

    compare(Timed(), start(), T, method="rk4", options=dict(grid_constructor=points))


@pytest.mark.parametrize("method", first_of(1, WITH_EXTRA_STAGES))
def test_stages_of_the_accurate_interpolant_are_evaluated_and_counted_only_in_steps_with_outputs(method):
    solver = dict(method=method, rtol=1e-4, atol=1e-4)
    found = compare(Timed(), start(), T, **solver, options=dict(dense="accurate", first_step=0.02)).stats
    with torch.no_grad():
        without = solve(Timed(), start(), T, **solver, options=dict(first_step=0.02)).stats
    assert found.nfe > without.nfe and found.accepted == without.accepted


@pytest.mark.parametrize("count", [2, 50])
def test_few_and_many_outputs(count):
    found = compare(Timed(), start(), linspace(0.0, 2.0, count), method="bosh3", rtol=1e-4, atol=1e-4)
    assert found.ys.shape == (count, 3, 2)


def test_outputs_that_lie_close_together_and_at_the_start():
    t = torch.tensor([0.0, 1e-9, 2e-9, 1.0, 1.0 + 1e-12, 2.0], dtype=F64)
    compare(Timed(), start(), t, method="bosh3", rtol=1e-3, atol=1e-3)


def test_float32():
    for method in ("bosh3", "euler"):
        field = Timed(torch.float32)
        for t in (T, T.float()):
            compare(field, start(torch.float32), t, method=method, rtol=1e-4, atol=1e-4, limit=CLOSE_IN_FLOAT)


# ------------------------------------------------------------------ several calls
@pytest.mark.parametrize("name", ["SECONDS", "BYTES"])
def test_a_solve_in_many_calls_is_the_same(monkeypatch, name):
    """One attempt a call, and one step with outputs a call."""
    monkeypatch.setattr(forward, name, 0)
    calls = compare(Timed(), start(), T, method="bosh3", rtol=1e-4, atol=1e-4).stats.host_reads
    assert calls >= 4


def test_a_solve_is_one_call(monkeypatch):
    monkeypatch.setattr(forward, "SECONDS", 1e6)  # on a busy machine the call would end sooner
    with torch.no_grad():
        stats = solve(Timed(), start(), T, method="bosh3", options=dict(compile=cache())).stats
    assert stats.host_reads == 2  # the times, and the point where the loop ended


def test_ctrl_c_between_calls_says_where_the_solve_stood(monkeypatch):
    monkeypatch.setattr(forward, "SECONDS", 0.0)
    calls = []

    def native(graph, examples, what):
        def run(inputs):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return list(graph(*inputs))

        return run

    monkeypatch.setattr(build, "native", native)
    with pytest.raises(KeyboardInterrupt) as raised, torch.no_grad():
        options = dict(compile=cache(), first_step=0.125, max_step=0.125)
        solve(Timed(), start(), T, rtol=1e-3, atol=1e-3, options=options)
    assert "t = 0.375, in a step of h = 0.125, after 3 accepted and 0 rejected" in "".join(
        getattr(raised.value, "__notes__", raised.value.args)
    )


# ------------------------------------------------------------------ numbers of options
def test_other_numbers_of_options_need_no_other_graph():
    field, kept, bosh3 = shared(), NativeCache(), dict(method="bosh3", rtol=1e-4, atol=1e-4)
    controllers = ["torchdiffeq", "I", "PI", "PID", Controller(0.2, 0.9, 0.05, keep=True)]
    numbers = [
        dict(first_step=0.3),
        dict(first_step=1.5, dfactor=0.4),
        dict(first_step=0.1, max_step=0.11),
        dict(first_step=0.1, min_step=0.2, max_step=0.4),
        dict(first_step=0.05, safety=0.7, ifactor=3.0),
        dict(max_num_steps=100),
        dict(throw=False),
        *(dict(controller=name, first_step=1.0) for name in controllers),
    ]
    found = set()
    for options in numbers:
        eager, native = pair(field, start(), T, **bosh3, options=options)
        same(eager, native)
        again = solve(field, start(), T, **bosh3, options=dict(options, compile=kept), gradient="adjoint")
        assert again.stats.loop == "native" and counts(again) == counts(native)
        found.add(counts(native))
    assert kept.count == 1 and len(found) > len(numbers) // 2


def test_stops_and_jumps():
    def field(t, y):
        return torch.where(t < 0.7, torch.ones_like(t), -2 * torch.ones_like(t)) * y * torch.cos(t)

    jump = torch.tensor([0.7], dtype=F64)
    stops = torch.tensor([0.25, 0.9, 1.6], dtype=F64)
    heun = dict(method="adaptive_heun", rtol=1e-2, atol=1e-2)
    for t in (T, T.flip(0)):
        compare(field, start(), t, **heun, options=dict(jump_t=jump))
    compare(field, start(), T, **heun, options=dict(step_t=stops))
    compare(field, start(), T, **heun, options=dict(step_t=stops, jump_t=jump))
    at_start = torch.tensor([0.0, 0.7], dtype=F64)
    compare(field, start(), T, **heun, options=dict(jump_t=at_start))


@pytest.mark.parametrize("method", first_of(1, ["bosh3", "tsit5"]))
def test_clip_keeps_the_field_between_the_times(method):
    def field(t, y):
        return -y * torch.sqrt(t * (2.0 - t))  # NaN outside of [0, 2]

    for t in (linspace(0.0, 2.0, 3), linspace(2.0, 0.0, 3)):
        found = compare(field, start(), t, method=method, rtol=1e-4, atol=1e-4, options=dict(clip=True))
        assert torch.isfinite(found.ys).all()


# ------------------------------------------------------------------ states and tolerances
def pendulum(t, state):
    angle, speed = state
    return speed, -torch.sin(angle) - 0.1 * speed.sum() * torch.ones_like(angle)


TWO = (torch.tensor([[0.5, 1.0], [-0.3, 2.0]], dtype=F64), torch.zeros(2, 2, dtype=F64))


@pytest.mark.parametrize("method", ["bosh3", "euler"])
def test_a_tuple(method):
    compare(pendulum, TWO, T, method=method, rtol=1e-4, atol=1e-4)


def test_tolerances_of_the_parts_of_a_tuple():
    compare(pendulum, TWO, T, method="adaptive_heun", rtol=(1e-2, 1e-3), atol=(1e-3, 1e-4))


def test_a_tolerance_for_each_element():
    """Other numbers in the same places need no other graph."""
    field = Timed()
    each = torch.tensor([[1e-2, 1e-3], [1e-4, 1e-3], [1e-2, 1e-4]], dtype=F64)
    taken = {
        counts(compare(field, start(), T, rtol=rtol, atol=atol, method="bosh3"))
        for rtol, atol in ((each, 1e-3), (each.flip(0), 1e-3), (1e-3, each), (each, each / 10))
    }
    assert len(taken) > 1


def test_a_state_without_dimensions():
    compare(lambda t, y: -y * torch.cos(t), torch.tensor(1.5, dtype=F64), T, method="bosh3", rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ how a solve ends
def nan_at_start(t, y):
    return y * torch.nan


def nan_later(t, y):
    return torch.where(t < 1.0, y, y * torch.nan)


def pole(t, y):
    return 50 * y * y


QUARTERS = dict(first_step=0.25, max_step=0.25, dfactor=0.25)  # exact times, also those of tiny steps


ENDS = {
    "max_num_steps": (shared(), dict(max_num_steps=3, max_step=0.05), Status.MAX_STEPS),
    "a NaN at the start": (nan_at_start, {}, Status.NON_FINITE),
    "a NaN later": (nan_later, QUARTERS, Status.NON_FINITE),
    "a NaN in the first steps": (nan_at_start, dict(first_step=0.25), Status.NON_FINITE),
    "a NaN in steps of min_step": (nan_later, dict(first_step=0.3, min_step=0.3), Status.NON_FINITE),
    "a NaN in the first step of min_step": (nan_at_start, dict(first_step=0.3, min_step=0.3), Status.NON_FINITE),
    "a pole": (pole, {}, Status.STEP_UNDERFLOW),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_solve_that_fails_ends_in_the_same_place_with_the_same_message(case):
    field, options, status = ENDS[case]
    y0, tols = start().abs() if case == "a pole" else start(), dict(rtol=1e-3, atol=1e-3, method="bosh3")
    found = compare(field, y0, T, options=dict(options, throw=False), **tols)
    assert found.status is status and torch.isnan(found.ys[-1]).all() and torch.equal(found.ys[0], y0)
    words = []
    for compiled in (False, True):
        with pytest.raises(SolveError) as raised, torch.no_grad():
            solve(field, y0, T, options=dict(options, compile=compiled), **tols)
        words.append(str(raised.value))
        assert raised.value.status is status
    assert words[0] == words[1]


def test_a_grid_with_a_nan_has_the_same_status():
    found = compare(nan_later, start(), T, method="rk4", options=dict(throw=False, step_size=0.25))
    assert found.status is Status.NON_FINITE


# ------------------------------------------------------------------ beside the state
def energy(t, y, dy):
    return dy.square().sum(-1)


def test_an_integral_and_a_regularized_field():
    field = Timed()
    heun = dict(method="adaptive_heun", rtol=1e-3, atol=1e-3)
    eager, native = pair(field, start(), T, integral=energy, **heun)
    same(eager, native)
    assert torch.allclose(native.integral, eager.integral, rtol=1e-12)
    noise = torch.ones_like(start())
    eager, native = pair(regularized(field, kinetic=0.1, jacobian=0.2, noise=noise), start(), T, **heun)
    same(eager, native)
    assert torch.allclose(native.integral, eager.integral, rtol=1e-12)


# ------------------------------------------------------------------ the public solvers
def test_every_public_solver_takes_the_option():
    field, y0, bosh3 = Timed(), start(), dict(method="bosh3", rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = odeint(field, y0, T, **bosh3)
        options = dict(compile="require")
        assert torch.allclose(odeint(field, y0, T, **bosh3, options=options), expected, rtol=1e-12)
        ys = odeint_adjoint(field, y0, T, **bosh3, options=options)
        assert torch.allclose(ys, expected, rtol=1e-12)
        layer = NeuralODE(field, T, **bosh3, options=options)
        assert torch.allclose(layer(y0), expected, rtol=1e-12)
    assert layer.stats is not None and layer.stats.loop == "native"


def test_a_wrong_value_of_the_option_is_refused():
    with pytest.raises(TypeError, match=r'options\["compile"\] must be True, False, "require"'):
        odeint(Timed(), start(), T, options=dict(compile="yes"))


def test_a_field_of_the_wrong_shape_has_the_usual_message():
    messages = []
    for compiled in (False, True):
        with pytest.raises(ValueError) as raised, torch.no_grad():
            solve(lambda t, y: y[:2], start(), T, options=dict(compile=compiled))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


# ------------------------------------------------------------------ reasons for the host loop
class WithCallback(Timed):
    def callback_step(self, t0, y0, dt):
        pass


REASONS = {
    "callbacks": (WithCallback, {}, "func has callbacks (callback_step)"),
    "a norm": (Timed, dict(options=dict(norm=lambda x: x.abs().max())), "a custom norm is Python"),
    "record_steps": (Timed, dict(options=dict(record_steps=True)), "record_steps needs the times of all steps"),
    "an implicit method": (Timed, dict(method="kvaerno5"), "kvaerno5 is no explicit Runge-Kutta method"),
    "an Adams method": (Timed, dict(method="explicit_adams"), "explicit_adams is no explicit Runge-Kutta method"),
    "scipy": (Timed, dict(method="scipy_solver"), "scipy_solver is no explicit Runge-Kutta method"),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_solve_that_is_not_compiled_says_why(case):
    make, solver, why = REASONS[case]
    with torch.no_grad():
        assert why in reason(make(), start(), T, **solver)
        options = dict(solver.get("options", {}), compile="require")
        with pytest.raises(ValueError, match=r'options\["compile"\] is "require".*' + why.split("(")[0].strip()):
            solve(make(), start(), T, **{**solver, "options": options})


def test_a_state_in_half_precision_is_not_compiled():
    with torch.no_grad():
        why = reason(Timed(torch.bfloat16), start(torch.bfloat16), T, rtol=1e-2, atol=1e-2)
    assert "half precision" in why


def test_a_solve_that_autograd_records_is_not_compiled():
    assert "autograd records the steps" in reason(Timed(), start(), T, gradient="backprop")
    y0 = start().requires_grad_()
    assert "autograd records the steps" in reason(lambda t, y: -y, y0, T, method="midpoint", gradient="backprop")


def test_a_solve_in_which_nothing_requires_a_gradient_is_compiled_while_autograd_is_on():
    frozen = Timed().requires_grad_(False)
    for field in (frozen, lambda t, y: -y * torch.cos(t)):
        ys = solve(field, start(), T, method="midpoint", options=dict(compile="require"), gradient="backprop").ys
        assert torch.allclose(ys, solve(field, start(), T, method="midpoint").ys, rtol=1e-12)


def test_a_tensor_that_is_no_parameter_may_require_a_gradient():
    scale = torch.tensor(0.5, dtype=F64, requires_grad=True)
    frozen = Timed().requires_grad_(False)
    frozen.scale = [scale]
    for field in (lambda t, y: -scale * y, frozen):
        assert "autograd records" in reason(field, start(), T, method="midpoint", gradient="backprop")


def test_an_event_is_looked_for_by_the_host():
    found = solve(
        Timed(), start(), T[[0, -1]], event_fn=lambda t, y: y[0, 0], options=dict(compile=True), gradient="backprop"
    )
    assert found.stats.why == "an event is looked for by the host"


def test_captured_and_compiled_exclude_each_other():
    with pytest.raises(InvalidInput, match="cuda_graph"):
        odeint(Timed(), start(), T, options=dict(compile=True, cuda_graph=True))
