"""The block `losses` of the pages: where node_cuda is slower, misses a promise or fails, from all results."""

from __future__ import annotations

from collections.abc import Callable

from parts.common.libraries import OURS, RIVAL
from parts.common.tables import Result, digits
from parts.compiled.report import lost as of_compiled
from parts.memory.report import series

SAME = 1.1
"""Errors and memory that differ by less than this factor count as equal."""


def losses_block(result: Result) -> str:
    """The rows of one result that node_cuda loses, as a list; empty if it loses none."""
    find = OF.get(result.get("benchmark", ""))
    lost = [] if find is None else find(result)
    return "\n".join([f"`{result['machine']['command']}`:\n", *(f"- {line}" for line in lost)]) if lost else ""


def of_speed(result: Result) -> list[str]:
    """Rows in which another is faster, and missed targets."""
    lost = [
        f"{row['case']}: {digits(row['ratio'][0])} times as fast as {RIVAL}"
        + (f", {row['target']:g} was promised" if row["met"] is False else "")
        for row in result["rows"]
        if row["ratio"][0] < 1 or row["met"] is False
    ]
    for row in result.get("small", []):
        lost += [
            f"{row['case']}: {digits(other['ratio'][0])} times as fast as {name}"
            for name, other in row["contestants"].items()
            if name != OURS and other["ratio"][0] < 1
        ]
    return lost


def of_memory(result: Result) -> list[str]:
    """Cells in which the same mode of torchdiffeq takes less time or less memory."""
    lost = []
    for quantity, unit in (("seconds", "s"), ("peak_mib", "MiB")):
        lines = series(result, quantity)
        for (library, gradient), points in lines.items():
            theirs = lines.get((RIVAL, gradient), {})
            lost += [
                f"{gradient}, N = {n}: {digits(value)} {unit} against {digits(theirs[n])} of {RIVAL}"
                for n, value in points.items()
                if library.startswith(OURS) and n in theirs and value > theirs[n]
            ]
    return lost


def of_gradients(result: Result) -> list[str]:
    """Missed targets, failures, and modes with a larger error or more memory than the adjoint of torchdiffeq."""
    rival = f"{RIVAL} adjoint"
    lost = []
    for row in (*result["times"], *result["problems"]):
        name = row.get("case") or row["problem"]
        theirs = row["by"].get(rival, {"failed": "not measured"})
        for mode, ours in row["by"].items():
            if mode.startswith(RIVAL):
                continue
            if "failed" in ours:
                lost.append(
                    f"{name}, {mode}: failed"
                    + (f", and so does {rival}" if rival in row["by"] and "failed" in theirs else "")
                )
            elif ours.get("met") is False:
                lost.append(
                    f"{name}, {mode}: {digits(ours['ratio'][0])} times as fast, {ours['target']:g} was promised"
                )
            if "failed" in ours or "failed" in theirs:
                continue
            for kind, what in (("error", "error"), ("peak_mib", "MiB")):
                if kind in ours and ours[kind] > SAME * theirs[kind]:
                    lost.append(f"{name}, {mode}: {what} {ours[kind]:.2g} against {theirs[kind]:.2g} of {rival}")
    return lost


def of_stiff(result: Result) -> list[str]:
    """Problems in which a solver of SciPy needs less time for an error that is not larger, and batches that lose."""
    lost = []
    for row in result["work"]:
        if row["method"].startswith("SciPy"):
            continue
        better = [
            other
            for other in result["work"]
            if other["method"].startswith("SciPy")
            and (other["problem"], other["rtol"]) == (row["problem"], row["rtol"])
            and other["ms"] < row["ms"]
            and other["error"] <= row["error"]
        ]
        for other in better:
            lost.append(
                f"{row['problem']}, rtol {row['rtol']:.0e}, {row['method']}: {digits(row['ms'])} ms, error "
                f"{row['error']:.2g}, against {digits(other['ms'])} ms, {other['error']:.2g} of {other['method']}"
            )
    for row in result["batch"]:
        where = f"{row['samples']} times {row['problem']}, {row['method']}"
        if row["status"] != "SUCCESS":
            lost.append(f"{where}: {row['status']}, where a loop of Radau takes {digits(row['loop_of_radau'])} s")
        elif row["ratio"] < 1:
            lost.append(f"{where}: {digits(row['ratio'])} times as fast as a loop of Radau")
    return lost


OF: dict[str, Callable[[Result], list[str]]] = {
    "speed": of_speed,
    "memory_vs_steps": of_memory,
    "gradients": of_gradients,
    "stiff": of_stiff,
    "compiled": of_compiled,
}
