"""Writes gpu.json: machine, GPU, versions, commit, and how the stages of gpu.sh went. gpu.sh runs it at its end.

python bench/gpu_record.py STAGES DIRECTORY    # STAGES: a line a stage, stage, result, seconds, note, by tabs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import machine
import torch


def record(stages: str, device: torch.device) -> dict[str, Any]:
    """What goes into gpu.json."""
    fields = [line.split("\t") for line in stages.splitlines()]
    return {
        "benchmark": "gpu",
        "device": device.type,
        "machine": machine.describe(device) | {"command": "bench/gpu.sh"},
        "stages": [
            {"stage": stage, "result": result, "seconds": int(seconds), "note": note}
            for stage, result, seconds, note in fields
        ],
    }


def main() -> None:
    stages, folder = map(Path, sys.argv[1:])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (folder / "gpu.json").write_text(json.dumps(record(stages.read_text(), device), indent=1) + "\n")


if __name__ == "__main__":
    main()
