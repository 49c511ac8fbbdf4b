"""Newton's iterations: they end where the error left is small, and give up where they do not contract."""

from __future__ import annotations

import pytest
import torch
from problems import F64, linspace

from node_cuda.methods.implicit.blocks import Blocks
from node_cuda.methods.implicit.linear import Factorised
from node_cuda.methods.implicit.newton import MOST, SMALL, Newton
from node_cuda.problem.problem import make_problem
from node_cuda.solution import Stats

BASE, HG = torch.tensor([0.5, -1.0], dtype=F64), 0.3
SCALE = torch.full_like(BASE, 1e-4)


def field(z):
    return -2.0 * z - torch.sin(z)


def iterated(derivative, tol=None, rtol=1e-6):
    """k = f(base + h gamma k) by iterations with this df/dz, and what they cost."""
    problem = make_problem(lambda t, y: y, BASE, linspace(0.0, 1.0, 2), rtol, 0.0)
    blocks, stats = Blocks(problem, 0), Stats()
    newton = Newton(problem.norm, F64, tol, stats)
    matrix = Factorised(blocks, torch.diag(derivative)[None], 1.0, HG)
    return newton.solve(residual, torch.zeros_like(BASE), matrix, of_state), newton, stats


def residual(k):
    return field(BASE + HG * k) - k


def of_state(change):
    return change * HG / SCALE


def miss(k):
    """The error of a stage, in units of the tolerances."""
    return float(((field(BASE + HG * k) - k) * HG / SCALE).abs().max())


@pytest.mark.parametrize("tol", [None, 1e-5])
def test_what_is_left_of_the_error_is_small_in_units_of_the_tolerances(tol):
    k, newton, stats = iterated(-2.0 - torch.cos(BASE), tol)
    assert miss(k) < 3 * (SMALL if tol is None else tol)
    assert 2 <= stats.newton_iterations == stats.linear_solves <= MOST
    assert 0.0 < newton.rate < 0.3


def test_a_derivative_that_is_off_costs_iterations_and_a_wrong_one_gives_up():
    exact = iterated(-2.0 - torch.cos(BASE))[2].newton_iterations
    k, newton, stats = iterated(torch.full_like(BASE, -2.0))
    assert miss(k) < 1.0 and stats.newton_iterations > exact and newton.rate > 0.1
    wrong, _, stats = iterated(torch.full_like(BASE, 2.5))
    assert wrong is None and stats.newton_iterations < MOST


def test_full_iterations_go_where_one_derivative_does_not():
    """A cubic that is a hundred times steeper at the guess than at its solution."""
    problem = make_problem(lambda t, y: y, BASE, linspace(0.0, 1.0, 2), 1e-6, 0.0)
    blocks, stats = Blocks(problem, 0), Stats()
    newton, one = Newton(problem.norm, F64, 1e-6, stats), torch.ones(2, dtype=F64)

    def miss_of(k):
        return -1e3 * (one + k) ** 3 - k

    def linearised(k):
        return miss_of(k), Factorised(blocks, torch.diag(-3e3 * (one + k) ** 2)[None], 1.0, 1.0)

    assert newton.solve(miss_of, torch.zeros_like(one), linearised(torch.zeros_like(one))[1], of_state) is None
    k = newton.full(linearised, torch.zeros_like(one), of_state, 30)
    assert k is not None and float(miss_of(k).abs().max()) < 1e-6
    assert newton.full(linearised, torch.zeros_like(one), of_state, 2) is None


def test_where_tolerances_choose_no_steps_single_precision_can_hold_them():
    """On a fixed grid rtol = 1e-7 is the default, and a number beside a large one is not known to 1e-9."""
    y0 = torch.tensor([1.0, 0.0])
    problem = make_problem(lambda t, y: y, y0, linspace(0.0, 1.0, 2).float(), 1e-7, 1e-9)
    newton = Newton(problem.norm, torch.float32, None, Stats(), held=1e-5)
    assert newton.scale(y0).tolist() == pytest.approx([1e-5, 1e-5])
    assert newton.tol * float(newton.scale(y0)[0]) > torch.finfo(torch.float32).eps


def test_the_tolerance_is_never_below_rounding():
    assert iterated(-2.0 - torch.cos(BASE), rtol=1e-14)[1].tol == pytest.approx(10 * 2.2e-16 / 1e-14, rel=0.01)
