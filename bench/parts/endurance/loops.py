"""The loops of endurance.py: a tiny problem, solved and differentiated once in every gradient mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from parts.common import libraries
from parts.common.fields import MLPField
from parts.common.libraries import OURS
from parts.common.modes import ADJOINT, BACKPROP, DISCRETE, mode

# Three steps of three stages: short solves, but long enough that one checkpoint leads to a recomputed step.
TOLERANCES = {"rtol": 1e-3, "atol": 1e-3, "method": "bosh3"}
T_END = 1.0


class Tiny:
    """An MLP field on 4 states of 2 dimensions; all loops share its parameters and initial state."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.field = MLPField(2, 8).to(device)
        self.start = torch.randn(4, 2, device=device)
        self.t = torch.tensor([0.0, T_END], device=device)
        with torch.no_grad():
            ends = libraries.function(OURS, "odeint")(self.field, self.start, self.t, **TOLERANCES)[:, 0, 0]
        self.level = ends.mean().item()  # between start and end, so the solve passes it

    def outputs(self, solver: Callable[..., Tensor]) -> None:
        """Solves to t_end and differentiates."""
        start = self._fresh()
        solver(self.field, start, self.t, **TOLERANCES)[-1].square().sum().backward()

    def event(self, solver: Callable[..., tuple[Tensor, Tensor]]) -> None:
        """Solves until a component passes a level, and differentiates the state and the time there."""
        start = self._fresh()
        time, ys = solver(self.field, start, self.t[0], event_fn=self.passed, **TOLERANCES)
        (time + ys[-1].square().sum()).backward()

    def _fresh(self) -> Tensor:
        self.field.zero_grad()
        return self.start.clone().requires_grad_()

    def passed(self, t: Tensor, y: Tensor) -> Tensor:
        """The event function: zero where the first component passes the level."""
        return y[0, 0] - self.level


def loops(device: torch.device) -> dict[str, Callable[[], None]]:
    """Name -> a function that solves and differentiates once."""
    tiny = Tiny(device)
    adjoint, discrete = (mode(OURS, gradient).solver for gradient in (ADJOINT, DISCRETE))
    return {
        BACKPROP: partial(tiny.outputs, mode(OURS, BACKPROP).solver),
        ADJOINT: partial(tiny.outputs, adjoint),
        DISCRETE: partial(tiny.outputs, discrete),
        # One, not eight: with eight checkpoints these few steps would not be recomputed.
        "discrete, 1 checkpoint": partial(tiny.outputs, partial(discrete, checkpoints=1)),
        "event, adjoint": partial(
            tiny.event, partial(libraries.function(OURS, "odeint_event"), odeint_interface=adjoint)
        ),
    }
