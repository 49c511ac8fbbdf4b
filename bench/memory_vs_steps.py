"""Trains an ODE-Net on digits, then measures a training step's memory and time against its solver steps.

1. Training: scikit-learn's bundled 8x8 handwritten digits, by `odeint_adjoint` with dopri5, to a stated test accuracy.
   The program ends with an error if the accuracy is not reached. Without scikit-learn this part is left out.
2. Measurement: one training step of the same network with N equal steps of a fixed-grid method. The gradient modes are
   backpropagation, the adjoint and the discrete adjoint (also with checkpoints) of node_cuda, on CUDA by the fused
   kernels and by plain PyTorch; and backpropagation and the adjoint of torchdiffeq, if it is installed. Memory is
   measured in a fresh process for each cell (parts/common/peak_memory.py says why). Time is measured in this process:
   the fastest of several runs, all modes in turn.
3. Report: a table, a sentence computed from the data, JSON and, if matplotlib is installed, a plot.

    python bench/memory_vs_steps.py [--quick] [--device cuda] [--jobs N] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from parts import program
from parts.common import libraries
from parts.common.fresh_process import measured
from parts.common.modes import ADJOINT, BACKPROP, CHECKPOINTED, DISCRETE, Mode, mode, of_library
from parts.common.tables import INCOMPLETE, show, write_result
from parts.common.timing import seconds
from parts.memory import digits
from parts.memory.digits import ODENet
from parts.memory.report import NOT_TRAINED, memory_rows, memory_sentence
from parts.memory.training_step import Setting, training_step

TAKES = "This takes about four minutes on two cores: training, then 24 cells of memory and their times."
# Seeds 0 to 5 reach 0.967 to 0.982. Other roundings on another machine have the effect of another seed.
REQUIRED_ACCURACY = 0.96
RTOL, ATOL = 1e-3, 1e-3  # of the training; as in torchdiffeq's ODE-Net example
EPOCHS, LEARNING_RATE = 12, 5e-3
CHANNELS, BATCH = 16, 64
MEASURED_BATCH = 32  # large enough to see the activations, small enough for 512 steps in a second or two
STEPS = (8, 32, 128, 512)
SOLVER_METHOD = "midpoint"  # two evaluations per step: the longest grid takes seconds
# A training step is timed until its runs add up to about REPEAT_STEPS solver steps.
REPEAT_STEPS, LEAST_REPEATS, MOST_REPEATS = 512, 2, 9
QUICK_IMAGES = 256

GRADIENTS = (BACKPROP, ADJOINT, DISCRETE, CHECKPOINTED)
Cell = dict[str, Any]


def main() -> None:
    arguments = parse()
    device = program.begin(arguments)
    console = Console()
    if not arguments.quick:
        console.print(TAKES)
    names = [libraries.FUSED, libraries.REFERENCE] if device.type == "cuda" else [libraries.OURS]
    if libraries.installed(libraries.RIVAL) and not arguments.quick:
        names.append(libraries.RIVAL)
    compared = [found for name in names for found in of_library(name, GRADIENTS)]
    cells: list[tuple[Mode, int]] = [(found, n) for n in arguments.steps for found in compared]

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
                f"the required {training['required_accuracy']:g}. Nothing is measured. Raise --epochs, or check "
                "the gradients with `make test`."
            )
        task = progress.add_task("memory", total=len(cells))
        done: list[Cell] = []
        result = {
            **program.new_result("memory_vs_steps", device),
            "settings": {"channels": CHANNELS, "batch": arguments.batch, "method": SOLVER_METHOD},
            "training": training,
            "cells": done,
            "sentence": INCOMPLETE,
        }
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for cell in pool.map(lambda key: measure_memory(key[0], key[1], arguments), cells):
                done.append(cell)
                progress.update(task, advance=1, description=f"memory, N={cell['steps']}")
        write_result(result, arguments.out)  # now: the program may be stopped before the last N
        task = progress.add_task("time", total=len(arguments.steps))
        for n in arguments.steps:
            measure_times([cell for cell in done if cell["steps"] == n], n, compared, arguments)
            write_result(result, arguments.out)
            progress.advance(task)

    result["sentence"] = memory_sentence(result)
    path = write_result(result, arguments.out)
    written = str(path)
    if libraries.installed("matplotlib"):
        from parts.memory.plot import draw_memory

        draw_memory(result, path.with_suffix(".png"))
        written += f" and {path.with_suffix('.png').name}"
    show(memory_rows(result))
    if not libraries.installed(libraries.RIVAL):
        console.print(f"{libraries.RIVAL} is not installed, so it has no columns.")
    if training is None:
        console.print(NOT_TRAINED)
    else:
        console.print(
            f"Trained with odeint_adjoint to a test accuracy of {training['test_accuracy']:.3f} "
            f"(at least {training['required_accuracy']:g} was needed) in {training['seconds']:.0f} s."
        )
    console.print(result["sentence"], soft_wrap=True)
    console.print(program.written(written, arguments.out), soft_wrap=True)


def parse() -> argparse.Namespace:
    parser = program.parser(__doc__, quick="a few images, two N, node_cuda only", out="folder of the JSON and the plot")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--batch", type=int, default=MEASURED_BATCH, help="batch of the measured step")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, metavar="N")
    parser.add_argument("--jobs", type=int, default=2, help="memory cells at once (default: 2)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs, arguments.steps = 1, (2, 16)
    return arguments


def train(arguments: argparse.Namespace, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Trains with node_cuda's `odeint_adjoint`; returns the record for the JSON."""
    torch.manual_seed(0)
    net = ODENet(CHANNELS, mode(libraries.OURS, ADJOINT).solver, method="dopri5", rtol=RTOL, atol=ATOL).to(device)
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
    # The one epoch of --quick is too short to learn.
    required = 0.0 if arguments.quick else REQUIRED_ACCURACY
    return {"required_accuracy": required, "rtol": RTOL, "atol": ATOL, "batch": BATCH, **record}


def measure_memory(by: Mode, steps: int, arguments: argparse.Namespace) -> Cell:
    """One cell, from a fresh process. A cell that fails has the reason in `failed` and no numbers."""
    cell = {"library": by.library, "gradient": by.gradient, "steps": steps}
    return cell | measured(
        "memory/cell.py",
        **cell,
        method=SOLVER_METHOD,
        channels=CHANNELS,
        batch=arguments.batch,
        threads=arguments.threads,
        device=arguments.device,
    )


def measure_times(cells: list[Cell], n: int, compared: list[Mode], arguments: argparse.Namespace) -> None:
    """Adds `seconds` to the cells of this N that did not fail: the fastest of several runs, all modes in turn."""
    setting = Setting(SOLVER_METHOD, CHANNELS, arguments.batch, arguments.device)
    device = torch.device(arguments.device)
    run = {(by.library, by.gradient): training_step(by, setting) for by in compared}
    for _ in range(min(MOST_REPEATS, max(LEAST_REPEATS, REPEAT_STEPS // n))):
        for cell in cells:
            if "failed" in cell:
                continue
            step = run[cell["library"], cell["gradient"]]
            took = seconds(lambda step=step: step(n), device)
            cell["seconds"] = min(took, cell.get("seconds", took))


if __name__ == "__main__":
    main()
