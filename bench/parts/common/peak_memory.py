"""Peak memory of a piece of code, beyond what the process held before it.

On CUDA the caching allocator keeps the count (`torch.cuda.max_memory_allocated`). On a CPU there is no such
counter, so the kernel's is used: the peak resident size of this process. It is honest only under these
conditions, which `memory_cell.py` meets:

- A fresh process for every measurement. Memory that a former run has freed often stays in malloc's heap, still
  resident, and the next run would be served from it without the resident size moving.
- The peak is the one of this program. `ru_maxrss` of `getrusage` is not: on Linux it survives `exec`, so a child
  starts with the peak of the parent that spawned it. `VmHWM` in /proc/self/status belongs to the new address
  space, and writing 5 to /proc/self/clear_refs sets it back to the present size: that drops what the imports
  needed at their worst. Where there is no /proc, `ru_maxrss` has to do.
- A warm-up step beforehand, so that what is allocated once (thread pools, oneDNN's compiled kernels, gradients)
  is in the baseline; then `malloc_trim`, so that the heap it has freed is given back and not silently used again.
- Every tensor in a mapping of its own, gone as soon as it is freed: `MALLOC_ENVIRONMENT`, from the process's start,
  since malloc would go on filling holes that are there already. In malloc's heap the holes between the tensors of a
  tape stay resident, and how many there are is luck: the same step of 34 MiB of live tensors showed as 35, 52 or
  69 MiB, by the order of allocations and the addresses of the day. That says nothing about a solver. Where malloc
  is not glibc's, the holes are in the number, and `method` does not say "mapped".

Checked against the live tensors' bytes as torch's profiler records them: 1 to 6 per cent above. Mappings are slow to
make, so time is measured elsewhere, with malloc as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import sys
from pathlib import Path
from types import TracebackType

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # bytes; glibc reads it once, at the start


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`; then `peak.bytes` is the growth over the size at entry."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._resident = resident_method()
        if device.type == "cuda":
            self.method = "torch.cuda.max_memory_allocated"
        else:
            self.method = f"{self._resident}, mapped" if mapped() else self._resident

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._baseline = torch.cuda.memory_allocated(self.device)
        else:
            return_free_heap()
            if self._resident == "VmHWM":
                CLEAR_REFS.write_text(RESET_PEAK)
            self._baseline = peak_resident(self._resident)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = peak_resident(self._resident)
        self.bytes = peak - self._baseline


def resident_method() -> str:
    """`VmHWM` where the kernel keeps it and lets this process reset it, else `ru_maxrss`."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
        return "VmHWM" if "VmHWM:" in STATUS.read_text() else "ru_maxrss"
    except OSError:
        return "ru_maxrss"


def peak_resident(method: str) -> int:
    """Peak resident size of this process in bytes."""
    if method == "VmHWM":
        return status_field("VmHWM")
    import resource  # not on Windows, where the first method is missing as well

    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident() -> int:
    """Resident size of this process in bytes, now; where there is no /proc its peak, which grows if that does."""
    return status_field("VmRSS") if STATUS.exists() else peak_resident("ru_maxrss")


def status_field(name: str) -> int:
    """A size from /proc/self/status in bytes; 0 if it has no such line."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def return_free_heap() -> None:
    """Gives the free part of malloc's heap back to the system, where malloc is glibc's."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def mapped() -> bool:
    """Whether this process's malloc is glibc's and gives every tensor a mapping of its own."""
    return platform.libc_ver()[0] == "glibc" and MALLOC_ENVIRONMENT.items() <= os.environ.items()
