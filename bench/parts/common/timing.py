"""Times: by the wall clock, synchronised and interleaved for comparisons, or by CUDA events for single launches."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
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


def interleaved(runs: Sequence[Callable[[], float]], *, rounds: int, budget: float) -> list[tuple[float, ...]]:
    """Seconds of every run, round after round, so that all see the same state of the machine.

    Each callable runs once and returns its own time (so that it can leave its preparation out). Every round begins
    with the next of them. At least 3 rounds and at most `rounds`; between the two, no new round after `budget`
    seconds. The garbage collector waits meanwhile: a collection would land on whoever happens to be running.
    """
    least = min(3, rounds)
    sample: list[tuple[float, ...]] = []
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while len(sample) < rounds and (len(sample) < least or time.perf_counter() - start < budget):
            took = [0.0] * len(runs)
            for i in range(len(runs)):
                turn = (len(sample) + i) % len(runs)
                took[turn] = runs[turn]()
            sample.append(tuple(took))
    finally:
        gc.enable()
    return sample


def device_seconds(calls: Sequence[Callable[[], object]], *, batches: int = 15, batch: float = 2e-3) -> list[float]:
    """Seconds a call on the GPU, by CUDA events around `batches` batches of about `batch` seconds: one number a batch.

    The calls take turns and follow each other without a pause, so that a batch of short ones shows what the host
    needs to launch them.
    """

    def elapsed(rounds: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(rounds):
            for call in calls:
                call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    elapsed(1)  # whatever happens once
    rounds = max(1, math.ceil(batch / elapsed(1)))
    elapsed(rounds)
    return [elapsed(rounds) / (rounds * len(calls)) for _ in range(batches)]
