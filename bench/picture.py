"""Draws the picture of the README from the published results: memory against steps, and how exact each gradient is.

It is black on white, so that it can be printed and read in one column.

    python bench/picture.py [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from parts.common.libraries import OURS, RIVAL
from parts.common.modes import ADJOINT, BACKPROP, CHECKPOINTED, DISCRETE
from parts.common.paths import PUBLISHED
from parts.common.plotting import PLAIN, Axes, plt, save
from parts.common.tables import Result
from parts.memory.report import series

NAME = "overview-cpu.png"
LINES = {BACKPROP: "-", DISCRETE: "--", ADJOINT: ":", CHECKPOINTED: "-."}
SHAPES = {BACKPROP: "o", DISCRETE: "s", ADJOINT: "^", CHECKPOINTED: "D"}
ROWS = (f"{RIVAL} {ADJOINT}", ADJOINT, BACKPROP, DISCRETE, CHECKPOINTED)
PROBLEMS = ("o", "s", "^", "D")
BLACK: dict[str, Any] = dict(color="black", linewidth=1.2, markerfacecolor="white", markersize=5)
FAILED = 1e-2
"""Where a mode that failed is drawn: to the right of all errors."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="folder of the picture (default: bench/results)")
    folder = parser.parse_args().out
    draw(PUBLISHED, folder / NAME)
    print(f"Written: {folder / NAME}")


def draw(results: Path, path: Path) -> None:
    """Writes the picture of the results in this folder as a PNG file."""
    memory, gradients = (json.loads((results / f"{x}-cpu.json").read_text()) for x in ("memory_vs_steps", "gradients"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.8, 3.2), width_ratios=(1, 1.15), layout="constrained")
    draw_memory(left, memory)
    draw_errors(right, gradients)
    save(figure, path)


def draw_memory(axes: Axes, result: Result) -> None:
    """Peak memory of a training step against the number of steps, a line for each mode of ours."""
    lines = {gradient: points for (library, gradient), points in series(result, "peak_mib").items() if library == OURS}
    for gradient, points in lines.items():
        style = dict(BLACK, linestyle=LINES[gradient], marker=SHAPES[gradient], label=gradient)
        axes.plot(list(points), list(points.values()), **style)
    steps = sorted(next(iter(lines.values())))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.yaxis.set_major_formatter(PLAIN)
    frame(axes, "Peak memory of a training step", "solver steps", "MiB")
    legend(axes)


def draw_errors(axes: Axes, result: Result) -> None:
    """The distance of each mode from the gradient of the computed solution, a marker for each problem."""
    for problem, shape in zip(result["problems"], PROBLEMS, strict=True):
        records = [problem["by"][row] for row in ROWS]
        errors = [record.get("error_same_steps", FAILED) for record in records]
        gap = 0.13 * (PROBLEMS.index(shape) - 1.5)  # equal errors stay apart
        style = dict(BLACK, linestyle="", marker=shape, label=problem["problem"])
        axes.plot(errors, [i + gap for i in range(len(ROWS))], **style)
    axes.axvline(FAILED / 3, color="#999999", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [1e-7, 1e-6, 1e-5, 1e-4, 1e-3]
    axes.set_xticks([*ticks, FAILED], [*(f"$10^{{{round(-e)}}}$" for e in (7, 6, 5, 4, 3)), "failed"])
    axes.minorticks_off()
    axes.set_yticks(range(len(ROWS)), ROWS)
    axes.set_ylim(len(ROWS) - 0.4, -0.6)
    frame(axes, "Error against the gradient of the computed solution", "relative error", "")
    legend(axes)


def legend(axes: Axes) -> None:
    """Names the lines or markers of a panel, below it."""
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.22), ncols=2, columnspacing=1)


def frame(axes: Axes, title: str, x: str, y: str) -> None:
    """Gives a panel its title, the names of its axes and a light grid."""
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
