"""Rounding over many small steps: the error of single precision is only that of a sum of exact increments.

The error is the difference between float32 and float64 with the same method and grid, so it contains only rounding.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from problems import F64

import node_cuda
from node_cuda import TABLEAUS, odeint, odeint_adjoint
from node_cuda.kernels import reference

STEPS = 1500
MOST = 1.2  # times the error of torchdiffeq, or of a sum of exact increments
T = torch.tensor([0.0, 4.0], dtype=F64)
Y0 = torch.linspace(2.0, 4.0, 64, dtype=F64)
ADAMS = ("explicit_adams", "implicit_adams")


def slow(t, y):
    """A field whose increments are small compared with y, and are no whole numbers of units in its last place."""
    return 0.2 + 0.05 * torch.sin(y)


def steps_of(method):
    return STEPS if method != "dopri8" else STEPS // 3  # this method has three times as many stages


def settings(method):
    """Return settings for the same small steps in both precisions. The tolerances are loose, so no step is rejected."""
    name = "max_step" if method in TABLEAUS and TABLEAUS[method].adaptive else "step_size"
    order = dict(max_order=4) if method in ADAMS else {}
    return dict(method=method, options={name: 4.0 / steps_of(method), **order}, rtol=1e-3, atol=1e-3)


def error_of(solve, method):
    """Return the root mean square of the error over the state."""
    wide = odeint(slow, Y0, T, **settings(method))[-1]
    narrow = solve(slow, Y0.float(), T.float(), **settings(method))[-1]
    return float((narrow.double() - wide).square().mean().sqrt())


@functools.lru_cache
def error_of_a_sum(steps):
    """Return the error of a float32 sum of the exact, rounded increments: the smallest possible error of steps."""
    path = odeint(slow, Y0, torch.linspace(0.0, 4.0, steps + 1, dtype=F64), method="rk4").numpy()
    y = path[0].astype(np.float32)
    for increment in np.diff(path, axis=0):
        y = y + increment.astype(np.float32)
    return float(np.sqrt(np.mean((y - path[-1]) ** 2)))


# Methods with the same last sum in a step cannot round differently, so there is one method of each kind. The methods
# that are left out have more than two stages, and a test below checks the end of one of their steps.
KINDS = [name for name, tableau in TABLEAUS.items() if tableau.stages <= 2] + ["rk4", "dopri5", "dopri8", *ADAMS]


@pytest.mark.slow
@pytest.mark.parametrize("method", KINDS)
def test_many_small_steps_round_as_a_sum_of_their_increments_and_as_torchdiffeqs(method, torchdiffeq):
    error = error_of(odeint, method)
    assert error <= MOST * error_of_a_sum(steps_of(method))
    theirs = pytest.importorskip("torchdiffeq._impl.odeint").SOLVERS
    if method in theirs and method != "tsit5":  # its steps are wrong there
        assert error <= MOST * error_of(torchdiffeq.odeint, method)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_many_small_steps_by_the_kernels_round_as_in_plain_pytorch(method, shim):
    settings_ = settings(method)
    settings_["options"] = {name: 15.0 * value for name, value in settings_["options"].items()}
    wide, plain = (odeint(slow, y, T.to(y.dtype), **settings_)[-1].double() for y in (Y0, Y0.float()))
    with node_cuda.backend("fused"):
        fused = odeint(slow, Y0.float(), T.float(), **settings_)[-1].double()
    assert (fused - wide).square().mean() <= MOST**2 * (plain - wide).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [name for name, tableau in TABLEAUS.items() if tableau.stages > 2])
def test_the_end_of_a_step_is_rounded_once_at_the_size_of_y(method, dtype):
    b, h, wide = TABLEAUS[method].b_row, 2.0**-12, np.longdouble
    y0 = torch.linspace(2.0, 3.9, 1001, dtype=dtype)
    k = [torch.randn(1001, dtype=dtype) for _ in range(TABLEAUS[method].stages)]
    exact = y0.numpy().astype(wide)
    for j, weight in b:
        exact = exact + wide(h) * wide(weight) * k[j].numpy().astype(wide)
    ulp = 2 * torch.finfo(dtype).eps  # of a number in [2, 4)
    error = np.abs(reference.combine(y0, k, b, h).numpy().astype(wide) - exact)
    # Half a unit is the rounding of y; the increment is 2^-10 of y, and so are its roundings, some units each.
    assert error.max() <= (0.5 + 0.05) * ulp


@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
def test_the_gradient_of_a_parameter_rounds_once_a_step(gradient):
    """y' = theta, L = y(1): dL/dtheta = sum h = 1."""
    theta, steps = torch.ones(1, requires_grad=True), 1000
    options = dict(step_size=1.0 / steps)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    y = odeint_adjoint(
        lambda t, y: theta.expand(1), torch.zeros(1), t, method="rk4", options=options, adjoint_params=(theta,),
        gradient=gradient,
    )  # fmt: skip
    (found,) = torch.autograd.grad(y[-1].sum(), theta)
    by_steps = abs(float(np.cumsum(np.full(steps, 1.0 / steps, dtype=np.float32))[-1]) - 1.0)
    assert abs(float(found) - 1.0) <= MOST * by_steps


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun3", "rk4"])
def test_an_event_on_a_grid_of_single_precision_is_that_of_torchdiffeq(method, torchdiffeq):
    """torchdiffeq's own test: y = 0.2 t + 3 reaches its value of t = 2.5556 by steps of 0.01."""

    def constant(t, y):
        return 0.2 + (y - (0.2 * t + 3.0)) ** 5

    times = torch.linspace(1.0, 8.0, 10)
    start, level = 0.2 * times[0] + 3.0, 0.2 * times[2] + 3.0

    def error(solver):
        event_t, _ = solver(
            constant, start.reshape(1), times[:2], event_fn=lambda t, y: (y - level).sum(), method=method,
            options=dict(step_size=0.01, interp="cubic"),
        )  # fmt: skip
        return abs(float(event_t - times[2]))

    assert error(odeint) <= MOST * error(torchdiffeq.odeint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["midpoint", "heun3", "rk4"])
def test_a_recorded_half_sum_has_the_value_of_one_that_is_not_and_gradients_that_are_rounded_once_without_casts(
    method, dtype
):
    made = torch.Generator().manual_seed(5)
    y0, *k = [torch.randn(50, generator=made).to(dtype).requires_grad_() for _ in range(TABLEAUS[method].stages + 1)]
    row, h = TABLEAUS[method].b_row, 0.37
    with torch.no_grad():
        expected = reference.combine(y0, k, row, h)
    used = [y0, *(k[j] for j, _ in row)]
    y1 = reference.combine(y0, k, row, h)
    assert y1.dtype is dtype
    assert torch.equal(y1, expected)
    g = torch.randn(50, generator=made).to(dtype)
    for found, weight in zip(torch.autograd.grad(y1, used, g), [1.0, *(h * a for _, a in row)], strict=True):
        assert torch.equal(found, (g.float() * weight).to(dtype))
    waiting, names = [reference.combine(y0, k, row, h).grad_fn], set()
    while waiting:
        node = waiting.pop()
        names.add(node.name())
        waiting += [below for below, _ in node.next_functions if below is not None]
    assert names == {"AddBackward0", "torch::autograd::AccumulateGrad"}
