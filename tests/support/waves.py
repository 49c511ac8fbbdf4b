"""The problem of the tests on a GPU, and its comparison. The bits of its field do not depend on other work of the
GPU."""

from __future__ import annotations

import torch
from problems import F64, linspace
from torch import Tensor, nn

AGREE = 1e-10
TIMES = linspace(0.0, 1.0, 4)


class Wave(nn.Module):
    """y' = w sin(y) cos(3 t), one weight for each column. It has no matrix product, whose bits may depend on other
    work."""

    def __init__(self, columns: int = 8, dtype: torch.dtype = F64):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, columns, dtype=F64).to(dtype))

    def forward(self, t, y):
        return self.w * torch.sin(y) * torch.cos(3 * t)


def state(rows: int = 100, columns: int = 8, dtype: torch.dtype = F64) -> Tensor:
    """Return numbers between -1 and 1, on the CPU."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(1), dtype=F64).mul(2).sub(1).to(dtype)


def weighted(ys: Tensor) -> Tensor:
    """Return a loss in which every number has a different weight."""
    weights = torch.linspace(0.5, 1.5, ys.numel(), dtype=F64, device=ys.device)
    return (weights * ys.reshape(-1).to(F64)).sum()


def assert_near(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0.0, atol=AGREE * float(b.abs().max()))


def same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
