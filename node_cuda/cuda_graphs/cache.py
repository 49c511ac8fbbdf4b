"""The cache of captured solves: what is captured once serves the next solves of the same kind.

The field is captured with the step: its Python runs a few times when that happens and not in the solve. What a captured
solve depends on is in its key and in the fingerprint of func; a solve of another kind is captured anew. What cannot be
captured is the host loop's, and `Stats.why` says why.
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
"""Captured solves that a `GraphCache` keeps; the one that was not used for longest goes first."""

PATIENCE = 4
"""Captures in a row, each for a func that had changed, after which it is the host loop's: a capture takes longer."""

# Options that change no launch.
_NO_MATTER = ("cuda_graph", "throw", "norm", "grid_constructor", "record_steps", "check_reconstruction", "dtype")

C = TypeVar("C")


@dataclass
class _Entry:
    """A captured solve, or why there is none; and what func was when it was made, but for what func itself writes."""

    key: Any
    found: Fingerprint
    written: frozenset[str]
    captured: Any

    def changed(self, now: Fingerprint) -> str | None:
        """What is another thing now."""
        return difference(self.found, without(now, self.written))


class GraphCache(Generic[C]):
    """Captured solves, for as long as this object lives. A copy is empty. tier: the way to repeat steps, one of
    "while" and "batches"; None: the best."""

    def __init__(self, tier: str | None = None) -> None:
        if tier is not None and tier not in TIERS:
            raise InvalidInput(f"tier must be one of {', '.join(map(repr, TIERS))} or None; got {tier!r}.")
        self.tier = tier
        self.rooms: dict[Any, int] = {}
        """For how many steps, or states, solves of a kind are to have room, where they record them."""
        self._entries: list[_Entry] = []
        self._misses = 0
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphCache, (self.tier,)

    @property
    def count(self) -> int:
        """How many there are, those that could not be captured included."""
        return len(self._entries)

    def __repr__(self) -> str:
        return f"GraphCache(tier={self.tier!r})"

    def get(self, key: Any, func: Any, device: torch.device, make: Callable[[], C]) -> C | str:
        """The captured solve, made where it is needed, or why there is none. One thread after another."""
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
                    f"func's {changed!r} was another one at each of the last {PATIENCE} captures: keep it as it is, "
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
        # What func wrote in its first evaluation alone it may look up in the others, and is not to change.
        own = written(settled[0] if settled else now, after)
        self._entries = [*self._entries[1 - MOST :], _Entry(key, without(after, own), own, captured)]
        return captured


_evaluated_once: ContextVar[Callable[[], None] | None] = ContextVar(
    "node_cuda.cuda_graphs.evaluated_once", default=None
)


def evaluated_once() -> None:
    """To be called while something is captured, behind the first evaluation of its func and before the others."""
    told = _evaluated_once.get()
    if told is not None:
        told()


_of_functions: weakref.WeakKeyDictionary[Any, dict[Any, GraphCache[Any]]] = weakref.WeakKeyDictionary()


def graphs_of(func: Any) -> GraphCache[Any]:
    """The captured solves of this function, which are freed with it; those of a bound method with its object, as the
    method itself is another one each time that it is looked up."""
    owner, method = (func.__self__, func.__func__) if isinstance(func, MethodType) else (func, None)
    try:
        return _of_functions.setdefault(owner, {}).setdefault(method, GraphCache())
    except TypeError:  # it cannot be referred to weakly
        return GraphCache()


def captured_or_why(
    options: Common, why: str | None, key: Callable[[], Any], problem: Problem, make: Callable[[], C]
) -> C | str:
    """The captured solve of this key, made where it is needed, or why there is none."""
    graphs: GraphCache[C] = options.cuda_graph
    why = why if why is not None else refuted(problem.y0.device)
    return why if why is not None else graphs.get(key(), problem.func, problem.y0.device, make)


def refuse_in_capture(y0: Any) -> None:
    """Raise Unsupported for a state on a stream that the user captures."""
    parts = y0 if isinstance(y0, tuple) else (y0,)
    if any(isinstance(part, Tensor) and capturing(part.device) for part in parts):
        raise Unsupported(
            "A solve and its gradient cannot be part of a torch.cuda.graph: solve outside the graph with "
            'options=dict(cuda_graph=True, throw="deferred"), which captures the steps itself and waits for nothing.'
        )


def fallback_reason(problem: Problem, method: Method) -> str | None:
    """Why a solve cannot be captured, as far as that is known before."""
    options = method.options
    if method.name == SCIPY or method.name in ADAMS:
        return f"{method.name} takes no Runge-Kutta steps"
    if method.implicit is not None:
        return f"{method.name} solves systems, and the host looks at each"
    if problem.bounds is not None:
        return "clip=True bounds the times that func sees by numbers of one solve"
    if options.record_steps:
        return "record_steps wants the times of all steps on the host"
    if isinstance(options, AdaptiveOptions) and runs_on_host(controller(options.controller)):
        return "the controller is the user's, and its Python runs on the host"
    if problem.norm.custom is not None:
        return "a norm of the user's is measured on the host"
    if len(problem.times) < 2 or problem.y0.numel() == 0:
        return "there is nothing to solve"
    if parametrize._cache_enabled:
        return "torch.nn.utils.parametrize.cached() keeps weights that a captured solve would go on using"
    return why_plain(problem.backend, problem.y0)


def key_of(problem: Problem, method: Method) -> tuple[Any, ...]:
    """What a captured solve cannot change, besides func: what the launches hold as numbers, and the sizes."""
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
    """The value as something that can be compared and hashed."""
    if isinstance(value, Tensor):
        return tuple(value.detach().reshape(-1).tolist()), value.shape
    if isinstance(value, dict):
        return tuple((name, _plain(x)) for name, x in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value
