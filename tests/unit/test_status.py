"""Errors say what came, what is needed and what to type. Their classes are those that torchdiffeq's users catch."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from problems import F64, MLP, linspace

import node_cuda
from node_cuda import odeint, odeint_adjoint, odeint_dense, odeint_event, solve
from node_cuda.status import SolveError, Status

T = linspace(0.0, 1.0, 3)
Y = torch.ones(2, dtype=F64)


def decay(t, y):
    return -y


def late(t, y):
    return torch.ones_like(y)


def crosses_half(t, y):
    return y[0] - 0.5


def never(t, y):
    return y[0] + 10.0


def grow(t, y):
    return y


def grid_that_stops_short(func, y0, t):
    return linspace(0.0, 0.9, 5)


def is_a_sentence(message: str) -> bool:
    """Check that a message is a sentence with at least eight words."""
    return len(message.split()) >= 8


# ------------------------------------------------------------------ the error table, row by row
# name: (call, classes it must be an instance of, words the message must hold)
ROWS = {
    "t is a list": (lambda: odeint(decay, Y, [0.0, 1.0]), AssertionError, r"`?t`?.*[Tt]ensor"),
    "t is a matrix": (lambda: odeint(decay, Y, T[None]), AssertionError, r"t\b.*(dimension|1-D|shape)"),
    "t is not monotone": (
        lambda: odeint(decay, Y, torch.tensor([0.0, 1.0, 0.5], dtype=F64)),
        AssertionError,
        r"t\b.*(increas|monoton)",
    ),
    "t repeats a value": (
        lambda: odeint(decay, Y, torch.tensor([0.0, 0.5, 0.5], dtype=F64)),
        AssertionError,
        r"t\b.*(increas|monoton)",
    ),
    "t is an integer tensor": (lambda: odeint(decay, Y, torch.tensor([0, 1])), TypeError, r"t\b.*float"),
    "y0 is a list": (lambda: odeint(decay, [Y, Y], T), AssertionError, r"y0.*tuple"),
    "rtol requires a gradient": (
        lambda: odeint(decay, Y, T, rtol=torch.tensor(1e-3, requires_grad=True)),
        AssertionError,
        r"rtol.*grad",
    ),
    "atol requires a gradient": (
        lambda: odeint(decay, Y, T, atol=torch.tensor(1e-3, requires_grad=True)),
        AssertionError,
        r"atol.*grad",
    ),
    "tupled rtol of another length": (
        lambda: odeint(lambda t, y: y, (Y, Y), T, rtol=(1e-3, 1e-3, 1e-3)),
        AssertionError,
        r"rtol.*(3.*2|2.*3)",
    ),
    "tupled atol of another length": (
        lambda: odeint(lambda t, y: y, (Y, Y), T, atol=(1e-3,)),
        AssertionError,
        r"atol.*(1.*2|2.*1)",
    ),
    "adjoint of a plain function": (lambda: odeint_adjoint(decay, Y, T), ValueError, r"adjoint_params"),
    "adjoint_method without its options": (
        lambda: odeint_adjoint(MLP(), Y, T, method="dopri5", options={}, adjoint_method="rk4"),
        ValueError,
        r"adjoint_options",
    ),
    "an event with three times": (lambda: odeint(decay, Y, T, event_fn=crosses_half), ValueError, r"2.*3|3.*2|two"),
    "an event with scipy_solver": (
        lambda: odeint(decay, Y, T[:2], event_fn=crosses_half, method="scipy_solver"),
        AttributeError,
        r"event.*scipy_solver|scipy_solver.*event",
    ),
    "an event on a grid without step_size": (
        lambda: odeint(decay, Y, T[:2], event_fn=crosses_half, method="rk4"),
        AssertionError,
        r"step_size",
    ),
    "an event that never comes, on a grid": (
        lambda: odeint(late, Y, T[:2], event_fn=never, method="euler", options=dict(step_size=0.1)),
        RuntimeError,
        r"event",
    ),
    "an event that never comes": (
        lambda: odeint(late, Y, T[:2], event_fn=never, options=dict(max_num_steps=30)),
        AssertionError,
        r"max_num_steps",
    ),
    "too many steps": (
        lambda: odeint(lambda t, y: -1e4 * y, Y, T, options=dict(max_num_steps=10)),
        AssertionError,
        r"max_num_steps",
    ),
    "a NaN in the first evaluation": (
        lambda: odeint(lambda t, y: y * math.nan, Y, T),
        AssertionError,
        r"(?i)nan|finite",
    ),
    "a NaN in y0": (lambda: odeint(decay, Y * math.nan, T), AssertionError, r"y0.*((?i:nan)|finite)|finite.*y0"),
    "an infinite y0": (lambda: odeint(decay, Y * math.inf, T), AssertionError, r"y0.*((?i:inf)|finite)|finite.*y0"),
    "a NaN with min_step": (
        lambda: odeint(lambda t, y: y * math.nan, Y, T, options=dict(min_step=1e-3)),
        AssertionError,
        r"(?i)nan|finite",
    ),
    "step_t and jump_t share a value": (
        lambda: odeint(decay, Y, T, options=dict(step_t=torch.tensor([0.5, 0.7]), jump_t=torch.tensor([0.5]))),
        ValueError,
        r"step_t.*jump_t.*0\.5",
    ),
    "step_size and grid_constructor": (
        lambda: odeint(decay, Y, T, method="rk4", options=dict(step_size=0.1, grid_constructor=lambda f, y, t: t)),
        ValueError,
        r"step_size.*grid_constructor|grid_constructor.*step_size",
    ),
    "an unknown interpolation": (
        lambda: odeint(decay, Y, T, method="rk4", options=dict(interp="quintic")),
        ValueError,
        r"quintic.*linear.*cubic",
    ),
    "a grid that stops short": (
        lambda: odeint(decay, Y, T, method="rk4", options=dict(grid_constructor=grid_that_stops_short)),
        AssertionError,
        r"grid.*0\.9",
    ),
    "an integer y0": (
        lambda: odeint(decay, torch.ones(2, dtype=torch.int64), T),
        NotImplementedError,
        r"y0.*(int64|Long).*|float",
    ),
    "an empty y0": (lambda: odeint(decay, torch.ones(0, dtype=F64), T), AssertionError, r"(?i)y0.*(empty|no elem|0)"),
    "f of the wrong shape": (
        lambda: odeint(lambda t, y: torch.ones(3, dtype=F64), Y, T),
        RuntimeError,
        r"\(?3,?\)?.*\(?2,?\)?|\(?2,?\)?.*\(?3,?\)?",
    ),
    "an unknown method": (lambda: odeint(decay, Y, T, method="dopri6"), ValueError, r"dopri6.*dopri5"),
}


@pytest.mark.parametrize(("call", "classes", "words"), ROWS.values(), ids=ROWS.keys())
def test_every_row_of_the_error_table_gives_a_message_that_says_what_to_change(call, classes, words):
    with pytest.raises(classes) as caught:
        call()
    message = str(caught.value)
    assert is_a_sentence(message), message
    assert re.search(words, message, re.DOTALL), message


# ------------------------------------------------------------------ rows that torchdiffeq answers without an error


def test_a_field_of_a_wider_dtype_is_cast_to_the_state():
    ys = odeint(lambda t, y: -y.double(), Y.float(), T)
    assert ys.dtype == torch.float32
    assert torch.allclose(ys[-1], torch.exp(torch.tensor(-1.0)).expand(2), atol=1e-5)


@pytest.mark.parametrize("method", ["bosh3", "rk4"])
def test_dense_output_of_tuples_and_of_other_methods_is_no_error(method):
    """torchdiffeq answers both with a bare AssertionError."""
    options = dict(step_size=0.01) if method == "rk4" else {}
    y = odeint_dense(lambda t, s: (-s[0], s[0]), (Y, 0 * Y), T[0], T[-1], method=method, options=options)
    first, second = y(torch.tensor(0.5, dtype=F64))
    assert torch.allclose(first, torch.exp(torch.tensor(-0.5, dtype=F64)).expand(2), atol=1e-4)
    assert torch.allclose(first + second, Y, atol=1e-4)


# ------------------------------------------------------------------ input mistakes beyond the table
@pytest.mark.parametrize(
    "odeint", [odeint, lambda f, y, t: odeint_adjoint(f, y, t, adjoint_params=())], ids=["odeint", "odeint_adjoint"]
)
@pytest.mark.parametrize("result", [None, 1.0, "y"], ids=["None", "float", "str"])
def test_a_field_that_returns_no_tensor_gives_an_error(odeint, result):
    with pytest.raises((TypeError, ValueError)) as caught:
        odeint(lambda t, y: result, Y, T)
    message = str(caught.value)
    assert is_a_sentence(message), message
    assert re.search(r"func|f\(t, y\)", message) and re.search(type(result).__name__, message), message


def test_a_field_of_a_tuple_state_must_return_as_many_tensors():
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        odeint(lambda t, s: (s[0],), (Y, Y), T)
    assert is_a_sentence(str(caught.value))
    assert re.search(r"1.*2|2.*1", str(caught.value))


def test_a_component_of_the_wrong_shape_is_named():
    with pytest.raises((ValueError, RuntimeError)) as caught:
        odeint(lambda t, s: (s[0], s[1].repeat(2)), (Y, torch.ones(3, dtype=F64)), T)
    assert re.search(r"6.*3|3.*6", str(caught.value))


def test_a_wrong_shape_is_found_even_if_it_would_broadcast():
    with pytest.raises((ValueError, RuntimeError)) as caught:
        odeint(lambda t, y: torch.ones(5, 1, 2, dtype=F64), Y, T)
    assert is_a_sentence(str(caught.value))


@pytest.mark.parametrize("method", ["Radau", "ode15s", "KenCarp4", "BDF", "LSODA"])
def test_naming_a_stiff_method_of_another_package_says_which_method_to_use_instead(method):
    with pytest.raises(ValueError) as caught:
        odeint(decay, Y, T, method=method)
    message = str(caught.value)
    assert is_a_sentence(message) and method in message, message
    assert any(re.search(rf"\b{name}\b", message) for name in node_cuda.METHODS), message


def test_input_mistakes_are_found_by_the_adjoint_too():
    with pytest.raises(AssertionError, match=r"increas|monoton"):
        odeint_adjoint(MLP(), Y, torch.tensor([0.0, 1.0, 0.5], dtype=F64))
    with pytest.raises(TypeError, match="float"):
        odeint_adjoint(MLP(), Y, torch.tensor([0, 1]))


def test_the_event_time_must_start_from_a_tensor():
    with pytest.raises((TypeError, AttributeError, AssertionError)) as caught:
        odeint_event(decay, Y, 0.0, event_fn=crosses_half)
    assert is_a_sentence(str(caught.value))
    assert "t0" in str(caught.value)


# ------------------------------------------------------------------ solves that fail report the cause
def failure(func, y0=Y, t=T, **arguments) -> SolveError:
    with pytest.raises(SolveError) as caught:
        odeint(func, y0, t, **arguments)
    assert is_a_sentence(str(caught.value)), str(caught.value)
    return caught.value


def nan_after(t, y):
    return torch.where(t > 0.3, math.nan, 1.0) * y


def test_a_nan_in_the_middle_is_reported_with_its_time():
    error = failure(nan_after)
    assert error.status is Status.NON_FINITE
    assert 0.0 <= error.t <= 0.3 + 1e-9
    assert re.search(r"(?i)nan|finite", str(error))
    assert "underflow in dt 0.0" not in str(error)


def test_an_infinite_derivative_is_reported_too():
    error = failure(lambda t, y: torch.where(t > 0.3, math.inf, 1.0) * y)
    assert error.status is Status.NON_FINITE


def test_a_solution_that_blows_up_ends_at_the_pole_with_its_step_too_small():
    error = failure(lambda t, y: y * y, t=linspace(0.0, 2.0, 3))
    assert error.status in (Status.STEP_UNDERFLOW, Status.NON_FINITE)
    assert error.t == pytest.approx(1.0, abs=1e-3)
    assert "step" in str(error) or "finite" in str(error)


def test_a_stiff_field_with_max_num_steps_ends_with_that_status():
    error = failure(lambda t, y: -1e6 * (y - torch.cos(t)), options=dict(max_num_steps=200))
    assert error.status is Status.MAX_STEPS
    assert "max_num_steps" in str(error) and "200" in str(error)
    assert 0.0 < error.t < 1.0


def test_an_event_that_never_comes_ends_with_a_separate_status():
    error = failure(late, t=T[:2], event_fn=never, method="euler", options=dict(step_size=0.1))
    assert error.status is Status.NO_EVENT


def test_the_failures_have_different_statuses():
    messages = {
        str(failure(nan_after)),
        str(failure(lambda t, y: y * y, t=linspace(0.0, 2.0, 3))),
        str(failure(lambda t, y: -1e6 * y, options=dict(max_num_steps=50))),
    }
    assert len(messages) == 3


def test_the_error_has_the_time_and_the_statistics():
    calls = 0

    def func(t, y):
        nonlocal calls
        calls += 1
        return nan_after(t, y)

    error = failure(func)
    assert isinstance(error, RuntimeError) and isinstance(error, AssertionError)
    assert error.stats.nfe == calls > 0
    assert error.stats.accepted >= 0
    assert isinstance(error.t, float)


def test_the_time_of_a_failure_is_the_users_when_time_runs_backwards():
    error = failure(lambda t, y: torch.where(t < 0.7, math.nan, 1.0) * y, t=T.flip(0))
    assert error.status is Status.NON_FINITE
    assert 0.7 - 1e-9 <= error.t <= 1.0


def test_a_failure_in_the_backward_pass_is_a_solve_error_too():
    class Field(torch.nn.Module):
        backward = False

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(2, dtype=F64))

        def forward(self, t, y):
            return y * self.w * (math.nan if self.backward else 1.0)

    func = Field()
    ys = odeint_adjoint(func, Y, T)
    func.backward = True
    with pytest.raises(SolveError) as caught:
        ys.sum().backward()
    assert caught.value.status is Status.NON_FINITE
    assert is_a_sentence(str(caught.value))


# ------------------------------------------------------------------ throw=False
def test_without_throw_the_solution_has_the_reached_outputs_and_nan_after_them():
    solution = solve(nan_after, Y, linspace(0.0, 1.0, 11), options=dict(throw=False))
    assert solution.status is Status.NON_FINITE
    reached = ~solution.ys.isnan().any(dim=1)
    assert reached[0] and not reached[-1]
    assert (reached.int().diff() <= 0).all(), "NaN must come behind everything that was reached"
    assert not reached[4:].any()
    assert torch.allclose(solution.ys[reached][:, 0], torch.exp(linspace(0.0, 1.0, 11)[reached]), rtol=1e-6)


def test_without_throw_odeint_returns_the_same_outputs():
    ys = odeint(lambda t, y: -1e6 * y, Y, T, options=dict(throw=False, max_num_steps=20))
    assert torch.equal(ys[0], Y)
    assert ys[1:].isnan().all()


def test_without_throw_a_tuple_state_gets_nan_in_every_component():
    solution = solve(lambda t, s: (s[0] * s[0], -s[1]), (Y, Y[:1]), linspace(0.0, 2.0, 5), options=dict(throw=False))
    assert solution.status is not Status.SUCCESS
    for component in solution.ys:
        assert not component[:2].isnan().any()
        assert component[3:].isnan().all()


def test_a_good_solve_has_the_status_success():
    assert solve(decay, Y, T).status is Status.SUCCESS
    assert solve(decay, Y, T, options=dict(throw=False)).status is Status.SUCCESS


@pytest.mark.parametrize("status", list(Status), ids=lambda status: status.name)
def test_every_status_has_an_explanation(status):
    sentence = str(status.value) if isinstance(status.value, str) else str(status)
    assert is_a_sentence(sentence) or status is Status.SUCCESS


# ------------------------------------------------------------------ warnings, where torchdiffeq warns
@pytest.mark.parametrize("method", ["dopri5", "rk4", "scipy_solver", "implicit_adams"])
def test_an_unknown_option_is_a_warning_that_names_it(method):
    with pytest.warns(UserWarning, match="stepsize"):
        odeint(decay, Y, T, method=method, options=dict(stepsize=0.1))


def test_a_callback_that_a_method_cannot_call_is_a_warning():
    class Field(MLP):
        def callback_accept_step(self, t0, y0, dt):
            raise AssertionError("not for fixed grids")

    with pytest.warns(UserWarning, match="callback"):
        odeint(Field(), Y, T, method="rk4")


def test_a_parameter_without_gradient_and_a_custom_adjoint_norm_give_a_warning():
    func = MLP()
    func.b1.requires_grad_(False)
    with pytest.warns(UserWarning, match="norm"):
        odeint_adjoint(func, Y, T, adjoint_options=dict(norm=lambda tensors: tensors[1].abs().max()))


def test_an_adams_method_of_order_below_four_warns():
    with pytest.warns(UserWarning, match="max_order"):
        odeint(decay, Y, T, method="implicit_adams", options=dict(max_order=3))


def test_a_functional_iteration_that_does_not_converge_warns():
    with pytest.warns(UserWarning, match="converge"):
        odeint(lambda t, y: -50.0 * y, Y, T, method="implicit_adams", options=dict(step_size=0.1), rtol=1e-9)


def test_a_nan_on_a_fixed_grid_is_never_hidden():
    """torchdiffeq returns the NaN. A solve may raise or return it, but must not return a finite number."""
    try:
        ys = odeint(lambda t, y: torch.where(t > 0.3, math.nan, 1.0) * y, Y, T, method="rk4")
    except SolveError as error:
        assert error.status is Status.NON_FINITE
    else:
        assert ys[-1].isnan().all()


def test_the_codes_that_the_device_writes_are_those_of_the_members():
    header = (Path(__file__).resolve().parents[2] / "csrc" / "control" / "control.h").read_text()
    written = re.search(r"enum Status : int32_t \{(.*?)\}", header, re.DOTALL)
    assert written is not None
    codes = dict(re.findall(r"(\w+) = (\d+)", written[1]))
    assert codes and all(Status[name].value == int(code) for name, code in codes.items())
