"""Tables and sentences from the JSON of the benchmarks, and the pages that show them.

    python bench/report.py            prints every block
    python bench/report.py --write    fills the blocks between `<!-- bench:NAME -->` and `<!-- /bench -->`
    python bench/report.py --check    fails where a page does not show what the JSON says

Blocks: `memory`, `speed`, `gradients`, `endurance`, `stiff`, `kernels`, `solve`, `device-loop` and `gpu` (command,
machine and commit; sentence, table), and `memory-short` and `speed-short` for the first page; pages: README.md,
bench/README.md, bench/results/README.md, docs/stiff.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from libraries import OURS, RIVAL
from report_device_loop import device_loop_block
from report_endurance import endurance_block
from report_gpu import gpu_block, kernels_block, solve_block
from report_gradients import gradients_block
from report_memory import memory_block, memory_short
from report_stiff import stiff_block
from tables import Result, Rows, evaluations, markdown, provenance, spread, target

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE / "results"
PAGES = (HERE.parent / "README.md", HERE / "README.md", PUBLISHED / "README.md", HERE.parent / "docs" / "stiff.md")
BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


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
    "endurance": ("endurance", endurance_block),
    "stiff": ("stiff", stiff_block),
    "kernels": ("kernels", kernels_block),
    "solve": ("solve", solve_block),
    "device-loop": ("device_loop", device_loop_block),
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


def write_pages(folder: Path = PUBLISHED) -> list[Path]:
    """Puts the tables of that folder's JSON into the pages; those that changed."""
    new = {path: filled(path.read_text(), folder) for path in PAGES}
    changed = [path for path in PAGES if new[path] != path.read_text()]
    for path in changed:
        path.write_text(new[path])
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=PUBLISHED, help="folder of the JSON")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        print("\n\n".join(block(name, arguments.results) for name in BLOCKS))
        return
    if arguments.write:
        write_pages(arguments.results)
    behind = [path.name for path in PAGES if filled(path.read_text(), arguments.results) != path.read_text()]
    if behind:
        raise SystemExit(f"{', '.join(behind)} is behind the JSON: run `python bench/report.py --write`.")


if __name__ == "__main__":
    main()
