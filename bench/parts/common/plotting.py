"""What all figures share: a colour and a marker for every gradient mode, titles, and the line with the machine."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws without a display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from parts.common.libraries import OURS
from parts.common.modes import ADJOINT, BACKPROP, CHECKPOINTED, DISCRETE, SEMINORM
from parts.common.tables import Result

COLOURS = {
    BACKPROP: "#d95f02",
    ADJOINT: "#1f78b4",
    SEMINORM: "#6a3d9a",
    DISCRETE: "#1b9e77",
    CHECKPOINTED: "#66a61e",
}
SHAPES = {SEMINORM: "^", CHECKPOINTED: "D"}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")  # 0.5 rather than 5 x 10^-1


def marker(library: str, gradient: str) -> str:
    """The marker of a mode; other libraries than node_cuda have squares."""
    return SHAPES.get(gradient, "o") if library.startswith(OURS) else "s"


def tidy(axes: Axes, title: str) -> None:
    """Gives a panel its title and a light grid."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def head_and_foot(figure: Figure, title: str, result: Result) -> None:
    """Gives a figure its title, and the machine below it."""
    about = result["machine"]
    figure.suptitle(title, fontsize=12)
    where = f"{about['device']}, {about['threads']} thread(s), torch {about['torch']}"
    figure.supxlabel(where, fontsize=8, color="#666666")


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a file and closes it."""
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
