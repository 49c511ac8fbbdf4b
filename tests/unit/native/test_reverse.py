"""The reverse loop over recorded steps gives the gradients of the host's discrete adjoint, for each kind of step.

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

from node_cuda.gradients.discrete import native

pytestmark = pytest.mark.usefixtures("interpreted")
T = linspace(0.0, 1.0, 4)
LOOSE = dict(rtol=1e-3, atol=1e-3)
HEUN = dict(method="adaptive_heun", rtol=3e-2, atol=3e-2)
EULER = dict(method="euler", options=dict(step_size=0.15))
FIXED = dict(first_step=0.3, min_step=0.3, max_step=0.3)  # the steps do not move with y0 or with a parameter


def compare(func: Any, y0: Any, t: torch.Tensor, **solver: Any) -> Any:
    return compare_gradients(func, y0, t, gradient="discrete", **solver)


@pytest.mark.parametrize(
    ("method", "dense"),
    first_of(
        2,
        [
            ("bosh3", "torchdiffeq"),
            ("adaptive_heun", "torchdiffeq"),
            ("dopri5", "torchdiffeq"),
            ("dopri5", "accurate"),
        ],
    ),
)
def test_an_adaptive_method_in_both_directions_with_rejected_steps_and_against_differences(method, dense):
    """One graph. dopri5 and bosh3 are FSAL; adaptive_heun is not, so that its k1 is recorded too."""
    field = Timed()
    solver, options = dict(LOOSE, method=method), dict(dense=dense)
    for t in (T.flip(0), T)[: 1 if dense == "accurate" else 2]:
        found = compare(field, start(), t, options=dict(options, first_step=1.0), **solver)
        assert found.stats.rejected > 0
    agrees_with_differences(
        field, start(), T, gradient="discrete", limit=1e-7, options=dict(options, **FIXED), **solver
    )


@pytest.mark.parametrize(
    ("method", "options"),
    first_of(
        2,
        [
            ("rk4", dict(step_size=0.3, interp="cubic")),
            ("euler", dict(step_size=0.3, interp="linear")),
            ("euler", dict(step_size=0.3, interp="cubic")),
            ("midpoint", dict(interp="cubic")),  # the grid is t
            ("heun2", dict(perturb=True, interp="cubic")),
        ],
    ),
)
def test_a_method_on_a_grid_in_both_directions_and_against_differences(method, options):
    field = Timed()
    for t in (T, T.flip(0)):
        compare(field, start(), t, method=method, options=options)
    agrees_with_differences(field, start(), T, gradient="discrete", limit=1e-7, method=method, options=options)


@pytest.mark.parametrize("method", first_of(1, ["bosh3", "adaptive_heun"]))
def test_a_jump_inside_of_a_step_of_the_tape(method):
    """The first stage after a jump is not the last one before it, which an output at 0.65 has used."""

    class Jump(Timed):
        def forward(self, t, y):
            return super().forward(t, y) * torch.where(t < 0.7, 1.0, -2.0)

    field, t = Jump(), torch.tensor([0.0, 0.5, 0.65, 1.0], dtype=F64)
    for jumps in ([0.7], [0.0])[: 1 + (method == "adaptive_heun")]:
        options = dict(jump_t=torch.tensor(jumps, dtype=F64), step_t=torch.tensor([0.2], dtype=F64))
        compare(field, start(), t, method=method, options=options, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("count", first_of(1, [30, 2]))
def test_few_and_many_outputs(count):
    compare(Timed(), start(), linspace(0.0, 1.0, count), **HEUN)


@pytest.mark.parametrize("method", first_of(2, ["bosh3", "euler", "adaptive_heun"]))
def test_a_record_over_many_calls(monkeypatch, method):
    """One, or two steps in a call: kappa, and the seed of the last stage, pass from call to call."""
    monkeypatch.setattr(native, "MOST_STEPS", 2)
    solver = dict(options=dict(step_size=0.15)) if method == "euler" else dict(rtol=1e-2, atol=1e-2)
    found = compare(Timed(), start(), T, method=method, **solver)
    assert found.stats.host_reads > 4


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
    compare(Timed(), start(), T, method="adaptive_heun", rtol=each, atol=1e-2)


def test_a_state_without_dimensions():
    class Decay(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.7, dtype=F64))

        def forward(self, t, y):
            return -self.rate * y * torch.cos(t)

    compare(Decay(), torch.tensor(1.5, dtype=F64), T, **EULER)


def test_a_field_that_does_not_depend_on_the_state():
    class Drift(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.ones(3, 2, dtype=F64))

        def forward(self, t, y):
            return self.v * torch.cos(3 * t)

    compare(Drift(), start(), T, **EULER)
