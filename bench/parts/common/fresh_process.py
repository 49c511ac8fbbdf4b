"""Cells that are measured in a process of their own: memory.py says why memory needs one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from parts.common.paths import PARTS, environment
from parts.common.peak_memory import MALLOC_ENVIRONMENT


def measured(program: str, *, limit: float | None = None, **options: Any) -> dict[str, Any]:
    """The JSON that the last line of a program below parts/ holds; `failed`, with the reason, where it has none.
    limit: in seconds."""
    command = [sys.executable, str(PARTS / program)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, env=environment() | MALLOC_ENVIRONMENT, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"did not end within {limit:g} s"}
    if run.returncode == 0:
        return json.loads(run.stdout.splitlines()[-1])
    lines = run.stderr.strip().splitlines()
    return {"failed": lines[-1] if lines else f"ended by signal {-run.returncode}, most likely for lack of memory"}
