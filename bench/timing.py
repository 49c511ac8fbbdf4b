"""Wall-clock times: synchronised on CUDA, interleaved for comparisons, summed up as median and quartiles."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Spread(NamedTuple):
    """Median and quartiles of a sample, in the sample's own unit."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, sample: list[float]) -> Spread:
        if len(sample) == 1:
            return cls(sample[0], sample[0], sample[0])
        q1, median, q3 = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(median, q1, q3)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, with the device idle before and after it."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    ours: Callable[[], float], theirs: Callable[[], float], *, pairs: int, budget: float
) -> list[tuple[float, float]]:
    """Seconds of (ours, theirs), pair after pair, so that both see the same state of the machine.

    Each callable runs once and returns its own time (so that it can leave its preparation out). The order within
    a pair alternates. At least 3 pairs and at most `pairs`; between the two, no new pair after `budget` seconds.
    The garbage collector waits meanwhile: a collection would land on whoever happens to be running.
    """
    least = min(3, pairs)
    sample: list[tuple[float, float]] = []
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while len(sample) < pairs and (len(sample) < least or time.perf_counter() - start < budget):
            if len(sample) % 2:
                second = theirs()
                sample.append((ours(), second))
            else:
                first = ours()
                sample.append((first, theirs()))
    finally:
        gc.enable()
    return sample
