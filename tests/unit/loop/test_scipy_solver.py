"""scipy_solver: the named solver of scipy, with the dtype, the shape and the times of the caller."""

from __future__ import annotations

import pytest
import torch
from problems import BY_NAME, F64, Counting, linspace, relative_difference

import node_cuda
from node_cuda import odeint, solve

Y = torch.tensor([1.0, -2.0], dtype=F64)


@pytest.mark.parametrize("solver", ["LSODA", "RK45", "DOP853", "Radau"])
def test_scipy_solver_solves_with_the_solver_that_was_named(solver):
    pytest.importorskip("scipy")
    problem = BY_NAME["stiffish"]
    ys = odeint(
        problem.make(), problem.y0, problem.t, rtol=1e-6, atol=1e-8, method="scipy_solver", options=dict(solver=solver)
    )
    assert relative_difference(ys, torch.stack([problem.exact(t) for t in problem.t])) < 1e-4


@pytest.mark.parametrize("name", ["tuple", "reversed", "mlp"])
def test_scipy_solver_takes_tuples_and_decreasing_time(name):
    pytest.importorskip("scipy")
    problem = BY_NAME[name]
    with torch.no_grad():
        ours = odeint(problem.make(), problem.y0, problem.t, rtol=1e-8, atol=1e-10, method="scipy_solver")
        fine = odeint(problem.make(), problem.y0, problem.t, rtol=1e-8, atol=1e-10)
    assert relative_difference(ours, fine) < 1e-5


@pytest.mark.filterwarnings("ignore:t holds one time")
def test_scipy_solver_keeps_the_dtype_and_the_shape():
    pytest.importorskip("scipy")
    ys = odeint(lambda t, y: -y, torch.ones(2, 3), torch.linspace(0, 1, 4), method="scipy_solver")
    assert ys.dtype == torch.float32 and ys.shape == (4, 2, 3)
    assert odeint(lambda t, y: -y, torch.ones(2, 3), torch.zeros(1), method="scipy_solver").shape == (1, 2, 3)


def test_scipy_solver_counts_its_evaluations():
    pytest.importorskip("scipy")
    func = Counting(lambda t, y: -y)
    solution = solve(func, Y, linspace(0.0, 1.0, 3), method="scipy_solver")
    assert solution.stats.nfe == func.nfe > 0
    assert solution.status is node_cuda.Status.SUCCESS
