"""An exception from user code gets one note: how the code was called, where the solve stood, and what to type."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import pytest
import torch
from problems import F64, linspace
from torch import nn

from node_cuda import InvalidField, _user_code, odeint, odeint_adjoint, odeint_dense, odeint_event, solve

Y = torch.ones(3, 2)
T = torch.tensor([0.0, 1.0])

needs_notes = pytest.mark.skipif(sys.version_info < (3, 11), reason="these exceptions get notes, from Python 3.11 on")


def decay(t, y):
    return -y


def ends_at(limit, error=ValueError):
    """Return a field that is not defined after this time."""

    def func(t, y):
        if t > limit:
            raise error("no data")
        return -y

    return func


def raised(call, error=Exception):
    """Return the exception and what was added: to its message, or as a note where the message cannot be changed."""
    with pytest.raises(error) as caught:
        call()
    words, notes = str(caught.value), getattr(caught.value, "__notes__", [])
    added = [words[words.index(_user_code.BEGINNING) :]] if _user_code.BEGINNING in words else []
    (note,) = added + notes
    assert note.count(_user_code.BEGINNING) == 1, "one note, and no more"
    return caught.value, note


def told(call, error=Exception):
    return raised(call, error)[1]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, t, y):
        return self.net(y)


# ------------------------------------------------------------------ what it says
def test_the_note_says_how_func_was_called_and_where_the_solve_stood():
    note = told(lambda: odeint(ends_at(0.3), Y, T), ValueError)
    call, t, y, stood = note.splitlines()
    assert call == "node_cuda: func(t, y) was called with"
    assert t.startswith("  t: shape (), torch.float32, cpu, t = 0.3")
    assert y == "  y: shape (3, 2), torch.float32, cpu"
    assert stood.startswith("The solve stood at t = 0.2") and "in a step of h = " in stood
    assert stood.endswith("accepted and 0 rejected steps.")


def test_each_component_of_a_tuple_is_described():
    note = told(lambda: odeint(lambda t, s: s[2], (Y, Y[0].double()), T), IndexError)
    assert "  y[0]: shape (3, 2), torch.float64, cpu\n  y[1]: shape (2,), torch.float64, cpu" in note


@needs_notes
def test_the_exception_its_type_and_its_arguments_are_the_users():
    class Mine(Exception):
        pass

    mine = Mine("a", 3)

    def func(t, y):
        raise mine

    error, _ = raised(lambda: odeint(func, Y, T), Mine)
    assert error is mine and error.args == ("a", 3)


NET, SEQUENCE = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
MENDS = {
    "func takes (y, t)": (lambda: odeint(lambda y, t: NET(y), Y, T), "func takes (y, t), and is called as func(t, y)"),
    "a module of y alone": (
        lambda: odeint(NET, Y, T),
        "Linear takes y alone, and is called as func(t, y). Use a module with `def forward(self, t, y)",
    ),
    "one of the adjoint": (lambda: odeint_adjoint(SEQUENCE, Y, T), "Sequential takes y alone"),
    "a function of y alone": (lambda: odeint(lambda y: -y, Y, T), "Use `lambda t, y: func(y)`."),
    "t is concatenated": (lambda: odeint(lambda t, y: torch.cat([y, t], -1), Y, T), "`t.expand(*y.shape[:-1], 1)`"),
    "y is double": (
        lambda: odeint(lambda t, y: NET(y), Y.double(), T),
        "y is torch.float64, and func computes with another dtype. Use `func.to(torch.float64)`",
    ),
    "the parameters are double": (
        lambda: odeint_adjoint(Net().double(), Y, T),
        "y is torch.float32, and func computes with another dtype. Use `func.to(torch.float32)` for its parameters, or "
        "start from a y0 of their dtype, e.g. `y0.double()`",
    ),
    "beyond the end": (
        lambda: odeint(ends_at(1.0), Y, T),
        "to t[-1] = 1. If func is defined only between 0 and 1, use",
    ),
}


@pytest.mark.parametrize("case", MENDS)
def test_a_common_mistake_is_answered_by_what_to_type(case):
    call, words = MENDS[case]
    note = told(call)
    assert words in note
    assert sum(words in note for _, words in MENDS.values()) == 1, "the mend of one mistake alone"


def test_a_func_of_y_and_t_gets_the_advice_to_swap_also_without_an_exception():
    with pytest.raises(InvalidField, match=r"got \(\)\. func takes \(y, t\), and is called as func\(t, y\)\. Swap"):
        odeint(lambda y, t: -y, Y, T)


def test_the_advice_to_clip_is_given_only_outside_of_the_interval_and_never_with_an_event():
    assert "clip=True" in told(lambda: odeint(ends_at(1.0), Y, T))
    assert "clip" not in told(lambda: odeint(ends_at(0.5), Y, T))
    assert "clip" not in told(lambda: odeint(ends_at(1.0), Y, T, event_fn=lambda t, y: y.sum() - 1.0))


def test_the_interval_of_a_solve_backwards_in_time_is_the_same_one():
    def func(t, y):
        if t < 0:
            raise ValueError("no data")
        return y

    assert "lies outside of the interval from t[0] = 1 to t[-1] = 0" in told(lambda: odeint(func, Y, T.flip(0)))


# ------------------------------------------------------------------ exceptions of all user code
USERS = {
    "event_fn": lambda: odeint(decay, Y, T, event_fn=lambda t, y: y[7]),
    "event_fn beside an integral": lambda: solve(
        decay, Y, T, event_fn=lambda t, y: y[7], integral=lambda t, y, dy: dy.sum()
    ),
    'options["norm"]': lambda: odeint(decay, Y, T, options=dict(norm=lambda e: e[7])),
    "integral": lambda: solve(decay, Y, T, integral=lambda t, y, dy: dy[7]),
    "func beside an integral": lambda: solve(ends_at(0.2, IndexError), Y, T, integral=lambda t, y, dy: dy.sum()),
    "func, by scipy": lambda: odeint(ends_at(0.2, IndexError), Y, T, method="scipy_solver"),
    "func, on a grid": lambda: odeint(ends_at(0.2, IndexError), Y, T, method="rk4"),
    "func, as a function of time": lambda: odeint_dense(ends_at(0.2, IndexError), Y, 0.0, 1.0),
    "event_fn of odeint_event": lambda: odeint_event(decay, Y, T[0], event_fn=lambda t, y: y[7]),
}


@pytest.mark.parametrize("case", USERS)
def test_the_note_names_what_was_called_with_the_users_state(case):
    note = told(USERS[case], IndexError)
    assert note.startswith(f"node_cuda: {case.split()[0].rstrip(',')}(")
    assert "shape (3, 2), torch.float32, cpu" in note
    assert "y[1]" not in note, "an integral is not part of the user's state"


@needs_notes
def test_an_exception_in_the_backward_pass_gets_a_note_too():
    func = Net()
    func.broken = False
    func.register_forward_pre_hook(lambda module, _: 1 / 0 if module.broken else None)
    ys = odeint_adjoint(func, Y, T)
    func.broken = True
    note = told(ys.sum().backward, ZeroDivisionError)
    assert note.startswith("node_cuda: func(t, y)") and "The solve stood at t = 1" in note


def test_a_solve_inside_of_a_solve_gives_one_note_about_the_inner_one():
    def outer(t, y):
        return odeint(ends_at(5.3), y, T + 5)[-1]

    note = told(lambda: odeint(outer, Y, T), ValueError)
    assert note.count("func(t, y)") == 1 and note.count("The solve stood at t = 5.2") == 1


def test_an_exception_of_the_solver_about_func_gets_no_note():
    """The inspection, which replaces func in its first evaluation, raises the second one."""
    for func, gradient in ((lambda t, y: None, "backprop"), (lambda t, y: nn.functional.dropout(y), "discrete")):
        with pytest.raises(InvalidField) as caught:
            solve(func, Y, T, adjoint_params=(), gradient=gradient)
        assert not hasattr(caught.value, "__notes__")


# ------------------------------------------------------------------ what it costs, and what it reads
class OnGpu(torch.Tensor):
    """A tensor that claims to be on a GPU. It records every operation except to read shape, dtype and device."""

    asked: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda:0")
        if func not in (torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__):
            cls.asked.append(func)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["func", "event_fn"])
def test_a_note_reads_nothing_from_a_device(name):
    t, y = torch.ones(()).as_subclass(OnGpu), Y.as_subclass(OnGpu)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    _user_code.tell(error, name, decay, (0.0, 1.0), t=t, y=(y, y))
    assert not OnGpu.asked
    assert any("t: shape (), torch.float32, cuda:0\n" in note for note in getattr(error, "__notes__", error.args))


def test_the_note_reports_a_step_past_the_end_if_the_time_of_the_call_is_not_known():
    error = ValueError("x")
    _user_code.tell(error, "func", decay, (0.0, 1.0), t=torch.ones((), device="meta"), y=Y.to("meta"))
    _user_code.tell_step(error, "t = 0.9.", beyond=(0.0, 1.0))
    (note,) = error.args
    assert "The step passes the last time. If func is defined only between 0 and 1, use options=dict(clip=True)" in note


# ------------------------------------------------------------------ where it is written
@pytest.mark.parametrize("error", [TypeError, ValueError, IndexError, AttributeError, RuntimeError])
def test_the_text_follows_a_message_that_is_one_string(error):
    def outer(t, y):
        return odeint(ends_at(5.3, error), y, T + 5)[-1]

    with pytest.raises(error) as caught:
        odeint(outer, Y, T)
    (words,) = caught.value.args
    assert words.startswith("no data\nnode_cuda: func(t, y) was called with\n")
    assert words.count("node_cuda") == words.count("The solve stood at") == 1


def test_without_notes_other_exceptions_are_left_alone(monkeypatch):
    monkeypatch.setattr(_user_code, "_HAS_NOTES", False)

    class Mine(ValueError):
        pass

    for error in (Mine("x"), KeyError("x"), ValueError("x", 2), ValueError(), ValueError(3)):
        before = error.args

        def func(t, y, error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            odeint(func, Y, T)
        assert caught.value is error and error.args == before


# ------------------------------------------------------------------ Ctrl-C
@needs_notes
@pytest.mark.parametrize("method", ["dopri5", "rk4", "scipy_solver"])
def test_an_interrupted_solve_says_where_it_stood(method):
    t = linspace(0.0, 1.0, 11).to(F64)
    note = told(lambda: odeint(ends_at(0.3, KeyboardInterrupt), Y.double(), t, method=method), KeyboardInterrupt)
    assert note.startswith("node_cuda: interrupted.\nThe solve stood at t = 0.")
