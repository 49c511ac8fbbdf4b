"""The folders of the project that the benchmarks read and write."""

from __future__ import annotations

from pathlib import Path

BENCH = Path(__file__).resolve().parents[2]
ROOT = BENCH.parent
PARTS = BENCH / "parts"
PUBLISHED = BENCH / "results"
"""The results that the pages show."""
