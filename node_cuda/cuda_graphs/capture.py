"""Work of a device as graphs: what it launches is recorded once and launched again, without the Python that made it.

A step is repeated until the solve is over in the best of the ways that a machine offers:

    "while"     one launch: the step in a WHILE node of our own, which the device leaves (csrc/graphs/graphs.h)
    "batches"   the step is launched again and again, the host looking a batch behind whether it was enough
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
"""Runs before a capture: libraries choose their algorithms, and make their handles, in the first ones."""

FIRST_BATCH, LATER_BATCHES = 8, 4
"""Attempts in a batch, where no solve before tells how many it will take."""

LONGEST_WAIT = 60.0
"""Seconds for another thread's captures to end; a solve inside a captured field's backward pass would wait for ever."""

_aten = torch.ops.aten
# Operations that wait for the device, since the host or the size of a result depends on what it computes.
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

# torch captures one graph at a time: the beginning of a second capture waits for the whole device.
_one_at_a_time = threading.RLock()
# Of captures that failed: torch's allocator for the host may go on asking them which streams are theirs.
_half_open: list[Any] = []


class Uncapturable(RuntimeError):
    """Why work cannot be recorded, as half a sentence."""


class Busy(Uncapturable):
    """It could be another time."""


class Recording(Protocol):
    """Recorded work. replay: do it once more, or so many times, in the current stream."""

    def replay(self, times: int = 1) -> None: ...


class Repeat(Protocol):
    """A recorded step until its control says that the solve is over, or pauses, in the current stream. tier: how."""

    tier: str

    def run(self) -> None: ...


class GraphCapture:
    """Records work on a device, in a stream of its own. tier: the way to repeat steps; None: the best."""

    def __init__(self, device: torch.device, module: ModuleType, tier: str | None = None) -> None:
        self.device = device
        self.module = module
        self.tier = tier
        self._stream = torch.cuda.Stream(device)
        # Nothing outlives the graph that made it but what was there before, so that all may share their memory.
        self._pool = torch.cuda.graph_pool_handle()
        self._looks: dict[int, StatusReader] = {}

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """For what is to be recorded: in the recorder's stream, one thread at a time."""
        if not _one_at_a_time.acquire(timeout=LONGEST_WAIT):
            raise Busy("another thread's capture did not end")
        # Autocast would keep casts of parameters from one evaluation for the next, beyond the end of a graph.
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
        """What is launched inside runs behind the current stream's work, and before what the stream gets later."""
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:  # also if it failed: the host loop goes on in the outer stream
            outer.wait_stream(self._stream)

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do the work as often as must be before it is recorded. Raises Uncapturable where that is known then: a
        capture that fails is worse."""
        before = self._random_states()
        for _ in range(WARM_UPS - 1):
            work()
        try:
            with Watch(self.device):
                work()
        except Uncapturable:
            raise
        except Exception:  # something that cannot be watched; if it cannot be captured, the capture says so
            work()
        if any(a != b for a, b in zip(before, self._random_states(), strict=True)):
            raise Uncapturable(_DRAWS)
        self._stream.synchronize()

    def _random_states(self) -> list[Any]:
        """Whatever a field may draw from without a word: none of them is on the device, and nothing waits."""
        states = torch.cuda.get_rng_state(self.device), torch.get_rng_state()
        return [*(state.numpy().tobytes() for state in states), random.getstate()]

    def record(self, work: Callable[[], None]) -> Recording:
        """What the work launches; to be called inside `aside`. Raises Uncapturable."""
        try:
            graph = torch.cuda.CUDAGraph(keep_graph=True)
        except TypeError:  # torch before 2.8 gives no graph away, and only replays it
            graph = torch.cuda.CUDAGraph()
        handled = sys.exc_info()[1]
        try:
            # Other threads may do what they like meanwhile.
            capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            with _no_collection(), _workspaces_of_its_own(), _streams_of_leaves_overridden(), capture:
                work()
        except RuntimeError as failure:
            self._mend(graph)
            raise Uncapturable(f"it could not be captured ({first_cause(failure, handled)})") from failure
        return CapturedGraph(self, graph)

    def _mend(self, graph: Any) -> None:
        """Torch leaves a capture that failed half open: its allocator waits for the end of it, and its random numbers,
        which nobody else can draw meanwhile, for the next one that succeeds."""
        with contextlib.suppress(Exception):  # raises where torch has closed it
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            _half_open.append(graph)
            torch._C._cuda_releasePool(self.device.index, self._pool)
        with contextlib.suppress(Exception):
            one = torch.zeros((), device=self.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local"):
                one.add_(1)

    def repeat(self, step: Recording, control: DeviceStepControl) -> tuple[Repeat, str | None]:
        """The best way to repeat a step, and why it is not the WHILE node."""
        assert isinstance(step, CapturedGraph)
        why = "batches were asked for"
        if self.tier != "batches":
            if step.raw is None:
                why = "this torch gives no captured graph away; 2.8 does"
            else:
                try:
                    made = self.module.WhileGraph(step.raw, control.address, self.device.index)
                    return WhileLoop(self, made, step), None
                except RuntimeError as refusal:  # what no loop may hold, or what this driver does not take
                    why = str(refusal)
        return Batches(step, StatusReader(self, control), StatusReader(self, control)), why

    def look(self, control: DeviceStepControl) -> StatusReader:
        """A look at where a solve stands: the same one each time, as its memory on the host is slow to come by."""
        if control.address not in self._looks:
            self._looks[control.address] = StatusReader(self, control)
        return self._looks[control.address]

    @property
    def current_stream(self) -> int:
        """The address of the stream that work is launched in."""
        return torch.cuda.current_stream(self.device).cuda_stream


class Watch(TorchDispatchMode):
    """Raises Uncapturable where an operation would wait for the device, copy between it and the host, or draw random
    numbers: such a captured step would fail, or find the numbers of its capture again."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # which would import it, for seconds
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
    """A graph of torch's, which owns the memory that its work uses. raw: as CUDA has it; None: this torch keeps it."""

    def __init__(self, recorder: GraphCapture, graph: Any) -> None:
        self._recorder = recorder
        self._graph = graph
        self.raw: int | None = graph.raw_cuda_graph() if hasattr(graph, "raw_cuda_graph") else None
        self._exec: int | None = None

    def replay(self, times: int = 1) -> None:
        """See `Recording`. Torch's own replay minds random numbers, which takes longer."""
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
    """Garbage may be other solves, and CUDA frees nothing of theirs during a capture, but ends it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _workspaces_of_its_own() -> Iterator[None]:
    """The workspaces of cuBLAS that a capture uses are memory of its graph: torch keeps one for each stream, and frees
    it when it likes, e.g. with another graph (pytorch issue 193402). torch.compile does the same."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def override_of_streams() -> Callable[[bool], None] | None:
    """Torch's switch, of torch 2.13, for a captured backward pass to take the capture's stream in the place of those
    that leaves were first used in."""
    return getattr(torch.autograd.graph, "set_override_stale_capture_stream", None)


@contextlib.contextmanager
def _streams_of_leaves_overridden() -> Iterator[None]:
    """The switch is one for the process: it is on as long as one capture of ours takes, and then as it was."""
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
    """The first line of the error that began a chain of them: the end of a capture that failed fails as well. until:
    what was being handled before, and is no cause."""
    while failure.__context__ is not None and failure.__context__ is not until:
        failure = failure.__context__
    return str(failure).split("\n")[0].rstrip(".")


class StatusReader:
    """A copy of the control's state, as it is where the stream has come to the last `ask`, for the host to wait for."""

    def __init__(self, recorder: GraphCapture, control: DeviceStepControl) -> None:
        # Not the recorder, which has looks of its own: nothing here waits for a collection.
        self.device = recorder.device
        self._flag = recorder.module.Flag(control.address, recorder.device.index)

    def ask(self) -> None:
        """Let the current stream make the copy."""
        self._flag.record(torch.cuda.current_stream(self.device).cuda_stream)

    def answer(self) -> ControllerSnapshot:
        """Wait for it."""
        self._flag.wait()
        return self._flag.read()


class WhileLoop:
    """One launch. The step has the memory that it works on."""

    tier = "while"

    def __init__(self, recorder: GraphCapture, graph: Any, step: CapturedGraph) -> None:
        self._recorder = recorder
        self._graph = graph
        self._step = step

    def run(self) -> None:
        self._graph.launch(self._recorder.current_stream)


class Batches:
    """A batch of steps is in the stream while the host waits for the one before it. The first is about as long as
    the solve before was."""

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
        # Once enough, try with one less the next time.
        self._first = count if count > self._first else max(count - 1, 1)
