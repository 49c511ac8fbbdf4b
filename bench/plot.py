"""The figure of memory_vs_steps.py: peak memory and time of a training step against N, log-log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor asked for

import matplotlib.pyplot as plt
from libraries import FUNCTIONS, OURS, REFERENCE
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from report import series, slope

COLOURS = {"odeint": "#d95f02", "odeint_adjoint": "#1f78b4"}
LABEL_GAP = 0.055  # least distance of two labels, as a share of the panel's height


def draw_memory(result: dict[str, Any], path: Path) -> None:
    """Writes the figure of a result of memory_vs_steps.py as a PNG file."""
    figure, (memory, time) = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    panel(memory, result, "peak_mib", "peak memory (MiB), with its growth")
    panel(time, result, "seconds", "time (s)")
    about, settings = result["machine"], result["settings"]
    figure.suptitle(
        f"One training step of an ODE-Net (batch {settings['batch']}) with N {settings['method']} steps",
        fontsize=12,
    )
    figure.supxlabel(
        f"{about['device']}, {about['threads']} thread(s), torch {about['torch']}",
        fontsize=8,
        color="#666666",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def panel(axes: Axes, result: dict[str, Any], quantity: str, title: str) -> None:
    ends: list[tuple[float, str, str]] = []
    steps: list[int] = []
    for (library, function), points in series(result, quantity).items():
        if not points:
            continue
        colour, ours = COLOURS[function], library.startswith(OURS)
        steps = sorted(points)
        values = [points[n] for n in steps]
        axes.plot(
            steps,
            values,
            color=colour,
            linestyle=":" if library == REFERENCE else "-" if ours else "--",
            marker="o" if ours else "s",
            markerfacecolor=colour if ours else "white",
            markersize=5,
            linewidth=1.8,
            alpha=1.0 if ours else 0.8,
        )
        growth = f"  $N^{{{slope(points):.2f}}}$" if quantity == "peak_mib" and len(points) > 1 else ""
        ends.append((values[-1], f"{library}, {FUNCTIONS[function]}{growth}", colour))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("solver steps N")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    label_ends(axes, ends)


def label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Names each line beside its last point, in its colour, moved up where two names would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    lowest = -1.0
    for value, text, colour in sorted(ends):
        height = max(float(to_axes.transform((1.0, value))[1]), lowest + LABEL_GAP)
        lowest = height
        axes.text(1.02, height, text, transform=axes.transAxes, color=colour, fontsize=9, va="center")
