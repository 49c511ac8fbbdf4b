"""What captured solves share: their memory, which one solve after another uses, and how their end is looked at."""

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
"""What is made of where a solve ended: it fills in what that cost, and says how it failed, if it did. Keeps neither
these statistics, which may keep it, nor what the user's graph hangs on."""


class CapturedSolve:
    """Solves of one kind as graphs. One solve after another uses their memory, whatever their streams and threads.

    lock: to be held from `follow` until nothing of the solve is left in that memory.
    """

    def __init__(self, problem: Problem, tier: str | None) -> None:
        self.device = problem.y0.device
        module = module_for(self.device)
        assert module is not None
        self.recorder = capture.GraphCapture(self.device, module, tier)
        self.lock = threading.RLock()
        self._last_stream: Any = None

    def follow(self) -> None:
        """Let the current stream begin behind the solve before, in whatever stream that was."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None and self._last_stream != stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream

    def record(self, begin: Callable[[], None], *parts: Callable[[], None]) -> list[Any]:
        """The beginning and the other parts of a loop, recorded. To be called inside `recorder.aside`."""

        def all_of_them() -> None:
            for part in (begin, *parts):
                part()

        evaluated_once()
        self.recorder.warm_up(all_of_them)
        return [self.recorder.record(part) for part in (begin, *parts)]

    def begun(
        self, control: DeviceStepControl, stats: Stats, on_finish: OnFinish, options: Common
    ) -> PendingStatus | None:
        """The solve that was just launched, for the host to look at its end; None: with throw="deferred" whoever asks
        `stats` does that."""
        if options.throw != "deferred":
            return PendingStatus(self, control, None, on_finish)
        stats.pending.append(PendingStatus(self, control, control.state.clone(), on_finish, self._last_stream))
        return None

    def __del__(self) -> None:
        # The memory may serve others now, which a solve that still runs would write.
        with contextlib.suppress(Exception):
            if self._last_stream is not None and not torch.cuda.is_current_stream_capturing():
                self._last_stream.synchronize()


@dataclass
class PendingStatus(Pending):
    """A solve by graphs that may not have ended yet.

    state: a copy of its control's state where it ended, made in `stream`; None: the control has it still.
    """

    captured: CapturedSolve
    control: DeviceStepControl
    state: Tensor | None
    on_finish: OnFinish
    stream: Any = None
    _failure: SolveError | None = field(default=None, init=False)
    _ended: bool = field(default=False, init=False)

    def end(self, stats: Stats) -> SolveError | None:
        """See `Pending`. One host read, the first time."""
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
    """How a solve that is over failed, if it did, as the host loop says it. detail: what went wrong, where it is
    known."""
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
