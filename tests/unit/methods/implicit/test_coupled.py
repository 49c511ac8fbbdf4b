"""Steps of fully implicit methods: the equations of the tableau, and the size of the systems."""

from __future__ import annotations

import pytest
import torch
from problems import F64, linspace
from stiff_cases import robertson

from node_cuda import solve
from node_cuda.loop.assemble import make_loop
from node_cuda.methods.implicit.coupled import CoupledSteps
from node_cuda.methods.implicit.linear import Matrices
from node_cuda.methods.implicit.tableau import FullyImplicit
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS
from node_cuda.methods.registry import lookup
from node_cuda.methods.step import ProposedStep
from node_cuda.problem.problem import make_problem
from node_cuda.solution import Stats

METHODS = [name for name, tableau in IMPLICIT_TABLEAUS.items() if isinstance(tableau, FullyImplicit)]
Y = torch.tensor([0.9, 2.2e-5, 0.1], dtype=F64)


def stepper(method, func=robertson, y0=Y, **options):
    problem = make_problem(func, y0, linspace(0.0, 1.0, 2), 1e-6, 1e-10)
    stats = Stats()
    loop, _ = make_loop(problem, lookup(method, options), stats)
    assert isinstance(loop.stepper, CoupledSteps)
    return loop.stepper, stats


@pytest.mark.parametrize("method", METHODS)
def test_a_step_fulfils_the_equations_of_the_tableau(method):
    tableau = IMPLICIT_TABLEAUS[method]
    with torch.no_grad():
        steps, _ = stepper(method, newton_tol=1e-6)
        step = steps.attempt(0.0, ProposedStep(0.01, 0.01), Y, None)
    for row in tableau.a:
        z = Y + 0.01 * sum(float(a) * k for a, k in zip(row, step.k, strict=True))
        again = Y + 0.01 * sum(
            float(a) * robertson(None, Y + 0.01 * sum(float(x) * k for x, k in zip(inner, step.k, strict=True)))
            for a, inner in zip(row, tableau.a, strict=True)
        )
        # robertson's largest derivative is 2e3, so that the equation is solved to 0.01 * 2e3 times the error of z
        assert torch.allclose(z, again, rtol=1e-9, atol=1e-13)
    y1 = Y + 0.01 * sum(float(b) * k for b, k in zip(tableau.b, step.k, strict=True))
    assert torch.allclose(step.y1, y1, rtol=1e-14)


def test_a_batch_has_systems_of_the_size_of_one_stage_in_a_solve_and_of_all_stages_in_a_gradient(monkeypatch):
    """Never of the size of the batch: 5 samples of 3 numbers, 3 stages."""
    sizes: set[tuple[int, ...]] = set()
    made = Matrices.__init__

    def seen(self, matrix):
        sizes.add((*matrix.shape, matrix.is_complex()))
        made(self, matrix)

    monkeypatch.setattr(Matrices, "__init__", seen)
    y0 = Y.expand(5, 3).clone()
    arguments = dict(method="radauIIA5", options=dict(batch_dims=1, step_size=0.005))
    with torch.no_grad():
        ys = solve(robertson, y0, linspace(0.0, 0.01, 2), **arguments).ys
    assert sizes == {(5, 3, 3, False), (5, 3, 3, True)}
    alone = solve(robertson, Y, linspace(0.0, 0.01, 2), method="radauIIA5", options=dict(step_size=0.005)).ys
    assert torch.allclose(ys[:, 0], alone, rtol=1e-8, atol=1e-12)
    sizes.clear()
    y0.requires_grad_()
    solve(robertson, y0, linspace(0.0, 0.01, 2), **arguments).ys.sum().backward()
    assert sizes == {(5, 3, 3, False), (5, 3, 3, True), (5, 9, 9, False)}


def test_the_polynomial_of_the_step_before_is_the_guess_of_the_next_unless_that_is_far_longer():
    """A guess that is exact needs one iteration: y = t^2 with stages that are linear in t."""

    def field(t, y):
        return 2.0 * t + 0.0 * y

    with torch.no_grad():
        steps, stats = stepper("gl4", field, torch.zeros(1, dtype=F64))
        counts, t, y = [], 0.0, torch.zeros(1, dtype=F64)
        for h in (0.1, 0.1, 0.15, 1.0):
            before = stats.newton_iterations
            step = steps.attempt(t, ProposedStep(t + h, h), y, None)
            counts.append(stats.newton_iterations - before)
            steps.carry(step)
            t, y = step.t1, step.y1
    assert counts == [2, 1, 1, 2] and float(y) == pytest.approx(t**2, rel=1e-12)
