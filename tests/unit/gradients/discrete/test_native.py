"""The discrete adjoint of a compiled solve: what it records, how it repeats calls, and what it does with func.

The graphs run without the compiler here. unit/native/test_reverse.py has the methods and the kinds of states.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native import Timed, start
from native_gradients import (
    CASES,
    CHANGES,
    CLOSE,
    EULER,
    HEUN,
    FailsAtOnce,
    Layers,
    T,
    autocast_holds_in_the_backward_pass,
    close,
    compare_gradients,
    gradients,
    loss_of,
    trains_as_the_host_and_builds_two_graphs,
)

from node_cuda import Status, solve
from node_cuda.gradients.discrete import native
from node_cuda.native.cache import NativeCache
from node_cuda.status import InvalidField

pytestmark = pytest.mark.usefixtures("interpreted")


def compare(func: Any, y0: Any = None, t: torch.Tensor = T, **solver: Any) -> Any:
    return compare_gradients(func, start() if y0 is None else y0, t, gradient="discrete", **solver)


@pytest.mark.parametrize("case", CASES)
def test_a_case_of_both_adjoint_methods_has_the_gradient_of_the_host(case):
    CASES[case](compare)


def recorded(field: Any, *, compiled: Any = "require", **solver: Any) -> tuple[Any, list[torch.Tensor]]:
    """Return a discrete solve, and what its loss is differentiated by."""
    y0 = start().requires_grad_()
    options = dict(solver.pop("options", {}), compile=compiled)
    return solve(field, y0, T, gradient="discrete", options=options, **solver), [y0, *field.parameters()]


# ------------------------------------------------------------------ checkpoints and repeated passes
@pytest.mark.parametrize("method", ["adaptive_heun", "bosh3"])
def test_checkpoints_repeat_calls_and_a_second_pass_gives_the_same(method):
    """With room for 8 states a call records 4 steps, and the states at the start of two calls are kept."""
    field = Timed()
    tols = dict(rtol=1e-3, atol=1e-3) if method == "bosh3" else dict(rtol=1e-2, atol=1e-2)
    options = dict(first_step=0.0625, max_step=0.0625)
    expected, of = recorded(field, compiled=False, method=method, options=options, **tols)
    expected = torch.autograd.grad(loss_of(expected), of)
    found, of = recorded(field, method=method, options=options, checkpoints=8, **tols)
    loss, nfe = loss_of(found), []
    assert found.stats.accepted >= 16
    for _ in range(3):
        close(torch.autograd.grad(loss, of, retain_graph=True), expected, CLOSE)
        nfe.append(found.stats.nfe_backward)
    assert found.stats.loop_backward == "native"
    assert found.stats.checkpoint_slots == 8 and 4 <= found.stats.peak_checkpoints <= 8
    assert found.stats.recomputed_steps > 0
    assert nfe[2] - nfe[1] > nfe[0]  # a repeated pass goes through the solve first


def test_all_steps_are_kept_without_a_limit_and_a_second_pass_recomputes_none():
    found, of = recorded(Timed(), **HEUN)
    loss = loss_of(found)
    first, second = (torch.autograd.grad(loss, of, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert found.stats.peak_checkpoints == found.stats.accepted and found.stats.recomputed_steps == 0
    assert found.stats.checkpoint_slots is None


def test_a_call_records_what_fits_into_its_memory(monkeypatch):
    monkeypatch.setattr(native, "BYTES", 3 * 48)  # three states of 6 doubles
    found = compare(Timed(), **EULER)
    assert found.stats.host_reads == 2 + 2 + 2  # the times; 4 steps in 2 calls; and 2 of the reverse loop


# ------------------------------------------------------------------ how a solve ends
def test_a_solve_that_fails_in_its_first_step_has_the_gradient_of_its_start():
    found = compare(FailsAtOnce(), options=dict(throw=False), **HEUN)
    assert found.status is Status.NON_FINITE and found.stats.accepted == 0


# ------------------------------------------------------------------ beside the state
def test_the_gradient_by_the_times():
    field = Timed()
    for t in (T, T.flip(0)):
        compare(field, t=t, wants_t=True, **HEUN)


def test_autocast_around_the_solve_holds_in_the_backward_pass():
    autocast_holds_in_the_backward_pass("discrete")


# ------------------------------------------------------------------ func is changed before backward()
def test_a_func_that_was_changed_is_refused():
    kept = NativeCache()
    for name, change in CHANGES.items():
        field = Layers()
        found, _ = recorded(field, compiled=kept, **EULER)
        change(field)
        with pytest.raises(InvalidField, match="was changed between the forward and the backward pass"):
            loss_of(found).backward()
        assert field.a.weight.grad is None, name


# ------------------------------------------------------------------ training
def test_a_training_loop_builds_its_graphs_once(monkeypatch):
    trains_as_the_host_and_builds_two_graphs("auto", monkeypatch)


def test_the_seconds_of_both_builds_are_told_by_the_first_solve():
    field, seconds = Timed(), []
    for _ in range(2):
        found, of = recorded(field, **EULER)
        before = found.stats.compile_seconds
        torch.autograd.grad(loss_of(found), of)
        seconds.append((before, found.stats.compile_seconds))
    assert 0 < seconds[0][0] < seconds[0][1] and seconds[1] == (0.0, 0.0)


# ------------------------------------------------------------------ reasons for the host
def test_a_solve_that_is_not_compiled_says_why_and_has_the_gradient_of_the_host():
    field = Timed()
    for solver, why in (
        (dict(EULER, checkpoints=3), "checkpoints=3 leaves no room to record the steps of a call"),
        (dict(EULER, wants_t=True), "dL/dt of a fixed grid is computed step by step"),
        (dict(method="kvaerno3", rtol=3e-2, atol=3e-2), "kvaerno3 is no explicit Runge-Kutta method"),
    ):
        options = solver.pop("options", {})
        _, expected = gradients(field, start(), T, gradient="discrete", options=options, **solver)
        found, grads = gradients(field, start(), T, gradient="discrete", options=dict(options, compile=True), **solver)
        close(grads, expected, CLOSE)
        assert why in str(found.stats.why) and found.stats.loop_backward == "host"
        with pytest.raises(ValueError, match='"compile"] is "require"'):
            gradients(field, start(), T, gradient="discrete", options=dict(options, compile="require"), **solver)
