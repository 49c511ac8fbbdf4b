"""`pytest -m gpu --pretend-gpu`: runs tests that need a GPU without one, to find errors in the tests themselves.

The CPU replaces CUDA, and the shim runs the kernels. A captured step is Python that runs again (shim/eager.py). The
functions of torch.cuda that the tests call have the smallest possible replacements. This does not show what only a GPU
can show: streams run all work at once and in order, and nothing is ever late.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from shim.eager import Eager
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from node_cuda.cuda_graphs import capture
from node_cuda.kernels import backend as dispatch
from node_cuda.problem.field import VectorField

CUDA = torch.device("cuda")
"""The device of tests marked gpu; the CPU after `pretend`."""

LEFT_OUT = {
    "the CPU has kernels as well": ("test_auto_uses_the_kernels_on_cuda",),
    "there is one device": ("test_a_solve_runs_on_the_device_of_its_state_and_keeps_the_current_device",),
    "a time is measured": ("test_the_kernels_pass_their_self_check_on_every_gpu_in_100_ms",),
    "a profiler sees nothing": (
        "test_a_dopri5_step_is_seven_launches_and_eight_with_an_output_and_one_copy_to_the_host",
        "test_all_work_of_a_solve_and_its_backward_pass_is_on_the_current_stream",
        "test_the_profiler_sees_no_synchronisation_in_a_deferred_step",
    ),
    "the CPU's allocator does not count": (
        "test_every_step_allocates_equally_often",
        "test_the_peak_of_memory_of_the_adjoint_does_not_depend_on_the_number_of_steps",
        "test_memory_does_not_grow_over_fifty_solves_and_is_freed_with_its_owner",
        "test_the_memory_of_a_captured_solve_does_not_depend_on_the_number_of_steps",
    ),
    "nothing is captured": (
        "test_after_a_failed_capture_the_host_solves_and_no_state_remains",
        "test_a_solve_inside_a_capture_of_the_user_is_refused_before_any_launch",
    ),
}
"""The tests that mean nothing on a CPU, and the reasons."""


def pretend() -> None:
    """Replace CUDA by the CPU, for all test modules that are imported after this."""
    global CUDA
    CUDA = torch.device("cpu")


def pretending() -> bool:
    """Return whether tests marked gpu run on the CPU."""
    return CUDA.type == "cpu"


class Stream:
    """A stream with a number. Work that is launched in it runs at once."""

    _numbers = itertools.count(1)

    def __init__(self, device: Any = None) -> None:
        self.cuda_stream = next(self._numbers)

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...


class WhileByDefault(Eager):
    """The capture on a machine that has WHILE nodes."""

    def __init__(self, device: torch.device, module: Any, tier: str | None = None) -> None:
        super().__init__(device, module, tier or "while")


class _Synchronising(TorchDispatchMode):
    """Raises for an operation that would wait on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in capture._READS:
            raise RuntimeError("called a synchronizing CUDA operation")
        return func(*args, **(kwargs or {}))


class _OfTorch:
    """Replacements for functions of torch.cuda, under their names there."""

    Stream = Stream

    def __init__(self) -> None:
        self._default = Stream()
        self._here = threading.local()
        self._mode = 0
        self._watch = _Synchronising()

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def _sleep(self, cycles: int) -> None: ...

    def default_stream(self, device: Any = None) -> Stream:
        return self._default

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self._here, "stream", self._default)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._here.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._here.stream = before

    def get_sync_debug_mode(self) -> int:
        return self._mode

    def set_sync_debug_mode(self, mode: str | int) -> None:
        mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)
        if mode == 2 and self._mode != 2:
            self._watch.__enter__()
        # autograd ends the mode at the end of a backward pass
        elif mode != 2 and _get_current_dispatch_mode() is self._watch:
            self._watch.__exit__(None, None, None)
        self._mode = mode


def stand_in(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Replace a GPU by the CPU and the kernels of this module."""
    cuda = _OfTorch()
    for name in dir(cuda):
        if hasattr(torch.cuda, name) and not name.startswith("__"):
            patch.setattr(torch.cuda, name, getattr(cuda, name))
    patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    patch.setattr(dispatch, "_has_kernels", lambda device: device.type == "cpu")
    patch.setattr(dispatch, "_kernels", lambda device: (module, (cuda.current_stream().cuda_stream, 0)))
    patch.setattr(capture, "GraphCapture", WhileByDefault)
    patch.setattr(VectorField, "release", lambda self: None)  # Eager calls func as long as it exists
