"""Solves and differentiates a tiny problem a hundred thousand times, and says whether memory grew.

Every gradient mode has a loop. At intervals it samples the resident memory, the number of live tensors, and on CUDA
what torch has allocated. The garbage collector is off, so memory that only the collector would free counts as growth.
The first quarter of a loop is a warm-up, in which caches and malloc's heap reach their sizes. In the rest, memory grew
if the straight line through the resident sizes rises by more than a MiB, or if at the end there are more tensors, or on
CUDA more bytes, than at the start. The program then ends with an error.

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
SAMPLES, LEAST_INTERVAL = 20, 5  # per loop, without the first one; a sample takes as long as several solves
WARM_UP = 0.25
ALLOWED = 2**20  # bytes of growth of the heap that do not count


class Sample(NamedTuple):
    """The memory after this number of solves. resident, allocated: bytes; allocated: by torch on CUDA, else None."""

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
            write_result(result, arguments.out)  # after each row: the program may be stopped before the last one
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
    parser.add_argument("--solves", type=int, default=SOLVES, help=f"solves per loop (default: {SOLVES})")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.solves = QUICK_SOLVES
    return arguments


def repeated(
    solve: Callable[[], None], solves: int, device: torch.device, advance: Callable[[int], None]
) -> list[Sample]:
    """Calls solve `solves` times; takes samples before and at even intervals. advance: called after each interval."""
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
    """The memory now, after this number of solves."""
    # issubclass: isinstance would make lazy objects of torch load their class, with a warning.
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    return Sample(solves, resident(), tensors, allocated)


def judged(samples: list[Sample]) -> Result:
    """The samples and where memory grew; bytes_a_solve: the slope of the straight line through the resident sizes."""
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
