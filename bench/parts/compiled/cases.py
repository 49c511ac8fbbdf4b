"""The rows of compiled.py: fields of several sizes and kinds, each solved forwards and with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parts.common.fields import ConvField, DeepField, FlowField, MLPField
from parts.common.modes import ADJOINT, DISCRETE

FORWARD = "forward"
PASSES = (FORWARD, DISCRETE, ADJOINT)
"""What is timed: a solve without gradients, or a training step by the discrete or the continuous adjoint."""


class Case(NamedTuple):
    """A field on a random state, solved by dopri5 from 0 to t_end at evenly spaced times.

    goals: for each pass how many times diffrax's time may be taken, where a limit was set.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    t_end: float
    outputs: int = 2
    rtol: float = 1e-6
    atol: float = 1e-6
    goals: tuple[tuple[str, float], ...] = ()

    def field(self) -> nn.Module:
        """The field, always with the same parameters."""
        torch.manual_seed(0)
        return self.make()

    def start(self) -> Tensor:
        """The initial state, always the same."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1))

    def t(self) -> Tensor:
        """The times."""
        return torch.linspace(0.0, self.t_end, self.outputs)


def mlp(batch: int, dim: int, hidden: int, goals: tuple[tuple[str, float], ...] = (), outputs: int = 2) -> Case:
    """An autonomous MLP of one hidden layer, to t = 10."""
    more = f", {outputs} outputs" if outputs > 2 else ""
    return Case(f"MLP {batch}x{dim}{more}", lambda: MLPField(dim, hidden), (batch, dim), 10.0, outputs, goals=goals)


def latent(outputs: int) -> Case:
    """A latent ODE, as wide as in torchdiffeq's example."""
    name = f"latent ODE 128x4, {outputs} outputs"
    return Case(name, lambda: DeepField(4, 20, nn.ELU), (128, 4), 5.0, outputs, goals=((FORWARD, 2.0),))


CASES = (
    mlp(16, 2, 50, ((FORWARD, 1.5), (DISCRETE, 1.5), (ADJOINT, 2.0))),
    mlp(16, 2, 50, ((FORWARD, 2.0), (DISCRETE, 2.0)), outputs=50),
    mlp(128, 64, 64, ((FORWARD, 1.6),)),
    mlp(1024, 64, 64),
    Case("flow 128x2, exact trace", lambda: FlowField(2, 64), (128, 3), 1.0),
    latent(50),
    latent(1000),
    Case("convolutions 8x8x14x14", lambda: ConvField(8), (8, 8, 14, 14), 1.0),
)
QUICK = (mlp(4, 2, 8)._replace(t_end=0.5, rtol=1e-3, atol=1e-3),)
