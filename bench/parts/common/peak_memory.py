"""Measures the peak memory of a piece of code, beyond what the process held before it.

On CUDA the caching allocator counts (`torch.cuda.max_memory_allocated`). On a CPU there is no such counter, so the
peak resident size of the process is used. That is reliable only under these conditions, which the cells in
`parts/memory/cell.py` and `parts/gradients/cell.py` meet:

- A fresh process for every measurement. Memory that an earlier run has freed often stays resident in malloc's heap.
  The next run would use it again, and the resident size would not grow.
- The peak is that of this program. `ru_maxrss` of `getrusage` survives `exec` on Linux, so a child starts with the
  peak of its parent. `VmHWM` in /proc/self/status belongs to the new address space, and writing 5 to
  /proc/self/clear_refs sets it back to the present size, without the peak of the imports. Without /proc, `ru_maxrss`
  is used.
- A warm-up step. What is allocated once (thread pools, oneDNN's compiled kernels, gradients) is then in the baseline.
  `malloc_trim` then gives the free heap back, so that the measured step cannot use it again.
- A separate memory mapping for each tensor, which goes as soon as the tensor is freed: `MALLOC_ENVIRONMENT`, set before
  the process starts, because malloc fills the holes that it already has. In malloc's heap the holes between the tensors
  of a tape stay resident, and their number depends on chance: the same step of 34 MiB of live tensors showed as 35, 52
  or 69 MiB, by the order of the allocations and the addresses. That says nothing about a solver. If malloc is not
  glibc's, the number includes the holes, and `method` does not say "mapped".

The numbers were checked against the bytes of live tensors in torch's profiler: they are 1 to 6 per cent above.
Mappings are slow to make, so times are measured in other processes, with the usual malloc.
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
    """`VmHWM` if the kernel has it and this process can reset it, else `ru_maxrss`."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
        return "VmHWM" if "VmHWM:" in STATUS.read_text() else "ru_maxrss"
    except OSError:
        return "ru_maxrss"


def peak_resident(method: str) -> int:
    """Peak resident size of this process in bytes."""
    if method == "VmHWM":
        return status_field("VmHWM")
    import resource  # missing on Windows, as is the first method

    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident() -> int:
    """Resident size of this process in bytes; without /proc, its peak."""
    return status_field("VmRSS") if STATUS.exists() else peak_resident("ru_maxrss")


def status_field(name: str) -> int:
    """A size from /proc/self/status in bytes; 0 if it has no such line."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def return_free_heap() -> None:
    """Returns the free part of malloc's heap to the system, if malloc is glibc's."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def mapped() -> bool:
    """Whether malloc is glibc's and gives each tensor a separate mapping."""
    return platform.libc_ver()[0] == "glibc" and MALLOC_ENVIRONMENT.items() <= os.environ.items()
