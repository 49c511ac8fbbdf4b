"""The state that the backward solve of the adjoint reconstructs: if it is wrong, a warning is issued."""

from __future__ import annotations

import math

import pytest
import torch
from problems import F64, MLP, TimedLinear, linspace, loss_of
from torch import nn

from node_cuda import InvalidInput, ReconstructionWarning, odeint_adjoint, solve

Y = torch.tensor([0.7, -0.4], dtype=F64)
W = torch.tensor([[0.3, -1.1], [0.8, 0.2]], dtype=F64)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


class Contracting(nn.Module):
    """dz/dt = -rate (z - g(z)): backwards, errors grow by exp(rate * time) and more."""

    def __init__(self, rate):
        super().__init__()
        self.rate, self.w = rate, nn.Parameter(W.clone())

    def forward(self, t, y):
        return -self.rate * (y - 0.3 * torch.tanh(y @ self.w.T))


CHECKED = dict(check_reconstruction=True)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "scipy_solver"])
def test_a_field_that_contracts_is_warned_about_if_its_backward_solve_is_unstable(method):
    y0, t = leaf(Y), linspace(0.0, 5.0, 2)
    ys = odeint_adjoint(Contracting(4.0), y0, t, rtol=1e-5, atol=1e-7, method=method, options=CHECKED)
    with pytest.warns(ReconstructionWarning, match=r'reconstructed z at t = 0, .* tolerances.*gradient="discrete"'):
        ys.sum().backward()


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_warning_needs_the_option_in_either_dict_of_options(name):
    t = linspace(0.0, 5.0, 2)
    where = dict(options=CHECKED) if name == "forward" else dict(adjoint_options=CHECKED)
    quiet = odeint_adjoint(Contracting(4.0), leaf(Y), t, rtol=1e-5, atol=1e-7)
    quiet.sum().backward()
    ys = odeint_adjoint(Contracting(4.0), leaf(Y), t, rtol=1e-5, atol=1e-7, **where)
    with pytest.warns(ReconstructionWarning):
        ys.sum().backward()


@pytest.mark.parametrize("gradient", ["backprop", "discrete"])
def test_the_check_is_refused_for_gradients_that_reconstruct_no_state(gradient):
    with pytest.raises(InvalidInput, match=r'check_reconstruction"\] belongs to gradient="adjoint".*Drop the option'):
        solve(MLP(), leaf(Y), linspace(0.0, 1.0, 2), gradient=gradient, options=CHECKED)


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("n", [2, 20])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("make", [MLP, TimedLinear])
def test_a_field_with_a_stable_backward_solve_gives_no_warning(make, tolerance, n, direction):
    solution = solve(
        make(), leaf(Y), direction * linspace(0.0, 2.0, n), rtol=tolerance, atol=tolerance, gradient="adjoint",
        options=CHECKED,
    )  # fmt: skip
    loss_of(solution.ys).backward()
    assert 0 < solution.stats.reconstruction_error < 100


def test_outputs_between_the_ends_reset_the_state():
    """With twenty outputs each backward interval is a twentieth of the solve, so that the errors stay small."""
    t = linspace(0.0, 5.0, 20)
    solution = solve(Contracting(4.0), leaf(Y), t, rtol=1e-5, atol=1e-7, gradient="adjoint", options=CHECKED)
    loss_of(solution.ys).backward()
    assert solution.stats.reconstruction_error < 100


def test_the_error_is_that_of_the_reconstructed_state_in_tolerances():
    """Solve y' = -8 y back over T = 1, from an output with a relative error of 1e-4, which the tolerance allows."""
    y0, t = leaf(torch.ones(1, dtype=F64)), linspace(0.0, 1.0, 2)
    solution = solve(
        lambda t, y: -8 * y, y0, t, rtol=1e-4, atol=0.0, gradient="adjoint", adjoint_params=(), adjoint_rtol=1e-10,
        adjoint_atol=0.0, options=dict(dense="accurate", **CHECKED),
    )  # fmt: skip
    with pytest.warns(ReconstructionWarning):
        solution.ys[-1].sum().backward()
    off = abs(float(solution.ys[-1].detach()) / math.exp(-8) - 1)  # y backwards is y(1) exp(8), to 1e-10
    assert solution.stats.reconstruction_error == pytest.approx(off / 1e-10, rel=1e-3)
