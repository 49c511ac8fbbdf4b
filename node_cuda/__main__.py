"""`python -m node_cuda`: reports the versions, the devices, the path that computes the steps, and the reason for it.

`python -m node_cuda run program.py args` runs a program with this package in the place of torchdiffeq.

The report never fails: an error becomes a line of the report. It changes nothing, except that the result of the
self-check is recorded, as in a first solve.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from node_cuda._version import __version__
from node_cuda.as_torchdiffeq.run import run
from node_cuda.extension import build
from node_cuda.extension import loading as extension
from node_cuda.kernels import backend, self_check
from node_cuda.status import InvalidInput, did_you_mean

REFERENCE = "the pure PyTorch reference (node_cuda.kernels.reference), on every device"
FUSED = "fused kernels on CUDA tensors, the pure PyTorch reference elsewhere"


class LivePath(NamedTuple):
    name: str  # the code that computes the steps
    why: str
    mend: str | None  # how to get the kernels; None if there is nothing to do


def live_path() -> LivePath:
    """Return the path that computes the arithmetic of a step on this machine."""
    try:
        return _live_path()
    except Exception as error:  # a broken driver or module becomes a line of the report
        return LivePath(REFERENCE, f"the search for the kernels failed ({error})", build.COMMAND)


def _live_path() -> LivePath:
    gpu = torch.cuda.is_available()
    found = extension.installed(torch.cuda.get_device_capability() if gpu else None)
    if found.module is not None and gpu:
        return _fused(f"{found.why}, and torch sees a CUDA device")
    if found.module is not None:
        return LivePath(
            REFERENCE,
            f"{found.why}, but torch {torch.__version__} sees no CUDA device",
            "an NVIDIA GPU with its driver and a CUDA build of torch; then python -m node_cuda again",
        )
    first_use = extension.forecast()
    if first_use.possible and gpu:
        return _fused(f"{found.why}; {first_use.why}")
    return LivePath(
        REFERENCE, f"{found.why}; {first_use.why}", f"in a checkout, with nvcc and a CUDA torch: {build.COMMAND}"
    )


def _fused(why: str) -> LivePath:
    if backend.chosen() == "reference":
        return LivePath(REFERENCE, f"{backend.VARIABLE}=reference is set", f"unset {backend.VARIABLE}")
    return LivePath(FUSED, why, None)


def devices() -> list[str]:
    """Return one line for each device: the CPU with torch's threads, then every CUDA device, or why there is none."""
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
        lines.append(f"cuda: the query failed ({error})")
    return lines


def installed(name: str) -> str:
    """Return the version of an optional package, or say that it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def checks(path: LivePath) -> list[str]:
    """Return a line for each primitive of the kernels after checking it now, or the reason why it is not checked."""
    if path.name != FUSED:
        return ["not run: the kernels are not live"]
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        found = extension.at_hand(torch.cuda.get_device_capability(device))
        if found.module is None:
            return ["not run: the first CUDA solve compiles the kernels, and checks them"]
        return [f"{name}: {result}" for name, result in self_check.survey(found.module, device)]
    except Exception as error:  # an error becomes a line of the report
        return [f"not run: {error}"]


def setting() -> str:
    """The path that the environment asks for, or what is wrong with it."""
    try:
        return backend.chosen()
    except InvalidInput as error:
        return f"every solve will fail: {error}"


def report() -> str:
    """Return the whole report as text."""
    path = live_path()
    rows = [
        ("node_cuda", __version__),
        ("python", f"{platform.python_version()} ({platform.system()})"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        *((name, installed(name)) for name in ("numpy", "scipy", "torchdiffeq")),
        *(("device", line) for line in devices()),
        ("backend", setting()),
        ("live path", path.name),
        ("because", path.why),
    ]
    if path.mend is not None:
        rows.append(("kernels", path.mend))
    rows += [("self-check", line) for line in checks(path)]
    return "\n".join(f"{key:<12}{value}" for key, value in rows)


def main() -> None:
    """Print the report, or run a program."""
    words = "What is installed, which devices there are, which path computes the steps, and why."
    parser = argparse.ArgumentParser(
        "python -m node_cuda",
        usage="python -m node_cuda [-h]\n"
        "       python -m node_cuda run PROGRAM.py [ARGUMENTS]\n"
        "       python -m node_cuda run -m MODULE [ARGUMENTS]",
        description=words,
        epilog="python -m node_cuda run PROGRAM.py [ARGUMENTS] runs a program, and `run -m MODULE` a module, with "
        "node_cuda in the place of torchdiffeq.",
    )
    if sys.argv[1:2] != ["run"] or sys.argv[2:3] in (["-h"], ["--help"]):
        others = parser.parse_known_args([x for x in sys.argv[1:] if x != "run"])[1]
        if others:
            parser.error(f"the only command is run; got {others[0]!r}.{did_you_mean(others[0], ('run',))}")
        print(report())
        return
    program = sys.argv[2:]
    if program[:1] == ["-m"]:
        program = program[1:]
        if not program:
            parser.error("run -m needs the name of a module")
    elif not program or not Path(program[0]).is_file():
        parser.error(f"run needs a program; got {program[0]!r}, which is no file" if program else "run needs a program")
    run(sys.argv[2:])


if __name__ == "__main__":
    main()
