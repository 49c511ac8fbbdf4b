"""What the programs here begin with: their common arguments, the device, and the head of the JSON that they write."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from parts import pages
from parts.common import machine
from parts.common.paths import PUBLISHED, ROOT
from parts.common.tables import Result

LOCAL = ROOT / "build" / "bench"
"""Where results go: into a folder that git ignores, or with --publish to those that the pages show."""


def parser(about: str | None, *, quick: str, out: str = "folder of the JSON") -> argparse.ArgumentParser:
    """With --device, --threads, --out and --quick. about: the program's docstring; quick, out: their help."""
    common = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    common.add_argument("--threads", type=int, default=1, help="torch's threads; 1 is the steadiest (default)")
    add_out(common, out)
    common.add_argument("--quick", action="store_true", help=f"{quick}: shows that the program runs")
    return common


def add_out(parser: argparse.ArgumentParser, about: str = "folder of the JSON") -> None:
    """Adds --out and --publish, of which one may be given. about: what --out names."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, default=LOCAL, help=f"{about} (default: build/bench)")
    about_publish = "write into bench/results/, and the tables of the pages from there"
    where.add_argument("--publish", action="store_const", dest="out", const=PUBLISHED, help=about_publish)


def begin(arguments: argparse.Namespace) -> torch.device:
    """Sets torch's threads; the device to measure on, or the end of the program where there is none."""
    if arguments.quick and arguments.out == PUBLISHED:
        raise SystemExit("--quick shows that a program runs; its numbers are not for the pages. Drop it, or --publish.")
    torch.set_num_threads(arguments.threads)
    return machine.chosen(arguments.device)


def new_result(benchmark: str, device: torch.device) -> Result:
    """What the JSON of every benchmark begins with."""
    return {"benchmark": benchmark, "device": device.type, "machine": machine.describe(device)}


def written(files: object, folder: Path) -> str:
    """The last line of a program: what was written. Where that is published, the pages get their tables first."""
    if folder != PUBLISHED:
        return f"Written: {files}"
    changed = [path.relative_to(ROOT) for path in pages.write_pages()]
    return f"Written: {files}; tables changed: {', '.join(map(str, changed)) or 'none'}"
