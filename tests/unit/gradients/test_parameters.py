"""The parameters of the adjoint: unused, fixed, many and foreign ones."""

from __future__ import annotations

import pytest
import torch
from problems import F64, MLP, Parted, linspace, loss_of, relative_difference
from torch import nn

from node_cuda import odeint, odeint_adjoint

Y = torch.tensor([0.7, -0.4], dtype=F64)
W = torch.tensor([[0.3, -1.1], [0.8, 0.2]], dtype=F64)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def curved(w):
    """A field that depends on t, is not linear in y, and has the parameter w."""
    return lambda t, y: torch.tanh(y @ w.T) * torch.cos(t) + 0.1 * y * y


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_unused_parameters_get_zeros_and_fixed_ones_are_left_alone(method):
    func = Parted(W)
    odeint_adjoint(func, leaf(Y), linspace(0.0, 1.0, 3), method=method).sum().backward()
    assert torch.equal(func.unused.grad, torch.zeros(3, 2, dtype=F64))
    assert func.fixed.grad is None
    assert func.used.grad.abs().min() > 0


def test_a_field_that_depends_on_no_input_has_zero_gradients():
    y0, p = leaf(Y), leaf(W)
    odeint_adjoint(lambda t, y: torch.ones_like(y), y0, linspace(0.0, 1.0, 3), adjoint_params=(p,)).sum().backward()
    assert torch.allclose(y0.grad, torch.full((2,), 3.0, dtype=F64))
    assert torch.equal(p.grad, torch.zeros_like(W))


def test_adjoint_params_may_be_a_generator_and_need_not_be_parameters():
    w = leaf(W)
    scaled = w * 2  # not a leaf
    ys = odeint_adjoint(
        curved(scaled), Y, linspace(0.0, 1.0, 2), rtol=1e-9, atol=1e-9, adjoint_params=(p for p in (scaled,))
    )
    (grad,) = torch.autograd.grad(loss_of(ys), w)
    (truth,) = torch.autograd.grad(loss_of(odeint(curved(2 * w), Y, linspace(0.0, 1.0, 2), rtol=1e-9, atol=1e-9)), w)
    assert relative_difference(grad, truth) < 1e-6


def test_parameters_of_many_shapes_and_of_another_precision():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scalar = nn.Parameter(torch.tensor(0.5))  # float32, with a float64 state
            self.matrix = nn.Parameter(W.clone())
            self.empty = nn.Parameter(torch.zeros(0, dtype=F64))

        def forward(self, t, y):
            return self.scalar.double() * torch.tanh(y @ self.matrix.T) + self.empty.sum()

    func = Mixed()
    ys = odeint_adjoint(func, Y, linspace(0.0, 1.0, 2), rtol=1e-8, atol=1e-8)
    grads = torch.autograd.grad(loss_of(ys), [func.scalar, func.matrix, func.empty])
    truth = torch.autograd.grad(
        loss_of(odeint(func, Y, linspace(0.0, 1.0, 2), rtol=1e-8, atol=1e-8)), [func.scalar, func.matrix]
    )
    assert [g.dtype for g in grads] == [torch.float32, F64, F64]
    assert relative_difference(grads[1], truth[1]) < 1e-6
    assert relative_difference(grads[0], truth[0]) < 1e-5
    assert grads[2].shape == (0,)


def test_parameters_may_change_after_the_backward_pass():
    func = MLP()
    optimizer = torch.optim.SGD(func.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = odeint_adjoint(func, Y, linspace(0.0, 1.0, 3), rtol=1e-5, atol=1e-5)[-1].square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
