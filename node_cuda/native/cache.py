"""Which compiled solve fits: the cache, its key, and the reasons for which a solve is not compiled.

The key holds what is fixed in the code: shapes, dtypes, the method, and the kinds of the options. Its numbers are
inputs of the code. The structure of func is compared beside it (`cuda_graphs.fingerprint`), without the numbers in its
tensors. A number that func keeps as a Python attribute is a constant of the code: a new value needs new code, at most
PATIENCE times for the same attribute.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from node_cuda._torch_modes import transformed
from node_cuda.controllers import controller, runs_on_host
from node_cuda.cuda_graphs.fingerprint import Fingerprint, difference, surroundings, without, written
from node_cuda.cuda_graphs.parts import Unseen, parts
from node_cuda.kernels.norms import HALF
from node_cuda.methods.registry import Method
from node_cuda.native.build import why_not
from node_cuda.native.tracing import Refused
from node_cuda.options import AdaptiveOptions, FixedOptions
from node_cuda.problem.problem import Problem
from node_cuda.status import InvalidField, Unsupported

PATIENCE = 2
"""How often a solve is compiled again because of the same attribute of func."""

MOST = 64
"""The number of compiled solves that a cache keeps. The first ones are dropped."""


class Seen:
    """What func can reach now: the tensors, each once, and the fingerprint without their numbers. Raises Unseen.

    own: the names of what func itself writes in each evaluation, such as a counter of calls.
    """

    def __init__(self, func: Any) -> None:
        values, tensors = parts(func)
        self.tensors: list[Tensor] = list({id(x): x for x in tensors.values()}.values())
        self.own: frozenset[str] = frozenset()
        places = {id(x): i for i, x in enumerate(self.tensors)}
        shared = tuple(places[id(x)] for x in tensors.values())  # which names are of the same tensor
        self.found: Fingerprint = {**values, **{name: _form(x) for name, x in tensors.items()}, "shared()": shared}

    def bare(self) -> list[Tensor]:
        """Return the tensors without autograd."""
        return [x.detach() for x in self.tensors]


class Then:
    """What func reached in a forward pass, to compare with what it reaches in the backward pass."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self._versions = [x._version for x in seen.tensors]
        self._sizes = _sizes(seen.tensors)

    def refuse_changes(self, now: Seen, what: str) -> None:
        """Raise InvalidField if func has changed. what: the gradient mode."""
        own = self.seen.own | now.own
        name = difference(without(self.seen.found, own), without(now.found, own))
        same = all(a is b for a, b in zip(self.seen.tensors, now.tensors, strict=False))
        unwritten = same and [x._version for x in now.tensors] == self._versions
        if name is None and unwritten and _sizes(now.tensors) == self._sizes:
            return
        raise InvalidField(
            f"func was changed between the forward and the backward pass ({name or 'one of its tensors'}), and the "
            f"compiled {what} evaluates it again. Call backward() before the change, use one func for each setting, or "
            'use gradient="backprop".'
        )


def _sizes(tensors: Sequence[Tensor]) -> bytes:
    """Return the norm of each tensor, which shows that it was written into through `.data`: that counts no version."""
    floats = [x.detach() for x in tensors if (x.is_floating_point() or x.is_complex()) and x.numel()]
    norms: Sequence[Tensor] = torch._foreach_norm(floats) if floats else ()
    if len({x.dtype for x in norms}) > 1:
        norms = [x.double() for x in norms]
    return torch.stack(list(norms)).view(torch.uint8).numpy().tobytes() if norms else b""


def _form(x: Tensor) -> Any:
    if not x.is_cpu or x.is_conj() or x.is_neg():
        raise Unseen("func has a tensor that is not on the CPU, or that is a conjugate or negative view")
    return x.dtype, x.shape, x.stride()


class _Entry:
    def __init__(self, key: Any, found: Fingerprint, own: frozenset[str], made: Any) -> None:
        self.key, self.found, self.own, self.made = key, found, own, made


class NativeCache:
    """Compiled solves of a func. A copy is empty. required: a solve that cannot be compiled raises Unsupported."""

    def __init__(self, required: bool = False) -> None:
        self.required = required
        self.methods: dict[Any, Method] = {}  # of options with this cache (see `methods.registry.lookup`)
        self._entries: list[_Entry] = []
        self._again: dict[str, int] = {}
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeCache, (self.required,)

    def __repr__(self) -> str:
        return f"NativeCache(required={self.required})"

    @property
    def count(self) -> int:
        """The number of entries, including the solves that could not be compiled."""
        return len(self._entries)

    def get(self, key: Any, func: Any, make: Callable[[Seen], Any], seen: Seen | None = None) -> tuple[Any, Seen] | str:
        """Return the compiled solve, compiled now if necessary, with what func reaches now; or the reason why not.

        seen: what func reaches, if it is known.
        """
        try:
            seen = Seen(func) if seen is None else seen
        except Unseen as why:
            return str(why)
        for entry in self._entries:
            if entry.key == key and entry.found == (seen.found if not entry.own else without(seen.found, entry.own)):
                seen.own = entry.own
                return entry.made if isinstance(entry.made, str) else (entry.made, seen)
        with self._lock:
            return self._make(key, func, seen, make)

    def _make(self, key: Any, func: Any, seen: Seen, make: Callable[[Seen], Any]) -> tuple[Any, Seen] | str:
        changes = [difference(e.found, without(seen.found, e.own)) for e in self._entries if e.key == key]
        if None in changes:  # another thread has made it
            made = next(e.made for e in self._entries if e.key == key and e.found == without(seen.found, e.own))
            return made if isinstance(made, str) else (made, seen)
        if changes and (name := changes[-1]) is not None:
            if self._again.get(name, 0) >= PATIENCE:
                return (
                    f"func's {name!r} has changed again, and each value needs another compilation: make it a buffer "
                    "(`self.register_buffer`), whose numbers may change"
                )
            self._again[name] = self._again.get(name, 0) + 1
        try:
            made: Any = make(seen)
        except (Refused, Unseen) as why:
            made = str(why)
        try:
            after = Seen(func)
        except Unseen:
            made, after = "func keeps something of each evaluation, such as a list that grows", seen
        own = written(seen.found, after.found)
        self._entries = [*self._entries[1 - MOST :], _Entry(key, without(after.found, own), own, made)]
        after.own = own
        return made if isinstance(made, str) else (made, after)


_of_functions: weakref.WeakKeyDictionary[Any, dict[Any, NativeCache]] = weakref.WeakKeyDictionary()


def natives_of(func: Any, required: bool) -> NativeCache:
    """Return the cache of compiled solves of this function, or of the object that it is a method of."""
    owner, method = (func.__self__, func.__func__) if isinstance(func, MethodType) else (func, None)
    try:
        return _of_functions.setdefault(owner, {}).setdefault((method, required), NativeCache(required))
    except TypeError:  # Python has no weak reference to it
        return NativeCache(required)


def refused(method: Method, why: str) -> str:
    """Return the reason; with compile="require" raise Unsupported with it."""
    cache = method.options.compile
    if isinstance(cache, NativeCache) and cache.required:
        raise Unsupported(f'options["compile"] is "require", and this solve cannot be compiled: {why}.')
    return why


def why_eager(problem: Problem, method: Method) -> str | None:
    """Return the reason why no solve of this kind is compiled, or None."""
    options, tableau = method.options, method.tableau
    if (why := why_not()) is not None:
        return why
    if problem.y0.device.type != "cpu":
        return "compile=True is for the CPU; on CUDA use cuda_graph=True"
    if not isinstance(options, (AdaptiveOptions, FixedOptions)) or tableau is None:
        return f"{method.name} is no explicit Runge-Kutta method"
    if tableau.adaptive and not tableau.carry_last_stage:
        return f"{method.name} evaluates the first stage of each step, which compiled solves do not"
    if not tableau.adaptive and tableau.fsal:
        return f"{method.name} has a stage at the end of a step of a fixed grid"
    if problem.y0.dtype in HALF:
        return "the compiler rounds a state in half precision at other places"
    if problem.callbacks:
        return f"func has callbacks ({', '.join(sorted(problem.callbacks))}), and a compiled loop calls no Python"
    if problem.norm.custom is not None:
        return "a custom norm is Python, and a compiled loop calls none"
    if isinstance(options, AdaptiveOptions) and runs_on_host(controller(options.controller)):
        return "the controller is the user's Python, and a compiled loop calls none"
    if options.compensated:
        return "compensated=True keeps a second tensor beside y, which a compiled loop does not"
    if options.progress:
        return "progress=True shows each step, and a compiled loop calls no Python"
    if options.record_steps:
        return "record_steps needs the times of all steps on the host"
    if len(problem.times) < 2 or problem.y0.numel() == 0:
        return "there is nothing to solve"
    if transformed():
        return "a transform of torch.func is active"
    if parametrize._cache_enabled:
        return "torch.nn.utils.parametrize.cached() is active"
    if torch.is_grad_enabled() and problem.t.requires_grad and isinstance(options, FixedOptions):
        return "dL/dt of a fixed grid is computed step by step"
    return None


def key_of(problem: Problem, method: Method, *kinds: Any) -> tuple[Any, ...]:
    """Return what is fixed in the code of a compiled solve, besides func."""
    y0, options = problem.y0, method.options
    return (
        method.name,
        method.tableau,  # compared by identity first
        getattr(options, "dense", None),
        getattr(options, "interp", None),
        getattr(options, "perturb", None),
        # With a grid that is t itself no output lies between two points, and interp has no effect.
        getattr(options, "step_size", None) is None and getattr(options, "grid_constructor", None) is None,
        (y0.shape, y0.dtype),
        problem.bounds is not None,
        problem.layout,
        tuple(tol.shape if isinstance(tol, Tensor) else None for tol in (problem.norm.rtol, problem.norm.atol)),
        problem.norm.sizes,
        surroundings("cpu"),
        torch.get_num_threads(),
        *kinds,
    )
