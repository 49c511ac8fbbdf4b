"""Runs a process with a time limit, and describes its outcome in lines."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from parts.common.paths import ROOT
from parts.gpu.items import Item

GIVE_UP = 10.0  # seconds after its limit; a process that SIGKILL has not ended by then is given up
LENGTH, NAMED = 300, 8  # largest length of a line, and largest number of failed tests named below it
OK, FAILED, SKIPPED, STOPPED = "ok", "FAILED", "skipped", "stopped"
CHECK = re.compile(rf"^({OK}|{FAILED}) ([\w-]+): (.*)$", re.MULTILINE)  # a line of smoke.py
COUNTS = re.compile(r"\b\d+ (?:passed|failed|errors?|skipped)\b.* in [\d.]+s")  # of pytest's last line


class Line(NamedTuple):
    """The outcome of an item or a check.

    outcome: skipped if something that it needs is not installed; stopped if the deadline came before its start or end.
    more: the failed tests.
    """

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
    """How a process ended. status: None if the time limit ended it."""

    status: int | None
    seconds: float
    log: str


def ran(command: Sequence[str | Path], limit: float, log: Path, environment: Mapping[str, str]) -> Ended:
    """Runs a command in the checkout, for `limit` seconds at most; its output goes to the log."""
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
    """A line for each check: its own line, or the reason why it has none. bad: the outcome of checks without a line."""
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
    """The line of tests or of a benchmark. bad: its outcome if it failed."""
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
    """The failed tests in pytest's summary; if it was stopped before the summary, those in its lines so far."""
    summary = [line for line in log if re.match(r"(FAILED|ERROR) tests/", line)]
    found = summary or [line for line in log if "tests/" in line and re.search(r"\b(FAILED|ERROR)\b", line)]
    more = [f"and {len(found) - NAMED} more, in the log"] if len(found) > NAMED else []
    return (*found[:NAMED], *more)


def how(ended: Ended) -> str:
    """How a process failed, and the most informative line of its log."""
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
