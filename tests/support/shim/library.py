"""Compiles csrc/ with the shim for the CPU: the module that solves use."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from ctypes import Structure, c_int, c_int32, c_uint64, c_void_p
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
BUILDS = ROOT / "build" / "tests"

MODULE = "shim_C"
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off")


def sources() -> list[Path]:
    return sorted(CSRC.rglob("*.cu"))


def compile_with_shim(folder: Path, *flags: str, main: Path | None = None) -> Path:
    """Compile csrc/ with the shim into `folder`: a library that is also the Python module `MODULE`.

    With `main`, compile a program without Python. Runs two compilers at a time.
    """
    compiler = shutil.which("g++")
    assert compiler is not None
    common = [compiler, *FLAGS, *flags, "-fPIC", f"-I{HERE}", f"-I{CSRC}", "-DNODE_CUDA_WITH_KERNELS"]
    # Two units of about the same size. One unit for each file would compile the standard headers fifteen times.
    units = ["rk_", "rest"]
    for unit in units:
        wanted = [s for s in sources() if s.name.startswith("rk_") == (unit == "rk_")]
        (folder / f"{unit}.cpp").write_text("".join(f'#include "{s.relative_to(CSRC)}"\n' for s in wanted))
    paths = [*(folder / f"{unit}.cpp" for unit in units), main or HERE / "exports.cpp", HERE / "cuda_graphs.cpp"]
    with_python: list[str] = []
    if main is not None:
        paths.append(CSRC / "graphs" / "graphs.cpp")
    else:
        paths += sorted(CSRC.rglob("*.cpp"))
        # the pybind11 headers of torch
        headers = (sysconfig.get_paths()["include"], Path(torch.__file__).parent / "include")
        with_python += [f"-isystem{path}" for path in headers]
        with_python += [f"-DTORCH_EXTENSION_NAME={MODULE}", '-DNODE_CUDA_ARCHS="shim"']
        with_python.append(f'-DNODE_CUDA_TORCH="{torch.__version__}"')
    compilers = []
    for i in range(0, len(paths), 2):
        pair = [
            subprocess.Popen(
                [*common, *with_python, "-c", str(p), "-o", str(folder / f"{p.stem}.o")],
                stderr=subprocess.PIPE,
                text=True,
            )
            for p in paths[i : i + 2]
        ]
        compilers += [(process.communicate()[1], process.returncode) for process in pair]
    assert not any(code for _, code in compilers), "".join(message for message, _ in compilers)
    result = folder / ("program" if main else f"{MODULE}.so")
    objects = [str(folder / f"{p.stem}.o") for p in paths]
    subprocess.run([*common, *([] if main else ["-shared"]), *objects, "-o", str(result), "-lpthread"], check=True)
    return result


def behind_shim(folder: Path) -> Path:
    """Return csrc/ as all tests of a session share it: with few blocks, so that small tensors also repeat the loops."""
    return compile_with_shim(folder, "-O0", "-DNODE_CUDA_MAX_BLOCKS=5")


def import_module(library: Path) -> ModuleType:
    """Import the library of `compile_with_shim` in the place of node_cuda._C: the plan and the launchers."""
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built(name: str, make: Callable[[Path], Path], settings: str = "") -> Path:
    """Return what `make` builds from csrc/ and the shim, in a folder that is kept until one of them changes.

    settings: further inputs of the build, as flags and the version of a compiler. If several test processes need it at
    once, one builds and the others wait.
    """
    digest = hashlib.sha256(f"{sys.version} {torch.__version__} {platform.platform()} {settings}".encode())
    for path in sorted([*CSRC.rglob("*"), *HERE.iterdir()]):
        if path.is_file():
            digest.update(os.path.relpath(path, HERE).encode() + path.read_bytes())
    folder = BUILDS / f"{name}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if not done.exists():
            done.write_text(make(folder).name)
        return folder / done.read_text()


class Launch(Structure):
    """struct Launch of csrc/launchers.h."""

    _fields_ = [("stream", c_void_p), ("device", c_int32), ("unused", c_int32)]


class Controls:
    """The functions that control the shim."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.shim_configure.argtypes = [c_uint64, c_int]
        self.lib.shim_launch_stream.restype = c_void_p
        self.configure()

    def configure(self, seed: int = 0, workers: int = 1) -> None:
        """Set the order of the blocks."""
        self.lib.shim_configure(seed, workers)
