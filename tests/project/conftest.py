"""Installs the tree once for all tests of the project."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock  # torch depends on it
from installs import SETTINGS, checkout, pip, run


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Install this tree in one of the settings, once for all processes of the test run, and return the folder.

    pip makes a wheel from the source archive, unpacked, which must be complete, and installs that file. The wheel lies
    in wheel_{setting} beside the folder.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(setting: str) -> Path:
        target = shared / f"installed_{setting}"
        with FileLock(shared / f"{setting}.lock"):
            if not target.exists():
                source = checkout(shared / f"source_{setting}")
                done = run(sys.executable, "-m", "build", "--sdist", "--no-isolation", cwd=source)
                assert done.returncode == 0, done.stdout + done.stderr
                (archive,) = (source / "dist").iterdir()
                shutil.unpack_archive(archive, shared / f"unpacked_{setting}")
                (unpacked,) = (shared / f"unpacked_{setting}").iterdir()
                wheels = shared / f"wheel_{setting}"
                python_m_pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
                options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", wheels]
                done = run(*python_m_pip, "wheel", "-v", *options, unpacked, cwd=shared, **SETTINGS[setting])
                assert done.returncode == 0, done.stdout + done.stderr
                (wheel,) = wheels.iterdir()
                done = pip(wheel, target)
                assert done.returncode == 0, done.stdout + done.stderr
        return target

    return folder
