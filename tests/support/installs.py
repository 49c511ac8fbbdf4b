"""Copies the tree, and builds and installs the copy by pip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from node_cuda.extension import build

ROOT = Path(__file__).resolve().parents[2]
DECIDING = ("NODE_CUDA_BUILD", "FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CXX", "PYTHONPATH")

SETTINGS = {
    "python": {"NODE_CUDA_BUILD": "python"},
    "cpu": {"NODE_CUDA_BUILD": "cpu"},
    # Other tests check the code that nvcc generates. Here it need not be fast.
    "cuda": {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0", "NVCC_APPEND_FLAGS": "-Xptxas=-O0 -Xcicc=-O0"},
}


def clean(**environ: str) -> dict[str, str]:
    """Return this process's environment without the variables that decide a build, and with the given ones."""
    return {**{key: value for key, value in os.environ.items() if key not in DECIDING}, **environ}


def checkout(folder: Path, csrc: Mapping[str, str] | None = None) -> Path:
    """Copy the tree, so that no build leaves files in it. If files are given, they replace those of csrc/."""
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    products = shutil.ignore_patterns("__pycache__", "*.so", build.NOTE)
    shutil.copytree(ROOT / "node_cuda", folder / "node_cuda", ignore=products)
    if csrc is None:
        shutil.copytree(ROOT / "csrc", folder / "csrc")
    else:
        write_csrc(folder / "csrc", csrc)
    return folder


def write_csrc(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file, by its path in the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*command: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], cwd=cwd, env=clean(**environ), capture_output=True, text=True)


def pip(source: Path, target: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `pip install --no-build-isolation` into a new folder, without a network."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", target]
    python_m_pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    return run(*python_m_pip, "install", "-v", *options, source, cwd=source.parent, **environ)
