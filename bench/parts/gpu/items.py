"""What the stages of gpu.sh run: one process for each item, with its time limit, the most important first."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from parts.common.paths import ROOT

BUDGETS = {"smoke": 150, "prove": 150, "measure": 230}  # seconds, of each stage
KERNEL_TESTS, GRAPH_TESTS = "tests/kernels/test_kernels_shim.py", "tests/gpu/test_gpu_graphs.py"


class Item(NamedTuple):
    """A process.

    checks: the checks of smoke.py that it makes; each prints a line. needs: modules that must be installed.
    environment: variables that only this process has.
    """

    name: str
    seconds: float
    command: Sequence[str | Path]
    checks: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def items(results: Path, scratch: Path, *, diffrax: bool) -> dict[str, tuple[Item, ...]]:
    """The items of each stage. results: folder in which benchmarks write. scratch: folder of the tests."""

    def bench(name: str, seconds: float, script: str, *options: str, needs: tuple[str, ...] = ()) -> Item:
        return Item(name, seconds, (sys.executable, f"bench/{script}", *options, "--out", results), needs=needs)

    def tests(
        name: str, seconds: float, *arguments: str, jobs: int = 0, each: int, under: tuple[str, ...] = ()
    ) -> Item:
        return Item(name, seconds, (*under, *pytest(scratch / name, jobs, each), *arguments), needs=("pytest",))

    # Every kernel in one dtype, and no whole solves: they would take minutes under the sanitizer. Without torch's cache
    # every tensor is a separate allocation, so that an access beside it is found.
    memcheck = (sanitizer(), "--tool", "memcheck", "--error-exitcode", "1")
    every_kernel = "float32 and not solve"
    loop = "device_loop.py"
    memory = ("--device", "cuda", "--steps", "8", "64", "512", "--jobs", "8")
    measure = (
        bench("device-loop", 80, loop, "--only", "steps", "training", "solves", "--budget", "1.5"),
        bench("solve", 45, "solve.py", "--device", "cuda", "--budget", "1.5"),
        bench("memory", 60, "memory_vs_steps.py", *memory, needs=("rich",)),
        tests("memcheck", 45, "-k", every_kernel, KERNEL_TESTS, each=40, under=memcheck)._replace(
            environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        ),
        bench("calls-and-memory", 50, loop, "--only", "calls", "memory", "--jobs", "8"),
    )
    with_diffrax = bench(
        "diffrax", 60, loop, "--only", "solves", "--diffrax", "--budget", "1.5", needs=("diffrax", "jax")
    )
    return {
        "smoke": (
            smoke("report", limit=25),
            smoke("dopri5", "rk4", "adjoint"),
            smoke("batches"),
            smoke("while"),
            smoke("step-times"),
            smoke("adjoint-default-stream", "discrete-default-stream"),
            smoke("adjoint-pool-stream", "discrete-pool-stream"),
            smoke("users-graph"),
            tests("kernel-tests", 60, KERNEL_TESTS, jobs=8, each=20),
        ),
        "prove": (
            bench("kernels", 40, "kernels.py", "--compile-seconds", "0"),
            tests("gpu-tests", 60, *with_gpu_tests(), jobs=8, each=60),
            tests("graph-tests-batches", 40, "-k", "batches", GRAPH_TESTS, jobs=4, each=20),
            tests("graph-tests", 60, "-k", "not batches", GRAPH_TESTS, jobs=4, each=20),
        ),
        "measure": (*measure, *([with_diffrax] if diffrax else [])),
    }


def smoke(*checks: str, limit: float = 20) -> Item:
    """An item of checks in one process. A check that breaks the CUDA context makes the later ones fail too."""
    return Item(", ".join(checks), limit, (sys.executable, "bench/smoke.py", *checks), checks)


def pytest(scratch: Path, jobs: int, each: int) -> list[str | Path]:
    """The pytest command for tests marked gpu.

    jobs: processes, if pytest-xdist is installed. each: seconds per test, if pytest-timeout is installed; a thread
    enforces them, because a signal does not end a call that waits for the GPU.
    """
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu", "--basetemp", scratch]
    if jobs and installed("xdist"):
        command += ["-n", str(jobs)]
    if installed("pytest_timeout"):
        command += [f"--timeout={each}", "--timeout-method=thread"]
    return command


def with_gpu_tests() -> list[str]:
    """The files with gpu tests, without those of the kernels and the graphs, which are items by themselves."""
    marked = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text())
    names = [path.relative_to(ROOT).as_posix() for path in marked]
    return [name for name in names if name not in (KERNEL_TESTS, GRAPH_TESTS)]


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def sanitizer() -> str:
    """The command compute-sanitizer, with its path if the CUDA toolkit is not on the PATH."""
    name = "compute-sanitizer"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [name, *(f"{home}/bin/{name}" for home in homes if home)]
    return next(filter(shutil.which, places), name)
