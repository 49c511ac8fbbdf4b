"""What a published number must carry: the machine, the versions, the commit and the command."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from libraries import OURS, RIVAL, version

ROOT = Path(__file__).resolve().parent.parent
# Files that the benchmarks write themselves: a change there does not change what is measured.
WRITTEN_BY_BENCHMARKS = (":(exclude)bench/results", ":(exclude)*.md")


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and command of this run, ready for JSON."""
    commit = git("rev-parse", "--short=12", "HEAD")
    changes = git("status", "--porcelain", "--", ".", *WRITTEN_BY_BENCHMARKS)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        # More than the cores: other processes took part, and the times are not to be trusted.
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        OURS: version(OURS),
        RIVAL: version(RIVAL),
    }


def git(*arguments: str) -> str | None:
    """What a git command prints in the repository; None without git, a repository or a commit."""
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def processor() -> str:
    """The CPU's name; `platform.processor()` is empty on most Linux systems."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
