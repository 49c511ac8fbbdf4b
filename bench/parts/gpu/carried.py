"""Where the module that build_for_gpu.py compiles lies, for gpu_stages.py to find."""

from __future__ import annotations

from pathlib import Path

from parts.common.paths import ROOT


def carried(python: str, torch: str, arch: str) -> Path:
    """The folder of the results, for "3.12", "2.11.0" and "9.0"; of each as many numbers as matter."""
    major, minor = torch.split(".")[:2]
    return ROOT / "build" / f"gpu-py{python.replace('.', '')}-torch{major}.{minor}-sm{arch.replace('.', '')}" / "carry"
