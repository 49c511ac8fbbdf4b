"""Every method converges with its order, on a problem that depends on t (a wrong node shows)."""

from __future__ import annotations

import math

import node_cuda
import numpy as np
import pytest
import torch
from node_cuda import TABLEAUS, odeint
from problems import F64, linspace
from tolerances import SLOPE

T = 2.0
EXACT = math.exp(math.sin(T))

# The coarsest number of steps, by order: the finest of four (eight times as many) must still be above rounding.
COARSEST = {1: 64, 2: 48, 3: 64, 4: 32, 5: 10, 6: 6, 7: 5, 8: 4}


def timed(t, y):
    return y * torch.cos(t)


def final_error(method: str, steps: int, **options) -> float:
    """|y(T) - exact| of a solve in `steps` equal steps."""
    h = T / steps
    if method in TABLEAUS and not TABLEAUS[method].adaptive or method not in TABLEAUS:
        options["step_size"] = h
    else:  # a tolerance that accepts every step
        options |= dict(first_step=h, max_step=h)
    y = odeint(timed, torch.ones(1, dtype=F64), linspace(0.0, T, 2), rtol=1e3, atol=1e3, method=method, options=options)
    return abs(float(y[-1, 0]) - EXACT)


def slope(method: str, coarsest: int, count: int = 4, **options) -> float:
    steps = [coarsest * 2**i for i in range(count)]
    errors = [final_error(method, n, **options) for n in steps]
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


@pytest.mark.parametrize("name", TABLEAUS)
def test_halving_the_step_divides_the_error_by_two_to_the_order(name):
    order = TABLEAUS[name].order
    count = 4 if order < 6 else 3
    assert slope(name, COARSEST[order], count) == pytest.approx(order, abs=SLOPE)


@pytest.mark.parametrize("max_order", [4, 5])
@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "fixed_adams"])
def test_adams_methods_have_the_order_that_was_asked_for(method, max_order):
    """k past derivatives give order k, and k + 1 with the implicit one; the predictor of order `max_order` uses
    max_order - 1 of them. The leading error terms of the start and of the formula cancel in part at fifth order."""
    order = max_order - 1 if method == "explicit_adams" else max_order
    slack = SLOPE if max_order == 4 else 2 * SLOPE
    assert slope(method, 120, count=3, max_order=max_order) >= order - slack


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_adams_methods_keep_converging_at_their_default_order(method):
    """torchdiffeq's explicit_adams has order 1.9 and gets worse on refinement."""
    assert slope(method, 24) >= 4 - SLOPE


@pytest.mark.parametrize("name", [name for name, tableau in TABLEAUS.items() if tableau.adaptive])
def test_a_smaller_tolerance_gives_a_smaller_error(name):
    """A hundredth of the tolerance: a second-order pair gains 100^(2/3) = 21 at least, every other one more."""
    errors = []
    for rtol in (1e-3, 1e-5):
        options = dict(step_t=torch.tensor([T], dtype=F64))  # the end of a step: no interpolant in between
        y = odeint(timed, torch.ones(1, dtype=F64), linspace(0.0, T, 2), rtol=rtol, atol=rtol, method=name,
                   options=options)
        errors.append(abs(float(y[-1, 0]) - EXACT))
    assert errors[1] < errors[0] / 10
    assert errors[1] < 2e-3


def test_every_method_is_tested_for_its_order():
    tested = set(TABLEAUS) | {"explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver"}
    assert set(node_cuda.METHODS) == tested
