"""Writes the tables and sentences of the pages from the JSON of the benchmarks.

    python bench/report.py            prints every block
    python bench/report.py --write    fills the blocks between `<!-- bench:NAME -->` and `<!-- /bench -->`
    python bench/report.py --check    fails if a page does not show what the JSON says

The blocks `memory`, `speed`, `gradients`, `endurance`, `kernels`, `solve`, `device-loop` and `gpu` have the command,
machine and commit, a sentence and a table; `memory-short` and `speed-short` are for the project's README. The pages are
README.md, bench/README.md and bench/results/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from parts import pages
from parts.common.paths import PUBLISHED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=PUBLISHED, help="folder of the JSON")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        print("\n\n".join(pages.block(name, arguments.results) for name in pages.BLOCKS))
        return
    if arguments.write:
        pages.write_pages(arguments.results)
    behind = [
        path.name for path in pages.PAGES if pages.filled(path.read_text(), arguments.results) != path.read_text()
    ]
    if behind:
        raise SystemExit(f"{', '.join(behind)} is behind the JSON: run `python bench/report.py --write`.")


if __name__ == "__main__":
    main()
