"""What a gradient costs and how far off it is, by every mode of node_cuda and by torchdiffeq.

1. Time of a solve and its gradient at the default tolerances, all modes in turn after a check of their values, with
   the ratio of torchdiffeq's adjoint's time in the same round, for 2 and for 100 outputs.
2. Error against peak memory at rtol 1e-5, for three problems: against the exact gradient, and against that of the same
   steps in float64. Memory in a process of its own for every cell (memory.py says why).

Rows that lose stay in; one that fails says why. The problems and the modes are in gradient_problems.py.

    python bench/gradients.py [--quick] [--device cuda] [--threads N] [--jobs N] [--budget SECONDS] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import libraries
import machine
import torch
from gradient_problems import (
    ADJOINT,
    DISCRETE,
    MODES,
    PROBLEMS_PLOTTED,
    PROBLEMS_TIMED,
    QUICK_MODES,
    QUICK_PROBLEM,
    TIMED,
    GradientProblem,
    Gradients,
    Step,
    difference,
    exact,
    installed,
    of_same_steps,
)
from memory import MALLOC_ENVIRONMENT
from report_gradients import gradient_error_rows, gradient_time_rows, gradients_sentence
from solving import ERROR_PER_EPS, ERROR_PER_RTOL
from tables import gist, show, write_result
from timing import Spread, interleaved, seconds

HERE = Path(__file__).resolve().parent
ROUNDS = 41  # at most, of each row
Record = dict[str, Any]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    device = machine.chosen(arguments.device)
    to_time, to_plot = ((QUICK_PROBLEM,),) * 2 if arguments.quick else (PROBLEMS_TIMED, PROBLEMS_PLOTTED)
    timed, plotted = (QUICK_MODES,) * 2 if arguments.quick else (TIMED, tuple(MODES))
    result: Record = {
        "benchmark": "gradients",
        "device": device.type,
        "machine": machine.describe(device),
        "settings": {"method": "dopri5", "dtype": "float32", "loss": "sum of squared outputs / (outputs * batch)"},
        "complete": False,
        "times": [],
        "problems": [],
    }
    for problem in to_time:
        print(problem.name, file=sys.stderr, flush=True)
        result["times"].append(measure_times(problem, installed(timed), device, arguments))
        write_result(result, arguments.out)  # each time: a limit may end the program before the last row
    for problem in to_plot:
        print(problem.name, file=sys.stderr, flush=True)
        result["problems"].append(measure_errors(problem, installed(plotted), device, arguments))
        write_result(result, arguments.out)
    result["complete"] = True
    path = write_result(result, arguments.out)
    if libraries.installed("matplotlib"):
        from plot_gradients import draw_gradients

        draw_gradients(result, path.with_suffix(".png"))
    show(gradient_time_rows(result))
    show(gradient_error_rows(result))
    print(gradients_sentence(result))
    print(f"Written: {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="memory cells at once (default: 1)")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of timing a row; at least three rounds")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON and the plot")
    parser.add_argument("--quick", action="store_true", help="one tiny problem: shows that the program runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.budget, arguments.jobs = 0.0, 2
    return arguments


def measure_times(
    problem: GradientProblem, modes: Sequence[str], device: torch.device, arguments: argparse.Namespace
) -> Record:
    """One row: all modes checked, then those that are right timed in turn."""
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
        if mode != ADJOINT and ADJOINT in times:
            by[mode]["ratio"] = Spread.of([theirs / its for its, theirs in zip(took, times[ADJOINT], strict=True)])
    ratio = by[DISCRETE].get("ratio")
    by[DISCRETE] |= {"target": problem.target, "met": None if ratio is None else ratio.median >= problem.target}
    return {"case": problem.name, "rounds": len(sample), "rtol": problem.rtol, "atol": problem.atol, "by": by}


def measure_errors(
    problem: GradientProblem, modes: Sequence[str], device: torch.device, arguments: argparse.Namespace
) -> Record:
    """One panel: errors in this process, memory in others."""
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
    return {"problem": problem.name, "rtol": problem.rtol, "atol": problem.atol, "by": by}


def attempt(problem: GradientProblem, mode: str, device: torch.device) -> tuple[Record, Gradients | None]:
    """The gradients and what they cost; none, and the reason, where the solve fails."""
    try:
        found = Step(problem, mode, device)()
    except Exception as error:  # a step size that underflows, out of memory: a value
        return {"failed": gist(error).partition(". ")[0]}, None  # the rest is advice
    return {"nfe": found.nfe, "nfe_backward": found.nfe_backward}, found


def memory(problem: GradientProblem, mode: str, arguments: argparse.Namespace) -> Record:
    """The peak of a fresh process; `failed` if it has none."""
    command = [sys.executable, str(HERE / "gradient_cell.py"), "--problem", problem.name, "--mode", mode]
    command += ["--threads", str(arguments.threads), "--device", arguments.device]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MALLOC_ENVIRONMENT})
    if run.returncode == 0:
        return json.loads(run.stdout.splitlines()[-1])
    lines = run.stderr.strip().splitlines()
    return {"failed": lines[-1] if lines else f"ended by signal {-run.returncode}, most likely for lack of memory"}


if __name__ == "__main__":
    main()
