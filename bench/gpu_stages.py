"""The stages of gpu.sh: runs one process after another until a deadline, and prints a line for what came of each.

    python bench/gpu_stages.py STAGE... [--deadline SECONDS] [--diffrax] [--out FOLDER]      # as gpu.sh calls it

Only the standard library is imported here: a broken torch, driver or kernel ends a process that is looked at from here.
gpu.json and gpu.tgz are written anew after every item, so that what there is comes back when a machine is taken away.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from parts.common.paths import BENCH, PARTS, ROOT
from parts.gpu.carried import carried
from parts.gpu.items import BUDGETS, Item, installed, items

OUT = ROOT / "build" / "gpu"
RECORD_LIMIT = 60.0  # seconds
SAVING = 3.0  # seconds before the deadline in which nothing runs: files are written
LEAST = 5.0  # no item begins with less
GIVE_UP = 10.0  # so long after its limit a process is left behind that not even SIGKILL ends
LENGTH, NAMED = 300, 8  # letters of a line, and failed tests that are named below one
OK, FAILED, SKIPPED, STOPPED = "ok", "FAILED", "skipped", "stopped"
CHECK = re.compile(rf"^({OK}|{FAILED}) ([\w-]+): (.*)$", re.MULTILINE)  # a line of smoke.py
COUNTS = re.compile(r"\b\d+ (?:passed|failed|errors?|skipped)\b.* in [\d.]+s")  # of pytest's last line


class Line(NamedTuple):
    """What came of an item or a check. outcome: skipped, if something that it needs is not installed; stopped, if it
    was to begin or to end after the deadline. more: failed tests."""

    stage: str
    name: str
    outcome: str
    seconds: float
    detail: str
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        first = f"{self.outcome} {self.name} ({self.seconds:.0f} s): {self.detail}"
        return "\n    ".join(line[:LENGTH] for line in (first, *self.more))


class Ended(NamedTuple):
    """How a process ended. status: None where its limit ended it."""

    status: int | None
    seconds: float
    log: str


class Session:
    """A call of gpu.sh. work: a folder for this call alone."""

    def __init__(self, out: Path, work: Path, deadline: float, machine: Mapping[str, Any]) -> None:
        self.out, self.machine = out, machine
        self.deadline = deadline  # as time.monotonic says it
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
        """An item, and its lines."""
        self.add(*self._lines(stage, item))

    def add(self, *lines: Line) -> None:
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
        """Nothing failed, and nothing was stopped."""
        return not any(line.outcome in (FAILED, STOPPED) for line in self.lines)

    def save(self) -> None:
        """Writes gpu.json and gpu.tgz, whole or not at all."""
        rows = {}
        for path in sorted(self.results.glob("*.json")):
            with contextlib.suppress(ValueError):  # its writer was stopped
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


# ---- one process


def ran(command: Sequence[str | Path], limit: float, log: Path, environment: Mapping[str, str]) -> Ended:
    """Runs a command in the checkout, for so many seconds at most."""
    begun = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            ["timeout", "-k", "2", f"{limit:.2f}", *map(str, command)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            status: int | None = process.wait(limit + GIVE_UP)
        except subprocess.TimeoutExpired:
            status = None
    seconds = time.monotonic() - begun
    if seconds >= limit and status in (124, 128 + signal.SIGKILL, -signal.SIGKILL):
        status = None
    return Ended(status, seconds, log.read_text(errors="replace"))


def of_checks(stage: str, item: Item, ended: Ended, bad: str) -> list[Line]:
    """A line a check: its own, or why there is none. bad: the outcome of the check that the process ended in."""
    told = {name: (outcome, detail) for outcome, name, detail in CHECK.findall(ended.log)}
    missing = [name for name in item.checks if name not in told]
    lines = []
    for name in item.checks:
        if name in told:
            outcome, detail = told[name]
        elif name == missing[0]:
            outcome, detail = bad, how(ended)
        else:
            outcome, detail = bad, f"not reached, because of {missing[0]}"
        lines.append(Line(stage, name, outcome, ended.seconds / len(item.checks), detail))
    return lines


def of_process(stage: str, item: Item, ended: Ended, bad: str) -> Line:
    """The line of tests or of a benchmark. bad: its outcome if it did not end well."""
    log = ended.log.splitlines()
    if "pytest" in item.needs:
        counts = [found[0] for line in log if (found := COUNTS.search(line))]
        good = ended.status == 0 and bool(counts) and "passed" in counts[-1]
        done = sum(" PASSED" in line for line in log)
        detail = counts[-1] if counts and ended.status is not None else f"{how(ended)}; {done} had passed"
        return Line(stage, item.name, OK if good else bad, ended.seconds, detail, failed_tests(log))
    if ended.status != 0:
        return Line(stage, item.name, bad, ended.seconds, how(ended))
    said = [line for line in log if line.strip() and not line.startswith("Written: ")]
    return Line(stage, item.name, OK, ended.seconds, said[-1] if said else "")


def failed_tests(log: Sequence[str]) -> tuple[str, ...]:
    """Those of pytest's summary; without one (it was stopped) those of its lines until then."""
    summary = [line for line in log if re.match(r"(FAILED|ERROR) tests/", line)]
    found = summary or [line for line in log if "tests/" in line and re.search(r"\b(FAILED|ERROR)\b", line)]
    more = [f"and {len(found) - NAMED} more, in the log"] if len(found) > NAMED else []
    return (*found[:NAMED], *more)


def how(ended: Ended) -> str:
    """How a process ended that did not end well, and the line of its log that says most."""
    lines = [line.strip() for line in ended.log.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"[Ee]rror\b|Fatal", line)] or lines or ["it printed nothing"]
    number = None
    if ended.status is None:
        end = f"stopped after {ended.seconds:.0f} s"
    else:
        number = -ended.status if ended.status < 0 else ended.status - 128
        end = f"exit status {ended.status}"
    if number is not None and number in set(signal.Signals):
        end = f"ended by {signal.Signals(number).name}"
    return f"{end}: {telling[-1]}"


# ---- before anything runs


def asked(work: Path) -> dict[str, Any]:
    """What gpu_record.py says of the machine; where it finds no GPU, the end of the program and a sentence."""
    path = os.pathsep.join(filter(None, [str(BENCH), os.environ.get("PYTHONPATH")]))
    record = [sys.executable, PARTS / "gpu" / "record.py"]
    found = ran(record, RECORD_LIMIT, work / "record.txt", {**os.environ, "PYTHONPATH": path})
    lines = found.log.strip().splitlines() or ["nothing was printed"]
    if found.status is None:
        raise SystemExit(f"torch did not say within {found.seconds:.0f} s which GPU there is: does nvidia-smi answer?")
    if found.status != 0:
        raise SystemExit(f"{sys.executable}: {lines[-1]} (PYTHON=... bench/gpu.sh names another interpreter.)")
    return json.loads(lines[-1])


def put_in_place(machine: Mapping[str, Any]) -> None:
    """Copies the carried module into the package. Where anything is missing or was compiled from other sources, the
    end of the program and a sentence."""
    python, torch = ".".join(machine["python"].split(".")[:2]), machine["torch"].partition("+")[0]
    carry = carried(python, torch, machine["capability"])
    again = (
        f"Run `python bench/build_for_gpu.py --python {python} --torch {torch} --arch {machine['capability']}` where "
        f"the project is developed, and carry {shown(carry)}."
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
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def digest() -> str:
    """That of csrc/, as the build notes it."""
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
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help=f"of the whole call (default: {budgets})")
    parser.add_argument("--diffrax", action="store_true", help="measure diffrax too, last")
    about_out = "of gpu.json and gpu.tgz (default: build/gpu)"
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
