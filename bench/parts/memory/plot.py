"""The figure of memory_vs_steps.py: peak memory, time and recomputed steps of a training step against N."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator

from parts.common.libraries import OURS, REFERENCE
from parts.common.plotting import COLOURS, PLAIN, head_and_foot, marker, plt, save, tidy
from parts.common.tables import Result
from parts.memory.report import series, slope

LABEL_GAP = 0.055  # smallest distance of two labels, as a share of the panel's height
PANELS = {
    "peak_mib": "peak memory (MiB), with its growth",
    "seconds": "time (s)",
    "recompute": "steps taken again, in units of N",
}


def draw_memory(result: Result, path: Path) -> None:
    """Writes the figure of a result of memory_vs_steps.py as a PNG file."""
    shown = [quantity for quantity in PANELS if any(series(result, quantity).values())]
    figure, axes = plt.subplots(1, len(shown), figsize=(5.9 * len(shown), 4.6), layout="constrained", squeeze=False)
    for panel, quantity in zip(axes[0], shown, strict=True):
        draw_panel(panel, result, quantity)
    settings = result["settings"]
    title = f"One training step of an ODE-Net (batch {settings['batch']}) with N {settings['method']} steps"
    head_and_foot(figure, title, result)
    save(figure, path)


def draw_panel(axes: Axes, result: Result, quantity: str) -> None:
    """Draws one quantity against N, a line for each mode."""
    ends: list[tuple[float, str, str]] = []
    steps: list[int] = []
    for (library, gradient), points in series(result, quantity).items():
        if not points:
            continue
        colour, ours = COLOURS[gradient], library.startswith(OURS)
        steps = sorted(points)
        values = [points[n] for n in steps]
        axes.plot(
            steps,
            values,
            color=colour,
            linestyle=":" if library == REFERENCE else "-" if ours else "--",
            marker=marker(library, gradient),
            markerfacecolor=colour if ours else "white",
            markersize=5,
            linewidth=1.8,
            alpha=1.0 if ours else 0.8,
        )
        growth = f"  $N^{{{slope(points):.2f}}}$" if quantity == "peak_mib" and len(points) > 1 else ""
        ends.append((values[-1], f"{library}, {gradient}{growth}", colour))
    axes.set_xscale("log", base=2)
    if quantity != "recompute":  # it may be 0, which has no logarithm
        axes.set_yscale("log")
    tidy(axes, PANELS[quantity])
    axes.set_xlabel("solver steps N")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_minor_formatter(NullFormatter())
    label_ends(axes, ends)


def label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Writes the name of each line beside its end; moves names that would overlap or leave the panel."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights: list[float] = []
    for value, _, _ in sorted(ends):
        height = float(to_axes.transform((1.0, value))[1])
        heights.append(max(height, heights[-1] + LABEL_GAP) if heights else height)
    highest = 1.0 + LABEL_GAP
    for height, (_, text, colour) in zip(reversed(heights), sorted(ends, reverse=True), strict=True):
        highest = min(height, highest - LABEL_GAP)
        axes.text(1.02, highest, text, transform=axes.transAxes, color=colour, fontsize=9, va="center")
