"""Every method converges with its order, on a problem that depends on t, so that a wrong node is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import F64, linspace
from tolerances import SLOPE

import node_cuda
from node_cuda import TABLEAUS, odeint
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS

TIMES = linspace(0.0, 3.0, 7)  # the largest error of several times: at a single one, terms of the error may cancel
EXACT = torch.exp(torch.sin(TIMES))

# The coarsest number of steps in each half unit of time, by order: the finest must still be above rounding.
# (Powers of two: their sums are exact, so the steps end at TIMES without a tiny last step.)
COARSEST = {1: 16, 2: 16, 3: 16, 4: 8, 5: 16, 6: 2, 7: 2, 8: 1}


def timed(t, y):
    return y * torch.cos(t)


def largest_error(method: str, steps: int, **options) -> float:
    """Return max |y - exact| over TIMES, for `steps` equal steps from each of them to the next."""
    h = 0.5 / steps
    if method in TABLEAUS and TABLEAUS[method].adaptive:  # a tolerance that accepts every step
        options |= dict(first_step=h, max_step=h, step_t=TIMES[1:])
    else:
        options["step_size"] = h
    y = odeint(timed, torch.ones(1, dtype=F64), TIMES, rtol=1e3, atol=1e3, method=method, options=options)
    return float((y[:, 0] - EXACT).abs().max())


def slope(method: str, coarsest: int, count: int = 4, **options) -> float:
    steps = [coarsest * 2**i for i in range(count)]
    errors = [largest_error(method, n, **options) for n in steps]
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


@pytest.mark.parametrize("name", TABLEAUS)
def test_halving_the_step_divides_the_error_by_two_to_the_order(name):
    order = TABLEAUS[name].order
    # For order 5 the two finest grids: the order of tsit5 decreases from 5.4 to 5, because its rounding is smaller now.
    count = 4 if order < 5 else 2 if order == 5 else 3
    assert slope(name, COARSEST[order], count) == pytest.approx(order, abs=SLOPE)


@pytest.mark.parametrize("max_order", [4, 5])
@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "fixed_adams"])
def test_adams_methods_have_the_requested_order(method, max_order):
    """k past derivatives give order k, and k + 1 with the implicit one; the predictor of order `max_order` uses
    max_order - 1 of them. The leading error terms of the start and of the formula cancel in part at fifth order."""
    order = max_order - 1 if method == "explicit_adams" else max_order
    slack = SLOPE if max_order == 4 else 2 * SLOPE
    assert slope(method, 32, count=3, max_order=max_order) >= order - slack


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_adams_methods_keep_converging_at_their_default_order(method):
    """torchdiffeq's explicit_adams has order 1.9, and its error grows on refinement."""
    assert slope(method, 8) >= 4 - SLOPE


@pytest.mark.parametrize("name", [name for name, tableau in TABLEAUS.items() if tableau.adaptive])
def test_a_smaller_tolerance_gives_a_smaller_error(name):
    """A hundredth of the tolerance is a step smaller by 100^(1/p) and an error, of order p, by a hundred; with the
    default interpolants of lower order that some methods have, still by ten."""
    errors = []
    for rtol in (1e-3, 1e-5):
        y = odeint(timed, torch.ones(1, dtype=F64), TIMES, rtol=rtol, atol=rtol, method=name)
        errors.append(float((y[:, 0] - EXACT).abs().max()))
    assert errors[1] < errors[0] / 10


def test_every_method_is_tested_for_its_order():
    tested = set(TABLEAUS) | {"explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver"}
    tested |= set(IMPLICIT_TABLEAUS)  # implicit/test_steps.py, loop/test_grids.py
    assert set(node_cuda.METHODS) == tested
