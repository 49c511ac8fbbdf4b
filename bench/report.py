"""Writes the tables and sentences of the pages from the JSON of the benchmarks.

    python bench/report.py            prints every block
    python bench/report.py --write    fills the blocks between `<!-- bench:NAME -->` and `<!-- /bench -->`
    python bench/report.py --check    fails if a page does not show what the JSON says

The blocks have the command, machine and commit, and tables or sentences; those that end in `-short` are for the
project's README. A block without results says "Not measured yet." The pages are README.md, bench/README.md,
bench/results/README.md, docs/choose.md and docs/stiff.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from parts import pages
from parts.common.paths import PUBLISHED, ROOT


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
    if old := [str(path.relative_to(ROOT)) for path in pages.outdated(arguments.results)]:
        raise SystemExit(f"Not what the JSON says: {', '.join(old)}. Run `python bench/report.py --write`.")


if __name__ == "__main__":
    main()
