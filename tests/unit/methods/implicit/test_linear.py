"""(a I - s J) x = b, by the inverse of a small matrix and by the factors of others."""

from __future__ import annotations

import pytest
import torch
from problems import F64, linspace

from node_cuda.methods.implicit.blocks import Blocks
from node_cuda.methods.implicit.linear import INVERTED, Coupled, Factorised, Matrices, Transformed, parted
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS
from node_cuda.problem.problem import make_problem


@pytest.mark.parametrize("shape, batch_dims", [((3,), 0), ((INVERTED + 1,), 0), ((4, 3), 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_it_solves_the_system_and_the_transposed_one(shape, batch_dims, transposed):
    b = torch.randn(shape, dtype=F64)
    problem = make_problem(lambda t, y: y, b, linspace(0.0, 1.0, 2), 1e-3, 1e-3)
    blocks = Blocks(problem, batch_dims)
    jacobian = torch.randn(blocks.count, blocks.size, blocks.size, dtype=F64)
    x = Factorised(blocks, jacobian, 2.0, 0.1).solve(b, transposed=transposed)
    matrix = 2.0 * torch.eye(blocks.size, dtype=F64) - 0.1 * (jacobian.mT if transposed else jacobian)
    assert x.shape == b.shape and x.is_contiguous()
    assert torch.allclose((matrix @ blocks.split(x)[..., None])[..., 0], blocks.split(b))


@pytest.mark.parametrize("size", [2, INVERTED + 1])
def test_a_singular_matrix_gives_what_is_not_finite(size):
    b = torch.ones(size, dtype=F64)
    blocks = Blocks(make_problem(lambda t, y: y, b, linspace(0.0, 1.0, 2), 1e-3, 1e-3), 0)
    singular = torch.zeros(1, size, size, dtype=F64)
    singular[0, 0, 0] = 1.0
    assert not Factorised(blocks, singular, 1.0, 1.0).solve(b).isfinite().all()


@pytest.mark.parametrize("shape, batch_dims", [((3,), 0), ((4, 3), 1), ((INVERTED + 1,), 0)])
@pytest.mark.parametrize("method", ["implicit_midpoint", "gl4", "radauIIA5", "gl6"])
def test_the_transformed_systems_and_the_matrix_of_all_stages_solve_the_same_equations(method, shape, batch_dims):
    tableau = IMPLICIT_TABLEAUS[method]
    s, h = tableau.stages, 0.7
    b = torch.randn(s, *shape, dtype=F64)
    blocks = Blocks(make_problem(lambda t, y: y, b[0], linspace(0.0, 1.0, 2), 1e-3, 1e-3), batch_dims)
    # 1 and larger on the diagonal of every system, which is then far from singular
    jacobian = 0.2 * torch.randn(blocks.count, blocks.size, blocks.size, dtype=F64) - torch.eye(blocks.size, dtype=F64)
    x = Transformed(blocks, jacobian, parted(tableau, F64, b.device), h).solve(b)
    a = torch.tensor([[float(x) for x in row] for row in tableau.a], dtype=F64)
    mixed = torch.stack([blocks.split(each) for each in torch.tensordot(a, x, 1)])
    left = torch.stack([blocks.split(each) for each in x]) - h * (jacobian @ mixed[..., None])[..., 0]
    assert torch.allclose(left, torch.stack([blocks.split(each) for each in b]), atol=1e-12)
    again = Coupled(blocks, torch.stack([jacobian] * s), tableau, h).solve(b)
    assert again.shape == b.shape and torch.allclose(again, x, atol=1e-12)


def test_the_matrix_of_all_stages_has_the_jacobian_of_each_stage_and_is_transposed():
    tableau, h = IMPLICIT_TABLEAUS["radauIIA3"], 0.4
    b, jacobians = torch.randn(2, 5, 3, dtype=F64), 0.3 * torch.randn(2, 5, 3, 3, dtype=F64)
    blocks = Blocks(make_problem(lambda t, y: y, b[0], linspace(0.0, 1.0, 2), 1e-3, 1e-3), 1)
    for sample in range(5):
        whole = torch.eye(6, dtype=F64)
        for i, row in enumerate(tableau.a):
            for j, a in enumerate(row):
                whole[3 * i : 3 * i + 3, 3 * j : 3 * j + 3] -= h * float(a) * jacobians[i, sample]
        for transposed in (False, True):
            x = Coupled(blocks, jacobians, tableau, h).solve(b, transposed=transposed)
            matrix = whole.T if transposed else whole
            assert torch.allclose(matrix @ x[:, sample].reshape(-1), b[:, sample].reshape(-1), atol=1e-12)


def test_a_vector_and_a_row_of_a_small_state_are_solved_alike():
    matrices = Matrices(torch.eye(3, dtype=F64)[None] + torch.triu(torch.ones(1, 3, 3, dtype=F64)))
    b = torch.randn(3, dtype=F64)
    for transposed in (False, True):
        row = matrices.solve(b[None], transposed=transposed)[0]
        assert matrices.inverted and torch.allclose(matrices.solve(b, transposed=transposed), row, rtol=1e-14)
