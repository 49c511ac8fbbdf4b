"""CUDA graphs: kernel launches are recorded once and replayed without the Python code that made them.

A captured step is repeated until the solve ends, in the best way that the machine offers:

    "while"     one launch: the step is the body of a WHILE node, and the device ends the loop (csrc/graphs/graphs.h)
    "batches"   the host launches batches of steps; after each batch it reads whether the batch before ended the solve
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from node_cuda.kernels.control import DeviceStepControl
from node_cuda.kernels.step_control import ControllerSnapshot

TIERS = ("while", "batches")

WARM_UPS = 3
"""Runs before a capture: in the first runs, libraries choose their algorithms and create their handles."""

FIRST_BATCH, LATER_BATCHES = 8, 4
"""Attempts in the first batch, if no earlier solve shows how many are needed, and in each later batch."""

LONGEST_WAIT = 60.0
"""Seconds to wait until another thread's captures end. Without a limit, a solve in the backward pass of a captured
field would wait forever."""

_aten = torch.ops.aten
# Operations that wait for the device: the host, or the size of the result, depends on values on the device.
_READS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.repeat_interleave.Tensor,
    _aten.bincount.default,
}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_DRAWS = "func draws random numbers, and a captured step would draw the same ones every time"

# torch captures one graph at a time: when a second capture begins, it waits for the whole device.
_one_at_a_time = threading.RLock()
# The graphs of failed captures. They are kept, because torch's host allocator may still query their streams.
_half_open: list[Any] = []


class Uncapturable(RuntimeError):
    """Work cannot be captured. The message is the reason, as half a sentence."""


class Busy(Uncapturable):
    """Work cannot be captured now. A later attempt may succeed."""


class Recording(Protocol):
    """Captured work. replay: launch it once, or `times` times, in the current stream."""

    def replay(self, times: int = 1) -> None: ...


class Repeat(Protocol):
    """A captured step with a way to repeat it in the current stream, until its control ends or pauses the solve.

    tier: the way to repeat the step.
    """

    tier: str

    def run(self) -> None: ...


class GraphCapture:
    """Captures work on a device, in a separate stream. tier: the way to repeat steps; None: the best."""

    def __init__(self, device: torch.device, module: ModuleType, tier: str | None = None) -> None:
        self.device = device
        self.module = module
        self.tier = tier
        self._stream = torch.cuda.Stream(device)
        # No tensor allocated in a capture is used after its graph has run. So all graphs can share one memory pool.
        self._pool = torch.cuda.graph_pool_handle()
        self._looks: dict[int, StatusReader] = {}

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Context for a capture: the recorder's stream is current, and other threads' captures wait."""
        if not _one_at_a_time.acquire(timeout=LONGEST_WAIT):
            raise Busy("another thread's capture did not end")
        # Autocast would cache casts of parameters for the next evaluation, after the end of the graph.
        kind = self.device.type
        autocast = torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        try:
            with self.in_its_stream(), autocast:
                yield
        finally:
            _one_at_a_time.release()

    @contextlib.contextmanager
    def in_its_stream(self) -> Iterator[None]:
        """Context in which launches go to the recorder's stream.

        They run after the earlier work of the current stream, and before its later work.
        """
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:  # also after a failure: the host loop continues in the outer stream
            outer.wait_stream(self._stream)

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run the work WARM_UPS times before it is captured.

        Raises Uncapturable if these runs show a reason, because a failed capture is harder to recover from.
        """
        before = self._random_states()
        for _ in range(WARM_UPS - 1):
            work()
        try:
            with Watch(self.device):
                work()
        except Uncapturable:
            raise
        except Exception:  # `Watch` does not support the work; if it cannot be captured, the capture raises the error
            work()
        if any(a != b for a, b in zip(before, self._random_states(), strict=True)):
            raise Uncapturable(_DRAWS)
        self._stream.synchronize()

    def _random_states(self) -> list[Any]:
        """Return the states of the random generators that a field may use. They are on the host; nothing waits."""
        states = torch.cuda.get_rng_state(self.device), torch.get_rng_state()
        return [*(state.numpy().tobytes() for state in states), random.getstate()]

    def record(self, work: Callable[[], None]) -> Recording:
        """Capture the launches of the work, and return them. Call it inside `aside`. Raises Uncapturable."""
        try:
            graph = torch.cuda.CUDAGraph(keep_graph=True)
        except TypeError:  # torch before 2.8 does not expose the graph, and only replays it
            graph = torch.cuda.CUDAGraph()
        handled = sys.exc_info()[1]
        try:
            # "thread_local": other threads may call CUDA in any way meanwhile.
            capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            with _no_collection(), _workspaces_of_its_own(), _streams_of_leaves_overridden(), capture:
                work()
        except RuntimeError as failure:
            self._mend(graph)
            raise Uncapturable(f"it could not be captured ({first_cause(failure, handled)})") from failure
        return CapturedGraph(self, graph)

    def _mend(self, graph: Any) -> None:
        """Close a failed capture, because torch leaves it half open.

        Torch's allocator still waits for its end, and random numbers cannot be drawn until another capture succeeds.
        """
        with contextlib.suppress(Exception):  # raises if torch has already closed it
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            _half_open.append(graph)
            torch._C._cuda_releasePool(self.device.index, self._pool)
        with contextlib.suppress(Exception):
            one = torch.zeros((), device=self.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local"):
                one.add_(1)

    def repeat(self, step: Recording, control: DeviceStepControl) -> tuple[Repeat, str | None]:
        """Return the best way to repeat a step, and the reason if that is not the WHILE node."""
        assert isinstance(step, CapturedGraph)
        why = 'tier="batches" was requested'
        if self.tier != "batches":
            if step.raw is None:
                why = "this version of torch does not expose the captured graph; torch 2.8 does"
            else:
                try:
                    made = self.module.WhileGraph(step.raw, control.address, self.device.index)
                    return WhileLoop(self, made, step), None
                except RuntimeError as refusal:  # no WHILE node can contain the step, or the driver has none
                    why = str(refusal)
        return Batches(step, StatusReader(self, control), StatusReader(self, control)), why

    def look(self, control: DeviceStepControl) -> StatusReader:
        """Return the status reader of this control. It is cached, because pinned memory is slow to allocate."""
        if control.address not in self._looks:
            self._looks[control.address] = StatusReader(self, control)
        return self._looks[control.address]

    @property
    def current_stream(self) -> int:
        """The address of the stream that work is launched in."""
        return torch.cuda.current_stream(self.device).cuda_stream


class Watch(TorchDispatchMode):
    """Raises Uncapturable if an operation waits for the device, copies from or to the host, or draws random numbers.

    The capture of such a step would fail, or each replay would use the numbers of the capture again.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # else torch imports Dynamo, which takes seconds
        return False

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._kind = device.type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and args[0].device.type == self._kind:
            raise Uncapturable(f"func reads a number from the device ({func})")
        if func is _aten.index.Tensor and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise Uncapturable(f"func reads how many elements a mask selects ({func})")
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            raise Uncapturable(_DRAWS)
        out = func(*args, **(kwargs or {}))
        if func in _COPIES:
            between = {x.device.type for x in (*args[:2], out) if isinstance(x, Tensor)}
            if len(between) == 2 and between == {self._kind, "cpu"}:
                raise Uncapturable(f"func copies between the host and the device ({func})")
        return out


class CapturedGraph:
    """A torch CUDA graph. It owns the memory that its work uses.

    raw: the address of the CUDA graph; None if this version of torch does not expose it.
    """

    def __init__(self, recorder: GraphCapture, graph: Any) -> None:
        self._recorder = recorder
        self._graph = graph
        self.raw: int | None = graph.raw_cuda_graph() if hasattr(graph, "raw_cuda_graph") else None
        self._exec: int | None = None

    def replay(self, times: int = 1) -> None:
        """Launch the graph once, or `times` times, in the current stream.

        Torch's own replay also updates the random generators, which takes longer.
        """
        if not hasattr(self._graph, "raw_cuda_graph_exec"):
            for _ in range(times):
                self._graph.replay()
            return
        if self._exec is None:
            self._graph.instantiate()
            self._exec = self._graph.raw_cuda_graph_exec()
        on = self._recorder.current_stream, self._recorder.device.index
        self._recorder.module.replay(self._exec, times, on)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Switch off garbage collection: it may free other solves, and a capture fails if CUDA frees memory meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _workspaces_of_its_own() -> Iterator[None]:
    """Give the capture new cuBLAS workspaces, in the memory of its graph.

    Torch keeps one workspace for each stream, and may free it while the graph still uses it, for example together with
    another graph (pytorch issue 193402). torch.compile does the same.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def override_of_streams() -> Callable[[bool], None] | None:
    """Return the switch of torch 2.13 for captured backward passes, or None.

    With it, a captured backward pass uses the stream of the capture, and not the stream in which a leaf was first used.
    """
    return getattr(torch.autograd.graph, "set_override_stale_capture_stream", None)


@contextlib.contextmanager
def _streams_of_leaves_overridden() -> Iterator[None]:
    """Turn the switch on during one capture, and restore it afterwards. The whole process has one switch."""
    override = override_of_streams()
    if override is None:
        yield
        return
    before: bool = torch._C._override_stale_capture_stream()
    override(True)
    try:
        yield
    finally:
        override(before)


def first_cause(failure: BaseException, until: BaseException | None = None) -> str:
    """Return the first line of the error that started a chain of errors. The end of a failed capture also fails.

    until: an exception that was already being handled before; it is not a cause.
    """
    while failure.__context__ is not None and failure.__context__ is not until:
        failure = failure.__context__
    return str(failure).split("\n")[0].rstrip(".")


class StatusReader:
    """Reads the state of the control: `ask` puts a copy into the stream, and `answer` waits for that copy."""

    def __init__(self, recorder: GraphCapture, control: DeviceStepControl) -> None:
        # No reference to the recorder, because it refers to its readers: a cycle would wait for garbage collection.
        self.device = recorder.device
        self._flag = recorder.module.Flag(control.address, recorder.device.index)

    def ask(self) -> None:
        """Put the copy into the current stream."""
        self._flag.record(torch.cuda.current_stream(self.device).cuda_stream)

    def answer(self) -> ControllerSnapshot:
        """Wait for the copy, and return it."""
        self._flag.wait()
        return self._flag.read()


class WhileLoop:
    """A WHILE node: one launch for all steps. `step` is kept, because it owns the memory that the graph uses."""

    tier = "while"

    def __init__(self, recorder: GraphCapture, graph: Any, step: CapturedGraph) -> None:
        self._recorder = recorder
        self._graph = graph
        self._step = step

    def run(self) -> None:
        self._graph.launch(self._recorder.current_stream)


class Batches:
    """Launches batches of steps: one batch is in the stream while the host waits for the batch before it.

    The first batch is about as long as the previous solve.
    """

    tier = "batches"

    def __init__(self, step: Recording, now: StatusReader, behind: StatusReader) -> None:
        self._step = step
        self._looks = now, behind
        self._first = FIRST_BATCH

    def run(self) -> None:
        now, behind = self._looks
        count = self._first
        self._step.replay(count)
        now.ask()
        while True:
            self._step.replay(LATER_BATCHES)
            behind.ask()
            if not now.answer().active:
                break
            count += LATER_BATCHES
            now, behind = behind, now
        # If the first batch was long enough, it is one step shorter the next time.
        self._first = count if count > self._first else max(count - 1, 1)
