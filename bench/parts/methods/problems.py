"""The problems of methods.py: a neural field, an orbit, and a field with a kink."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from node_cuda._typing import Func

F64 = torch.float64


class Problem(NamedTuple):
    """dy/dt = field(t, y), y(0) = start, up to the time end."""

    name: str
    field: Func
    start: Tensor
    end: float


class Field(nn.Module):
    """An MLP on (y, t) with this activation and random weights, always the same ones."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        drawn = torch.random.get_rng_state()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(9, 64), activation, nn.Linear(64, 8)).to(F64)
        torch.random.set_rng_state(drawn)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([y, t.expand(*y.shape[:-1], 1)], -1))


def orbit(t: Tensor, y: Tensor) -> Tensor:
    """Two bodies: y is the place and the velocity of one, seen from the other."""
    place, velocity = y.chunk(2, -1)
    return torch.cat([velocity, -place / place.norm(dim=-1, keepdim=True) ** 3], -1)


BATCH = torch.linspace(-1.0, 1.0, 16 * 8, dtype=F64).reshape(16, 8)
PROBLEMS = (
    Problem("neural field (tanh), t = 0 to 5", Field(nn.Tanh()), BATCH, 5.0),
    Problem("orbit, eccentricity 0.5, five turns", orbit, torch.tensor([0.5, 0.0, 0.0, 3.0**0.5], dtype=F64), 31.4),
    Problem("neural field (ReLU), t = 0 to 5", Field(nn.ReLU()), BATCH, 5.0),
)
