"""NeuralODE: a layer that knows its times, checks its arguments at once, and works in a Sequential."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from problems import F64, MLP, linspace
from torch import nn

from node_cuda import InvalidInput, InvalidType, NeuralODE, odeint_adjoint, solve

Y = torch.tensor([[0.7, -0.4], [0.1, 0.2]], dtype=F64)
T = linspace(0.0, 1.0, 3)


# ------------------------------------------------------------------ the times
def test_the_times_may_be_given_to_the_layer_or_to_the_call():
    func = MLP(dim=2)
    expected = odeint_adjoint(func, Y, T)
    assert torch.equal(NeuralODE(func, T)(Y), expected)
    assert torch.equal(NeuralODE(func)(Y, T), expected)
    assert torch.equal(NeuralODE(func, T + 5)(Y, T), expected), "those of the call come first"


def test_a_call_without_any_times_says_how_to_give_them():
    with pytest.raises(InvalidInput, match=r"needs the times t.*`NeuralODE\(func, t\)`"):
        NeuralODE(MLP(dim=2))(Y)


def test_last_only_is_the_last_state():
    func = MLP(dim=2)
    assert torch.equal(NeuralODE(func, T, last_only=True)(Y), odeint_adjoint(func, Y, T)[-1])


def test_last_only_of_a_tuple_and_of_an_integral():
    class Pair(nn.Module):
        def forward(self, t, s):
            return -s[0], s[1]

    first, second = NeuralODE(Pair(), T, last_only=True)((Y, Y[0]))
    assert (first.shape, second.shape) == (Y.shape, Y[0].shape)
    ys, integral = NeuralODE(MLP(dim=2), T, last_only=True, integral=lambda t, y, dy: dy.square().sum())(Y)
    whole = solve(MLP(dim=2), Y, T, integral=lambda t, y, dy: dy.square().sum(), gradient="adjoint")
    assert torch.equal(ys, whole.ys[-1]) and torch.equal(integral, whole.integral[-1])


def test_a_sequential_of_layers_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), NeuralODE(MLP(dim=2).float(), T, last_only=True), nn.Linear(2, 1))
    model(torch.rand(4, 3)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_change_of_dtype_leaves_the_times():
    layer = NeuralODE(MLP(dim=2), torch.tensor([0.1, 0.7]), rtol=1e-2, atol=1e-2)
    kept = layer.t.clone()
    for changed in (layer.half(), layer.to(torch.bfloat16), layer.float(), copy.deepcopy(layer)):
        assert changed.t.dtype == F64 and torch.equal(changed.t, kept)
    assert "t" not in layer.state_dict() and not list(layer.buffers())
    assert torch.equal(pickle.loads(pickle.dumps(layer)).t, kept)


def test_times_that_require_a_gradient_get_it():
    t = T.clone().requires_grad_()
    layer = NeuralODE(MLP(dim=2), t)
    layer(Y).sum().backward()
    assert t.grad is not None and t.grad.isfinite().all()
    assert isinstance(NeuralODE(MLP(dim=2), nn.Parameter(T.clone())).get_parameter("t"), nn.Parameter)


# ------------------------------------------------------------------ its arguments
WRONG = {
    "method": (dict(method="dopr5"), ValueError, "Did you mean 'dopri5'"),
    "adjoint_method": (dict(adjoint_method="dopr5", adjoint_options={}), ValueError, "Did you mean 'dopri5'"),
    "gradient": (dict(gradient="adjont"), InvalidInput, "Did you mean 'adjoint'"),
    "checkpoints": (dict(checkpoints=4, gradient="adjoint"), InvalidInput, 'belongs to gradient="discrete"'),
    "options": (dict(options=["clip"]), InvalidType, "options must be a dict"),
    "the value of an option": (dict(options=dict(safety="x")), InvalidType, r'options\["safety"\] must be a number'),
    "an option as an argument": (dict(clip=True), InvalidType, r"use `options=dict\(clip=...\)`"),
    "a misprint": (dict(rtool=1e-3), InvalidType, r"NeuralODE\(\) got an .* 'rtool'. Did you mean 'rtol'"),
    "t": (dict(t=[0.0, 1.0]), InvalidType, "t must be a torch.Tensor"),
    "t is not monotonic": (dict(t=torch.tensor([0.0, 1.0, 1.0])), InvalidInput, "strictly increasing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_raises_when_the_layer_is_made(case):
    given, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        NeuralODE(MLP(dim=2), **given)


def test_an_unknown_option_warns_when_the_layer_is_made():
    with pytest.warns(UserWarning, match="Did you mean 'max_step'") as heard:
        NeuralODE(MLP(dim=2), options=dict(max_stepp=0.1))
    assert heard[0].filename == __file__


def test_a_func_that_is_not_callable_raises_when_the_layer_is_made():
    with pytest.raises(InvalidType, match="func must be callable"):
        NeuralODE(T, MLP(dim=2))  # pyright: ignore


def test_adjoint_params_may_be_an_iterator():
    func = MLP(dim=2)
    layer = NeuralODE(func, T, adjoint_params=func.parameters())
    for _ in range(2):
        func.zero_grad()
        layer(Y).sum().backward()
        assert func.w1.grad is not None


def test_the_layer_shows_how_it_is_solved():
    layer = NeuralODE(MLP(dim=2), T, last_only=True, method="rk4")
    assert layer.extra_repr() == "3 times t from 0 to 1, last_only=True, gradient='auto', method='rk4'"
    assert NeuralODE(MLP(dim=2)).extra_repr() == "gradient='auto'"
