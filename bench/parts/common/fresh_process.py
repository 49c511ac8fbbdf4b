"""Starts the fresh processes (cells) that measure memory; peak_memory.py says why memory needs one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from parts.common.paths import PARTS, environment
from parts.common.peak_memory import MALLOC_ENVIRONMENT


def measured(program: str, *, limit: float | None = None, **options: Any) -> dict[str, Any]:
    """Runs a program below parts/ and returns the JSON in its last line, or {"failed": reason}.

    limit: seconds. options: the arguments of the program.
    """
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
