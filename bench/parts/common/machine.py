"""What the JSON says of a run: the machine, the versions, the commit and the command."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from parts.common.libraries import OURS, RIVAL, version
from parts.common.paths import ROOT

# The benchmarks write these files; a change there does not change the results.
WRITTEN_BY_BENCHMARKS = (":(exclude)bench/results", ":(exclude)*.md")


def chosen(name: str) -> torch.device:
    """The device of that name; raises SystemExit if a GPU is asked for and torch finds none."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {name} needs an NVIDIA GPU and a CUDA build of torch, and torch finds none here.")
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and command of this run, ready for JSON."""
    # A copy of the working tree without a repository gets its commit from this variable.
    commit = git("rev-parse", "--short=12", "HEAD") or os.environ.get("NODE_CUDA_COMMIT")
    changes = git("status", "--porcelain", "--", ".", *WRITTEN_BY_BENCHMARKS)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *without_folder(sys.argv[1:])]),
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        # If it exceeds the cores, other processes were running and the times are unreliable.
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        OURS: version(OURS),
        RIVAL: version(RIVAL),
        **(gpu(device) if device.type == "cuda" else {}),
    }


def without_folder(arguments: list[str]) -> list[str]:
    """The arguments without --publish, --out and the folder of --out, which do not change the results."""
    arguments = [argument for argument in arguments if argument != "--publish"]
    if "--out" not in arguments:
        return arguments
    at = arguments.index("--out")
    return arguments[:at] + arguments[at + 2 :]


def gpu(device: torch.device) -> dict[str, Any]:
    """Driver, CUDA version, compute capability and memory of a GPU; driver is None if nvidia-smi fails."""
    properties = torch.cuda.get_device_properties(device)
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "gpu_gib": round(properties.total_memory / 2**30, 1),
    }


def git(*arguments: str) -> str | None:
    """The output of a git command in the repository; None without git, a repository or a commit."""
    return output("git", "-C", str(ROOT), *arguments)


def output(*command: str) -> str | None:
    """The output of a command; None if the command does not exist or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def processor() -> str:
    """The name of the CPU, from /proc/cpuinfo: `platform.processor()` is empty on most Linux systems."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
