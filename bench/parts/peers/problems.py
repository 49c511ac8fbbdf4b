"""The six problems of peers.py, each one that people have, and their exact solutions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parts.common import libraries
from parts.common.fields import DeepField, FlowField, MLPField, SineField, deep
from parts.solve.solving import Quantities


class CubicField(nn.Module):
    """dy/dt = net(y^3): the field that the spiral of torchdiffeq's first example trains."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.field = MLPField(2, hidden)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.field(t, y**3)


class Velocity(nn.Module):
    """dx/dt = net(x, t). t: one number, or one for each sample."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = deep(dim + 1, hidden, dim, nn.Tanh)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, t.to(x.dtype).reshape(-1, 1).expand(len(x), 1)], dim=1))


class VanDerPol(nn.Module):
    """x'' = mu (1 - x^2) x' - x, so little stiff that an explicit method is the right one."""

    mu = 5.0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        x, v = y.unbind(-1)
        return torch.stack([v, self.mu * (1 - x**2) * v - x], -1)


class Problem(NamedTuple):
    """A field on a state (samples, dim), solved from t = 0 to t_end at evenly spaced times.

    gradient: whether the gradient of y0 and all parameters is computed too; the loss is the mean square of all outputs
    after the first. jax: the name of the field in parts/peers/diffrax_contestant.py. scale: of all
    parameters; a field with torch's first ones is so smooth that no tolerance matters.
    """

    name: str
    jax: str
    make_field: Callable[[], nn.Module]
    samples: int
    dim: int
    times: int
    t_end: float
    gradient: bool
    rtols: tuple[float, ...]
    dtype: torch.dtype = torch.float32
    scale: float = 1.0

    @torch.no_grad()
    def field(self) -> nn.Module:
        """The field, always with the same parameters."""
        torch.manual_seed(0)
        field = self.make_field()
        for parameter in field.parameters():
            parameter.mul_(self.scale)
        return field.to(self.dtype)

    def start(self) -> Tensor:
        """The initial state, always the same one."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.samples, self.dim, generator=generator, dtype=torch.float64).to(self.dtype)

    def t(self) -> Tensor:
        """The times of the outputs, y0 included, in the dtype of the state."""
        return torch.linspace(0.0, self.t_end, self.times, dtype=self.dtype)


SINGLE, DOUBLE = (1e-3, 1e-5, 1e-7), (1e-3, 1e-6, 1e-9)
PROBLEMS = (
    Problem("spiral", "cubic", lambda: CubicField(50), 20, 2, 10, 1.0, True, SINGLE),
    Problem("CNF", "flow", lambda: FlowField(2, 64), 128, 3, 2, 1.0, True, SINGLE),
    Problem("latent ODE", "deep", lambda: DeepField(4, 64, nn.Tanh), 128, 4, 100, 5.0, True, SINGLE, scale=2.0),
    Problem("flow-matching sampler", "velocity", lambda: Velocity(2, 128), 512, 2, 2, 1.0, False, SINGLE, scale=3.0),
    Problem("Van der Pol", "van_der_pol", VanDerPol, 1, 2, 101, 20.0, False, DOUBLE, torch.float64),
    Problem("large cheap field", "sine", SineField, 4096, 256, 2, 2.0, False, SINGLE),
)
QUICK_PROBLEMS = (
    Problem("spiral", "cubic", lambda: CubicField(8), 4, 2, 3, 1.0, True, (1e-3,)),
    Problem("Van der Pol", "van_der_pol", VanDerPol, 1, 2, 3, 1.0, False, (1e-3,), torch.float64),
)


def loss_of(ys: Tensor) -> Tensor:
    """The mean square of all outputs after the first."""
    return ys[1:].square().mean()


def gradients(ys: Tensor, y0: Tensor, field: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The gradients of y0 and, as one vector, of all parameters."""
    grad_y0, *rest = torch.autograd.grad(loss_of(ys), [y0, *field.parameters()])
    return grad_y0, torch.cat([grad.flatten() for grad in rest]) if rest else None


def exact(problem: Problem) -> Quantities:
    """The results in float64 by dopri8 with rtol 1e-13, by torchdiffeq if it is installed: an independent reference.

    The state and the parameters are those of the problem's dtype.
    """
    by = libraries.RIVAL if libraries.installed(libraries.RIVAL) else libraries.OURS
    odeint = libraries.function(by, "odeint")
    field = copy.deepcopy(problem.field()).double()
    y0, t = problem.start().double().requires_grad_(problem.gradient), problem.t().double()
    with torch.set_grad_enabled(problem.gradient):
        ys = odeint(field, y0, t, rtol=1e-13, atol=1e-14, method="dopri8", options={"step_t": t[1:-1]})
    return Quantities(ys.detach(), *(gradients(ys, y0, field) if problem.gradient else ()))
