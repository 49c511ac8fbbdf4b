"""`python -m node_cuda`: what is installed, which devices there are, which path computes the steps, and why.

It reports and decides nothing, and it never fails: what cannot be found out is a line of the report.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from typing import NamedTuple

import torch

from node_cuda._version import __version__

KERNELS = "node_cuda._C"
BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


class LivePath(NamedTuple):
    name: str  # what computes the steps
    why: str
    mend: str | None  # how to get the kernels; None where they are live


def live_path() -> LivePath:
    """The path that computes the arithmetic of a step on this machine."""
    reference = "the pure PyTorch reference (node_cuda.kernels.reference), on every device"
    try:
        importlib.import_module(KERNELS)
    except ModuleNotFoundError as error:
        if error.name != KERNELS:
            return LivePath(reference, f"{KERNELS} is installed but does not load: {error}", BUILD)
        return LivePath(
            reference,
            f"the compiled module {KERNELS} is not installed",
            f"in a checkout whose setup.py declares {KERNELS}, with nvcc and a CUDA build of torch: {BUILD}",
        )
    except ImportError as error:  # built against another torch, or a shared library is missing
        return LivePath(reference, f"{KERNELS} is installed but does not load: {error}", BUILD)
    if not torch.cuda.is_available():
        return LivePath(
            reference,
            f"{KERNELS} is installed, but torch {torch.__version__} sees no CUDA device",
            "an NVIDIA GPU with its driver and a CUDA build of torch; then python -m node_cuda again",
        )
    return LivePath(
        f"fused kernels ({KERNELS}) on CUDA tensors, the pure PyTorch reference elsewhere",
        f"{KERNELS} is installed and torch sees a CUDA device",
        None,
    )


def devices() -> list[str]:
    """One line a device: the CPU with torch's threads, then every CUDA device, or why there is none."""
    lines = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    if torch.version.cuda is None:
        return [*lines, "cuda: none (this torch is built without CUDA)"]
    try:
        if not torch.cuda.is_available():
            return [*lines, "cuda: none (torch finds no NVIDIA driver or no visible GPU)"]
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            facts = f"compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
            lines.append(f"cuda:{index}: {gpu.name}, {facts}")
    except (RuntimeError, AssertionError) as error:  # a broken driver must not hide the rest of the report
        lines.append(f"cuda: cannot be asked ({error})")
    return lines


def installed(name: str) -> str:
    """The version of an optional package, or that there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The whole report as text."""
    path = live_path()
    rows = [
        ("node_cuda", __version__),
        ("python", f"{platform.python_version()} ({platform.system()})"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        *((name, installed(name)) for name in ("numpy", "scipy", "torchdiffeq")),
        *(("device", line) for line in devices()),
        ("live path", path.name),
        ("because", path.why),
    ]
    if path.mend is not None:
        rows.append(("kernels", path.mend))
    return "\n".join(f"{key:<12}{value}" for key, value in rows)


if __name__ == "__main__":
    print(report())
