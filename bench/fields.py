"""The vector fields f(t, z) that the benchmarks solve, and a counter of their evaluations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MLPField(nn.Module):
    """dz/dt = W2 tanh(W1 z + b1) + b2.  z (batch, dim) -> (batch, dim), dtype of the parameters."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(z)


class ConvField(nn.Module):
    """dz/dt = conv(relu(conv([z, t]))): a small residual branch with the time as one more channel.

    z (batch, channels, height, width) -> the same shape; t () is broadcast to an image of its own.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels + 1, channels, kernel_size=3, padding=1)
        self.outer = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        time = t.to(z.dtype).expand(z.shape[0], 1, *z.shape[2:])
        return self.outer(torch.relu(self.inner(torch.cat([z, time], dim=1))))


class Counted(nn.Module):
    """`field` with the number of its evaluations since the last `reset` in `nfe`."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field
        self.nfe = 0

    def reset(self) -> int:
        """Returns the count and sets it to zero."""
        nfe, self.nfe = self.nfe, 0
        return nfe

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.nfe += 1
        return self.field(t, z)
