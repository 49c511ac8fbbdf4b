"""Plots of a solution and of its steps, by matplotlib, which is imported when a plot is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from node_cuda._extras import extra
from node_cuda.status import InvalidInput

MOST = 10
"""The number of elements of y that a plot shows."""


def plot_solution(ts: Tensor, ys: Any, step_times: Sequence[float] | None, ax: Any = None) -> Any:
    """Plot the elements of y against ts, and return the axes."""
    ax = _new(1, "Solution.plot()") if ax is None else ax
    parts = ys if isinstance(ys, tuple) else (ys,)
    t = ts.detach().cpu().double().numpy()
    left, total = MOST, sum(part[0].numel() for part in parts)
    for i, part in enumerate(parts):
        flat = part.detach().cpu().reshape(len(ts), -1)
        flat = flat.real if flat.is_complex() else flat
        name = f"y[{i}]" if isinstance(ys, tuple) else "y"
        for j in range(min(flat.shape[1], left)):
            ax.plot(t, flat[:, j].double().numpy(), marker="." if len(t) < 30 else None, label=f"{name}[{j}]")
        left = max(left - flat.shape[1], 0)
    if step_times is not None:
        low = ax.get_ylim()[0]
        ax.plot(step_times, [low] * len(step_times), "|", color="black", label="steps", clip_on=False)
    ax.set(xlabel="t", ylabel="y" if total <= MOST else f"y, {MOST} of {total} elements")
    if total > 1:
        ax.legend(fontsize="small")
    return ax


def plot_steps(steps: Sequence[Any] | None, axes: Any = None) -> Any:
    """Plot the sizes and the errors of the steps against t, and return the two axes."""
    if not steps:
        raise InvalidInput(
            "stats.plot() needs the steps of the solve, and they were not recorded. Use "
            "`solve(..., options=dict(record_steps=True))`; a captured solve (cuda_graph=True) records none, nor does "
            "scipy_solver."
        )
    sizes, errors = _new(2, "stats.plot()") if axes is None else axes
    for accepted, marker, label in ((True, ".", "accepted"), (False, "x", "rejected")):
        some = [step for step in steps if step.accepted is accepted]
        t = [step.t for step in some]
        if some:
            sizes.plot(t, [abs(step.h) for step in some], marker, label=label)
            errors.plot(t, [step.error for step in some], marker, label=label)
    sizes.set(yscale="log", ylabel="step size |h|")
    sizes.legend(fontsize="small")
    errors.axhline(1.0, color="black", linewidth=0.8)
    positive = any(step.error > 0 for step in steps)
    errors.set(xlabel="t", ylabel="error / tolerance", yscale="log" if positive else "linear")
    return sizes, errors


def _new(rows: int, what: str) -> Any:
    _, axes = extra("matplotlib.pyplot", what, "plot").subplots(rows, 1, sharex=True, layout="constrained")
    return axes
