"""Runs the stages of gpu.sh: one process after another until a deadline, with a line for the outcome of each.

    python bench/gpu_stages.py STAGE... [--deadline SECONDS] [--diffrax] [--out FOLDER]      # as gpu.sh calls it

Only the standard library is imported here, so that a broken torch, driver or kernel ends an item and not this program.
gpu.json and gpu.tgz are written again after every item, so that the results so far are saved if the machine goes away.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parts.common.paths import PARTS, ROOT, environment
from parts.gpu.carried import carried
from parts.gpu.items import BUDGETS, Item, installed, items
from parts.gpu.processes import FAILED, OK, SKIPPED, STOPPED, Line, of_checks, of_process, ran

OUT = ROOT / "build" / "gpu"
RECORD_LIMIT = 60.0  # seconds
SAVING = 3.0  # seconds before the deadline, for writing the files; no item runs then
LEAST = 5.0  # seconds; an item does not start with less time


class Session:
    """A call of gpu.sh. work: a temporary folder for this call."""

    def __init__(self, out: Path, work: Path, deadline: float, machine: Mapping[str, Any]) -> None:
        self.out, self.machine = out, machine
        self.deadline = deadline  # a time of time.monotonic
        self.results, self.logs, self.scratch = (work / name for name in ("results", "logs", "scratch"))
        for folder in (out, self.results, self.logs, self.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        self.lines: list[Line] = []
        self.environment = {
            **os.environ,
            "NODE_CUDA_BUILD": "python",  # nothing is compiled on first use
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }

    def run(self, stage: str, item: Item) -> None:
        """Runs an item and adds its lines."""
        self.add(*self._lines(stage, item))

    def add(self, *lines: Line) -> None:
        """Prints lines and saves them."""
        for line in lines:
            print(line)
        self.lines += lines
        self.save()

    def _lines(self, stage: str, item: Item) -> list[Line]:
        lacking = [module for module in item.needs if not installed(module)]
        if shutil.which(item.command[0]) is None:
            lacking.append(str(item.command[0]))
        if lacking:
            return [Line(stage, item.name, SKIPPED, 0.0, f"not installed: {', '.join(lacking)}")]
        left = self.deadline - SAVING - time.monotonic()
        if left < LEAST:
            return [Line(stage, item.name, STOPPED, 0.0, "not begun, because of the deadline")]
        limit = min(item.seconds, left)
        print(f"--- {stage}: {item.name}, at most {limit:.0f} s")
        log = self.logs / f"{stage}-{re.sub(r'[^A-Za-z0-9]+', '-', item.name)}.txt"
        ended = ran(item.command, limit, log, {**self.environment, **dict(item.environment)})
        what = STOPPED if ended.status is None and limit < item.seconds else FAILED
        found = of_checks(stage, item, ended, what) if item.checks else [of_process(stage, item, ended, what)]
        if any(line.outcome != OK for line in found):
            print(*ended.log.splitlines()[-8:], sep="\n")
        return found

    @property
    def good(self) -> bool:
        """Whether no line failed or was stopped."""
        return not any(line.outcome in (FAILED, STOPPED) for line in self.lines)

    def save(self) -> None:
        """Writes gpu.json and gpu.tgz. Each file is complete or stays as it was."""
        rows = {}
        for path in sorted(self.results.glob("*.json")):
            with contextlib.suppress(ValueError):  # the program was stopped while it wrote the file
                rows[path.name] = json.loads(path.read_text())
        found = {
            "benchmark": "gpu",
            "device": "cuda",
            "machine": self.machine,
            "lines": [line._asdict() for line in self.lines],
            "results": rows,
        }
        new = self.scratch / "new"
        new.write_text(json.dumps(found, indent=1) + "\n")
        shutil.move(new, self.out / "gpu.json")
        with tarfile.open(new, "w:gz") as tar:
            for folder in (self.logs, self.results):
                tar.add(folder, folder.name)
        shutil.move(new, self.out / "gpu.tgz")


# ---- before anything runs


def asked(work: Path) -> dict[str, Any]:
    """The record of the machine, from parts/gpu/record.py. Raises SystemExit if it finds no GPU."""
    record = [sys.executable, PARTS / "gpu" / "record.py"]
    found = ran(record, RECORD_LIMIT, work / "record.txt", environment())
    lines = found.log.strip().splitlines() or ["nothing was printed"]
    if found.status is None:
        raise SystemExit(f"torch did not name the GPU within {found.seconds:.0f} s. Check that nvidia-smi answers.")
    if found.status != 0:
        raise SystemExit(f"{sys.executable}: {lines[-1]} (For another interpreter: PYTHON=... bench/gpu.sh.)")
    return json.loads(lines[-1])


def put_in_place(machine: Mapping[str, Any]) -> None:
    """Copies the compiled module into the package.

    Raises SystemExit if a file is missing or the module was compiled from other sources.
    """
    python, torch = ".".join(machine["python"].split(".")[:2]), machine["torch"].partition("+")[0]
    carry = carried(python, torch, machine["capability"])
    again = (
        f"Run `python bench/build_for_gpu.py --python {python} --torch {torch} --arch {machine['capability']}` on "
        f"the machine where the project is developed, and copy {shown(carry)} to this one."
    )
    modules = sorted((carry / "node_cuda").glob("_C.*.so"))
    note = carry / "node_cuda" / "_build.json"
    for path in (*(modules or [carry / "node_cuda" / "_C.*.so"]), note):
        if not path.is_file():
            raise SystemExit(f"{shown(path)} is missing. {again}")
    if json.loads(note.read_text()).get("sources") != digest():
        raise SystemExit(f"{shown(carry)} was compiled from other sources than those in csrc/. {again}")
    for path in (*modules, note):
        shutil.copy(path, ROOT / "node_cuda")


def shown(path: Path) -> str:
    """A path relative to the checkout, if it lies there."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def digest() -> str:
    """The digest of csrc/, as the build computes it."""
    spec = importlib.util.spec_from_file_location("node_cuda_build", ROOT / "node_cuda" / "extension" / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = build
    spec.loader.exec_module(build)
    return build.digest(ROOT / "csrc")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description="See the head of bench/gpu.sh.")
    parser.add_argument("stages", nargs="+", metavar="STAGE", choices=BUDGETS, help=", ".join(BUDGETS))
    budgets = ", ".join(f"{name} {seconds}" for name, seconds in BUDGETS.items())
    parser.add_argument(
        "--deadline", type=float, metavar="SECONDS", help=f"time limit of the call (default: {budgets})"
    )
    parser.add_argument("--diffrax", action="store_true", help="measure diffrax too, last")
    about_out = "folder of gpu.json and gpu.tgz (default: build/gpu)"
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=about_out)
    return parser.parse_args()


def main() -> None:
    begun = time.monotonic()
    arguments = parse()
    stages = [stage for stage in BUDGETS if stage in arguments.stages]
    seconds = arguments.deadline or sum(BUDGETS[stage] for stage in stages)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        machine = asked(work) | {"command": " ".join(["bench/gpu.sh", *stages])}
        put_in_place(machine)
        print(f"{machine['device']}, driver {machine['driver']}, torch {machine['torch']}, commit {machine['commit']}")
        session = Session(arguments.out.resolve(), work, begun + seconds, machine)
        everything = items(session.results, session.scratch, diffrax=arguments.diffrax)
        for stage in stages:
            if stage != "smoke" and "smoke" in stages and not session.good:
                session.add(Line(stage, stage, SKIPPED, 0.0, "not begun: smoke must pass first"))
                continue
            for item in everything[stage]:
                session.run(stage, item)
    print("", *session.lines, sep="\n")
    outcomes = [line.outcome for line in session.lines]
    count = {outcome: outcomes.count(outcome) for outcome in (OK, FAILED, SKIPPED, STOPPED)}
    counted = ", ".join(f"{number} {outcome}" for outcome, number in count.items() if number)
    print(f"{counted}; {time.monotonic() - begun:.0f} s of {seconds:.0f}; {session.out}/gpu.json, gpu.tgz")
    sys.exit(bool(count[FAILED]))


if __name__ == "__main__":
    main()
