"""Trains an ODE-Net on digits, then measures a training step's memory and time against its solver steps.

1. Training: scikit-learn's bundled 8x8 handwritten digits, `odeint_adjoint` with dopri5, to a stated test accuracy;
   the program ends with an error where it is not reached. Without scikit-learn it goes on to the measurement.
2. Measurement: one training step of the same network with N equal steps of a fixed-grid method, for `odeint`
   (backpropagation through the solver) and `odeint_adjoint`, of node_cuda (on CUDA by the fused kernels and by plain
   PyTorch) and, where it is installed, torchdiffeq.
   Memory in a process of its own for every cell (memory.py says why, and what is measured), time in this one, the
   fastest of several, all modes in turn.
3. Report: a table, a sentence computed from the data, JSON and, where matplotlib is installed, a plot.

    python bench/memory_vs_steps.py [--quick] [--device cuda] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import digits
import libraries
import machine
import torch
from digits import ODENet
from memory import MALLOC_ENVIRONMENT
from report import NOT_TRAINED, memory_rows, memory_sentence
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tables import show, write_result
from timing import seconds
from training_step import Setting, training_step

HERE = Path(__file__).resolve().parent
# Seeds 0 to 5 end at 0.967 to 0.982, and the roundings of another machine amount to another seed.
REQUIRED_ACCURACY = 0.96
RTOL, ATOL = 1e-3, 1e-3  # of the training; torchdiffeq's own ODE-Net example trains with the same
EPOCHS, LEARNING_RATE = 12, 5e-3
CHANNELS, BATCH = 16, 64
MEASURED_BATCH = 32  # large enough for the activations to stand out, small enough for 512 steps in a second or two
STEPS = (8, 16, 32, 64, 128, 256, 512)
SOLVER_METHOD = "midpoint"  # two evaluations a step: the longest grid stays a matter of seconds
# A step is timed several times, short ones more often, until they add up to about so many solver steps.
REPEAT_STEPS, LEAST_REPEATS, MOST_REPEATS = 512, 2, 9
QUICK_IMAGES = 256

CellKey = tuple[str, str, int]  # library, function, N


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    device = machine.chosen(arguments.device)
    console = Console()
    names = [libraries.FUSED, libraries.REFERENCE] if device.type == "cuda" else [libraries.OURS]
    if libraries.installed(libraries.RIVAL) and not arguments.quick:
        names.append(libraries.RIVAL)
    cells = [(name, function, n) for n in arguments.steps for name in names for function in libraries.FUNCTIONS]

    with Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        training = train(arguments, device, progress) if libraries.installed("sklearn") else None
        if training is not None and training["test_accuracy"] < training["required_accuracy"]:
            raise SystemExit(
                f"After {arguments.epochs} epochs the test accuracy is {training['test_accuracy']:.3f}, less than "
                f"the required {training['required_accuracy']:g}: nothing is measured. Raise --epochs, or look for "
                "what is wrong with the gradients: `make test`."
            )
        task = progress.add_task("memory", total=len(cells))
        measured = []
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for cell in pool.map(lambda key: measure_memory(key, arguments), cells):
                measured.append(cell)
                progress.update(task, advance=1, description=f"memory, N={cell['steps']}")
        task = progress.add_task("time", total=len(arguments.steps))
        measure_times(measured, arguments, lambda: progress.advance(task))

    result = {
        "benchmark": "memory_vs_steps",
        "device": device.type,
        "machine": machine.describe(device),
        "settings": {"channels": CHANNELS, "batch": arguments.batch, "method": SOLVER_METHOD},
        "training": training,
        "cells": measured,
    }
    result["sentence"] = memory_sentence(result)
    path = write_result(result, arguments.out)
    written = str(path)
    if libraries.installed("matplotlib"):
        from plot import draw_memory

        draw_memory(result, path.with_suffix(".png"))
        written += f" and {path.with_suffix('.png').name}"
    show(memory_rows(result))
    if not libraries.installed(libraries.RIVAL):
        console.print(f"{libraries.RIVAL} is not installed, and has no columns.")
    if training is None:
        console.print(NOT_TRAINED)
    else:
        console.print(
            f"Trained with odeint_adjoint to a test accuracy of {training['test_accuracy']:.3f} "
            f"(at least {training['required_accuracy']:g} was needed) in {training['seconds']:.0f} s."
        )
    console.print(result["sentence"], soft_wrap=True)
    console.print(f"Written: {written}", soft_wrap=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; 1 is the steadiest (default)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--batch", type=int, default=MEASURED_BATCH, help="of the measured step")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, metavar="N")
    parser.add_argument("--jobs", type=int, default=1, help="memory cells at once (default: 1)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON and the plot")
    parser.add_argument(
        "--quick", action="store_true", help="a few images, two N, node_cuda only: shows that the program runs"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs, arguments.steps, arguments.jobs = 1, (2, 16), 2
    return arguments


def train(arguments: argparse.Namespace, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Trains with our `odeint_adjoint`; the record of it for the JSON."""
    torch.manual_seed(0)
    solver = libraries.function(libraries.OURS, "odeint_adjoint")
    net = ODENet(CHANNELS, solver, method="dopri5", rtol=RTOL, atol=ATOL).to(device)
    data = digits.load(device)
    if arguments.quick:
        data = data.fewer(QUICK_IMAGES)
    task = progress.add_task("training", total=arguments.epochs * digits.batches_of(data, BATCH))
    record = digits.train(
        net,
        data,
        epochs=arguments.epochs,
        batch=BATCH,
        learning_rate=LEARNING_RATE,
        report=lambda line: progress.update(task, advance=1, description=line),
    )
    progress.update(task, description=f"trained, accuracy {record['test_accuracy']:.3f}")
    # One epoch of --quick shows that the program runs, not that the network learns.
    required = 0.0 if arguments.quick else REQUIRED_ACCURACY
    return {"required_accuracy": required, "rtol": RTOL, "atol": ATOL, "batch": BATCH, **record}


def measure_memory(key: CellKey, arguments: argparse.Namespace) -> dict[str, Any]:
    """One cell in a fresh process; one that fails (out of memory, say) has its reason in `failed` and no numbers."""
    library, function, steps = key
    options = {
        "library": library,
        "function": function,
        "steps": steps,
        "method": SOLVER_METHOD,
        "channels": CHANNELS,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "device": arguments.device,
    }
    command = [sys.executable, str(HERE / "memory_cell.py")]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MALLOC_ENVIRONMENT})
    cell: dict[str, Any] = {"library": library, "function": function, "steps": steps}
    if run.returncode == 0:
        return cell | json.loads(run.stdout.splitlines()[-1])
    lines = run.stderr.strip().splitlines()
    reason = lines[-1] if lines else f"ended by signal {-run.returncode}, most likely for lack of memory"
    return cell | {"failed": reason}


def measure_times(cells: list[dict[str, Any]], arguments: argparse.Namespace, advance: Callable[[], None]) -> None:
    """Adds `seconds` to the cells that had enough memory: the fastest of several, all modes of an N in turn."""
    setting = Setting(SOLVER_METHOD, CHANNELS, arguments.batch, arguments.device)
    device = torch.device(arguments.device)
    modes = {(cell["library"], cell["function"]) for cell in cells}
    run = {mode: training_step(*mode, setting) for mode in sorted(modes)}
    for n in sorted({cell["steps"] for cell in cells}):
        row = [cell for cell in cells if cell["steps"] == n and "failed" not in cell]
        for _ in range(min(MOST_REPEATS, max(LEAST_REPEATS, REPEAT_STEPS // n))):
            for cell in row:
                step = run[cell["library"], cell["function"]]
                took = seconds(lambda step=step, n=n: step(n), device)
                cell["seconds"] = min(took, cell.get("seconds", took))
        advance()


if __name__ == "__main__":
    main()
