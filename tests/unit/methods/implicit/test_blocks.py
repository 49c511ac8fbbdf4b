"""States as samples: cut and put together, and the sentences of those that cannot be."""

from __future__ import annotations

import pytest
import torch
from problems import F64, linspace

from node_cuda.methods.implicit.blocks import Blocks
from node_cuda.problem.problem import make_problem
from node_cuda.status import InvalidInput, InvalidState

T = linspace(0.0, 1.0, 2)


def blocks(y0, batch_dims):
    problem = make_problem(lambda t, y: y, y0, T, 1e-3, 1e-3)
    return problem, Blocks(problem, batch_dims)


STATES = [
    (torch.randn(4, dtype=F64), 0, (1, 4)),
    (torch.randn(3, 2, 2, dtype=F64), 1, (3, 4)),
    (torch.randn(3, 2, 2, dtype=F64), 2, (6, 2)),
    (torch.randn(3, 2, dtype=torch.complex128), 1, (3, 4)),
    ((torch.randn(3, 2, dtype=F64), torch.randn(3, 1, 4, dtype=F64)), 1, (3, 6)),
    ((torch.randn(3, 2, dtype=torch.complex128), torch.randn(3, dtype=torch.complex128)), 1, (3, 6)),
    ((torch.randn(2, dtype=F64), torch.randn(3, dtype=F64)), 0, (1, 5)),
]


@pytest.mark.parametrize("y0, batch_dims, shape", STATES)
def test_a_state_is_cut_into_samples_and_put_together_again(y0, batch_dims, shape):
    problem, cut = blocks(y0, batch_dims)
    rows = cut.split(problem.y0)
    assert (cut.count, cut.size) == rows.shape == shape
    together = cut.join(rows)
    assert torch.equal(together, problem.y0) and together.is_contiguous()


def test_each_row_is_one_sample_of_all_components():
    a, b = torch.arange(6.0).reshape(3, 2), 10 + torch.arange(3.0)
    problem, cut = blocks((a, b), 1)
    assert torch.equal(cut.split(problem.y0), torch.cat([a, b[:, None]], 1))


@pytest.mark.parametrize(
    "y0, batch_dims, kind, words",
    [
        (torch.ones(2, dtype=torch.float16), 0, InvalidState, "float32 and float64; got a state of torch.float16"),
        (torch.ones(2), 2, InvalidInput, "batch_dims"),
        ((torch.ones(3, 2), torch.ones(2, 2)), 1, InvalidInput, r"the same in all; got \(3, 2\), \(2, 2\)"),
        (torch.ones(20000), 0, InvalidInput, r"1 x 20000 x 20000 numbers, 1\.49 GiB.*batch_dims=1"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_words(y0, batch_dims, kind, words):
    with pytest.raises(kind, match=words):
        blocks(y0, batch_dims)
