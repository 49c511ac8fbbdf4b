"""The folders of the project that the benchmarks read and write."""

from __future__ import annotations

import os
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2]
ROOT = BENCH.parent
PARTS = BENCH / "parts"
PUBLISHED = BENCH / "results"
"""The results that the pages show."""
EXAMPLES = ROOT / "examples"
PICTURES = ROOT / "docs" / "images" / "examples"
"""The pictures of the examples that the pages show."""


def environment() -> dict[str, str]:
    """Environment for a process that is started by the path of a file in parts/: it finds the package `parts`."""
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), inherited] if inherited else [str(BENCH)])}
