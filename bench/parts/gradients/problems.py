"""The problems of gradients.py: fields, initial states, times and losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parts.common.fields import Counted, DeepField, DissipativeField, FlowField, MLPField


def normal(batch: int, dim: int, generator: torch.Generator) -> Tensor:
    """Standard normal initial states (batch, dim)."""
    return torch.randn(batch, dim, generator=generator)


def eight_gaussians(batch: int, dim: int, generator: torch.Generator) -> Tensor:
    """Points (batch, dim) around eight centres on a circle in the plane; the other coordinates are 0."""
    angles = torch.randint(8, (batch,), generator=generator) * (math.pi / 4)
    centres = 2.0 * torch.stack([angles.cos(), angles.sin()], dim=1)
    points = centres + 0.3 * torch.randn(batch, 2, generator=generator)
    return torch.cat([points, torch.zeros(batch, dim - 2)], dim=1)


def mean_square(ys: Tensor) -> Tensor:
    """The sum of all squared outputs / (outputs * batch)."""
    return ys.square().sum() / (ys.shape[0] * ys.shape[1])


def negative_log_likelihood(ys: Tensor) -> Tensor:
    """The negative log likelihood of the initial points of a flow to a standard normal distribution, batch mean.

    The log density of a point is log N(z) - l: z is where the flow takes it, l the integral of -tr(dg/dz).
    """
    z, log_volume = ys[-1, :, :-1], ys[-1, :, -1]
    return (0.5 * z.square().sum(1) + 0.5 * z.shape[1] * math.log(2 * math.pi) + log_volume).mean()


class GradientProblem(NamedTuple):
    """A field in float32 with an initial state and output times, and a loss of the outputs (times, batch, dim).

    `draw` makes the initial state (batch, dim). `target`: the promised ratio of the time of torchdiffeq's adjoint to
    that of the discrete adjoint, or None.
    """

    name: str
    make_field: Callable[[], nn.Module]
    batch: int
    dim: int
    times: tuple[float, ...]
    rtol: float = 1e-7  # torchdiffeq's defaults
    atol: float = 1e-9
    draw: Callable[[int, int, torch.Generator], Tensor] = normal
    loss: Callable[[Tensor], Tensor] = mean_square
    target: float | None = None

    def field(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Counted:
        """The field, always with the same parameters, rounded to float32."""
        torch.manual_seed(0)
        return Counted(self.make_field()).to(device, dtype)

    def start(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """The initial state, always the same."""
        return self.draw(self.batch, self.dim, torch.Generator().manual_seed(1)).to(device, dtype)

    def t(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """The output times, rounded to float32, so that they are the same in every dtype."""
        return torch.tensor(self.times).to(device, dtype)


def evenly(t_end: float, outputs: int) -> tuple[float, ...]:
    """Evenly spaced times from 0 to t_end."""
    return tuple(torch.linspace(0.0, t_end, outputs).tolist())


def to_time(batch: int, dim: int, hidden: int, outputs: int, target: float) -> GradientProblem:
    """A problem for the table of times: an MLP field from t = 0 to 5."""
    name = f"{batch}x{dim} hidden {hidden}, {outputs} outputs"
    return GradientProblem(name, lambda: MLPField(dim, hidden), batch, dim, evenly(5.0, outputs), target=target)


PROBLEMS_TIMED = (
    to_time(16, 2, 50, 2, target=3.0),
    to_time(16, 2, 50, 100, target=10.0),
    to_time(128, 64, 64, 2, target=3.0),
    to_time(128, 64, 64, 100, target=10.0),
)
LOOSE = (1e-5, 1e-7)  # rtol, atol
PROBLEMS_PLOTTED = (
    # The early output keeps the gradient of y0 from vanishing. At the last output rate * time is 20.
    GradientProblem(
        "dissipative, rate x time = 20", lambda: DissipativeField(8, 32, 4.0), 1024, 8, (0.0, 0.25, 5.0), *LOOSE
    ),
    GradientProblem("latent ODE, 200 outputs", lambda: DeepField(8, 64, nn.ELU), 256, 8, evenly(5.0, 200), *LOOSE),
    GradientProblem(
        "a million parameters, state of 4", lambda: DeepField(4, 1000, nn.Tanh), 1, 4, evenly(5.0, 2), *LOOSE
    ),  # torchdiffeq's issue 243
    GradientProblem(
        "normalizing flow in the plane",
        lambda: FlowField(2, 64),
        512,
        3,
        evenly(2.0, 2),
        *LOOSE,
        eight_gaussians,
        negative_log_likelihood,
    ),
)
QUICK_PROBLEM = GradientProblem("quick", lambda: MLPField(2, 8), 4, 2, evenly(1.0, 3), rtol=1e-4, atol=1e-4, target=3.0)
PROBLEMS = {problem.name: problem for problem in (*PROBLEMS_TIMED, *PROBLEMS_PLOTTED, QUICK_PROBLEM)}
