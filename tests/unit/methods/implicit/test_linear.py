"""(a I - s J) x = b, by the inverse of a small matrix and by the factors of others."""

from __future__ import annotations

import pytest
import torch
from problems import F64, linspace

from node_cuda.methods.implicit.blocks import Blocks
from node_cuda.methods.implicit.linear import INVERTED, Factorised
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
