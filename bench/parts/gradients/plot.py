"""The figure of gradients.py: error against peak memory, log-log, one panel for each problem."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from parts.common.libraries import OURS
from parts.common.modes import MODES
from parts.common.plotting import COLOURS, PLAIN, head_and_foot, marker, plt, save, tidy
from parts.common.tables import Result

LEAST_MIB = 0.01  # smaller values are within a page or two of 0, which has no logarithm
COLUMNS = 2


def draw_gradients(result: Result, path: Path) -> None:
    """Writes the figure of a result of gradients.py as a PNG file."""
    rows = result["problems"]
    shape = (math.ceil(len(rows) / COLUMNS), min(len(rows), COLUMNS))
    figure, axes = plt.subplots(*shape, figsize=(4.8 * shape[1] + 0.6, 4.1 * shape[0] + 0.6), squeeze=False)
    for panel, row in zip(axes.flat, rows, strict=False):
        draw_panel(panel, row)
    for panel in axes.flat[len(rows) :]:
        panel.set_visible(False)
    head_and_foot(figure, f"A gradient by {result['settings']['method']}, {result['settings']['dtype']}", result)
    figure.supylabel("largest relative error of the gradients", fontsize=10)
    figure.tight_layout()
    shown = {name for row in rows for name in row["by"]}
    handles = legend([name for name in MODES if name in shown])
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    save(figure, path)


def draw_panel(panel: Axes, row: Result) -> None:
    """Draws both errors of every mode at its memory, and names the modes that failed."""
    for name, record in row["by"].items():
        if "failed" in record:
            continue
        colour, shape = style(name)
        x = max(record["peak_mib"], LEAST_MIB)
        both = (record["error"], record["error_same_steps"])
        panel.plot([x, x], both, color=colour, linewidth=0.8, alpha=0.5)
        panel.plot(x, both[0], shape, color=colour, markersize=7)
        panel.plot(x, both[1], shape, color=colour, markersize=7, markerfacecolor="white")
    failed = [f"{name}: failed" for name, record in row["by"].items() if "failed" in record]
    panel.text(0.55, 0.5, "\n".join(failed), transform=panel.transAxes, ha="center", va="center", fontsize=8)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.margins(0.12)
    panel.xaxis.set_major_formatter(PLAIN)
    tidy(panel, row["problem"])
    panel.set_xlabel("peak memory (MiB)")


def style(name: str) -> tuple[str, str]:
    """The colour and the marker of a mode."""
    return COLOURS[MODES[name].gradient], marker(MODES[name].library, MODES[name].gradient)


def legend(names: list[str]) -> list[Line2D]:
    """The entries of the legend: the modes, and the meaning of filled and empty markers."""
    handles = [
        Line2D([], [], color=colour, marker=shape, linestyle="", label=label(name))
        for name, (colour, shape) in ((name, style(name)) for name in names)
    ]
    for fill, meaning in (("#666666", "against the exact gradient"), ("white", "against that of the same steps")):
        handles.append(Line2D([], [], color="#666666", marker="o", linestyle="", markerfacecolor=fill, label=meaning))
    return handles


def label(name: str) -> str:
    """The name of a mode with its library."""
    return name if MODES[name].library != OURS else f"{OURS} {name}"
