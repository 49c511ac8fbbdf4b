"""The cells of calls and memory of device_loop.py: the arguments of each, and its row."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from parts.common.fresh_process import measured
from parts.common.modes import ADJOINT, DISCRETE
from parts.device_loop.cell import FORWARD

CELL = "device_loop/cell.py"
CELL_LIMIT = 60.0  # seconds; a loop on the GPU that never ends fails only in its row


class Cell(NamedTuple):
    """The arguments of cell.py. allowed: the promised largest number of waits of the host, or None."""

    what: str
    loop: str
    gradient: str
    steps: int
    rows: int
    allowed: int | None = None

    @property
    def name(self) -> str:
        """The name for the progress output."""
        return f"{self.what}: {self.gradient}, {self.loop}, {self.steps} steps"

    def measured(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """The row, from a fresh process."""
        asked = {name: value for name, value in self._asdict().items() if name != "allowed"}
        row = {
            **self._asdict(),
            **measured(CELL, limit=CELL_LIMIT, **asked, threads=arguments.threads, device=arguments.device),
        }
        told = "calls" in row and self.allowed is not None
        return row | {"met": row["calls"]["waits"] <= self.allowed if told else None}


# The host waits once, for the status at the end; not at all if deferred. States have 64 columns; 16384 rows are 4 MiB.
CALLS = (
    Cell("calls", "host", FORWARD, steps=16, rows=128),
    Cell("calls", "batches", FORWARD, steps=16, rows=128),
    Cell("calls", "while", FORWARD, steps=16, rows=128, allowed=1),
    Cell("calls", "while, deferred", FORWARD, steps=16, rows=128, allowed=0),
    Cell("calls", "while, deferred", ADJOINT, steps=16, rows=128, allowed=0),
    Cell("calls", "while", DISCRETE, steps=16, rows=128),
)
MEMORY = tuple(
    Cell("memory", loop, gradient, steps, rows=16384)
    for loop, gradient in (("while", FORWARD), ("batches", FORWARD), ("while", ADJOINT), ("while", DISCRETE))
    for steps in (10, 1000)
)
