"""The folder in which build_for_gpu.py puts the compiled module and gpu_stages.py finds it."""

from __future__ import annotations

from pathlib import Path

from parts.common.paths import ROOT


def carried(python: str, torch: str, arch: str) -> Path:
    """The folder for these versions, such as "3.12", "2.11.0" and "9.0"; torch's third number does not count."""
    major, minor = torch.split(".")[:2]
    return ROOT / "build" / f"gpu-py{python.replace('.', '')}-torch{major}.{minor}-sm{arch.replace('.', '')}" / "carry"
