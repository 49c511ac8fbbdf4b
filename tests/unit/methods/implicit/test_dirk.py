"""Steps of diagonally implicit methods: the equations of the tableau, and when the Jacobian is computed anew."""

from __future__ import annotations

import pytest
import torch
from problems import F64, linspace
from stiff_cases import robertson

from node_cuda.loop.assemble import make_loop
from node_cuda.methods.implicit.dirk import DirkSteps
from node_cuda.methods.implicit.tableau import Dirk
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS
from node_cuda.methods.registry import lookup
from node_cuda.methods.step import ProposedStep
from node_cuda.problem.problem import make_problem
from node_cuda.solution import Stats

DIRK = [name for name, tableau in IMPLICIT_TABLEAUS.items() if isinstance(tableau, Dirk)]
Y = torch.tensor([0.9, 2.2e-5, 0.1], dtype=F64)


def stepper(method, func=robertson, **options):
    problem = make_problem(func, Y, linspace(0.0, 1.0, 2), 1e-6, 1e-10)
    stats = Stats()
    loop, _ = make_loop(problem, lookup(method, options), stats)
    assert isinstance(loop.stepper, DirkSteps)
    return loop.stepper, stats


@pytest.mark.parametrize("method", DIRK)
def test_a_step_fulfils_the_equations_of_the_tableau(method):
    tableau = IMPLICIT_TABLEAUS[method]
    with torch.no_grad():
        steps, _ = stepper(method, newton_tol=1e-5)
        step = steps.attempt(0.0, ProposedStep(0.01, 0.01), Y, None)
        assert len(step.k) == tableau.stages
        first = int(tableau.explicit_first)
        for row, k in zip(tableau.a[first:], step.k[first:], strict=True):
            z = Y + 0.01 * sum(float(a) * x for a, x in zip((*row, tableau.gamma), step.k, strict=False))
            # The equation of k, as one of z: a change of k by J dz is a small one of z.
            assert torch.allclose(z + 0.01 * float(tableau.gamma) * (robertson(None, z) - k), z, rtol=1e-9, atol=1e-12)
    assert torch.allclose(z, step.y1, rtol=1e-12)  # stiffly accurate


def test_the_jacobian_is_kept_while_iterations_contract_and_the_matrix_while_h_stays():
    with torch.no_grad():
        steps, stats = stepper("kvaerno5")
        y, k1 = Y, None
        for i in range(6):
            step = steps.attempt(1.0 + i * 1e-3, ProposedStep(1.0 + (i + 1) * 1e-3, 1e-3), y, k1)
            y, k1 = step.y1, steps.carry(step)
    assert stats.jacobians == stats.factorisations == 1


def test_a_step_that_an_old_jacobian_does_not_solve_is_tried_with_a_new_one():
    """From one corner of the problem to another: the step is taken, and not rejected."""
    func = lambda t, y: -torch.where(t > 0.5, 1e5, 1.0) * (y - 1) ** 3 - y  # noqa: E731
    with torch.no_grad():
        steps, stats = stepper("kvaerno3", func)
        first = steps.attempt(0.0, ProposedStep(0.01, 0.01), Y, None)
        steps.carry(first)
        assert stats.jacobians == 1
        second = steps.attempt(0.6, ProposedStep(0.6 + 4e-6, 4e-6), Y + 1.0, None)
    assert stats.jacobians == 2 and not second.unsolved and stats.rejected_by_newton == 0


def test_the_jacobian_behind_a_jump_is_that_of_its_far_side():
    times: list[float] = []

    def jacobian(t, y):
        times.append(float(t))
        return -torch.eye(3, dtype=F64)

    with torch.no_grad():
        steps, _ = stepper("kvaerno5", lambda t, y: -y, jac=jacobian)
        step = steps.attempt(0.0, ProposedStep(0.5, 0.5), Y, None)
        step.jump = True
        k1 = steps.carry(step)
        steps.attempt(0.5, ProposedStep(0.6, 0.1), step.y1, k1)
    assert times[0] == 0.0 and 0.5 < times[1] < 0.5 + 1e-15


def test_a_step_that_is_not_solved_is_told_apart_and_leaves_the_state():
    def cliff(t, y):
        return torch.where(y > 0.5, -1.0, 1.0) * 1e3 * torch.ones_like(y)

    with torch.no_grad():
        steps, stats = stepper("kvaerno5", cliff, jac=lambda t, y: torch.eye(3, dtype=F64) * 1e4)
        step = steps.attempt(0.0, ProposedStep(0.1, 0.1), Y, None)
    assert step.unsolved and stats.rejected_by_newton == 1
    assert step.y1 is Y and (step.error > Y * 1e-6 + 1e-10).all()
