"""Tables and sentences from the JSON of the benchmarks, and the pages that show them.

    python bench/report.py            prints every block
    python bench/report.py --write    fills the blocks between `<!-- bench:NAME -->` and `<!-- /bench -->`
    python bench/report.py --check    fails where a page does not show what the JSON says

Blocks: `memory` and `speed` (command, machine and commit; sentence, table), and `memory-short` and `speed-short` for
the first page; pages: README.md, bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from libraries import FUNCTIONS, OURS, RIVAL
from rich.box import SIMPLE_HEAD
from rich.table import Table

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md", HERE / "README.md")
BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


Result = dict[str, Any]
Rows = list[list[str]]


# ---- memory_vs_steps


def series(result: Result, quantity: str) -> dict[tuple[str, str], dict[int, float]]:
    """(library, function) -> {N: value} of the cells that were measured."""
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for cell in result["cells"]:
        line = lines.setdefault((cell["library"], cell["function"]), {})
        if quantity in cell:
            line[cell["steps"]] = cell[quantity]
    return lines


def slope(points: dict[int, float]) -> float:
    """Least-squares slope of log(value) over log(N): 1 for a linear growth, 0 for none."""
    xs = [math.log(n) for n in points]
    ys = [math.log(value) for value in points.values()]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def memory_sentence(result: Result) -> str:
    """What the measured cells show, in one sentence."""
    lines = series(result, "peak_mib")
    times = series(result, "seconds")
    backprop, adjoint = lines[OURS, "odeint"], lines[OURS, "odeint_adjoint"]
    common = sorted(set(backprop) & set(adjoint))
    if len(common) < 2:
        return "Too few cells could be measured to say how memory grows with the number of solver steps."
    first, last = common[0], common[-1]
    slower = times[OURS, "odeint_adjoint"][last] / times[OURS, "odeint"][last]
    pace = f"{slower:.1f} times the time" if slower >= 1 else f"{1 / slower:.1f} times less time"
    return (
        f"From N = {first} to {last} solver steps, the peak memory of a training step grows as "
        f"N^{slope(backprop):.2f} with backpropagation through the solver ({backprop[first]:.0f} to "
        f"{backprop[last]:.0f} MiB) and as N^{slope(adjoint):.2f} with the adjoint ({adjoint[first]:.0f} to "
        f"{adjoint[last]:.0f} MiB), which at N = {last} takes {backprop[last] / adjoint[last]:.0f} times less "
        f"memory and {pace}."
    )


def memory_rows(result: Result) -> Rows:
    """Peak memory and time of every cell, a row an N."""
    memory, times = series(result, "peak_mib"), series(result, "seconds")
    steps = sorted({cell["steps"] for cell in result["cells"]})
    rows = [["N", *(f"{library}\n{FUNCTIONS[function]}\nMiB / s" for library, function in memory)]]
    for n in steps:
        pairs = [(memory[name].get(n), times[name].get(n)) for name in memory]
        cells = ["failed" if None in pair else f"{pair[0]:.1f} / {pair[1]:.3f}" for pair in pairs]
        rows.append([str(n), *cells])
    return rows


def memory_block(result: Result) -> str:
    training = result["training"]
    settings = result["settings"]
    return "\n\n".join(
        [
            provenance(result),
            f"Trained with `odeint_adjoint` to a test accuracy of {training['test_accuracy']:.3f} in "
            f"{training['seconds']:.0f} s. {result['sentence']}",
            f"One training step, batch {settings['batch']}, method {settings['method']}, step 1/N:",
            markdown(memory_rows(result)),
        ]
    )


# ---- speed


def speed_rows(result: Result) -> Rows:
    """A row a case: both times, their ratio, evaluations and achieved errors."""
    rows = [
        [
            "case",
            f"{OURS}\nms (IQR)",
            f"{RIVAL}\nms (IQR)",
            "ratio\n(IQR)",
            "target",
            "nfe f+b,\nboth",
            "error,\nboth",
        ]
    ]
    for row in result["rows"]:
        ours, theirs = row["libraries"][OURS], row["libraries"][RIVAL]
        rows.append(
            [
                row["case"],
                spread(ours["milliseconds"]),
                spread(theirs["milliseconds"]),
                spread(row["ratio"]),
                "" if row["target"] is None else f"{row['target']:g}" + ("" if row["met"] else "\n(missed)"),
                f"{evaluations(ours)},\n{evaluations(theirs)}",
                f"{ours['error']:.0e},\n{theirs['error']:.0e}",
            ]
        )
    return rows


def evaluations(library: Result) -> str:
    """Forward + backward; only forward where nothing goes back through the field of its own accord."""
    return f"{library['nfe']}" + (f"+{library['nfe_backward']}" if library["nfe_backward"] else "")


def speed_block(result: Result) -> str:
    return "\n\n".join([provenance(result), markdown(speed_rows(result))])


def memory_short(result: Result) -> str:
    return "\n\n".join([provenance(result), result["sentence"]])


def speed_short(result: Result) -> str:
    """The rows with a target, the least favourable one, and all that are lost."""
    least = min(row["ratio"][0] for row in result["rows"])
    kept = [row for row in result["rows"] if row["target"] is not None or row["ratio"][0] <= max(least, 1.0)]
    return speed_block({**result, "rows": kept})


# ---- shared


def write_result(result: Result, folder: Path) -> Path:
    """Writes BENCHMARK-DEVICE.json and returns its path, from the current folder where it lies in it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}-{result['device']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def provenance(result: Result) -> str:
    """Command, machine, versions and commit, in one line."""
    about = result["machine"]
    commit = about["commit"] or "no commit"
    return (
        f"`{about['command']}` ({about['device']}, {about['threads']} of {about['cores']} threads, torch "
        f"{about['torch']}, {OURS} {about[OURS]}, {RIVAL} {about[RIVAL]}, {about['date'][:10]}, "
        f"commit {commit}{', with uncommitted changes' if about['dirty'] else ''})"
    )


def spread(values: list[float]) -> str:
    """median (q1-q3), to three digits, on two lines."""
    median, q1, q3 = (f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values)
    return f"{median}\n({q1}-{q3})"


def markdown(rows: Rows) -> str:
    """A Markdown table; the first row is the head, a line break in a cell becomes a space."""
    head, *body = rows
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |".replace("\n", " ") for line in lines)


def console_table(rows: Rows) -> Table:
    """The same table for a terminal."""
    head, *body = rows
    table = Table(box=SIMPLE_HEAD)
    for place, title in enumerate(head):
        table.add_column(title, justify="right" if place else "left")
    for line in body:
        table.add_row(*line)
    return table


BLOCKS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "memory": ("memory_vs_steps", memory_block),
    "memory-short": ("memory_vs_steps", memory_short),
    "speed": ("speed", speed_block),
    "speed-short": ("speed", speed_short),
}


def block(name: str, folder: Path) -> str:
    """The text of a block: that of every device's result in turn."""
    if name not in BLOCKS:
        raise SystemExit(f"There is no block `bench:{name}`; there are {', '.join(sorted(BLOCKS))}.")
    stem, render = BLOCKS[name]
    results = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{stem}-*.json"))]
    return "\n\n".join(map(render, results)) or "Not measured yet."


def filled(page: str, folder: Path) -> str:
    """The page with every block's text put in."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{block(found['name'], folder)}\n\n{found[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        print("\n\n".join(block(name, arguments.results) for name in BLOCKS))
        return
    for path in PAGES:
        page = path.read_text() if path.exists() else ""
        new = filled(page, arguments.results)
        if new == page:
            continue
        if arguments.check:
            raise SystemExit(f"{path.name} is behind the JSON: run `python bench/report.py --write`.")
        path.write_text(new)


if __name__ == "__main__":
    main()
