"""Work of a device as graphs: what it launches is recorded once and launched again, without the Python that made it.

A step is repeated until the solve is over in the best of the ways that a machine offers:

    "while"     one launch: the step in a WHILE node of our own, which the device leaves (csrc/graphs.h)
    "batches"   the step is launched again and again, the host looking a batch behind whether it was enough
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

import torch

from node_cuda.kernels.control import Control, Reading, reading

TIERS = ("while", "batches")

WARM_UPS = 3
"""Runs before a capture: libraries choose their algorithms, and make their handles, in the first ones."""

FIRST_BATCH, LATER_BATCHES = 8, 4
"""Attempts in a batch, where no solve before tells how many it will take."""


class Uncapturable(RuntimeError):
    """Why work cannot be recorded, as half a sentence."""


def capturing(device: torch.device) -> bool:
    """What is launched on this device now is recorded, by whomever."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Recording(Protocol):
    """Recorded work. replay: do it once more, in the current stream."""

    def replay(self) -> None: ...


class Repeat(Protocol):
    """A recorded step until its control says that the solve is over, or pauses, in the current stream. tier: how."""

    tier: str

    def run(self) -> None: ...


class Recorder:
    """Records work on a device, in a stream of its own. tier: the way to repeat steps; None: the best."""

    def __init__(self, device: torch.device, module: ModuleType, tier: str | None = None) -> None:
        self.device = device
        self.module = module
        self.tier = tier
        self._stream = torch.cuda.Stream(device)
        # Nothing outlives the graph that made it but what was there before, so that all may share their memory.
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is launched inside runs behind the current stream's work, and before what the stream gets later."""
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        # Autocast would keep casts of parameters from one evaluation for the next, beyond the end of a graph.
        kind = self.device.type
        autocast = torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        with torch.cuda.stream(self._stream), autocast:
            yield
        outer.wait_stream(self._stream)

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do the work as often as must be before it is recorded. Raises Uncapturable if it draws random numbers."""
        before = torch.cuda.get_rng_state(self.device)
        for _ in range(WARM_UPS):
            work()
        if not torch.equal(before, torch.cuda.get_rng_state(self.device)):
            raise Uncapturable("func draws random numbers, and a captured step would draw the same ones every time")
        self._stream.synchronize()

    def record(self, work: Callable[[], None]) -> Recording:
        """What the work launches; to be called inside `aside`. Raises Uncapturable."""
        try:
            graph = torch.cuda.CUDAGraph(keep_graph=True)
        except TypeError:  # torch before 2.8 gives no graph away, and only replays it
            graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may do what they like meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as failure:
            raise Uncapturable(f"it could not be captured ({first_cause(failure)})") from failure
        return graph

    def repeat(self, step: Recording, control: Control) -> tuple[Repeat, str | None]:
        """The best way to repeat a step, and why it is not the WHILE node."""
        batches = Batches(step, Look(self, control), Look(self, control))
        if self.tier == "batches":
            return batches, "batches were asked for"
        graph: Any = step
        if not hasattr(graph, "raw_cuda_graph"):
            return batches, "this torch gives no captured graph away; 2.8 does"
        try:
            made = self.module.WhileGraph(graph.raw_cuda_graph(), control.address, self.device.index)
        except NotImplementedError as why:
            return batches, str(why)
        return WhileLoop(self, made), None

    def look(self, control: Control) -> Look:
        """A look at where a solve stands."""
        return Look(self, control)

    @property
    def current_stream(self) -> int:
        """The address of the stream that work is launched in."""
        return torch.cuda.current_stream(self.device).cuda_stream


def first_cause(failure: BaseException) -> str:
    """The first line of the error that began a chain of them: the end of a capture that failed fails as well."""
    while failure.__context__ is not None:
        failure = failure.__context__
    return str(failure).split("\n")[0].rstrip(".")


class Look:
    """A copy of the control's state, as it is where the stream has come to the last `ask`, for the host to wait for."""

    def __init__(self, recorder: Recorder, control: Control) -> None:
        self._recorder = recorder
        self._flag = recorder.module.Flag(control.address, recorder.device.index)

    def ask(self) -> None:
        """Let the current stream make the copy."""
        self._flag.record(self._recorder.current_stream)

    def answer(self) -> Reading:
        """Wait for it."""
        self._flag.wait()
        return reading(self._flag.read())


class WhileLoop:
    """One launch."""

    tier = "while"

    def __init__(self, recorder: Recorder, graph: Any) -> None:
        self._recorder = recorder
        self._graph = graph

    def run(self) -> None:
        """See `Repeat`."""
        self._graph.launch(self._recorder.current_stream)


class Batches:
    """A batch of steps is in the stream while the host waits for the one before it. The first is about as long as
    the solve before was."""

    tier = "batches"

    def __init__(self, step: Recording, now: Look, behind: Look) -> None:
        self._step = step
        self._looks = now, behind
        self._first = FIRST_BATCH

    def run(self) -> None:
        """See `Repeat`."""
        now, behind = self._looks
        count = self._first
        self._launch(count)
        now.ask()
        while True:
            self._launch(LATER_BATCHES)
            behind.ask()
            if not now.answer().active:
                break
            count += LATER_BATCHES
            now, behind = behind, now
        # Once enough, try with one less the next time.
        self._first = count if count > self._first else max(count - 1, 1)

    def _launch(self, count: int) -> None:
        for _ in range(count):
            self._step.replay()
