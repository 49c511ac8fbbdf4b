"""Measures times: by the wall clock or in CPU time, in turns, for comparisons; by CUDA events for single launches."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Spread(NamedTuple):
    """Median and quartiles of a sample, in the unit of the sample."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, sample: list[float]) -> Spread:
        """The spread of a sample; of a single number, three times that number."""
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


def cpu_seconds(run: Callable[[], object], device: torch.device) -> float:
    """CPU time of the process in one call, which other processes change least; on CUDA the wall-clock time."""
    if device.type == "cuda":
        return seconds(run, device)
    start = time.process_time()
    run()
    return time.process_time() - start


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(runs: Sequence[Callable[[], float]], *, rounds: int, budget: float) -> list[tuple[float, ...]]:
    """Seconds of every run in every round: one tuple for each round.

    In a round each callable runs once and returns its time, which may leave out its preparation. Round i starts with
    callable i, so that each takes each place. There are at least 3 and at most `rounds` rounds; after 3, no round
    starts later than `budget` seconds. The garbage collector is off: a collection would add to the time of one run.
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
    """Seconds per call on the GPU, by CUDA events: one number for each of `batches` batches of about `batch` seconds.

    The calls take turns and follow each other without a pause. For short calls the time is therefore that of the
    launches on the host.
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

    elapsed(1)  # warm-up
    rounds = max(1, math.ceil(batch / elapsed(1)))
    elapsed(rounds)
    return [elapsed(rounds) / (rounds * len(calls)) for _ in range(batches)]
