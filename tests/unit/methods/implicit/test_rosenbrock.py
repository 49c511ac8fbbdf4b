"""Steps of the Rosenbrock method: the linear systems of the tableau, with one Jacobian for as many tries."""

from __future__ import annotations

import torch
from problems import F64, linspace

from node_cuda.loop.assemble import make_loop
from node_cuda.methods.implicit.rosenbrock import RosenbrockSteps
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS
from node_cuda.methods.registry import lookup
from node_cuda.methods.step import ProposedStep
from node_cuda.problem.problem import make_problem
from node_cuda.solution import Stats

Y, H = torch.tensor([0.5, -1.0], dtype=F64), 0.1


def field(t, y):
    return torch.stack([y[1] * torch.cos(3 * t), -50.0 * y[1] + y[0] ** 2 - t**2])


def stepper():
    stats = Stats()
    loop, _ = make_loop(make_problem(field, Y, linspace(0.0, 1.0, 2), 1e-6, 1e-8), lookup("rodas5p", {}), stats)
    assert isinstance(loop.stepper, RosenbrockSteps)
    return loop.stepper, stats


def test_a_step_fulfils_the_equations_of_the_tableau():
    tableau, t0 = IMPLICIT_TABLEAUS["rodas5p"], 0.2
    with torch.no_grad():
        step = stepper()[0].attempt(t0, ProposedStep(t0 + H, H), Y, None)
        t = torch.tensor(t0, dtype=F64)
        jacobian = torch.func.jacrev(lambda y: field(t, y))(Y)
        df_dt = torch.func.jacrev(lambda t: field(t, Y))(t)
        matrix = torch.eye(2, dtype=F64) / float(tableau.gamma) - H * jacobian
        v = []
        for i, node in enumerate(tableau.nodes):
            z = Y + H * sum(float(a) * x for a, x in zip(tableau.a[i], v, strict=True))
            right = field(t + node * H, z) + sum(float(c) * x for c, x in zip(tableau.c[i], v, strict=True))
            v.append(torch.linalg.solve(matrix, right + H * float(tableau.d[i]) * df_dt))
    for ours, by_hand in zip(step.k, v, strict=True):
        assert torch.allclose(ours, by_hand, rtol=1e-10, atol=1e-12)
    assert torch.allclose(step.y1, Y + H * sum(float(m) * x for m, x in zip(tableau.m, v, strict=True)))


def test_a_step_that_is_tried_again_keeps_its_jacobian_and_the_next_one_has_its_own():
    with torch.no_grad():
        steps, stats = stepper()
        steps.attempt(0.0, ProposedStep(H, H), Y, None)
        step = steps.attempt(0.0, ProposedStep(H / 2, H / 2), Y, None)
        assert (stats.jacobians, stats.factorisations) == (1, 2)
        assert steps.carry(step) is None
        steps.attempt(H / 2, ProposedStep(H, H / 2), step.y1, None)
    assert (stats.jacobians, stats.factorisations) == (2, 3)
