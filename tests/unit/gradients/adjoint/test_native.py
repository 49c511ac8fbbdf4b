"""The adjoint method with a compiled backward solve: its options, its norm, its statistics, and what func may do.

The graphs run without the compiler here. unit/native/test_adjoint.py has the methods and the kinds of states.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from native import Timed, shared, start
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
from problems import F64

from node_cuda import SolveError, Status, odeint_adjoint, solve
from node_cuda.native.cache import NativeCache
from node_cuda.status import InvalidField

pytestmark = pytest.mark.usefixtures("interpreted")


def compare(func: Any, y0: Any = None, t: torch.Tensor = T, **solver: Any) -> Any:
    return compare_gradients(func, start() if y0 is None else y0, t, gradient="adjoint", **solver)


@pytest.mark.parametrize("case", CASES)
def test_a_case_of_both_adjoint_methods_has_the_gradient_of_the_host(case):
    CASES[case](compare)


# ------------------------------------------------------------------ options of the backward solve
def test_the_norm_with_and_without_the_gradients_of_the_parameters():
    """They take other steps."""
    field, nfe = shared(), []
    for options in ({}, dict(norm="seminorm")):
        tols = dict(rtol=1e-1, atol=1e-1, adjoint_rtol=1e-3, adjoint_atol=1e-3)
        found = compare(field, method="adaptive_heun", adjoint_options=options, **tols)
        nfe.append(found.stats.nfe_backward)
    assert nfe[0] > nfe[1]


def test_a_method_tolerances_and_options_for_the_backward_solve_alone():
    field = shared()
    backward = dict(adjoint_method="adaptive_heun", adjoint_rtol=1e-2, adjoint_atol=1e-2)
    nfe = []
    for step in (0.05, 0.2):
        found = compare(field, **EULER, **backward, adjoint_options=dict(max_step=step))
        nfe.append(found.stats.nfe_backward)
    assert nfe[0] > nfe[1] > found.stats.nfe


def test_a_backward_solve_that_is_not_compiled_after_one_that_is():
    found, grads = gradients(
        shared(),
        start(),
        T,
        gradient="adjoint",
        options=dict(compile=True),
        adjoint_options=dict(compile=False),
        **HEUN,
    )
    _, expected = gradients(shared(), start(), T, gradient="adjoint", **HEUN)
    close(grads, expected, CLOSE)
    assert (found.stats.loop, found.stats.loop_backward) == ("native", "host")


REASONS = {
    "check_reconstruction compares y at each output on the host": dict(
        **HEUN, adjoint_options=dict(check_reconstruction=True)
    ),
    "a custom norm is Python": dict(**HEUN, adjoint_options=dict(norm=lambda parts: parts[1].abs().max())),
    "explicit_adams is no explicit Runge-Kutta method": dict(
        **HEUN, adjoint_method="explicit_adams", adjoint_options=dict(step_size=0.1)
    ),
}


@pytest.mark.parametrize("why", REASONS)
def test_a_backward_solve_that_is_not_compiled_says_why(why):
    field = shared()
    found, grads = gradients(field, start(), T, gradient="adjoint", options=dict(compile=True), **REASONS[why])
    _, expected = gradients(field, start(), T, gradient="adjoint", **REASONS[why])
    close(grads, expected, CLOSE)
    assert found.stats.loop_backward == "host" and why in str(found.stats.why_backward)


def test_a_func_that_cannot_be_inspected_says_why_in_both_passes():
    field = Timed()
    field.hidden = torch.ones(2, dtype=torch.complex128).conj()
    options = dict(EULER["options"], compile=True)
    found, grads = gradients(field, start(), T, gradient="adjoint", options=options, method="euler")
    _, expected = gradients(field, start(), T, gradient="adjoint", **EULER)
    close(grads, expected, CLOSE)
    assert found.stats.loop == found.stats.loop_backward == "host"
    assert "conjugate or negative view" in str(found.stats.why) and found.stats.why == found.stats.why_backward


# ------------------------------------------------------------------ how a solve ends
def test_a_solve_that_fails_in_its_first_interval_has_the_gradient_of_its_start():
    options = dict(throw=False, compile="require")
    found, (of_y0, of_w) = gradients(FailsAtOnce(), start(), T, gradient="adjoint", options=options, **HEUN)
    weights = torch.cos(torch.arange(6, dtype=F64)).view(3, 2)
    assert found.status is Status.NON_FINITE and torch.equal(of_y0, weights)
    assert of_w is None or not of_w.any()


def test_a_backward_solve_that_fails_raises_the_error_of_the_host():
    messages = []
    for compiled in (False, "require"):
        with pytest.raises(SolveError) as raised:
            gradients(
                Timed(),
                start(),
                T,
                gradient="adjoint",
                options=dict(compile=compiled),
                adjoint_options=dict(max_num_steps=3, first_step=0.01, max_step=0.01, compile=compiled),
                **HEUN,
            )
        messages.append(str(raised.value).split("(nfe")[0])
        assert raised.value.status is Status.MAX_STEPS
    assert messages[0] == messages[1]


# ------------------------------------------------------------------ beside the state
@pytest.mark.parametrize("solver", [HEUN, EULER])
def test_the_gradient_by_the_times(solver):
    field = shared()
    if solver is HEUN:
        for t in (T, T.flip(0)):
            compare(field, t=t, wants_t=True, **HEUN)
        return
    _, grads = gradients(
        field, start(), T, gradient="adjoint", wants_t=True, method="euler", options=dict(step_size=0.3, compile=True)
    )
    _, expected = gradients(field, start(), T, gradient="adjoint", wants_t=True, **EULER)
    close(grads, expected, CLOSE)


def test_autocast_around_the_solve_holds_in_the_backward_pass():
    autocast_holds_in_the_backward_pass("adjoint")


# ------------------------------------------------------------------ func is changed before backward()
def test_a_func_that_was_changed_is_refused_by_both_backward_passes():
    kept = NativeCache()
    for backward in ({}, dict(compile=False)):
        for name, change in CHANGES.items():
            field = Layers()
            y0, options = start().requires_grad_(), dict(EULER["options"], compile=kept)
            solver = dict(method="euler", options=options, adjoint_options=dict(EULER["options"], **backward))
            loss = loss_of(solve(field, y0, T, gradient="adjoint", **solver))
            change(field)
            with pytest.raises(InvalidField, match="was changed between the forward and the backward pass"):
                loss.backward()
            assert field.a.weight.grad is None, name


def test_a_buffer_that_was_replaced_is_that_of_the_forward_pass_and_the_host_solves():
    grads, given = [], Layers()
    for replaced in (False, True):
        field, y0 = copy.deepcopy(given), start().requires_grad_()
        found = solve(field, y0, T, gradient="adjoint", method="euler", options=dict(step_size=0.3, compile=True))
        if replaced:
            field.scale = torch.ones(2, dtype=F64)
        grads.append(torch.autograd.grad(loss_of(found), [y0, field.a.weight]))
        assert found.stats.loop_backward == ("host" if replaced else "native")
        assert "tensors in the place of its own" in str(found.stats.why_backward) or not replaced
    close(*grads, CLOSE)


# ------------------------------------------------------------------ training
def test_a_training_loop_builds_its_graphs_once(monkeypatch):
    trains_as_the_host_and_builds_two_graphs("adjoint", monkeypatch)


def test_odeint_adjoint_and_a_second_pass():
    field, y0 = Timed(), start().requires_grad_()
    ys = odeint_adjoint(field, y0, T, options=dict(EULER["options"], compile="require"), method="euler")
    first, second = (torch.autograd.grad(ys.sum(), [y0, field.w], retain_graph=True) for _ in range(2))
    expected = torch.autograd.grad(odeint_adjoint(field, y0, T, **EULER).sum(), [y0, field.w])
    close(first, expected, CLOSE)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
