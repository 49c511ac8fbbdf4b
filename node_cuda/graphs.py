"""Captured solves: a device loop as graphs, kept for the next solve of the same kind.

The field is captured with the step: its Python runs a few times when that happens and not in the solve. What a captured
solve depends on is in its key and in the fingerprint of func; a solve of another kind is captured anew. What cannot be
captured is the host loop's, and `Stats.why` says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from node_cuda.device_loop import OutputLoop, set_apart
from node_cuda.fingerprint import Fingerprint, difference, fingerprint
from node_cuda.kernels import capture
from node_cuda.kernels.backend import module_for, why_plain
from node_cuda.kernels.capture import TIERS, Recorder, Uncapturable
from node_cuda.kernels.control import Control, Reading, reading
from node_cuda.kernels.fused import Fused
from node_cuda.methods import ADAMS, SCIPY, Method, arithmetic_of, grid_of
from node_cuda.options import FixedOptions
from node_cuda.problem import Problem
from node_cuda.solution import Pending, Stats
from node_cuda.status import InvalidInput, SolveError, Status

MOST = 32
"""Captured solves that a `Graphs` keeps; the one that was not used for longest goes first."""

PATIENCE = 4
"""Captures in a row, each for a func that had changed, after which it is the host loop's: a capture takes longer."""

# Options that change no launch.
_NO_MATTER = ("cuda_graph", "throw", "norm", "grid_constructor", "record_steps", "check_reconstruction")

C = TypeVar("C")


class Captured:
    """What captured solves share. Their memory is used by one solve after another, whatever their streams."""

    def __init__(self, problem: Problem, tier: str | None) -> None:
        self.device = problem.y0.device
        module = module_for(self.device)
        assert module is not None
        self.recorder = capture.Recorder(self.device, module, tier)
        self._last_stream: Any = None

    def follow(self) -> None:
        """Let the current stream begin behind the solve before, in whatever stream that was."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None and self._last_stream != stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream

    def __del__(self) -> None:
        # The memory may serve others now, which a solve that still runs would write.
        with contextlib.suppress(Exception):
            if self._last_stream is not None and not torch.cuda.is_current_stream_capturing():
                self._last_stream.synchronize()


class CapturedSolve(Captured):
    """A forward solve."""

    def __init__(self, problem: Problem, method: Method, points: Sequence[float] | None, tier: str | None) -> None:
        super().__init__(problem, tier)
        with self.recorder.aside(), torch.no_grad():
            own = set_apart(problem)
            arithmetic = arithmetic_of(own)
            assert isinstance(arithmetic, Fused)
            self.loop = loop = OutputLoop(own, method, arithmetic, points=points)
            self._begin, step = record_loop(self.recorder, loop.begin, loop.attempt)
            self.repeat, self.why = self.recorder.repeat(step, loop.control)
        loop.release()

    def run(self, problem: Problem, points: Sequence[float] | None) -> Tensor:
        """y at the problem's times; nothing is read."""
        self.follow()
        self.loop.rebind(problem.y0, problem.times, problem.norm, points)
        self._begin.replay()
        self.repeat.run()
        return self.loop.ys.clone()


def record_loop(recorder: Recorder, begin: Callable[[], None], *parts: Callable[[], None]) -> list[Any]:
    """The beginning and the other parts of a loop, recorded. To be called inside `recorder.aside`."""

    def all_of_them() -> None:
        for part in (begin, *parts):
            part()

    recorder.warm_up(all_of_them)
    return [recorder.record(part) for part in (begin, *parts)]


@dataclass
class _Entry:
    """A captured solve, or why there is none; and what func was when it was made, but for what func itself writes."""

    key: Any
    found: Fingerprint
    written: frozenset[str]
    captured: Any

    def changed(self, now: Fingerprint) -> str | None:
        """What is another thing now."""
        return difference(self.found, {name: value for name, value in now.items() if name not in self.written})


class Graphs(Generic[C]):
    """Captured solves, for as long as this object lives. A copy is empty. tier: the way to repeat steps, one of
    "while" and "batches"; None: the best."""

    def __init__(self, tier: str | None = None) -> None:
        if tier is not None and tier not in TIERS:
            raise InvalidInput(f"tier must be one of {', '.join(map(repr, TIERS))} or None; got {tier!r}.")
        self.tier = tier
        self._entries: list[_Entry] = []
        self._misses = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.tier,)

    @property
    def count(self) -> int:
        """How many there are, those that could not be captured included."""
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Graphs(tier={self.tier!r})"

    def get(self, key: Any, func: Any, make: Callable[[], C]) -> C | str:
        """The captured solve, made where it is needed, or why there is none."""
        now = fingerprint(func)
        changed = None
        for i, entry in enumerate(self._entries):
            if entry.key != key:
                continue
            change = entry.changed(now)
            if change is None:
                self._misses = 0
                self._entries.append(self._entries.pop(i))
                return entry.captured
            changed = change
        if changed is not None:
            self._misses += 1
        if self._misses > PATIENCE:
            return (
                f"func's {changed!r} was another one at each of the last {PATIENCE} captures: keep it as it is, or, "
                "if it is a tensor, write into it with `copy_`"
            )
        try:
            captured = make()
        except Uncapturable as why:
            captured = str(why)
        after = fingerprint(func)
        written = frozenset(name for name in (*now, *after) if name not in now or now[name] != after.get(name))
        found = {name: value for name, value in after.items() if name not in written}
        self._entries = [*self._entries[1 - MOST :], _Entry(key, found, written, captured)]
        return captured


_of_functions: weakref.WeakKeyDictionary[Any, Graphs[Any]] = weakref.WeakKeyDictionary()


def graphs_of(func: Any) -> Graphs[Any]:
    """The captured solves of this function, which are freed with it."""
    try:
        return _of_functions.setdefault(func, Graphs())
    except TypeError:  # it cannot be referred to weakly
        return Graphs()


@dataclass
class Run(Pending):
    """A solve by graphs that may not have ended yet. state: a copy of where it ended; None: the loop has it still."""

    problem: Problem
    captured: CapturedSolve
    ys: Tensor
    stats: Stats
    state: Tensor | None
    _failure: SolveError | None = field(default=None, init=False)
    _ended: bool = field(default=False, init=False)

    def end(self) -> SolveError | None:
        """See `Pending`."""
        if not self._ended:
            self._ended = True
            now = read_at_end(self.captured.recorder, self.captured.loop.control, self.state)
            self.stats.host_reads += 1
            self.stats.nfe = self.captured.loop.cost(now, self.stats)
            self._failure = self._failed(now)
        return self._failure

    def _failed(self, now: Reading) -> SolveError | None:
        failure = failure_of(now, self.problem.direction, self.stats)
        if failure is None and not self.captured.loop.adaptive:
            # A fixed grid judges no step.
            self.stats.host_reads += 1
            if not bool(torch.isfinite(self.ys[-1]).all()):
                return SolveError(Status.NON_FINITE, self.problem.direction * now.last_t1, self.stats)
        return failure


def read_at_end(recorder: Recorder, control: Control, state: Tensor | None) -> Reading:
    """Where the last solve of a control ended, or the one that `state` was copied from."""
    if state is not None:
        return reading(state.cpu().numpy().data)
    look = recorder.look(control)
    look.ask()
    return look.answer()


def failure_of(now: Reading, direction: float, stats: Stats) -> SolveError | None:
    """How a solve that is over failed, if it did."""
    status = Status(now.status)
    if status is Status.SUCCESS:
        return None
    return SolveError(status, direction * now.t0, stats, f"The step was {now.proposal:.3g}.")


def solve_by_graphs(problem: Problem, method: Method, stats: Stats) -> tuple[Tensor, Status] | None:
    """As `host_loop.solve_outputs`, or None where that is to do it: then `stats.why` says why."""
    options = method.options
    stats.why = _gradient_obstacle(problem) or obstacle(problem, method)
    if stats.why is not None:
        return None
    points = tuple(grid_of(problem, options)[0]) if isinstance(options, FixedOptions) else None
    graphs: Graphs[CapturedSolve] = options.cuda_graph
    found = graphs.get(
        ("forward", *key_of(problem, method), points and len(points)),
        problem.func,
        lambda: CapturedSolve(problem, method, points, graphs.tier),
    )
    if isinstance(found, str):
        stats.why = found
        return None
    stats.loop, stats.why = found.repeat.tier, found.why
    ys = found.run(problem, points)
    deferred = options.throw == "deferred"
    run = Run(problem, found, ys, stats, found.loop.control.state.clone() if deferred else None)
    if deferred:
        stats.pending.append(run)
        return ys, Status.PENDING
    failure = run.end()
    if failure is not None and options.raises and found.loop.adaptive:
        raise failure
    return ys, Status.SUCCESS if failure is None else failure.status


def obstacle(problem: Problem, method: Method) -> str | None:
    """Why a solve cannot be captured, as far as that is known before."""
    options = method.options
    if method.name == SCIPY or method.name in ADAMS:
        return f"{method.name} takes no Runge-Kutta steps"
    if options.record_steps:
        return "record_steps wants the times of all steps on the host"
    if problem.norm.custom is not None:
        return "a norm of the user's is measured on the host"
    if len(problem.times) < 2 or problem.y0.numel() == 0:
        return "there is nothing to solve"
    return why_plain(problem.backend, problem.y0)


def _gradient_obstacle(problem: Problem) -> str | None:
    if torch.is_grad_enabled() and _wants_gradient(problem):
        return 'autograd records the steps; gradient="adjoint" and "discrete" capture them, and so does torch.no_grad()'
    return None


def _wants_gradient(problem: Problem) -> bool:
    func = problem.func
    if problem.y0.requires_grad or problem.t.requires_grad or not isinstance(func, nn.Module):
        return True
    return any(p.requires_grad for p in func.parameters())


def key_of(problem: Problem, method: Method) -> tuple[Any, ...]:
    """What a captured solve cannot change, besides func: what the launches hold as numbers, and the sizes."""
    y0, options = problem.y0, method.options
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in _NO_MATTER}
    lands = given.get("step_t") is not None or given.get("jump_t") is not None
    kind = y0.device.type
    return (
        method.name,
        _plain(given),
        (y0.shape, y0.dtype, y0.device),
        (len(problem.times), problem.direction, problem.times[0] if lands else None),
        problem.layout,
        tuple(
            (tol.shape, tol.dtype) if isinstance(tol, Tensor) else tol for tol in (problem.norm.rtol, problem.norm.atol)
        ),
        problem.norm.sizes,
        problem.backend,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
    )


def _plain(value: Any) -> Any:
    """The value as something that can be compared and hashed."""
    if isinstance(value, Tensor):
        return tuple(value.detach().reshape(-1).tolist()), value.shape
    if isinstance(value, dict):
        return tuple((name, _plain(x)) for name, x in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value
