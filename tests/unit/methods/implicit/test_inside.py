"""The error between the ends of a step counts where an output is, and only there."""

from __future__ import annotations

import pytest
import torch
from problems import F64, linspace

from node_cuda.loop.assemble import make_loop
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS
from node_cuda.methods.registry import lookup
from node_cuda.methods.step import ProposedStep
from node_cuda.problem.problem import make_problem
from node_cuda.solution import Stats

Y = torch.zeros(1, dtype=F64)


def field(t, y):
    return -1e7 * (y - torch.sin(t)) + torch.cos(t)


@pytest.mark.parametrize("method", [name for name, tableau in IMPLICIT_TABLEAUS.items() if tableau.adaptive])
def test_it_is_about_the_error_of_the_interpolant_where_a_component_is_infinitely_stiff(method):
    """A step of 2: the ends are exact, and the polynomial through them is not the sine."""
    with torch.no_grad():
        for output, judged in ((1.0, True), (3.0, False)):
            problem = make_problem(field, Y, torch.tensor([0.0, output], dtype=F64), 1e-6, 1e-8)
            loop, interpolant = make_loop(problem, lookup(method, dict(newton_tol=1e-6)), Stats())
            before = problem.field.nfe
            step = loop.stepper.attempt(0.0, ProposedStep(2.0, 2.0), Y, None)
            off = float(interpolant.evaluate(step, step.k, 0.75) - torch.sin(torch.tensor(1.5, dtype=F64)))
            assert abs(float(step.y1) - float(torch.sin(torch.tensor(2.0, dtype=F64)))) < 1e-5
            assert problem.field.nfe > before
            if judged:
                assert float(step.error) == pytest.approx(abs(off), rel=0.1) and abs(off) > 5e-4
            else:
                assert float(step.error.abs()) < 1e-2 * abs(off)


def test_outputs_at_the_ends_of_steps_cost_nothing():
    func = make_problem(field, Y, linspace(0.0, 1.0, 2), 1e-6, 1e-8)
    with torch.no_grad():
        loop, _ = make_loop(func, lookup("rodas5p", {}), Stats())
        loop.stepper.attempt(0.0, ProposedStep(1.0, 1.0), Y, None)
    assert func.field.nfe == 8
