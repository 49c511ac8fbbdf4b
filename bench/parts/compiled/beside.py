"""An older checkout of node_cuda in a second process, whose eager solves are timed in turn with those of this one.

python -m parts.compiled.beside    reads lines "case<tab>pass" and answers with the CPU seconds of one run
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from parts.common.paths import BENCH
from parts.common.timing import cpu_seconds
from parts.compiled.cases import CASES, QUICK
from parts.compiled.peers import Contestant, by_us


class Before:
    """The second process. checkout: the root of the older checkout, such as a git worktree."""

    def __init__(self, checkout: Path, threads: int) -> None:
        if not (checkout / "node_cuda" / "__init__.py").is_file():
            raise SystemExit(f"--before needs a checkout of node_cuda; {checkout} has no node_cuda/__init__.py.")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "parts.compiled.beside", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(checkout), str(BENCH)))},
            cwd=checkout,
        )

    def contestant(self, case: str, timed: str) -> Callable[[], float]:
        """A function that times one run of this case there."""
        run = lambda: self._asked(f"{case}\t{timed}")  # noqa: E731
        run()  # a first run, as all contestants have
        return run

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _asked(self, line: str) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


def answer() -> None:
    """The program of the second process."""
    torch.set_num_threads(int(sys.argv[1]))
    cases = {case.name: case for case in (*CASES, *QUICK)}
    contestants: dict[str, Contestant] = {}
    for line in sys.stdin:
        name, timed = line.rstrip("\n").split("\t")
        if line not in contestants:
            contestants[line] = by_us(cases[name], timed, compiled=False)
        print(cpu_seconds(contestants[line], torch.device("cpu")), flush=True)


if __name__ == "__main__":
    answer()
