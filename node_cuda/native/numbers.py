"""The numbers that a native loop gets at each call, in one vector of doubles: the point, the settings, the times.

No number is a constant of the compiled code, so that other tolerances, step sizes and times need no other code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from node_cuda.kernels.reference import ControllerParams

Number = Any
"""A number on the host, a 0-d tensor while a loop is traced."""


class Settings(NamedTuple):
    """The settings of a solve. Each is a float on the host, and a 0-d double while a loop is traced.

    direction: t = direction * s. rtol, atol: 0 where a tensor is given instead. e0 to max_step: the law of the
    controller (`kernels.reference.ControllerParams`). limit: the Euler step that probes the first step size does not go
    past it. low, high: func is evaluated between these user's times only. cap: the attempts of one call. rtol_sums,
    atol_sums: those of the gradients of the parameters.
    """

    direction: Number
    rtol: Number
    atol: Number
    e0: Number = 0.0
    e1: Number = 0.0
    e2: Number = 0.0
    safety: Number = 0.9
    ifactor: Number = 10.0
    dfactor: Number = 0.2
    keep: Number = 0.0
    min_step: Number = 0.0
    max_step: Number = math.inf
    max_num_steps: Number = math.inf
    limit: Number = math.inf
    low: Number = -math.inf
    high: Number = math.inf
    cap: Number = 1e9
    rtol_sums: Number = 0.0
    atol_sums: Number = 0.0


class Point(NamedTuple):
    """Where a loop stands. On the host floats; while a loop is traced 0-d doubles and, for the counts, 0-d integers.

    t: the solver time. proposal: the size of the step to try. r0, r1: the error ratios of the last two accepted steps.
    t_k1: the solver time at which k1 is evaluated. fresh: 2: k1 and the first step size are to be found, 1: k1 alone,
    0: neither. finite: the last error ratio was finite. attempts: since the last output. output: the first output that
    is not reached. place: of a fixed grid, the index of the point at t. calls: attempts of this call. rows: rows of the
    output record that are filled; steps: those of the record of steps.
    """

    t: Number
    proposal: Number = 0.0
    r0: Number = 1.0
    r1: Number = 1.0
    t_k1: Number = 0.0
    fresh: Number = 0
    finite: Number = 1
    attempts: Number = 0
    accepted: Number = 0
    rejected: Number = 0
    status: Number = 0
    output: Number = 1
    place: Number = 0
    nfe: Number = 0
    calls: Number = 0
    rows: Number = 0
    steps: Number = 0


REALS = Point._fields.index("fresh")
"""The first fields of a point are real numbers, the others counts."""


def point_in(vector: Tensor) -> Point:
    """Return a point from its vector, while a loop is traced."""
    values = vector.unbind()
    return Point(*values[:REALS], *(x.long() for x in values[REALS:]))


def settings_in(vector: Tensor) -> Settings:
    """Return the settings from their vector, while a loop is traced."""
    return Settings(*vector.unbind())


def packed(values: Sequence[Tensor]) -> Tensor:
    """Return 0-d tensors as one vector of doubles, while a loop is traced.

    A loop returns the copy: its parts are then allocated before the loop (see `native.allocation`).
    """
    return torch.stack([x.double() for x in values]).clone()


def point_of(values: Sequence[float]) -> Point:
    """Return a point as numbers of the host."""
    return Point(*values[:REALS], *map(int, values[REALS:]))


class Form(NamedTuple):
    """How many numbers of each kind follow the point and the settings in the vector of a call.

    times: the outputs, in solver time. tstops: times that a step must end at. jumps: those where func is discontinuous.
    grid: the points of a fixed grid.
    """

    times: int
    tstops: int = 0
    jumps: int = 0
    grid: int = 0

    @property
    def length(self) -> int:
        """The length of the whole vector."""
        return SECOND + sum(self)


class Given(NamedTuple):
    """The settings and the times of a call, while a loop is traced. What a solve does not have is None."""

    c: Settings
    times: Tensor
    tstops: Tensor | None
    jumps: Tensor | None
    grid: Tensor | None


FIRST = len(Point._fields)
SECOND = FIRST + len(Settings._fields)
CAP = FIRST + Settings._fields.index("cap")
"""The places in the vector: the settings, the times, and the cap on the attempts."""


def given_in(form: Form, vector: Tensor) -> Given:
    """Return the settings and the times from the vector of a call."""
    found, start = [], SECOND
    for count in form:
        found.append(vector[start : start + count] if count else None)
        start += count
    return Given(settings_in(vector[FIRST:SECOND]), *found)


def settings_of_law(law: ControllerParams) -> dict[str, float]:
    """Return the part of the settings that a step-size controller gives."""
    e0, e1, e2 = law.exponents
    return {
        "e0": e0,
        "e1": e1,
        "e2": e2,
        "safety": law.safety,
        "ifactor": law.ifactor,
        "dfactor": law.dfactor,
        "keep": float(law.keep),
        "min_step": law.min_step,
        "max_step": law.max_step,
    }
