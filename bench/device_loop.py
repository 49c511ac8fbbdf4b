"""Times captured solves (cuda_graph=True): one step, with its field, is captured once and repeated on the GPU.

The sections are:

steps: the cost of a step in each loop, as the slope of the time over the number of steps, and the time of a first call.
training: a training step with Adam: torchdiffeq's adjoint, node_cuda's adjoint in every loop, and the discrete adjoint.
solves: whole solves at rtol 1e-6: torchdiffeq, node_cuda's loop on the host, and its loops on the GPU: one launch
("while"), batches of launches ("batches"), and one launch without reading the status ("while, deferred"). With
--diffrax also diffrax, compiled by jax.jit.
calls: the CUDA calls of a run between its start and its return, by torch.profiler: launches, copies, waits.
memory: what torch's allocator holds for a captured solve of few and of many steps, and after its owner is deleted.

Results are checked before they are timed, and a ratio compares times of one round. Each cell of calls and memory is a
process. A row that fails says why. With --only, the name of the result has the names of the sections.

    python bench/device_loop.py [--quick] [--only SECTION...] [--diffrax] [--budget SECONDS] [--jobs N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from parts import program
from parts.common.libraries import DIFFRAX, RIVAL, installed
from parts.common.tables import gist, show, write_result
from parts.common.timing import Spread, interleaved
from parts.device_loop.cells import CALLS, MEMORY
from parts.device_loop.contestants import (
    HOST,
    HOST_ADJOINT,
    QUICK_SOLVE_CASES,
    QUICK_TRAINING_CASES,
    SOLVE_CASES,
    SOLVES,
    THEIR_ADJOINT,
    TRAINING_CASES,
    TRAININGS,
    Contestants,
    Promises,
)
from parts.device_loop.report import calls_rows, device_loop_sentences, memory_rows, solve_rows, steps_rows
from parts.device_loop.steps import ROUNDS as STEP_ROUNDS
from parts.device_loop.steps import STEPPINGS, STEPS, measure_steps
from parts.device_loop.steps import TIMED as LOOPS_TIMED
from parts.solve.cases import Case
from parts.solve.solving import ROUNDS, Contestant, checked, exact, make_problem

SECTIONS = ("steps", "training", "solves", "calls", "memory")  # the most important first
Record = dict[str, Any]


def main() -> None:
    arguments = parse()
    device = cuda_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    result: Record = {
        **program.new_result("-".join(["device_loop", *arguments.only]), device),
        "settings": {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6, "loss": "sum of y(t_end)^2 / batch"},
        "complete": False,
        **{section: [] for section in SECTIONS},
    }
    sections = arguments.only or SECTIONS

    def add(section: str, name: str, row: Callable[[], Record]) -> None:
        print(name, file=sys.stderr, flush=True)
        result[section].append(row())
        write_result(result, arguments.out)  # after each row: the program may be stopped before the last one

    measuring = {"device": device, "rounds": 3 if quick else ROUNDS, "budget": arguments.budget}
    if "steps" in sections:
        counts, few = STEPS[:2] if quick else STEPS, measuring | {"rounds": min(measuring["rounds"], STEP_ROUNDS)}
        for stepping in STEPPINGS[:1] if quick else STEPPINGS:
            add("steps", stepping.name, functools.partial(measure_steps, stepping, LOOPS_TIMED, counts, **few))
    if "training" in sections:
        against = (THEIR_ADJOINT, HOST_ADJOINT)
        for it, promises in QUICK_TRAINING_CASES if quick else TRAINING_CASES:
            add("training", it.name, functools.partial(measure, it, TRAININGS, promises, against, **measuring))
    if "solves" in sections:
        solvers = {name: each for name, each in SOLVES.items() if name != DIFFRAX or arguments.diffrax}
        against = (RIVAL, *([DIFFRAX] if arguments.diffrax else []), HOST)
        for it, promises in QUICK_SOLVE_CASES if quick else SOLVE_CASES:
            add("solves", it.name, functools.partial(measure, it, solvers, promises, against, **measuring))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        cells = [cell for cell in (*CALLS, *MEMORY) if cell.what in sections]
        begun = [(cell, pool.submit(cell.measured, arguments)) for cell in cells]
        for cell, row in begun:
            add(cell.what, cell.name, row.result)
    result["complete"] = True
    path = write_result(result, arguments.out)
    tables = [solve_rows(result, section) for section in ("solves", "training")]
    for rows in (*tables, steps_rows(result), calls_rows(result), memory_rows(result)):
        if len(rows) > 1:
            show(rows)
    print(device_loop_sentences(result))
    print(program.written(path, arguments.out))
    if ours := failures(result):
        raise SystemExit(f"Failed, or wrong: {'; '.join(ours)}.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="a CUDA device (default: cuda)")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of torch (default: 1)")
    program.add_out(parser)
    parser.add_argument("--quick", action="store_true", help="tiny cases; only to see that the program runs")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", choices=SECTIONS, help=", ".join(SECTIONS))
    parser.add_argument("--diffrax", action="store_true", help="measure diffrax too; it is compiled for every case")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of timing per row; at least three rounds")
    parser.add_argument("--jobs", type=int, default=1, help="cells of calls and memory at once (default: 1)")
    return parser.parse_args()


def cuda_device(name: str) -> torch.device:
    """The CUDA device. Prints what is missing and raises SystemExit if the kernels cannot run on it."""
    device = torch.device(name)
    if device.type != "cuda":
        lacking = "this is no CUDA device"
    elif not torch.cuda.is_available():
        lacking = "torch finds none here"
    elif not kernels_for(device):
        lacking = "there are no compiled kernels for it here; `python -m node_cuda` says why"
    else:
        return device
    print(
        "device_loop.py times captured solves, which repeat their steps on a GPU. It needs an NVIDIA GPU, a CUDA build "
        f"of torch and the kernels of node_cuda (--device {name}: {lacking}). "
        "Without a GPU, tests/project/test_bench.py checks its parts.",
        file=sys.stderr,
    )
    raise SystemExit(2)


def kernels_for(device: torch.device) -> bool:
    """Whether node_cuda has compiled kernels for the device."""
    from node_cuda.extension.loading import kernels

    return kernels(device) is not None


def measure(
    case: Case,
    contestants: Contestants,
    promises: Promises,
    against: Sequence[str],
    *,
    device: torch.device,
    rounds: int,
    budget: float,
) -> Record:
    """One row: checks all contestants, then times those with correct results in turn.

    against: the times of these contestants are divided by the times of the others.
    """
    problem = make_problem(case, device)
    expected = exact(problem)
    by: dict[str, Record] = {}
    running: dict[str, Contestant] = {}
    for name, contestant in contestants.items():
        if not installed(name.partition(" ")[0]):
            by[name] = {"failed": "not installed"}
            continue
        try:
            running[name] = contestant(problem)
            by[name] = checked(name, running[name], case, expected)
            by[name]["loops"] = getattr(running[name], "loops", "")  # contestants of node_cuda have them
            running[name].timed()  # a warm-up: makes Adam's state; in batches, the second solve sets their length
        except Exception as error:  # out of memory, no GPU for JAX, no such loop here: the row says so
            by[name] = {"failed": gist(error)}
        if "failed" in by[name]:
            running.pop(name, None)
    sample = interleaved([contestant.timed for contestant in running.values()], rounds=rounds, budget=budget)
    times = dict(zip(running, zip(*sample, strict=True), strict=True))
    for name, took in times.items():
        by[name]["milliseconds"] = Spread.of([1e3 * seconds for seconds in took])
        by[name]["ratios"] = {
            other: Spread.of([theirs / its for its, theirs in zip(took, times[other], strict=True)])
            for other in against
            if other in times and other != name
        }
    for name, others in promises.items():
        ratios = by[name].get("ratios", {})
        by[name]["promises"] = {
            other: {"target": target, "met": ratios[other].median >= target if other in ratios else None}
            for other, target in others.items()
            if other in contestants
        }
    return {"case": case.name, "rounds": len(sample), "against": list(against), "by": by}


def failures(result: Record) -> list[str]:
    """The rows of node_cuda without numbers, and those with more waits of the host than promised."""
    failed = [
        f"{name} in `{row['case']}`"
        for section in ("solves", "training", "steps")
        for row in result[section]
        for name, record in row["by"].items()
        if "failed" in record and name.partition(" ")[0] not in (RIVAL, DIFFRAX)
    ]
    for section in ("calls", "memory"):
        of_cells = [row for row in result[section] if "failed" in row or row.get("met") is False]
        failed += [f"{section} of {row['loop']}, {row['gradient']}" for row in of_cells]
    return failed


if __name__ == "__main__":
    main()
