"""Runs one example in a fresh process, and reads what it found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from parts.common.libraries import OURS, RIVAL
from parts.common.paths import EXAMPLES, ROOT

TOGETHER = {"several_processes": 2}
"""Examples that torchrun starts, and in how many processes."""
CHOICE = f'choices=["{OURS}", "{RIVAL}"]'


def names() -> list[str]:
    """The examples, by the names of their files."""
    return sorted(path.stem for path in EXAMPLES.glob("*.py"))


def has_both(name: str) -> bool:
    """Whether an example can be run with torchdiffeq."""
    return CHOICE in (EXAMPLES / f"{name}.py").read_text()


def run(name: str, library: str, picture: Path, *, short: bool, threads: int) -> dict[str, Any]:
    """What an example found with a library, and the seconds that the whole program took; or {"failed": reason}."""
    command = [sys.executable]
    if name in TOGETHER:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(TOGETHER[name])]
    command += [str(EXAMPLES / f"{name}.py"), "--out", str(picture), *(["--short"] if short else [])]
    if library != OURS:
        command += ["--library", library]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads), "MPLBACKEND": "Agg"}
    begun = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    if ended.returncode != 0:
        return {"failed": (ended.stderr.strip().splitlines() or [f"ended by {ended.returncode}"])[-1]}
    whole = time.perf_counter() - begun
    shrink(picture)
    return read(ended.stdout) | {"whole_seconds": whole}


def shrink(picture: Path) -> None:
    """Writes a picture again with 64 colours: a third of its size, and nothing to see of it."""
    from PIL import Image  # matplotlib needs it, too

    Image.open(picture).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)


def read(output: str) -> dict[str, float]:
    """The numbers of the line `found: NAME=NUMBER ...`."""
    line = next(line for line in reversed(output.splitlines()) if line.startswith("found: "))
    return {name: float(number) for name, number in re.findall(r"(\w+)=(\S+)", line)}
