"""What all programs share: options, the device, the head of the JSON, and the last line."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from parts import pages
from parts.common import machine
from parts.common.paths import PUBLISHED, ROOT
from parts.common.tables import Result

LOCAL = ROOT / "build" / "bench"
"""The folder of the results without --publish; git ignores it."""


def parser(about: str | None, *, quick: str, out: str = "folder of the JSON") -> argparse.ArgumentParser:
    """A parser with --device, --threads, --out, --publish and --quick.

    about: the docstring of the program. quick, out: help texts of these options.
    """
    common = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    common.add_argument("--threads", type=int, default=1, help="number of threads of torch; 1 varies least (default)")
    add_out(common, out)
    common.add_argument("--quick", action="store_true", help=f"{quick}; only to see that the program runs")
    return common


def add_out(parser: argparse.ArgumentParser, about: str = "folder of the JSON") -> None:
    """Adds --out and --publish, which exclude each other. about: help text of --out."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, default=LOCAL, help=f"{about} (default: build/bench)")
    about_publish = "write into bench/results/ and fill the tables of the pages"
    where.add_argument("--publish", action="store_const", dest="out", const=PUBLISHED, help=about_publish)


def begin(arguments: argparse.Namespace) -> torch.device:
    """Sets the threads of torch and returns the device. Raises SystemExit if there is no such device."""
    if arguments.quick and arguments.out == PUBLISHED:
        raise SystemExit("The numbers of --quick are not for the pages: leave out --quick or --publish.")
    torch.set_num_threads(arguments.threads)
    return machine.chosen(arguments.device)


def new_result(benchmark: str, device: torch.device) -> Result:
    """The first entries of the JSON of every benchmark."""
    return {"benchmark": benchmark, "device": device.type, "machine": machine.describe(device)}


def written(files: object, folder: Path) -> str:
    """The last line of a program, which names the files. In bench/results/ the pages are filled first."""
    if folder != PUBLISHED:
        return f"Written: {files}"
    changed = [path.relative_to(ROOT) for path in pages.write_pages()]
    return f"Written: {files}; tables changed: {', '.join(map(str, changed)) or 'none'}"
