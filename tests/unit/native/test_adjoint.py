"""The backward loop between outputs gives the gradients of the host's adjoint method, step for step.

The graphs run without the compiler here. The numbers of options are inputs of a graph: rows with the same func and the
same kinds of options trace once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native import Timed, first_of, start
from native_gradients import CLOSE_IN_FLOAT, agrees_with_differences, compare_gradients
from problems import F64, linspace
from torch import nn

from node_cuda.gradients.adjoint import native

pytestmark = pytest.mark.usefixtures("interpreted")
T = linspace(0.0, 1.0, 4)
LOOSE = dict(rtol=1e-3, atol=1e-3)
HEUN = dict(method="adaptive_heun", rtol=3e-2, atol=3e-2)


def compare(func: Any, y0: Any, t: torch.Tensor, **solver: Any) -> Any:
    return compare_gradients(func, y0, t, gradient="adjoint", **solver)


@pytest.mark.parametrize("method", first_of(1, ["bosh3", "dopri5", "adaptive_heun"]))
def test_an_adaptive_method_in_both_directions_with_rejected_steps_and_against_differences(method):
    """One graph. The gradient is one of the exact solution: it agrees with differences up to the tolerance."""
    field = Timed()
    for t in (T.flip(0), T)[: 1 if method == "dopri5" else 2]:
        compare(field, start(), t, method=method, options=dict(first_step=1.0), **LOOSE)
    tol, limit = (1e-4, 1e-2) if method == "bosh3" else (1e-3, 1e-1)
    if method != "dopri5":
        solver = dict(method=method, rtol=tol, atol=tol, options=dict(first_step=0.1))
        agrees_with_differences(field, start(), T, gradient="adjoint", limit=limit, **solver)


@pytest.mark.parametrize(
    ("method", "options"),
    first_of(
        1,
        [
            ("rk4", dict(step_size=0.05)),
            ("euler", dict(step_size=0.3, interp="cubic")),
            ("midpoint", {}),
            ("heun2", dict(perturb=True)),
        ],
    ),
)
def test_a_method_on_a_grid_in_both_directions(method, options):
    """Each interval has a grid, and intervals have different numbers of steps."""
    field = Timed()
    t = torch.tensor([0.0, 0.05, 0.7, 1.0], dtype=F64)
    for times in (t, t.flip(0)):
        compare(field, start(), times, method=method, options=options)
    if method == "rk4":  # its error in steps of 0.05 is below 1e-5
        agrees_with_differences(field, start(), t, gradient="adjoint", limit=1e-4, method=method, options=options)


def test_stops_and_jumps():
    class Jump(Timed):
        def forward(self, t, y):
            return super().forward(t, y) * torch.where(t < 0.7, 1.0, -2.0)

    field = Jump()
    for t in (T, T.flip(0)):
        options = dict(jump_t=torch.tensor([0.7], dtype=F64), step_t=torch.tensor([0.2], dtype=F64))
        compare(field, start(), t, options=options, **HEUN)


@pytest.mark.parametrize("count", first_of(1, [20, 2]))
def test_few_and_many_outputs(count):
    compare(Timed(), start(), linspace(0.0, 1.0, count), **HEUN)


def test_one_attempt_in_each_call(monkeypatch):
    """What the loop carries passes from call to call."""
    monkeypatch.setattr(native, "SECONDS", 0.0)
    field = Timed()
    for method in ("adaptive_heun", "euler"):
        solver = dict(options=dict(step_size=0.1)) if method == "euler" else dict(rtol=3e-2, atol=3e-2)
        assert compare(field, start(), T, method=method, **solver).stats.host_reads > 5


def test_states_in_float32():
    compare(Timed(torch.float32), start(torch.float32), T.float(), limit=CLOSE_IN_FLOAT, **HEUN)


class Pendulum(nn.Module):
    def __init__(self):
        super().__init__()
        self.friction = nn.Parameter(torch.tensor(0.1, dtype=F64))

    def forward(self, t, state):
        angle, speed = state
        return speed, -torch.sin(angle) - self.friction * speed.sum() * torch.ones_like(angle)


TWO = (torch.tensor([[0.5, 1.0], [-0.3, 2.0]], dtype=F64), torch.zeros(2, 2, dtype=F64))


def test_a_tuple_with_tolerances_for_its_parts():
    compare(Pendulum(), TWO, T, method="adaptive_heun", rtol=(1e-2, 3e-2), atol=(3e-2, 1e-2))


def test_a_tolerance_for_each_element():
    each = torch.tensor([[1e-1, 1e-2], [1e-2, 1e-1], [1e-1, 1e-2]], dtype=F64)
    adjoint = dict(adjoint_rtol=1e-2, adjoint_atol=1e-2)
    compare(Timed(), start(), T, method="adaptive_heun", rtol=each, atol=1e-2, **adjoint)


def test_a_field_that_does_not_depend_on_the_state():
    class Drift(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.ones(3, 2, dtype=F64))

        def forward(self, t, y):
            return self.v * torch.cos(3 * t)

    compare(Drift(), start(), T, method="euler", options=dict(step_size=0.15))
