"""What the programs here begin with: their common arguments, the device, and the head of the JSON that they write."""

from __future__ import annotations

import argparse
from pathlib import Path

import machine
import torch
from tables import Result

RESULTS = Path(__file__).resolve().parent / "results"


def parser(about: str | None, *, quick: str, out: str = "folder of the JSON") -> argparse.ArgumentParser:
    """With --device, --threads, --out and --quick. about: the program's docstring; quick, out: their help."""
    common = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    common.add_argument("--threads", type=int, default=1, help="torch's threads; 1 is the steadiest (default)")
    common.add_argument("--out", type=Path, default=RESULTS, help=out)
    common.add_argument("--quick", action="store_true", help=f"{quick}: shows that the program runs")
    return common


def begin(arguments: argparse.Namespace) -> torch.device:
    """Sets torch's threads; the device to measure on, or the end of the program where there is none."""
    torch.set_num_threads(arguments.threads)
    return machine.chosen(arguments.device)


def new_result(benchmark: str, device: torch.device) -> Result:
    """What the JSON of every benchmark begins with."""
    return {"benchmark": benchmark, "device": device.type, "machine": machine.describe(device)}
