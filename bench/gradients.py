"""Measures time, error and memory of gradients, by every mode of node_cuda and by torchdiffeq.

1. Time of a solve and its gradient at the default tolerances, for 2 and for 100 outputs. The gradients are checked
   first, then all modes take turns. The ratio is the time of torchdiffeq's adjoint over that of the mode, in one round.
2. Error and peak memory at rtol 1e-5, for four problems. The error is against the exact gradient, and against the
   gradient of the same steps in float64. Memory is measured in a fresh process for each cell
   (parts/common/peak_memory.py says why).

Rows in which node_cuda loses are kept; a row that failed says why. The problems are in parts/gradients/problems.py, the
modes in parts/common/modes.py.

    python bench/gradients.py [--quick] [--device cuda] [--threads N] [--jobs N] [--budget SECONDS] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from parts import program
from parts.common import libraries
from parts.common.fresh_process import measured
from parts.common.libraries import RIVAL
from parts.common.modes import ADJOINT, BACKPROP, CHECKPOINTED, DISCRETE, MODES, installed
from parts.common.tables import gist, show, write_result
from parts.common.timing import Spread, interleaved, seconds
from parts.gradients.problems import PROBLEMS_PLOTTED, PROBLEMS_TIMED, QUICK_PROBLEM, GradientProblem
from parts.gradients.report import gradient_error_rows, gradient_time_rows, gradients_sentence
from parts.gradients.steps import Gradients, Step, difference, exact, of_same_steps
from parts.solve.solving import ERROR_PER_EPS, ERROR_PER_RTOL

THEIRS = f"{RIVAL} {ADJOINT}"  # all other modes are compared with this one
TIMED = (THEIRS, ADJOINT, DISCRETE, CHECKPOINTED, BACKPROP)
QUICK_MODES = (THEIRS, DISCRETE)
ROUNDS = 41  # at most, of each row
Record = dict[str, Any]


def main() -> None:
    arguments = parse()
    device = program.begin(arguments)
    to_time, to_plot = ((QUICK_PROBLEM,),) * 2 if arguments.quick else (PROBLEMS_TIMED, PROBLEMS_PLOTTED)
    timed, plotted = (QUICK_MODES,) * 2 if arguments.quick else (TIMED, tuple(MODES))
    result: Record = {
        **program.new_result("gradients", device),
        "settings": {"method": "dopri5", "dtype": "float32"},
        "complete": False,
        "times": [],
        "problems": [],
    }
    for problem in to_time:
        print(problem.name, file=sys.stderr, flush=True)
        result["times"].append(measure_times(problem, installed(timed), device, arguments))
        write_result(result, arguments.out)  # after each row: the program may be stopped before the last one
    for problem in to_plot:
        print(problem.name, file=sys.stderr, flush=True)
        result["problems"].append(measure_errors(problem, installed(plotted), device, arguments))
        write_result(result, arguments.out)
    result["complete"] = True
    path = write_result(result, arguments.out)
    if libraries.installed("matplotlib"):
        from parts.gradients.plot import draw_gradients

        draw_gradients(result, path.with_suffix(".png"))
    show(gradient_time_rows(result))
    show(gradient_error_rows(result))
    print(gradients_sentence(result))
    print(program.written(path, arguments.out))


def parse() -> argparse.Namespace:
    parser = program.parser(__doc__, quick="one tiny problem", out="folder of the JSON and the plot")
    parser.add_argument("--jobs", type=int, default=1, help="memory cells at once (default: 1)")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of timing per row; at least three rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.budget, arguments.jobs = 0.0, 2
    return arguments


def measure_times(
    problem: GradientProblem, modes: Sequence[str], device: torch.device, arguments: argparse.Namespace
) -> Record:
    """One row: checks all modes, then times those with correct gradients in turn."""
    expected = exact(problem, device)
    allowed = ERROR_PER_RTOL * problem.rtol + ERROR_PER_EPS * torch.finfo(torch.float32).eps
    by: dict[str, Record] = {}
    running: dict[str, Step] = {}
    for mode in modes:
        by[mode], found = attempt(problem, mode, device)
        if found is None:
            continue
        by[mode]["error"] = difference(found, expected)
        if by[mode]["error"] <= allowed:
            running[mode] = Step(problem, mode, device)
        else:
            by[mode]["failed"] = f"the gradient is off by {by[mode]['error']:.0e}: not timed"
    runs = [lambda step=step: seconds(step, device) for step in running.values()]
    sample = interleaved(runs, rounds=ROUNDS, budget=arguments.budget)
    times = dict(zip(running, zip(*sample, strict=True), strict=True))
    for mode, took in times.items():
        by[mode]["milliseconds"] = Spread.of([1e3 * each for each in took])
        if mode != THEIRS and THEIRS in times:
            by[mode]["ratio"] = Spread.of([theirs / its for its, theirs in zip(took, times[THEIRS], strict=True)])
    ratio = by[DISCRETE].get("ratio")
    by[DISCRETE] |= {"target": problem.target, "met": None if ratio is None else ratio.median >= problem.target}
    return {"case": problem.name, "rounds": len(sample), **about(problem), "by": by}


def measure_errors(
    problem: GradientProblem, modes: Sequence[str], device: torch.device, arguments: argparse.Namespace
) -> Record:
    """One panel: the errors, from this process, and the memory, from fresh processes."""
    references = {"error": exact(problem, device), "error_same_steps": of_same_steps(problem, device)}
    by: dict[str, Record] = {}
    for mode in modes:
        by[mode], found = attempt(problem, mode, device)
        if found is not None:
            by[mode] |= {name: difference(found, expected) for name, expected in references.items()}
            if not all(math.isfinite(by[mode][name]) for name in references):
                by[mode] = {"failed": "the gradient is not finite"}
    running = [mode for mode in modes if "failed" not in by[mode]]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mode, cell in zip(running, pool.map(lambda mode: memory(problem, mode, arguments), running), strict=True):
            by[mode] |= cell
    return {"problem": problem.name, **about(problem), "by": by}


def attempt(problem: GradientProblem, mode: str, device: torch.device) -> tuple[Record, Gradients | None]:
    """The cost and the gradients; if the solve fails, the reason and None."""
    try:
        found = Step(problem, mode, device)()
    except Exception as error:  # a step size that underflows, out of memory: the row says so
        return {"failed": gist(error).partition(". ")[0]}, None  # without the advice in the message
    return {"nfe": found.nfe, "nfe_backward": found.nfe_backward}, found


def memory(problem: GradientProblem, mode: str, arguments: argparse.Namespace) -> Record:
    """The peak memory from a fresh process, or `failed` with the reason."""
    options = {"problem": problem.name, "mode": mode, "threads": arguments.threads, "device": arguments.device}
    return measured("gradients/cell.py", **options)


def about(problem: GradientProblem) -> Record:
    """The tolerances and the loss of a problem, for the JSON."""
    return {"rtol": problem.rtol, "atol": problem.atol, "loss": problem.loss.__name__}


if __name__ == "__main__":
    main()
