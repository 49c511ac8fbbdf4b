"""Solves and differentiates a tiny problem a hundred thousand times, and says whether memory grew.

Every way to a gradient in a loop of its own: resident memory, what torch has allocated on CUDA, and the number of live
tensors, at intervals. The garbage collector is off meanwhile: what only it would free counts as growth. The first
quarter of a loop warms up: caches and malloc's heap find their sizes. Of the rest, memory grew if the straight line
through the resident sizes rises by more than a MiB from end to end, or if there are more tensors, or more bytes of them
on CUDA, at its end than at its beginning. Ends with an error where it did.

    python bench/endurance.py [--quick] [--device cuda] [--solves N] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from parts import program
from parts.common.peak_memory import resident
from parts.common.tables import Result, show, write_result
from parts.endurance.loops import loops
from parts.endurance.report import endurance_rows, endurance_sentence

SOLVES, QUICK_SOLVES = 20_000, 40  # of each loop
SAMPLES, LEAST_INTERVAL = 20, 5  # of a loop, besides the one before it; a sample takes as long as several solves
WARM_UP = 0.25
ALLOWED = 2**20  # bytes: what a heap may move by without a reason that could be named


class Sample(NamedTuple):
    """What there is after so many solves. resident, allocated: bytes; allocated: of torch on CUDA, None on a CPU."""

    solves: int
    resident: int
    tensors: int
    allocated: int | None


def main() -> None:
    arguments = parse()
    device = program.begin(arguments)
    rows: list[Result] = []
    result: Result = {
        **program.new_result("endurance", device),
        "settings": {"solves": arguments.solves, "warm_up": WARM_UP, "allowed_bytes": ALLOWED, "collector": False},
        "complete": False,
        "rows": rows,
    }
    columns = TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        for name, solve in loops(device).items():
            task = progress.add_task(name, total=arguments.solves)
            begin = time.perf_counter()
            samples = repeated(solve, arguments.solves, device, lambda done, task=task: progress.advance(task, done))
            rows.append({"gradient": name, "seconds": time.perf_counter() - begin, **judged(samples)})
            write_result(result, arguments.out)  # each time: a limit may end the program before the last row
    result["complete"] = True
    path = write_result(result, arguments.out)
    show(endurance_rows(result))
    console = Console()
    console.print(endurance_sentence(result), soft_wrap=True)
    console.print(program.written(path, arguments.out), soft_wrap=True)
    if grew := [row["gradient"] for row in rows if row["grew"]]:
        raise SystemExit(f"Memory grew: {'; '.join(grew)}.")


def parse() -> argparse.Namespace:
    parser = program.parser(__doc__, quick=f"{QUICK_SOLVES} solves each")
    parser.add_argument("--solves", type=int, default=SOLVES, help=f"of each loop (default: {SOLVES})")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.solves = QUICK_SOLVES
    return arguments


def repeated(
    solve: Callable[[], None], solves: int, device: torch.device, advance: Callable[[int], None]
) -> list[Sample]:
    """Calls solve so often; samples before the first call and at even intervals. advance: told of each interval."""
    count = max(2, min(SAMPLES, solves // LEAST_INTERVAL))
    samples = [sample(0, device)]
    gc.collect()
    gc.disable()
    try:
        for number in range(1, count + 1):
            done, until = samples[-1].solves, number * solves // count
            for _ in range(done, until):
                solve()
            samples.append(sample(until, device))
            advance(until - done)
    finally:
        gc.enable()
    return samples


def sample(solves: int, device: torch.device) -> Sample:
    # issubclass: isinstance would ask lazy objects of torch for their class, and warn.
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    return Sample(solves, resident(), tensors, allocated)


def judged(samples: list[Sample]) -> Result:
    """The samples, and what they say; bytes_a_solve: the slope of the straight line through the resident sizes."""
    watched = [each for each in samples if each.solves >= WARM_UP * samples[-1].solves]
    first, last = watched[0], watched[-1]
    line = statistics.linear_regression([each.solves for each in watched], [each.resident for each in watched])
    grew = {
        "resident": line.slope * (last.solves - first.solves) > ALLOWED,
        "tensors": last.tensors > first.tensors,
        "allocated": (last.allocated or 0) > (first.allocated or 0),
    }
    return {
        "bytes_a_solve": line.slope,
        "allowed_bytes_a_solve": ALLOWED / (last.solves - first.solves),
        "grew": [quantity for quantity, it_did in grew.items() if it_did],
        "samples": [each._asdict() for each in samples],
        "watched_from": samples.index(first),
    }


if __name__ == "__main__":
    main()
