"""Measures one row of compiled.py: compiles, checks the results of all, then times them in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from parts.common.libraries import OURS, function
from parts.common.tables import gist
from parts.common.timing import Spread, cpu_seconds, interleaved
from parts.compiled.beside import Before
from parts.compiled.cases import FORWARD, Case
from parts.compiled.peers import COMPILED, MAKERS, Contestant, Run, loss_of

ROUNDS = 101  # at most, of each row
BUDGET = 6.0  # seconds of timing for each row; there are always at least three rounds
BEFORE = f"{OURS} before"
CPU = torch.device("cpu")


def measure(case: Case, timed: str, names: Sequence[str], rounds: int, before: Before | None) -> dict[str, Any]:
    """One row. names: the contestants that are installed. before: an older checkout, or None."""
    exact, record = reference(case, timed), {}
    runs: dict[str, Callable[[], float]] = {}
    for name in names:
        try:
            record[name], runs[name] = prepared(MAKERS[name](case, timed), exact)
        except Exception as error:  # a peer may fail in any way; its cell says how
            record[name] = {"failed": gist(error)}
    if before is not None:
        runs[BEFORE] = before.contestant(case.name, timed)
        record[BEFORE] = {}
    sample = interleaved(list(runs.values()), rounds=rounds, budget=BUDGET)
    for place, name in enumerate(runs):
        record[name]["milliseconds"] = Spread.of([1e3 * took[place] for took in sample])
        if COMPILED in runs:
            ours = list(runs).index(COMPILED)
            record[name]["ratio"] = Spread.of([took[place] / took[ours] for took in sample])
    return {"case": case.name, "timed": timed, "rounds": len(sample), "goal": dict(case.goals).get(timed), "by": record}


def prepared(contestant: Contestant, exact: Run) -> tuple[dict[str, Any], Callable[[], float]]:
    """What is known of a contestant before the timing, and the function that times it.

    compile_seconds: by how much its first run takes longer than its second, by the clock.
    """
    first, _ = clocked(contestant)
    second, found = clocked(contestant)
    record = {**found.work, "error": largest_error(found, exact), "compile_seconds": max(first - second, 0.0)}
    return record, lambda: cpu_seconds(contestant, CPU)


def clocked(contestant: Contestant) -> tuple[float, Run]:
    """The seconds of one run by the clock, and its results."""
    start = time.perf_counter()
    found = contestant()
    return time.perf_counter() - start, found


def reference(case: Case, timed: str) -> Run:
    """The results in float64 by dopri8 with rtol 1e-12, from the same parameters and state."""
    field, y0 = case.field().double(), case.start().double().requires_grad_(timed != FORWARD)
    with torch.set_grad_enabled(timed != FORWARD):
        ys = function(OURS, "odeint")(field, y0, case.t().double(), method="dopri8", rtol=1e-12, atol=1e-14)
    if timed == FORWARD:
        return Run(ys, (), {})
    return Run(ys.detach(), torch.autograd.grad(loss_of(ys), [y0, *field.parameters()]), {})


def largest_error(found: Run, exact: Run) -> float:
    """The largest error of the outputs, or of a gradient, relative to the largest element of each."""
    errors = []
    for mine, theirs in zip((found.ys, *found.gradients), (exact.ys, *exact.gradients), strict=True):
        a, b = np.asarray(mine, dtype=np.float64), theirs.numpy()
        if scale := float(np.abs(b).max()):
            errors.append(float(np.abs(a - b).max()) / scale)
    return max(errors)
