"""ODEBlock: with Euler steps of size 1 it is the residual network of Chen et al. 2018, equation 1."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from problems import F64
from torch import nn

from node_cuda import InvalidInput, InvalidType, ODEBlock

H = torch.tensor([[0.7, -0.4, 0.2], [0.1, 0.2, -0.9]], dtype=F64)


def residual_branch() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class LayerByLayer(nn.Module):
    """f(t, h) with the parameters theta_t of layer t."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, t, h):
        return self.layers[int(t)](h)


def gradients(out, *params):
    return torch.autograd.grad(out.square().sum(), params)


@pytest.mark.parametrize("gradient", ["auto", "adjoint", "backprop"])
def test_euler_steps_of_size_one_are_a_residual_network(gradient):
    f, n = residual_branch(), 4
    out = ODEBlock(f, depth=n, steps=n, method="euler", gradient=gradient)(H)
    h = H
    for _ in range(n):
        h = h + f(h)
    assert torch.equal(out, h)
    if gradient != "adjoint":  # the adjoint's backward pass is another discretisation
        for found, truth in zip(gradients(out, *f.parameters()), gradients(h, *f.parameters()), strict=True):
            assert torch.allclose(found, truth, rtol=1e-13, atol=1e-13)  # the order of sums


def test_layers_with_different_parameters_are_a_field_that_chooses_them_by_time():
    layers = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double() for _ in range(3)]
    out = ODEBlock(LayerByLayer(layers), depth=3, steps=3, method="euler", timed=True)(H)
    h = H
    for layer in layers:
        h = h + layer(h)
    assert torch.equal(out, h)


def test_more_and_smaller_layers_come_to_the_solution_of_the_equation():
    f = residual_branch()
    limit = ODEBlock(f, rtol=1e-10, atol=1e-12)(H).detach()
    errors = [float((ODEBlock(f, steps=n, method="euler")(H).detach() - limit).abs().max()) for n in (10, 20, 40)]
    for coarse, fine in itertools.pairwise(errors):
        assert 1.8 < coarse / fine < 2.2, "Euler's method has order 1"


def test_the_depth_is_the_end_of_the_interval():
    f = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(f.weight, -0.5)
    out = ODEBlock(f, depth=3.0)(torch.ones(1, 1, dtype=F64))
    assert abs(out.item() - math.exp(-1.5)) < 1e-6


def test_a_step_size_among_the_options_replaces_steps():
    f = residual_branch()
    by_option = ODEBlock(f, method="rk4", options=dict(step_size=0.25))(H)
    assert torch.allclose(by_option, ODEBlock(f, steps=4, method="rk4")(H), rtol=1e-14)


WRONG = {
    "no steps": (dict(method="euler"), r"needs steps with method='euler'.*`ODEBlock\(f, steps=10, method='euler'\)`"),
    "steps of an adaptive method": (dict(steps=4), r"steps=4 belongs to a fixed grid.*'dopri5'"),
    "no number": (dict(steps=0, method="euler"), "steps must be a number of steps"),
    "depth": (dict(depth=-1.0), "depth must be a positive number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_depth_or_steps_that_do_not_fit_are_refused(case):
    given, words = WRONG[case]
    with pytest.raises(InvalidInput, match=words):
        ODEBlock(residual_branch(), **given)


def test_arguments_of_another_kind_are_refused():
    with pytest.raises(InvalidType, match=r"ODEBlock\(\) got an unexpected keyword argument 'rtool'. Did you mean"):
        ODEBlock(residual_branch(), rtool=1e-3)
    with pytest.raises(InvalidType, match=r"f must be an nn.Module of h; got a float"):
        ODEBlock(1.0)  # pyright: ignore
