"""The cache of captured solves: a captured solve is used again for later solves of the same kind.

The field is captured together with the step. Its Python code runs a few times during the capture, and never during a
solve. The key and the fingerprint of func contain everything that a captured solve depends on. A solve with another key
or another fingerprint is captured anew. If a solve cannot be captured, the host loop runs it, and `Stats.why` gives the
reason.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from node_cuda._torch_modes import capturing
from node_cuda.controllers import controller, runs_on_host
from node_cuda.cuda_graphs.capture import TIERS, Busy, Uncapturable
from node_cuda.cuda_graphs.fingerprint import Fingerprint, difference, fingerprint, surroundings, without, written
from node_cuda.cuda_graphs.first_run_check import refuted
from node_cuda.cuda_graphs.parts import Unseen
from node_cuda.kernels.backend import why_plain
from node_cuda.methods.registry import ADAMS, SCIPY, Method
from node_cuda.options import AdaptiveOptions, Common
from node_cuda.problem.problem import Problem
from node_cuda.status import InvalidInput, Unsupported

MOST = 32
"""The number of captured solves that a `GraphCache` keeps. The least recently used one is dropped first."""

PATIENCE = 4
"""If func has changed before each of so many captures in a row, the host loop is used: a capture takes longer."""

# These options change no kernel launch.
_NO_MATTER = ("cuda_graph", "throw", "norm", "grid_constructor", "record_steps", "check_reconstruction", "dtype")

C = TypeVar("C")


@dataclass
class _Entry:
    """A captured solve, or the reason why there is none, and the fingerprint of func at the capture.

    written: the names of what func itself writes. They are not part of the fingerprint.
    """

    key: Any
    found: Fingerprint
    written: frozenset[str]
    captured: Any

    def changed(self, now: Fingerprint) -> str | None:
        """Return the name of the first thing that has changed since the capture, or None."""
        return difference(self.found, without(now, self.written))


class GraphCache(Generic[C]):
    """Captured solves. They live as long as this object. A copy is empty.

    tier: the way to repeat steps, "while" or "batches"; None: the best one that the machine offers.
    """

    def __init__(self, tier: str | None = None) -> None:
        if tier is not None and tier not in TIERS:
            raise InvalidInput(f"tier must be one of {', '.join(map(repr, TIERS))} or None; got {tier!r}.")
        self.tier = tier
        self.rooms: dict[Any, int] = {}
        """For each kind of solve that records its steps: the number of steps, or of states, that it has room for."""
        self._entries: list[_Entry] = []
        self._misses = 0
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphCache, (self.tier,)

    @property
    def count(self) -> int:
        """The number of entries, including the solves that could not be captured."""
        return len(self._entries)

    def __repr__(self) -> str:
        return f"GraphCache(tier={self.tier!r})"

    def get(self, key: Any, func: Any, device: torch.device, make: Callable[[], C]) -> C | str:
        """Return the captured solve, captured now if necessary, or the reason why there is none.

        A lock allows one thread at a time.
        """
        with self._lock:
            try:
                return self._get(key, partial(fingerprint, func, device), make)
            except Unseen as why:
                return str(why)

    def _get(self, key: Any, look: Callable[[], Fingerprint], make: Callable[[], C]) -> C | str:
        now = look()
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
                    f"func's {changed!r} had changed at each of the last {PATIENCE} captures: keep it unchanged, "
                    "or, if it is a tensor, write into it with `copy_`"
                )
        settled: list[Fingerprint] = []
        token = _evaluated_once.set(lambda: settled.append(look()))
        try:
            captured = make()
        except Busy as why:
            return str(why)
        except Uncapturable as why:
            captured = str(why)
        finally:
            _evaluated_once.reset(token)
        after = look()
        # func may fill something in its first evaluation and only read it later. That must not change any more, so only
        # what func wrote after its first evaluation is left out of the fingerprint.
        own = written(settled[0] if settled else now, after)
        self._entries = [*self._entries[1 - MOST :], _Entry(key, without(after, own), own, captured)]
        return captured


_evaluated_once: ContextVar[Callable[[], None] | None] = ContextVar(
    "node_cuda.cuda_graphs.evaluated_once", default=None
)


def evaluated_once() -> None:
    """Take the fingerprint after the first evaluation of func. A capture calls this before the other evaluations."""
    told = _evaluated_once.get()
    if told is not None:
        told()


_of_functions: weakref.WeakKeyDictionary[Any, dict[Any, GraphCache[Any]]] = weakref.WeakKeyDictionary()


def graphs_of(func: Any) -> GraphCache[Any]:
    """Return the cache of captured solves of this function. The cache is freed with the function.

    The cache of a bound method is freed with the method's object, because Python makes a new bound method for each
    attribute access.
    """
    owner, method = (func.__self__, func.__func__) if isinstance(func, MethodType) else (func, None)
    try:
        return _of_functions.setdefault(owner, {}).setdefault(method, GraphCache())
    except TypeError:  # Python has no weak reference to it
        return GraphCache()


def captured_or_why(
    options: Common, why: str | None, key: Callable[[], Any], problem: Problem, make: Callable[[], C]
) -> C | str:
    """Return the captured solve of this key, captured now if necessary, or the reason why there is none.

    why: a reason that is already known, or None.
    """
    graphs: GraphCache[C] = options.cuda_graph
    why = why if why is not None else refuted(problem.y0.device)
    return why if why is not None else graphs.get(key(), problem.func, problem.y0.device, make)


def refuse_in_capture(y0: Any) -> None:
    """Raise Unsupported if the user is capturing the stream that the state is on."""
    for part in y0 if isinstance(y0, tuple) else (y0,):
        if isinstance(part, Tensor) and capturing(part.device):
            raise Unsupported(
                "A solve and its gradient cannot be part of a torch.cuda.graph: solve outside the graph with "
                'options=dict(cuda_graph=True, throw="deferred"), which captures the steps itself and does not wait.'
            )


def fallback_reason(problem: Problem, method: Method) -> str | None:
    """Return the reason why a solve cannot be captured, or None. Only reasons that are known before the capture."""
    options = method.options
    if method.name == SCIPY or method.name in ADAMS:
        return f"{method.name} takes no Runge-Kutta steps"
    if method.implicit is not None:
        return f"{method.name} solves systems, and the host looks at each"
    if problem.bounds is not None:
        return "clip=True limits the times of func to the interval of one solve"
    if options.record_steps:
        return "record_steps needs the times of all steps on the host"
    if isinstance(options, AdaptiveOptions) and runs_on_host(controller(options.controller)):
        return "the controller is the user's, and its Python runs on the host"
    if problem.norm.custom is not None:
        return "a custom norm is computed on the host"
    if len(problem.times) < 2 or problem.y0.numel() == 0:
        return "there is nothing to solve"
    if parametrize._cache_enabled:
        return "torch.nn.utils.parametrize.cached() keeps weights that a captured solve would continue to use"
    return why_plain(problem.backend, problem.y0)


def key_of(problem: Problem, method: Method) -> tuple[Any, ...]:
    """Return the properties, besides func, that are fixed in a captured solve: the sizes, and the numbers that are
    constants of the kernel launches."""
    y0, options = problem.y0, method.options
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in _NO_MATTER}
    lands = given.get("step_t") is not None or given.get("jump_t") is not None
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
        surroundings(y0.device.type),
    )


def _plain(value: Any) -> Any:
    """Return the value in a form that can be compared and hashed."""
    if isinstance(value, Tensor):
        return tuple(value.detach().reshape(-1).tolist()), value.shape
    if isinstance(value, dict):
        return tuple((name, _plain(x)) for name, x in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value
