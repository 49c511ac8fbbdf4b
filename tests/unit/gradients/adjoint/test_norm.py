"""The norm of the backward solve: the default, the seminorm, and those of the user."""

from __future__ import annotations

import pytest
import torch
from problems import F64, MLP, Counting, Parted, TimedLinear, linspace

from node_cuda import odeint_adjoint

Y = torch.tensor([0.7, -0.4], dtype=F64)
W = torch.tensor([[0.3, -1.1], [0.8, 0.2]], dtype=F64)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def rms(x):
    return x.abs().square().mean().sqrt()


def default_norm(tensors):
    return max(rms(x) for x in tensors)


def semi_norm(tensors):
    return max(rms(x) for x in tensors[:3])


def backward_cost(norm=None, hidden=64):
    class Wiggling(MLP):
        def forward(self, t, y):
            return super().forward(t, y) * torch.sin(20 * t)

    func = Counting(Wiggling(hidden=hidden))
    options = {} if norm is None else dict(adjoint_options=dict(norm=norm))
    ys = odeint_adjoint(func, leaf(torch.stack([Y, 3 * Y])), linspace(0.0, 1.0, 2), rtol=1e-6, atol=1e-6, **options)
    before = func.nfe
    ys.sum().backward()
    return func.nfe - before


def test_a_custom_norm_that_is_the_default_gives_the_same_backward_pass():
    assert backward_cost(default_norm) == backward_cost()


def test_a_custom_norm_that_leaves_the_parameters_out_is_the_seminorm():
    assert backward_cost(semi_norm) == backward_cost("seminorm")


def test_the_seminorm_costs_no_more_evaluations():
    assert backward_cost("seminorm") <= backward_cost()


def test_a_custom_adjoint_norm_sees_time_state_adjoint_and_parameters():
    seen = []

    def norm(tensors):
        seen.append(tuple(x.shape for x in tensors))
        assert isinstance(tensors, tuple)
        return default_norm(tensors)

    func = Parted(W)
    func.fixed.requires_grad_(True)
    y0 = leaf(torch.stack([Y, Y, Y]))
    odeint_adjoint(func, y0, linspace(0.0, 1.0, 2), adjoint_options=dict(norm=norm)).sum().backward()
    assert set(seen) == {((), (3, 2), (3, 2), (2, 2), (3, 2), (2,))}


def test_a_custom_adjoint_norm_of_a_tuple_state_sees_its_components():
    seen = []

    def norm(tensors):
        seen.append(tuple(x.shape for x in tensors))
        return default_norm(tensors)

    w = leaf(W)
    ys = odeint_adjoint(
        lambda t, s: (s[0] @ w, -s[1]),
        (leaf(Y), torch.ones((), dtype=F64)),
        linspace(0.0, 1.0, 2),
        adjoint_params=(w,),
        adjoint_options=dict(norm=norm),
    )
    ys[0].sum().backward()
    assert set(seen) == {((), (2,), (), (2,), (), (2, 2))}


def test_the_forward_norm_measures_the_state_in_the_backward_pass_too():
    calls = []

    def norm(y):
        calls.append(y.shape)
        return y.abs().max()

    ys = odeint_adjoint(TimedLinear(), leaf(Y), linspace(0.0, 1.0, 2), options=dict(norm=norm))
    forward = len(calls)
    ys.sum().backward()
    assert len(calls) > forward and set(calls) == {(2,)}


# ------------------------------------------------------------------ the live dictionary, as torchdiffeq's tests use it
def spy_on(options, seen):
    inner = options["norm"]
    assert callable(inner)

    def spy(tensors):
        value = inner(tensors)
        seen.append((tuple(x.shape for x in tensors), [x.clone() for x in tensors], torch.as_tensor(value).clone()))
        return value

    options["norm"] = spy


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [dict(), dict(adjoint_options={}), dict(adjoint_options=dict(norm="seminorm"))],
    ids=["default", "empty options", "seminorm"],
)
def test_the_norm_of_the_backward_pass_can_be_replaced_after_the_forward_pass(shape, arguments):
    params = (torch.rand(7, requires_grad=True), torch.rand((), requires_grad=True))
    ys = odeint_adjoint(
        lambda t, y: y, torch.full(shape, 1.0), torch.tensor([0.0, 1.0]), adjoint_params=params, **arguments
    )
    seen = []
    spy_on(ys.grad_fn.adjoint_options, seen)
    ys.sum().backward()
    assert seen
    for shapes, tensors, value in seen:
        assert shapes == ((), shape, shape, (7,), ())
        expected = (semi_norm if "norm" in arguments.get("adjoint_options", {}) else default_norm)(tensors)
        assert value.shape == ()
        assert float(value) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)


def test_the_adjoint_options_of_a_tuple_state_are_two_views_below_its_first_component():
    x0 = torch.tensor(1.0), torch.tensor([[0.5, 0.5], [0.1, 0.1]])
    params = (torch.rand(7, requires_grad=True),)
    ys = odeint_adjoint(lambda t, y: y, x0, torch.tensor([0.0, 1.0]), adjoint_params=params)
    options = ys[0].grad_fn.next_functions[0][0].next_functions[0][0].adjoint_options
    seen = []
    spy_on(options, seen)
    ys[0].sum().backward()
    assert seen and all(shapes == ((), (5,), (5,), (7,)) for shapes, _, _ in seen)
