"""The Adams methods: their cost, their accuracy and their order."""

from __future__ import annotations

import torch
from problems import F64, Counting, linspace, max_difference

from node_cuda import odeint

Y = torch.tensor([1.0, -2.0], dtype=F64)


def timed(t, y):
    return y * torch.cos(t)


def exact(t, y0=Y):
    return y0 * torch.exp(torch.sin(t))[:, None]


def test_the_implicit_adams_method_is_more_accurate_than_the_explicit_one():
    t = linspace(0.0, 2.0, 2)
    errors = {
        method: max_difference(odeint(timed, Y, t, method=method, options=dict(step_size=0.02, max_order=4)), exact(t))
        for method in ("explicit_adams", "implicit_adams")
    }
    assert errors["implicit_adams"] < errors["explicit_adams"] < 1e-4


def test_fixed_adams_is_the_implicit_one():
    t, options = linspace(0.0, 1.0, 3), dict(step_size=0.05)
    assert torch.equal(
        odeint(timed, Y, t, method="fixed_adams", options=options),
        odeint(timed, Y, t, method="implicit_adams", options=options),
    )


def test_an_explicit_adams_step_costs_one_evaluation_after_the_start():
    counts = []
    for steps in (40, 80):
        func = Counting(timed)
        odeint(func, Y, linspace(0.0, 1.0, 2), method="explicit_adams", options=dict(step_size=1 / steps))
        counts.append(func.nfe)
    assert counts[1] - counts[0] == 40


def test_adams_methods_are_right_on_a_grid_of_uneven_steps():
    """The coefficients are for equal steps. Uneven steps must restart or have a lower order, and not be wrong."""
    t = torch.tensor([0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.1, 0.13, 0.16, 0.2, 0.24, 0.28, 0.32], dtype=F64)
    for method in ("explicit_adams", "implicit_adams"):
        assert max_difference(odeint(timed, Y, t, method=method, options=dict(max_order=4)), exact(t)) < 1e-3
