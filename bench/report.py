"""Tables and sentences from the JSON of the benchmarks, and the pages that show them.

    python bench/report.py            prints every block
    python bench/report.py --write    fills the blocks between `<!-- bench:NAME -->` and `<!-- /bench -->`
    python bench/report.py --check    fails where a page does not show what the JSON says

Blocks: `memory`, `speed`, `gradients`, `kernels`, `solve` and `gpu` (command, machine and commit; sentence, table),
and `memory-short` and `speed-short` for the first page; pages: README.md, bench/README.md, bench/results/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from libraries import FUNCTIONS, OURS, RIVAL
from report_gpu import gpu_block, kernels_block, solve_block
from report_gradients import gradients_block
from tables import Result, Rows, evaluations, markdown, provenance, spread, target

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md", HERE / "README.md", HERE / "results" / "README.md")
NOT_TRAINED = "Not trained: scikit-learn, whose digits it takes, is not installed."
BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


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
    ours = result["cells"][0]["library"]  # the kernels where they are measured, which come first
    backprop, adjoint = lines[ours, "odeint"], lines[ours, "odeint_adjoint"]
    common = sorted(set(backprop) & set(adjoint))
    if len(common) < 2:
        return "Too few cells could be measured to say how memory grows with the number of solver steps."
    first, last = common[0], common[-1]
    slower = times[ours, "odeint_adjoint"][last] / times[ours, "odeint"][last]
    pace = f"{slower:.1f} times the time" if slower >= 1 else f"{1 / slower:.1f} times less time"
    return (
        f"From N = {first} to {last} solver steps, the peak memory of a training step grows as "
        f"N^{slope(backprop):.2f} with backpropagation through the solver ({backprop[first]:.0f} to "
        f"{backprop[last]:.0f} MiB) and as N^{slope(adjoint):.2f} with the adjoint ({adjoint[first]:.0f} to "
        f"{adjoint[last]:.0f} MiB), which at N = {last} takes {backprop[last] / adjoint[last]:.0f} times less "
        f"memory and {pace}."
    )


def training_sentence(result: Result) -> str:
    """The accuracy reached, or that there was no training."""
    training = result["training"]
    if training is None:
        return NOT_TRAINED
    return (
        f"Trained with `odeint_adjoint` to a test accuracy of {training['test_accuracy']:.3f} "
        f"in {training['seconds']:.0f} s."
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
    settings = result["settings"]
    return "\n\n".join(
        [
            provenance(result),
            f"{training_sentence(result)} {result['sentence']}",
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
                target(row),
                f"{evaluations(ours)},\n{evaluations(theirs)}",
                f"{ours['error']:.0e},\n{theirs['error']:.0e}",
            ]
        )
    return rows


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


BLOCKS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "memory": ("memory_vs_steps", memory_block),
    "memory-short": ("memory_vs_steps", memory_short),
    "speed": ("speed", speed_block),
    "speed-short": ("speed", speed_short),
    "gradients": ("gradients", gradients_block),
    "kernels": ("kernels", kernels_block),
    "solve": ("solve", solve_block),
    "gpu": ("gpu", gpu_block),
}


def block(name: str, folder: Path) -> str:
    """The text of a block: that of every device's result in turn."""
    if name not in BLOCKS:
        raise SystemExit(f"There is no block `bench:{name}`; there are {', '.join(sorted(BLOCKS))}.")
    stem, render = BLOCKS[name]
    results = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{stem}*.json"))]
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
