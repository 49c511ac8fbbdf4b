"""The figure of gradients.py: error against peak memory, a panel a problem, log-log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor asked for

import matplotlib.pyplot as plt
from gradient_problems import MODES
from libraries import OURS
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

COLOURS = ("#1f78b4", "#d95f02", "#d95f02", "#1f78b4", "#6a3d9a", "#1b9e77", "#66a61e")
SHAPES = ("s", "s", "o", "o", "^", "o", "D")
LEAST_MIB = 0.01  # less than a page or two cannot be told from nothing, and has no logarithm


def draw_gradients(result: dict[str, Any], path: Path) -> None:
    """Writes the figure of a result of gradients.py as a PNG file."""
    panels = result["problems"]
    styles = dict(zip(MODES, zip(COLOURS, SHAPES, strict=True), strict=True))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.3 * len(panels) + 2.6, 4.8), squeeze=False)
    for place, (panel, row) in enumerate(zip(axes[0], panels, strict=True)):
        for mode, record in row["by"].items():
            if "failed" in record:
                continue
            colour, shape = styles[mode]
            x = max(record["peak_mib"], LEAST_MIB)
            both = (record["error"], record["error_same_steps"])
            panel.plot([x, x], both, color=colour, linewidth=0.8, alpha=0.5)
            panel.plot(x, both[0], shape, color=colour, markersize=7)
            panel.plot(x, both[1], shape, color=colour, markersize=7, markerfacecolor="white")
        failed = [f"{mode}: failed" for mode, record in row["by"].items() if "failed" in record]
        panel.text(0.55, 0.5, "\n".join(failed), transform=panel.transAxes, ha="center", va="center", fontsize=8)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.margins(0.12)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_title(row["problem"], fontsize=10, loc="left")
        panel.set_xlabel("peak memory (MiB)")
        if not place:
            panel.set_ylabel("largest relative error of the gradients")
        panel.grid(which="major", color="#dddddd", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    shown = {mode for row in panels for mode in row["by"]}
    handles = [
        Line2D([], [], color=styles[mode][0], marker=styles[mode][1], linestyle="", label=label(mode))
        for mode in MODES
        if mode in shown
    ]
    for fill, meaning in (("#666666", "against the exact gradient"), ("white", "against that of the same steps")):
        handles.append(Line2D([], [], color="#666666", marker="o", linestyle="", markerfacecolor=fill, label=meaning))
    about = result["machine"]
    figure.suptitle(f"A gradient by {result['settings']['method']}, {result['settings']['dtype']}", fontsize=12)
    where = f"{about['device']}, {about['threads']} thread(s), torch {about['torch']}"
    figure.supxlabel(where, fontsize=8, color="#666666")
    figure.tight_layout()
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def label(mode: str) -> str:
    return mode if MODES[mode].library != OURS else f"{OURS} {mode}"
