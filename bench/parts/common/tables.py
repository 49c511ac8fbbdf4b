"""Tables, spreads, the line with command and machine, and the JSON files of all benchmarks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from parts.common.libraries import OURS, RIVAL

Result = dict[str, Any]
Rows = list[list[str]]
SHORT = 16  # letters of a cell
INCOMPLETE = "The program was stopped before its end: rows are missing."


def write_result(result: Result, folder: Path) -> Path:
    """Writes BENCHMARK-DEVICE.json and returns its path, relative to the current folder if it lies there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}-{result['device']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def provenance(result: Result) -> str:
    """Command, machine, versions and commit, in one line."""
    about = result["machine"]
    commit = about["commit"] or "no commit"
    where = f"{about['device']}, {about['threads']} of {about['cores']} threads"
    if "driver" in about:
        where = f"{about['device']}, driver {about['driver']}, CUDA {about['cuda']}"
    return (
        f"`{about['command']}` ({where}, torch "
        f"{about['torch']}, {OURS} {about[OURS]}, {RIVAL} {about[RIVAL] or 'not installed'}, {about['date'][:10]}, "
        f"commit {commit}{', with uncommitted changes' if about['dirty'] else ''})"
    )


def digits(value: float) -> str:
    """A number to three digits, without an exponent if it is large."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def spread(values: list[float]) -> str:
    """median (q1-q3), to three digits, on two lines."""
    median, q1, q3 = map(digits, values)
    return f"{median}\n({q1}-{q3})"


def target(row: Result) -> str:
    """The target of a row, with "(missed)" if it is missed; empty if the row has no target."""
    if row["target"] is None:
        return ""
    return f"{row['target']:g}" + ("\n(missed)" if row["met"] is False else "")


def evaluations(library: Result) -> str:
    """Evaluations forward + backward; only forward if the backward pass evaluates nothing."""
    return f"{library['nfe']}" + (f"+{library['nfe_backward']}" if library["nfe_backward"] else "")


def gist(error: Exception) -> str:
    """An error in one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def outcome(why: str) -> str:
    """The cell of a row that failed: the reason, if it is short enough for a table."""
    return why if len(why) <= SHORT else "failed"


def reasons(failed: list[tuple[str, str]]) -> list[str]:
    """The reasons that are too long for a table, each pair of name and reason once."""
    return [f"{name}: {why.rstrip('.')}." for name, why in dict.fromkeys(failed) if len(why) > SHORT]


def markdown(rows: Rows) -> str:
    """A Markdown table; the first row is the head, a line break in a cell becomes a space."""
    head, *body = rows
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |".replace("\n", " ") for line in lines)


def show(rows: Rows) -> None:
    """Prints a table: with rich on a terminal, as Markdown in a log or without rich."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        print(markdown(rows))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    head, *body = rows
    table = Table(box=SIMPLE_HEAD)
    for place, title in enumerate(head):
        table.add_column(title, justify="right" if place else "left")
    for line in body:
        table.add_row(*line)
    Console().print(table)
