"""The rows of small states: fixed grids of few steps, a normalizing flow, a latent ODE and a rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parts.common.fields import DeepField, FlowField, MLPField
from parts.common.modes import ADJOINT, BACKPROP, DISCRETE
from parts.speed.loops import LOOPS

FORWARD = "no gradient"
TIMED = (FORWARD, BACKPROP, ADJOINT, DISCRETE)
DTYPES = (torch.float32, torch.bfloat16)


class SmallCase(NamedTuple):
    """A field on a random state (batch, dim), solved from t = 0 to t_end at evenly spaced times.

    use: the words in front of the method in the name. times: number of times; on a fixed grid each time after the first
    is a step. timed: FORWARD (a solve under no_grad), or the name of the gradient mode of a solve with its gradient.
    every: whether the loss has every output, or only the last. rtol, atol: not used on a fixed grid.
    """

    use: str
    make_field: Callable[[], nn.Module]
    batch: int
    dim: int
    method: str
    times: int
    timed: str = FORWARD
    dtype: torch.dtype = torch.float32
    t_end: float = 1.0
    every: bool = False
    rtol: float = 1e-5
    atol: float = 1e-7

    @property
    def name(self) -> str:
        """The name of the case in tables."""
        amount = f"{self.times} outputs"
        if self.fixed:
            amount = f"{self.times - 1} step{'s' if self.times > 2 else ''}"
        words = [self.use, self.method, amount, str(self.dtype).removeprefix("torch."), self.timed]
        return ", ".join(filter(None, words))

    @property
    def fixed(self) -> bool:
        """Whether the method has a fixed grid, for which there is a loop by hand."""
        return self.method in LOOPS

    @property
    def h(self) -> float:
        """The size of a step of a fixed grid."""
        return self.t_end / (self.times - 1)

    def field(self, device: torch.device) -> nn.Module:
        """The field, always with the same parameters."""
        torch.manual_seed(0)
        return self.make_field().to(device, self.dtype)

    def start(self, device: torch.device) -> Tensor:
        """The initial state, always the same."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.batch, self.dim, generator=generator).to(device, self.dtype)

    def t(self, device: torch.device) -> Tensor:
        """The times, in float32 for every dtype of the state."""
        return torch.linspace(0.0, self.t_end, self.times, device=device)


def small_mlp() -> nn.Module:
    """The field of the fixed grids."""
    return MLPField(3, 40)


def flow() -> nn.Module:
    """The field of the normalizing flow in the plane; its state has the log density as third number."""
    return FlowField(2, 64)


def latent() -> nn.Module:
    """The field of the latent ODE, as wide as in torchdiffeq's example."""
    return DeepField(4, 20, nn.ELU)


def grid(method: str, steps: int, timed: str, dtype: torch.dtype) -> SmallCase:
    """A row of the fixed grids."""
    return SmallCase("", small_mlp, 24, 3, method, steps + 1, timed, dtype)


ROLLOUT = SmallCase("rollout", small_mlp, 24, 3, "euler", 1001, t_end=10.0)
FLOW = SmallCase("normalizing flow", flow, 128, 3, "dopri5", 2)
LATENT = SmallCase("latent ODE", latent, 128, 4, "dopri5", 200, t_end=5.0, every=True)

SMALL_CASES = (
    *(
        grid(method, steps, timed, dtype)
        for timed in TIMED
        for dtype in DTYPES
        for method in LOOPS
        for steps in (1, 10, 50)
    ),
    ROLLOUT,
    *(case._replace(timed=timed) for case in (FLOW, LATENT) for timed in TIMED),
)
QUICK_SMALL_CASES = (
    grid("euler", 1, FORWARD, torch.float32),
    grid("midpoint", 2, BACKPROP, torch.bfloat16),
    grid("rk4", 2, ADJOINT, torch.float32),
    grid("euler", 2, DISCRETE, torch.bfloat16),
    ROLLOUT._replace(times=21),
    FLOW._replace(batch=4, t_end=0.1, rtol=1e-3, atol=1e-3),
    LATENT._replace(batch=4, times=5, timed=DISCRETE, rtol=1e-3, atol=1e-3),
)
