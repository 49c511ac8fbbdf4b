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
- Every tensor in a mapping of its own, gone as soon as it is freed. In malloc's heap the holes between the tensors
  of a tape stay resident, and how many there are is luck: the same step of 34 MiB of live tensors showed as 35, 52
  or 69 MiB, by the order of allocations and the addresses of the day. That says nothing about a solver. Hence
  `mallopt`, where malloc is glibc's; elsewhere the holes are in the number, and `method` does not say "mapped".

Checked against the sum of the live tensors' bytes as torch's profiler records them. Mappings are slow to make: time
is measured before, with malloc as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path
from types import TracebackType

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
MAPPED_FROM = 2**15  # bytes; smaller blocks are not worth a mapping


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`; then `peak.bytes` is the growth over the size at entry.

    On a CPU it leaves malloc as it has set it: the process should end soon after.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self.method = "torch.cuda.max_memory_allocated" if device.type == "cuda" else resident_method()

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._baseline = torch.cuda.memory_allocated(self.device)
        else:
            mapped = map_each_block()
            if self.method == "VmHWM":
                CLEAR_REFS.write_text(RESET_PEAK)
            self._baseline = peak_resident(self.method)
            self.method += ", mapped" if mapped else ""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = peak_resident(self.method.removesuffix(", mapped"))
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


def status_field(name: str) -> int:
    """A size from /proc/self/status in bytes; 0 if it has no such line."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def map_each_block() -> bool:
    """Gives malloc's free heap back, and has every larger block mapped from now on; False if malloc is not glibc's."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        return bool(libc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM))
    return False
