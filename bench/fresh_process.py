"""Cells that are measured in a process of their own: memory.py says why memory needs one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from memory import MALLOC_ENVIRONMENT

HERE = Path(__file__).resolve().parent


def measured(program: str, *, limit: float | None = None, **options: Any) -> dict[str, Any]:
    """The JSON that the last line of a program of this folder holds; `failed`, with the reason, where it has none.
    limit: in seconds."""
    command = [sys.executable, str(HERE / program)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, **MALLOC_ENVIRONMENT}
    try:
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"did not end within {limit:g} s"}
    if run.returncode == 0:
        return json.loads(run.stdout.splitlines()[-1])
    lines = run.stderr.strip().splitlines()
    return {"failed": lines[-1] if lines else f"ended by signal {-run.returncode}, most likely for lack of memory"}
