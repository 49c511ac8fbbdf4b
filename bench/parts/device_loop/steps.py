"""Measures the cost of a step in each loop: the slope of the time of a solve over its number of equal steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parts.common import libraries
from parts.common.fields import MLPField
from parts.common.libraries import FUSED
from parts.common.tables import gist
from parts.common.timing import Spread, interleaved, seconds
from parts.device_loop.captured import LOOPS, Loop, Run

STEPS = (32, 128, 512)  # powers of two, so that the step sizes and their number are exact
ROUNDS = 21  # at most, of each row
FIRST_CALLS = 3
TIMED = ("host", "batches", "while")
Record = dict[str, Any]


class Decay(nn.Module):
    """dz/dt = -z: one kernel."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -z


class Stepping(NamedTuple):
    """A problem with equal steps from t = 0 to 1. solver: number of steps -> arguments of the solver."""

    name: str
    field: Callable[[], nn.Module]
    shape: tuple[int, ...]
    solver: Callable[[int], dict[str, Any]]

    def run(self, loop: Loop, steps: int, device: torch.device) -> Run:
        """A new run, with its own captured graph."""
        torch.manual_seed(0)
        field, y0 = self.field().to(device), torch.randn(self.shape, device=device)
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)  # on the CPU, where reading them needs no synchronisation
        return Run(loop, field, y0, t, **self.solver(steps))


def on_a_grid(steps: int) -> dict[str, Any]:
    """Steps of one evaluation each."""
    return {"method": "euler", "options": {"step_size": 1 / steps}}


def all_accepted(steps: int) -> dict[str, Any]:
    """Steps with an error estimate, none of which is rejected."""
    options = {"first_step": 1 / steps, "max_step": 1 / steps}
    return {"method": "dopri5", "rtol": 1e3, "atol": 1e3, "options": options}


CHEAPEST = "euler, -z, one number"
STEPPINGS = (
    Stepping(CHEAPEST, Decay, (1, 1), on_a_grid),
    Stepping("dopri5, -z, one number", Decay, (1, 1), all_accepted),
    Stepping("dopri5, 128x64 hidden 64", lambda: MLPField(64, 64), (128, 64), all_accepted),
)


def measure_steps(
    stepping: Stepping, loops: Sequence[str], steps: Sequence[int], device: torch.device, rounds: int, budget: float
) -> Record:
    """One row: every loop with every number of steps, in turn. Each round gives one slope."""
    by: dict[str, Record] = {}
    running: list[tuple[str, Callable[[], float]]] = []
    for name in loops:
        try:
            runs = [checked(stepping, LOOPS[name], count, device) for count in steps]
            by[name] = {} if LOOPS[name].tier is None else {"first_milliseconds": first_calls(stepping, name, device)}
        except Exception as error:  # no such loop on this machine: the row says so
            by[name] = {"failed": gist(error)}
            continue
        running += [(name, lambda run=run: timed(run, device)) for run in runs]
    sample = interleaved([run for _, run in running], rounds=rounds, budget=budget)
    slopes: dict[str, list[float]] = {}
    for i in range(0, len(running), len(steps)):
        name, took = running[i][0], [each[i : i + len(steps)] for each in sample]
        slopes[name] = [1e6 * statistics.linear_regression(steps, times).slope for times in took]
        by[name] |= {
            "milliseconds": [Spread.of([1e3 * s for s in times]) for times in zip(*took, strict=True)],
            "microseconds_a_step": Spread.of(slopes[name]),
        }
    row: Record = {"case": stepping.name, "steps": list(steps), "rounds": len(sample), "by": by}
    if slopes.keys() >= {"while", "batches"}:
        pairs = zip(slopes["while"], slopes["batches"], strict=True)
        row["while_over_batches_microseconds"] = Spread.of([one - other for one, other in pairs])
    return row


def checked(stepping: Stepping, loop: Loop, steps: int, device: torch.device) -> Run:
    """A run that is warmed up. Raises RuntimeError if it takes another number of steps."""
    run = stepping.run(loop, steps, device)
    taken = run.checked().solution.stats.accepted
    if taken != steps:
        raise RuntimeError(f"{taken} steps were taken, not {steps}")
    timed(run, device)  # in batches, the second solve sets their length
    return run


def first_calls(stepping: Stepping, name: str, device: torch.device) -> Spread:
    """Milliseconds of a first solve, which captures a step, with the smallest number of steps."""
    fresh = [stepping.run(LOOPS[name], STEPS[0], device) for _ in range(FIRST_CALLS)]
    return Spread.of([1e3 * timed(run, device) for run in fresh])


def timed(run: Run, device: torch.device) -> float:
    """Seconds of one run."""
    with libraries.path(FUSED):
        return seconds(run, device)
