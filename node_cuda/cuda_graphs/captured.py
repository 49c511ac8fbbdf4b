"""The base of captured solves: it keeps solves that share memory in order, and reads the status at their end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from node_cuda.cuda_graphs import capture
from node_cuda.cuda_graphs.cache import evaluated_once
from node_cuda.kernels.backend import module_for
from node_cuda.kernels.control import DeviceStepControl
from node_cuda.kernels.step_control import ControllerSnapshot
from node_cuda.options import AdaptiveOptions, Common
from node_cuda.problem.problem import Problem
from node_cuda.solution import Pending, Stats
from node_cuda.status import SolveError, Status

OnFinish = Callable[[ControllerSnapshot, Stats], SolveError | None]
"""Callback run when a solve finishes: it fills in the statistics and returns the SolveError, or None.

It must keep no reference to these statistics, which may refer to it, and none to tensors that keep the user's graph.
"""


class CapturedSolve:
    """Captured graphs for solves of one kind. The solves use the same memory in turn, in any stream or thread.

    lock: a solve holds it from `follow` until all its results are copied out of that memory.
    """

    def __init__(self, problem: Problem, tier: str | None) -> None:
        self.device = problem.y0.device
        module = module_for(self.device)
        assert module is not None
        self.recorder = capture.GraphCapture(self.device, module, tier)
        self.lock = threading.RLock()
        self._last_stream: Any = None

    def follow(self) -> None:
        """Make the current stream wait for the previous solve, which may be in another stream."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None and self._last_stream != stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream

    def record(self, begin: Callable[[], None], *parts: Callable[[], None]) -> list[Any]:
        """Capture the beginning and the other parts of a loop, and return them. Call it inside `recorder.aside`."""

        def all_of_them() -> None:
            for part in (begin, *parts):
                part()

        evaluated_once()
        self.recorder.warm_up(all_of_them)
        return [self.recorder.record(part) for part in (begin, *parts)]

    def begun(
        self, control: DeviceStepControl, stats: Stats, on_finish: OnFinish, options: Common
    ) -> PendingStatus | None:
        """Return the pending status of the solve that was just launched.

        With throw="deferred" it is put into `stats.pending` instead, and the result is None: the status is read when
        the user reads `stats`.
        """
        if options.throw != "deferred":
            return PendingStatus(self, control, None, on_finish)
        stats.pending.append(PendingStatus(self, control, control.state.clone(), on_finish, self._last_stream))
        return None

    def __del__(self) -> None:
        # Others may get this memory now, and a solve that still runs would write into it.
        with contextlib.suppress(Exception):
            if self._last_stream is not None and not torch.cuda.is_current_stream_capturing():
                self._last_stream.synchronize()


@dataclass
class PendingStatus(Pending):
    """The status of a captured solve that may still be running.

    state: a copy of the control's state at the end, made in `stream`. None: the control itself still has that state.
    """

    captured: CapturedSolve
    control: DeviceStepControl
    state: Tensor | None
    on_finish: OnFinish
    stream: Any = None
    _failure: SolveError | None = field(default=None, init=False)
    _ended: bool = field(default=False, init=False)

    def end(self, stats: Stats) -> SolveError | None:
        """Wait for the end of the solve, fill in the statistics, and return the SolveError, or None.

        The first call is one host read. Later calls return the same result.
        """
        if not self._ended:
            self._ended = True
            stats.host_reads += 1
            self._failure = self.on_finish(self._reading(), stats)
        return self._failure

    def _reading(self) -> ControllerSnapshot:
        if self.state is not None:
            if self.stream is not None:
                torch.cuda.current_stream(self.captured.device).wait_stream(self.stream)
            return self.control.snapshot_of(self.state)
        look = self.captured.recorder.look(self.control)
        look.ask()
        return look.answer()


def failure_of(
    now: ControllerSnapshot, direction: float, stats: Stats, options: Common | None = None, detail: str | None = None
) -> SolveError | None:
    """Return the SolveError of a finished solve, with the text of the host loop, or None if the solve succeeded.

    detail: the cause, if it is known.
    """
    status = Status(now.status)
    if status is Status.SUCCESS:
        return None
    if detail is None:
        detail = f"The step was {now.proposal:.3g}."
        if now.gave_up:
            detail = f"The step was min_step = {now.last_h:.3g}."
        elif status is Status.MAX_STEPS and isinstance(options, AdaptiveOptions):
            detail = f"max_num_steps = {options.max_num_steps}, the step {now.proposal:.3g}."
    return SolveError(status, direction * now.t0, stats, detail)
