"""The figure of peers.py: CPU time against the error that was reached, a panel a problem, log-log."""

from __future__ import annotations

from pathlib import Path

from parts.common.libraries import DIFFRAX, OURS, RIVAL, TORCHODE
from parts.common.modes import ADJOINT, BACKPROP
from parts.common.plotting import head_and_foot, plt, save, tidy
from parts.common.tables import Result

COLOURS = {OURS: "#1b9e77", RIVAL: "#d95f02", TORCHODE: "#6a3d9a", DIFFRAX: "#1f78b4"}


def style(name: str) -> dict[str, str]:
    """The colour is that of the library, and the line that of the way to differentiate."""
    library, _, way = name.partition(" ")
    line, marker = {ADJOINT: ("--", "^"), BACKPROP: (":", "s")}.get(way, ("-", "o"))
    return {"color": COLOURS[library], "linestyle": line, "marker": marker if way != "compiled" else "*"}


def draw_peers(result: Result, path: Path) -> None:
    """Writes the figure of a result of peers.py as a PNG file."""
    rows = [row for row in result["rows"] if "milliseconds" in row]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    columns = min(3, len(problems))
    lines = -(-len(problems) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns + 0.6, 3.2 * lines + 0.4), squeeze=False)
    shown = {}
    for panel, problem in zip(axes.flat, problems, strict=False):
        for name in dict.fromkeys(row["by"] for row in rows):
            its = [row for row in rows if row["problem"] == problem and row["by"] == name]
            if not its:
                continue
            x, y = [row["error"] for row in its], [row["milliseconds"][0] for row in its]
            (shown[name],) = panel.plot(x, y, markersize=4, linewidth=1.2, **style(name))
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.invert_xaxis()
        tidy(panel, problem)
    for panel in axes[-1]:
        panel.set_xlabel("error, relative")
    for panel in axes[:, 0]:
        panel.set_ylabel("CPU time (ms)")
    head_and_foot(figure, "Work against precision: lower and further to the right is better", result)
    figure.tight_layout()
    figure.legend(shown.values(), shown.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    save(figure, path)
