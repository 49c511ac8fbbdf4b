"""`python -m node_cuda run train.py args`: runs a program with this package in the place of torchdiffeq."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import node_cuda
from node_cuda.as_torchdiffeq.install import install_as_torchdiffeq
from node_cuda.as_torchdiffeq.startup import VARIABLE

STARTUP = Path(__file__).resolve().parent / "startup"
"""The folder with `sitecustomize.py`, which Python runs when a process starts."""


def run(arguments: Sequence[str]) -> None:
    """Run `[program.py, *args]` or `["-m", module, *args]` as `python` does, with `torchdiffeq` being node_cuda.

    Processes that the program starts do the same: they read PYTHONPATH and the variable NODE_CUDA_AS_TORCHDIFFEQ.
    """
    install_as_torchdiffeq()
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STARTUP), *([before] if before else [])])
    os.environ[VARIABLE] = str(Path(node_cuda.__file__).resolve().parent.parent)
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    program = Path(arguments[0])
    sys.argv = list(arguments)
    sys.path[0] = str(program.resolve().parent)
    runpy.run_path(str(program), run_name="__main__")
