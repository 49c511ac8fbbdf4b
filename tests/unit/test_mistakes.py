"""Mistakes that beginners make, each with its message: what came, what is needed, what to type."""

from __future__ import annotations

import functools
import re
import typing
import warnings

import numpy as np
import pytest
import torch
from problems import F64, linspace
from torch import nn

import node_cuda
from node_cuda import (
    InvalidField,
    SolveError,
    Status,
    _typing,
    backend,
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
    solve,
)
from node_cuda.gradients.registry import GRADIENTS
from node_cuda.nn import ContinuousFlow, NeuralODE, ODEBlock

Y = torch.ones(2, dtype=F64)
T = linspace(0.0, 1.0, 3)


def f(t, y):
    return -y


class Field(nn.Module):
    def forward(self, t, y):
        return -y


class Buffered(nn.Module):
    """It writes into its buffer while autograd records."""

    def __init__(self):
        super().__init__()
        self.rate, self.kept = nn.Parameter(torch.tensor(-1.0, dtype=F64)), torch.zeros(2, dtype=F64)

    def forward(self, t, y):
        return self.kept.copy_(self.rate * y)


class ByTime(nn.Module):
    """It chooses its parameter by t."""

    def __init__(self):
        super().__init__()
        self.rates = nn.ParameterList([nn.Parameter(torch.tensor(-1.0, dtype=F64)) for _ in range(2)])

    def forward(self, t, y):
        return self.rates[int(t >= 0.5)] * y


class Labelled(Field):
    callback_step = "every"


def second_derivative_of_an_event():
    y0 = Y.clone().requires_grad_()
    at, _ = odeint_event(f, y0, T[0], event_fn=crossing)
    (first,) = torch.autograd.grad(at, y0, create_graph=True)
    torch.autograd.grad(first.sum(), y0)


class Driven(nn.Module):
    def forward(self, t, y, U, v):
        return U - y


def crossing(t, y):
    return y[0] - 0.5


# name: (call, class, words that the message must hold, in this order)
MISTAKES = {
    # the order and the kind of the arguments
    "func and y0 are swapped": (lambda: odeint(Y, f, T), TypeError, "func and y0 are swapped: use", "odeint(func, y0"),
    "y0 and t are swapped": (lambda: odeint(f, T, torch.ones(3, 2)), ValueError, "(3, 2)", "y0 and t are swapped"),
    "y0 and t are vectors, and swapped": (lambda: odeint(f, T, Y), ValueError, "increasing", "y0 and t are swapped"),
    "the order of solve_ivp": (lambda: odeint(f, (0.0, 1.0), Y), TypeError, "got a float", "solve_ivp", "odeint(func"),
    "t of numpy": (lambda: odeint(f, Y, np.linspace(0, 1, 3)), TypeError, "got a ndarray", "`torch.as_tensor(t)`"),
    "y0 of numpy": (lambda: odeint(f, np.ones(2), T), TypeError, "got a ndarray", "`torch.as_tensor(y0)`"),
    "t is a list": (lambda: odeint(f, Y, [0, 1]), TypeError, "got a list", "torch.tensor([0.0, 1.0])"),
    "y0 is a list of numbers": (lambda: odeint(f, [1.0], T), TypeError, "got a list", "torch.tensor(y0)"),
    "y0 is a number": (lambda: odeint(f, 1.0, T), TypeError, "got a float", "torch.tensor([1.0])"),
    # arguments by name
    "an option as an argument": (lambda: odeint(f, Y, T, clip=True), TypeError, "odeint()", "'clip'", "dict(clip=...)"),
    "gradient of odeint": (lambda: odeint(f, Y, T, gradient="discrete"), TypeError, "'gradient'", "odeint_adjoint"),
    "a misprint of solve": (lambda: solve(f, Y, T, rtool=1e-3), TypeError, "solve()", "'rtool'", "mean 'rtol'"),
    "an option of odeint_adjoint": (
        lambda: odeint_adjoint(f, Y, T, max_num_steps=9),
        TypeError,
        "odeint_adjoint()",
        "dict(max_num_steps=...)",
    ),
    "an unknown argument": (lambda: odeint_dense(f, Y, 0.0, 1.0, colour=3), TypeError, "'colour'", "It has rtol, atol"),
    "an option of odeint_event": (lambda: odeint_event(f, Y, T[0], event_fn=crossing, clip=True), TypeError, "clip"),
    # methods and gradients
    "a method without its order": (lambda: odeint(f, Y, T, method="dopri"), ValueError, '"dopri". Use method="dopri5"'),
    "a method that is nearly one": (lambda: odeint(f, Y, T, method="dopri6"), ValueError, '"dopri6"', "mean 'dopri"),
    "a method of diffrax": (lambda: odeint(f, Y, T, method="Dopri5"), ValueError, "Did you mean 'dopri5'?"),
    "RK45": (lambda: odeint(f, Y, T, method="RK45"), ValueError, 'Use method="dopri5"'),
    "DOP853": (lambda: odeint(f, Y, T, method="DOP853"), ValueError, 'Use method="dopri8"'),
    "BDF": (lambda: odeint(f, Y, T, method="BDF"), ValueError, 'method="scipy_solver"', 'solver="BDF"'),
    "Kvaerno5": (lambda: odeint(f, Y, T, method="Kvaerno5"), ValueError, "mean 'kvaerno5'?"),
    "ode15s": (lambda: odeint(f, Y, T, method="ode15s"), ValueError, 'method="rodas5p"', 'solver="Radau"'),
    "LSODA": (lambda: odeint(f, Y, T, method="LSODA"), ValueError, 'method="scipy_solver"', 'solver="LSODA"'),
    "a method that is no string": (lambda: odeint(f, Y, T, method=5), TypeError, "got 5", 'method="dopri5"'),
    # what func takes
    "a class": (lambda: odeint(Field, Y, T), TypeError, "got the class Field", "`func = Field(...)`", "odeint(func"),
    "a class, in odeint_adjoint": (lambda: odeint_adjoint(Field, Y, T), TypeError, "got the class Field"),
    "a class, in a layer": (lambda: NeuralODE(Field), TypeError, "got the class Field", "NeuralODE(func, t)"),
    "a class, in a block": (
        lambda: ODEBlock(Field),
        TypeError,
        "got the class Field",
        "`f = Field(...)`",
        "ODEBlock(f)",
    ),
    "a class, in a flow": (
        lambda: ContinuousFlow(Field, 2),
        TypeError,
        "the class Field",
        "ContinuousFlow(func, shape)",
    ),
    "a function that needs more": (
        lambda: odeint(lambda t, y, p, q=2: -y, Y, T),
        TypeError,
        "func needs p as well, and is called as func(t, y)",
        "Use `lambda t, y: func(t, y, p)`",
    ),
    "a module that needs more": (
        lambda: odeint(Driven(), Y, T),
        TypeError,
        "Keep U, v in the module, `self.U`, or use `lambda t, y: func(t, y, U, v)`",
    ),
    "a callback that is a word": (lambda: odeint(Labelled(), Y, T), TypeError, "callback_step of func", "got a str"),
    "a second derivative of an event": (
        second_derivative_of_an_event,
        NotImplementedError,
        "the time of an event gives first derivatives only",
        "Use finite differences of the first derivative, or a solve to a fixed time",
    ),
    "a function of y alone": (lambda: odeint(lambda y: -y, Y, T), TypeError, "takes y alone", "`lambda t, y: func(y)`"),
    "a module of y alone": (
        lambda: odeint(nn.Linear(2, 2), Y.float(), T.float()),
        TypeError,
        "Linear takes y alone",
        "def forward(self, t, y): return self.net(y)",
        "`lambda t, y: func(y)`",
    ),
    "a layer of a module of y alone": (
        lambda: NeuralODE(nn.Sequential(nn.Linear(2, 2)), T),
        TypeError,
        "must take (t, y)",
        "got a Sequential, which takes y alone",
        "def forward(self, t, y)",
        "node_cuda.nn.ODEBlock(Sequential(...))",
    ),
    "a flow of a module of y alone": (lambda: ContinuousFlow(nn.Linear(2, 2), 2), TypeError, "Linear, which takes y"),
    "a block of a module of t and h": (
        lambda: ODEBlock(Field()),
        TypeError,
        "h alone",
        "got a Field, which takes (t, h)",
        "`ODEBlock(f, timed=True)`",
    ),
    "a timed block of a module of h": (
        lambda: ODEBlock(nn.Linear(2, 2), timed=True),
        TypeError,
        "got a Linear, which takes h alone",
        "`ODEBlock(f)`",
    ),
    "a layer of a function": (
        lambda: NeuralODE(f, T),
        ValueError,
        "got a function",
        "`def forward(self, t, y)`",
        "adjoint_params=()",
    ),
    "odeint_adjoint of a function": (
        lambda: odeint_adjoint(f, Y, T),
        ValueError,
        "got a function",
        "adjoint_params=tuple(net.parameters())",
    ),
    "a shape as a number of samples": (
        lambda: ContinuousFlow(Field(), 2).sample((2, 3)),
        ValueError,
        "number of samples; got (2, 3)",
        "`flow.sample(6).unflatten(0, (2, 3))`",
    ),
    "a fraction of a sample": (lambda: ContinuousFlow(Field(), 2).sample(0.5), ValueError, "got 0.5", "flow.sample(3)"),
    "a misprint of a gradient": (lambda: solve(f, Y, T, gradient="adjont"), ValueError, "'adjont'", "mean 'adjoint'?"),
    "a backend, at the call": (lambda: backend("fusd"), ValueError, "'auto'", "got 'fusd'", "mean 'fused'?"),
    # options
    "options is a string": (lambda: odeint(f, Y, T, options="fast"), TypeError, "a dict", "'fast', a str", "dict("),
    "options is a list": (lambda: odeint(f, Y, T, options=["clip"]), TypeError, "['clip'], a list", "dict(clip=True)"),
    "adjoint_options is a list": (
        lambda: odeint_adjoint(f, Y, T, adjoint_params=(), adjoint_options=["norm"]),
        TypeError,
        "adjoint_options must be a dict",
    ),
    "options of compile": (lambda: node_cuda.compile(f, options="fast"), TypeError, "options must be a dict"),
    "a time that is a string": (
        lambda: odeint(f, Y, T, options=dict(jump_t="0.5")),
        TypeError,
        "'0.5'",
        "jump_t=[0.5]",
    ),
    "record_steps": (lambda: odeint(f, Y, T, options=dict(record_steps="yes")), TypeError, "True or False", "'yes'"),
    "perturb": (lambda: odeint(f, Y, T, method="rk4", options=dict(perturb=1)), TypeError, "True or False; got 1"),
    "check_reconstruction": (
        lambda: odeint_adjoint(f, Y, T, adjoint_params=(), options=dict(check_reconstruction="yes")),
        TypeError,
        "True or False",
    ),
    "throw": (lambda: odeint(f, Y, T, options=dict(throw=1)), TypeError, 'True, False or "deferred"; got 1'),
    "grid_constructor": (
        lambda: odeint(f, Y, T, method="rk4", options=dict(grid_constructor=0.1)),
        TypeError,
        "callable as grid_constructor(func, y0, t)",
        "got 0.1",
    ),
    "rtol inside of options": (lambda: odeint(f, Y, T, options=dict(rtol=1.0)), UserWarning, "rtol is an argument"),
    "step_size of an adaptive method": (
        lambda: odeint(f, Y, T, options=dict(step_size=0.1)),
        UserWarning,
        "step_size belongs to the fixed grids",
    ),
    "max_step of a grid": (
        lambda: odeint(f, Y, T, method="rk4", options=dict(max_order=4)),
        UserWarning,
        "max_order belongs to the Adams methods",
    ),
    "a misprint of an option": (lambda: odeint(f, Y, T, options=dict(max_stepp=1)), UserWarning, "mean 'max_step'?"),
    # events
    "event_fn is None": (lambda: odeint_event(f, Y, T[0], event_fn=None), TypeError, "got a NoneType", "lambda t, y:"),
    "event_fn is no function": (lambda: odeint(f, Y, T[:2], event_fn="y"), TypeError, "got a str", "lambda t, y:"),
    "event_fn forgot return": (
        lambda: odeint(f, Y, T[:2], event_fn=lambda t, y: None),
        TypeError,
        "got a NoneType. Did it forget `return`?",
    ),
    "event_fn is complex": (lambda: odeint(f, Y, T[:2], event_fn=lambda t, y: y[0] * 1j), TypeError, "`y[0].real`"),
    "event_fn returns nothing": (lambda: odeint(f, Y, T[:2], event_fn=lambda t, y: y[:0]), ValueError, "shape (0,)"),
    "odeint_interface is solve": (
        lambda: odeint_event(f, Y, T[0], event_fn=crossing, odeint_interface=solve),
        ValueError,
        "got a Solution",
        "odeint_interface=odeint_adjoint",
    ),
    "an event that does not come": (
        lambda: odeint(f, Y, T[:2], event_fn=lambda t, y: y[0] + 1, options=dict(max_num_steps=9)),
        RuntimeError,
        "NO_EVENT at t = ",
        "max_num_steps = 9",
        "event_checks",
        "max_step",
    ),
    # what a dtype can hold
    "float32 at 1e-12": (
        lambda: odeint(f, 3 * Y.float(), T, rtol=1e-12, atol=1e-12),
        UserWarning,
        "rtol = 1e-12 and atol = 1e-12 are less than torch.float32 can tell apart for |y0| up to 3",
        "Use rtol=1e-07, atol=4e-07 or more, or a wider state",
    ),
    "bfloat16 at the defaults": (
        lambda: odeint(f, Y.bfloat16(), T),
        UserWarning,
        "torch.bfloat16",
        "Use rtol=0.008, atol=0.008 or more",
    ),
    "float64 at 1e-18": (
        lambda: odeint_dense(f, Y, 0.0, 1.0, rtol=1e-18, atol=1e-18),
        UserWarning,
        "torch.float64",
        "Use rtol=2e-16, atol=2e-16 or more.",
    ),
    "one time": (lambda: solve(f, Y, T[:1]), UserWarning, "t holds one time, t[0] = 0", "torch.tensor([t0, t1])"),
    "scipy and autograd": (
        lambda: odeint(f, Y.clone().requires_grad_(), T, method="scipy_solver"),
        UserWarning,
        "scipy computes outside of autograd",
        "odeint_adjoint(",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_answered_by_what_came_and_what_to_type(case):
    call, error, *words = MISTAKES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error) as caught:
            call()
    message = str(caught.value)
    assert re.search(".*".join(map(re.escape, words)), message, re.DOTALL), message
    assert len(message.split()) >= 8


def test_an_event_that_does_not_come_is_not_taken_for_a_stiff_field():
    with pytest.raises(SolveError) as caught:
        odeint(f, Y, T[:2], event_fn=lambda t, y: y[0] + 1, options=dict(max_num_steps=9))
    assert caught.value.status is Status.NO_EVENT and "Radau" not in str(caught.value)


@pytest.mark.parametrize("case", [case for case, row in MISTAKES.items() if row[1] is UserWarning])
def test_a_warning_points_at_the_line_of_the_user(case):
    with pytest.warns(UserWarning) as heard:
        MISTAKES[case][0]()
    assert {warning.filename for warning in heard} == {__file__} and len(heard) == 1


QUIET = {
    "float32 at the defaults": lambda: odeint(f, Y.float(), T),
    "a small rtol beside an atol that counts": lambda: odeint(f, Y.float(), T, rtol=1e-12, atol=1e-5),
    "a small atol beside an rtol that counts": lambda: odeint(f, Y.float(), T, rtol=1e-6, atol=1e-20),
    "atol by element": lambda: odeint(f, Y.float(), T, rtol=0.0, atol=torch.tensor([1e-12, 1e-4])),
    "a small state": lambda: odeint(f, 1e-9 * Y.float(), T, rtol=1e-12, atol=1e-12),
    "a grid, which reads no tolerance": lambda: odeint(f, Y.bfloat16(), T, method="rk4"),
    "one step over a long interval": lambda: odeint(f, Y, 10 * T[::2], method="rk4"),
    "scipy by the adjoint": lambda: odeint_adjoint(
        f, Y.clone().requires_grad_(), T, method="scipy_solver", adjoint_params=()
    ),
    "scipy without a gradient": lambda: odeint(f, Y, T, method="scipy_solver"),
}


@pytest.mark.parametrize("case", QUIET)
def test_what_is_no_mistake_is_quiet(case):
    QUIET[case]()  # a warning is an error here


@torch.no_grad()
def test_the_tolerances_are_compared_with_y0_only_where_they_are_small():
    reads = [solve(f, Y.float(), T, rtol=rtol, atol=1e-3, method="dopri5").stats.host_reads for rtol in (1e-3, 1e-12)]
    attempts = [solve(f, Y.float(), T, rtol=rtol, atol=1e-3).stats for rtol in (1e-3, 1e-12)]
    steps = [stats.accepted + stats.rejected for stats in attempts]
    assert reads[1] - steps[1] == reads[0] - steps[0] + 1


def test_a_module_whose_hook_or_decorator_changes_its_arguments_is_not_refused():
    class Decorated(nn.Module):
        @functools.wraps(nn.Linear.forward)
        def forward(self, *args):
            return -args[-1]

    hooked = nn.Identity()
    hooked.register_forward_pre_hook(lambda module, args: args[-1:])
    for func in (Decorated(), hooked):
        assert NeuralODE(func, T, last_only=True)(Y).shape == Y.shape


def test_a_layer_of_a_function_works_without_parameters_and_by_autograd():
    for more in (dict(adjoint_params=()), dict(gradient="backprop")):
        assert NeuralODE(f, T, **more)(Y).shape == (3, 2)


def test_callbacks_that_are_never_called_warn_at_the_line_of_the_user():
    class Field(nn.Module):
        def forward(self, t, y):
            return -y

        def callback_reject_step(self, t0, y0, dt):
            raise AssertionError

    for call in (odeint, odeint_adjoint, solve):
        with pytest.warns(UserWarning, match="does not support callbacks") as heard:
            call(Field(), Y, T, method="rk4")
        assert heard[0].filename == __file__


def test_on_a_cpu_the_device_is_the_reason_for_no_capture_also_if_autograd_records():
    stats = solve(f, Y.clone().requires_grad_(), T, options=dict(cuda_graph=True)).stats
    assert stats.why == "the state is on cpu, and the kernels run on CUDA devices"


def test_a_star_import_leaves_pythons_compile():
    names: dict[str, object] = {}
    exec("from node_cuda import *", names)
    assert "compile" not in names and "odeint" in names
    assert callable(node_cuda.compile)


def test_the_types_know_the_methods_and_gradients_that_there_are():
    assert set(typing.get_args(_typing.MethodName)) == set(node_cuda.METHODS)
    assert set(typing.get_args(_typing.GradientName)) == set(GRADIENTS)


def test_two_options_with_the_same_likely_meaning_get_one_hint():
    with pytest.warns(UserWarning, match="Unexpected arguments") as caught:
        odeint(f, Y, T, method="euler", options=dict(stepsize=0.1, step_sizes=0.1))
    assert str(caught[0].message).count("Did you mean 'step_size'?") == 1


@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_graph_that_func_keeps_is_named(gradient, method):
    ys = odeint_adjoint(Buffered(), Y, T, method=method, gradient=gradient)
    with pytest.raises(InvalidField, match=r"keeps a tensor with its graph .* Return a new tensor"):
        ys.sum().backward()


def test_a_field_that_chooses_its_parameter_by_t_is_told_of_the_discrete_gradient():
    two = T[[0, -1]]
    with pytest.raises(InvalidField, match=r'func chooses its tensors by t.*gradient="discrete"'):
        odeint_adjoint(ByTime(), Y, two, method="euler").sum().backward()
    func = ByTime()
    odeint_adjoint(func, Y, two, method="euler", gradient="discrete").sum().backward()
    assert func.rates[0].grad == 2.0  # dy/dt = rate y from y = (1, 1), in one step of size 1
