"""The figure of stiff.py: time against the error that was reached, a panel a problem, log-log."""

from __future__ import annotations

from pathlib import Path

from parts.common.plotting import head_and_foot, plt, save, tidy
from parts.common.tables import Result

COLOURS = {
    "rodas5p": "#1b9e77",
    "kvaerno5": "#1f78b4",
    "kvaerno3": "#6a3d9a",
    "SciPy Radau": "#d95f02",
    "SciPy LSODA": "#999999",
}


def draw_stiff(result: Result, path: Path) -> None:
    """Writes the figure of a result of stiff.py as a PNG file."""
    problems = list(dict.fromkeys(row["problem"] for row in result["work"]))
    figure, axes = plt.subplots(1, len(problems), figsize=(3.6 * len(problems) + 0.6, 3.6), squeeze=False)
    for panel, problem in zip(axes.flat, problems, strict=True):
        for method, colour in COLOURS.items():
            rows = [row for row in result["work"] if row["problem"] == problem and row["method"] == method]
            # The error in units of rtol |y|: what was asked for is a vertical line at each rtol.
            x, y = [row["error"] * row["rtol"] for row in rows], [row["ms"] for row in rows]
            panel.plot(x, y, "s-" if method.startswith("SciPy") else "o-", color=colour, label=method, markersize=5)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.invert_xaxis()
        panel.set_xlabel("error, relative")
        tidy(panel, problem)
    axes[0, 0].set_ylabel("time (ms)")
    head_and_foot(figure, "Stiff problems: work against precision", result)
    figure.tight_layout()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    save(figure, path)
