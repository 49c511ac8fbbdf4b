"""Grids that are the output times: the same bits and messages as in the general loop, with fewer calls."""

from __future__ import annotations

import gc
import sys
from collections import Counter

import pytest
import torch
from torch import nn

from node_cuda import InvalidField, odeint, odeint_adjoint, solve
from node_cuda.gradients import forward
from node_cuda.loop import plain_grid
from node_cuda.status import Status

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4"]


class Net(nn.Module):
    """The field of the measurements: 24 x 3, hidden 40."""

    def __init__(self, dtype=F32):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)

    def forward(self, t, y):
        return self.net(y) * torch.cos(t)


def grid(steps, *, backwards=False):
    t = torch.linspace(0.3, 1.7, steps + 1, dtype=F64)
    return t.flip(0) if backwards else t


def state(dtype=F32):
    return torch.randn(24, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def general(monkeypatch):
    """Return a function that calls another function with the general loop."""

    def call(function):
        with monkeypatch.context() as m:
            m.setattr(plain_grid, "applies", lambda *_: False)
            return function()

    return call


def outcome(gradient, method, dtype=F32, steps=4, *, backwards=False, wants_t=False, split=False):
    """Return y, all gradients, and the statistics."""
    func, y0, t = Net(dtype), state(dtype).requires_grad_(), grid(steps, backwards=backwards).requires_grad_(wants_t)
    field = (lambda t, y: (func(t, y[0]), -y[1])) if split else func
    given = (y0, y0.detach()[:2].clone().requires_grad_()) if split else y0
    params = tuple(func.parameters())
    solution = solve(field, given, t, method=method, gradient=gradient, adjoint_params=params)
    ys = solution.ys if split else (solution.ys,)
    loss = sum((y.float().square() * torch.linspace(1, 2, steps + 1).view(-1, 1, 1)).sum() for y in ys)
    wanted = (*(given if split else (y0,)), *params, *((t,) if wants_t else ()))
    found = torch.autograd.grad(loss, wanted)
    stats = solution.stats
    return [y.detach() for y in ys], found, (stats.nfe, stats.nfe_backward, stats.accepted, stats.host_reads)


def assert_same(a, b):
    for x, y in zip((*a[0], *a[1]), (*b[0], *b[1]), strict=True):
        assert torch.equal(x, y)
    assert a[2] == b[2]


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_outputs_gradients_and_statistics_are_those_of_the_general_loop(general, gradient, method, dtype):
    assert_same(outcome(gradient, method, dtype), general(lambda: outcome(gradient, method, dtype)))


@pytest.mark.parametrize("case", [dict(backwards=True), dict(wants_t=True), dict(split=True), dict(steps=1)], ids=str)
@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_they_also_are_backwards_with_gradients_of_time_for_tuples_and_for_one_step(general, gradient, case):
    assert_same(outcome(gradient, "rk4", **case), general(lambda: outcome(gradient, "rk4", **case)))


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_without_gradients_a_small_and_a_large_solve_give_the_same_bits_too(general, method, monkeypatch):
    def solved():
        with torch.no_grad():
            return odeint(Net(), state(), grid(5), method=method)

    expected = general(solved)
    assert torch.equal(solved(), expected)
    monkeypatch.setattr(plain_grid, "LARGE", 0)  # every solve writes its outputs into one tensor
    assert torch.equal(solved(), expected)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize(("first", "count"), [(1, 1), (2, 1), (6, 1), (1, 2)])
def test_a_field_that_returns_its_buffers_again_has_the_result_of_one_that_returns_new_tensors(
    general, method, dtype, first, count
):
    """first: the call from which on it does. count: of its buffers, which it returns in turn."""

    class Buffered:
        def __init__(self):
            self.calls, self.buffers = 0, [torch.empty(24, 3, dtype=dtype) for _ in range(count)]

        def __call__(self, t, y):
            self.calls += 1
            out = y * torch.cos(t)
            return out if self.calls < first else self.buffers[self.calls % count].copy_(out)

    def solved(steps, func):
        with torch.no_grad():
            return odeint(func, state(dtype), grid(steps), method=method)

    for steps in (1, 4):
        exact = solved(steps, lambda t, y: y * torch.cos(t))
        assert torch.equal(solved(steps, Buffered()), exact)
        if count == 1:  # the general loop finds one buffer only
            assert torch.equal(general(lambda steps=steps: solved(steps, Buffered())), exact)


def low_pass():
    """A field with a state of its own, in the buffer that it returns."""
    kept = torch.zeros(24, 3)
    return lambda t, y: kept.mul_(0.5).add_(y, alpha=-0.5)


def two_rows():
    """A field that writes into both rows of its buffer, and returns one of them."""
    rows = torch.zeros(2, 24, 3)

    def func(t, y):
        rows[0], rows[1] = -y, -2 * y
        return rows[int(t > 1)]

    return func


def noise():
    """A field that draws new numbers into its buffer."""
    drawn = torch.zeros(24, 3)
    return lambda t, y: drawn.normal_()


def constant():
    """A field that returns what it holds."""
    held = torch.ones(24, 3)
    return lambda t, y: held


def scaled_time():
    """A field that writes into t, and returns one buffer."""
    kept = torch.zeros(24, 3)
    return lambda t, y: kept.copy_(-y * t.mul_(2))


@pytest.mark.parametrize("make", [low_pass, two_rows, noise, constant, scaled_time])
@pytest.mark.parametrize("method", FIXED)
def test_a_field_that_returns_what_it_holds_is_evaluated_as_often_as_in_the_general_loop(general, method, make):
    """Its first evaluations show it, so that no step is taken again, in which it could act otherwise."""

    def solved():
        torch.manual_seed(0)
        with torch.no_grad():
            solution = solve(make(), state(), grid(4), method=method)
        return solution.ys, solution.stats.nfe

    (ys, nfe), (expected, as_often) = solved(), general(solved)
    assert torch.equal(ys, expected) and nfe == as_often


def late(wrong):
    """Return a field that is wrong from its fourth evaluation on."""
    calls = []

    def func(t, y):
        calls.append(t)
        return wrong(y) if len(calls) > 3 else -y

    return func


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda y: y[:1], InvalidField),
        (lambda y: y.tolist(), InvalidField),
        (lambda y: y.mul_(2.0), InvalidField),
        (lambda y: y @ y, RuntimeError),
    ],
)
def test_a_mistake_of_the_field_gives_the_same_message(general, wrong, error):
    def words():
        with pytest.raises(error) as caught:
            odeint(late(wrong), state(), grid(4), method="midpoint")
        return str(caught.value), getattr(caught.value, "__notes__", [])

    assert words() == general(words)


def test_a_call_depends_on_its_arguments_alone_and_not_on_earlier_calls():
    func, y0, t = Net(), state(), grid(4)
    options = {}
    plain = odeint(func, y0, t, method="euler", options=options)
    options["step_size"] = 0.05  # the same dict
    assert not torch.equal(odeint(func, y0, t, method="euler", options=options), plain)
    func.scale = nn.Parameter(torch.tensor(2.0))  # a parameter that was not there
    func.forward = lambda t, y: func.net(y) * func.scale
    odeint_adjoint(func, y0, t, method="euler").sum().backward()
    assert func.scale.grad is not None


def test_training_mode_is_that_of_the_call():
    class Noisy(nn.Module):
        def forward(self, t, y):
            return nn.functional.dropout(-y, 0.5, self.training)

    func = Noisy().eval()
    with torch.no_grad():
        first, second = (odeint(func, state(), grid(4), method="euler") for _ in range(2))
        assert torch.equal(first, second)
        func.train()
        assert not torch.equal(odeint(func, state(), grid(4), method="euler"), first)


def test_a_function_at_the_address_of_a_freed_one_is_not_taken_for_it():
    def solved(rate):
        return odeint(lambda t, y: rate * y, state(), grid(1), method="euler")

    found = []
    for rate in (-1.0, 1.0):
        found.append(solved(rate))
        gc.collect()
    assert not torch.equal(*found)


# ------------------------------------------------------------------ what it costs
def python_calls(function):
    """Count the calls of Python functions, including those of the field and of torch."""
    for _ in range(3):
        function()
    calls = Counter()

    def count(frame, event, _):
        calls[event] += 1

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls["call"]


def by_euler(steps):
    func, y0, t = Net(), state(), grid(steps)

    def solved():
        with torch.no_grad():
            return odeint(func, y0, t, method="euler")

    return python_calls(solved)


def test_python_calls_of_a_step_of_euler_without_gradients():
    """In Python 3.11, 18 calls of a step are the field's, and 8 calls of the first step are those of no_grad."""
    first, twentieth = by_euler(1), by_euler(20)
    assert first <= 78
    assert (twentieth - first) / 19 <= 30


def test_python_calls_of_a_step_of_euler_by_the_adjoint():
    func, y0, t = Net(), state(), grid(1)
    assert python_calls(lambda: odeint_adjoint(func, y0, t, method="euler")[-1].sum().backward()) <= 405


def test_a_buffer_that_the_backward_pass_meets_first_does_not_change_earlier_stages():
    class Late(nn.Module):
        def __init__(self, late):
            super().__init__()
            self.w, self.late, self.calls = nn.Parameter(torch.tensor(0.7)), late, 0
            self.memory = [torch.empty(24, 3)]

        def forward(self, t, y):
            self.calls += 1
            out = torch.sin(self.w * y) * torch.cos(t)
            return self.memory[0].detach().copy_(out) if self.calls > self.late else out

    def gradient(late):
        func = Late(late)
        ys = odeint_adjoint(func, state(), grid(4), method="rk4")
        assert func.calls < 20  # the forward pass has returned no buffer
        return torch.autograd.grad(ys.square().sum(), func.w)[0]

    assert torch.equal(gradient(22), gradient(10**6))


def test_the_status_of_a_grid_is_read_only_where_the_caller_gets_it(monkeypatch):
    read = []
    monkeypatch.setattr(forward, "grid_status", lambda ys, stats: read.append(ys) or Status.SUCCESS)
    odeint(Net(), state(), grid(2), method="euler")
    assert not read
    solve(Net(), state(), grid(2), method="euler")
    assert len(read) == 1
