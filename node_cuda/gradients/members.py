"""The attributes and buffers of func: as they were in a solve, and how they have changed since."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from node_cuda.gradients.parameters import Parameters, is_wrapped
from node_cuda.problem.field import version_of


class Held(NamedTuple):
    """A tensor that func holds: its place, a reference to it, and the value that can be put back.

    value: the tensor without its graph, except for a tensor that the solve is differentiated by.
    """

    place: dict[str, Any]
    name: str
    was: weakref.ref[Tensor]
    version: int | None
    value: Tensor
    attribute: bool

    def there(self) -> bool:
        """Return whether the tensor was not replaced."""
        return self.place.get(self.name) is self.was()

    def written(self) -> bool:
        """Return whether the tensor was written into, and not replaced."""
        x = self.was()
        return x is not None and self.place.get(self.name) is x and version_of(x) != self.version


class Members:
    """The members of the object that func computes with, and of its modules, after the first evaluation of a solve.

    tensors: attributes and buffers, without those that func writes. others: attributes, by value or by identity.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._holder = parameters.func if parameters.owner is None else parameters.owner
        self._named = set(map(id, parameters.every))
        self._looked = False
        self.tensors: list[Held] = []
        self.others: list[tuple[dict[str, Any], str, Any]] = []

    def look(self) -> None:
        """Note the attributes and buffers."""
        self._looked = True
        if isinstance(self._holder, nn.Module):
            self.others.append((self._holder.__dict__, "training", self._holder.training))
        for one in self._objects():
            own = one.__dict__
            of_torch = type(one).__module__.startswith("torch.")
            for name in own.keys() - _OF_MODULES:
                x = own[name]
                if isinstance(x, Tensor):
                    self._hold(own, name, x, attribute=True)
                elif not of_torch:
                    self.others.append((own, name, _known(x)))
            buffers = own.get("_buffers")
            if buffers and type(buffers) is dict:
                for name, x in buffers.items():
                    if x is not None:
                        self._hold(buffers, name, x, attribute=False)

    def settle(self) -> None:
        """Forget the tensors that func wrote in the solve, at its end. A captured solve may not have called func."""
        if not self._looked:
            self.look()
        elif self.tensors:
            self.tensors = [x for x in self.tensors if x.there() and not x.written()]

    def rewritten(self) -> bool:
        """Return whether a tensor was written into since the solve."""
        return any(x.written() for x in self.tensors)

    def put_back(self) -> list[contextlib.AbstractContextManager[None]]:
        """Return the context that puts back the tensor attributes that were replaced since the solve, if any were."""
        if not self.tensors:
            return []
        replaced = [x for x in self.tensors if x.attribute and not x.there()]
        return [self._with(replaced)] if replaced else []

    @contextlib.contextmanager
    def _with(self, replaced: list[Held]) -> Iterator[None]:
        with _lock_of(self._holder):
            now = [x.place.get(x.name, _GONE) for x in replaced]
            try:
                for x in replaced:
                    x.place[x.name] = x.value
                yield
            finally:
                for x, current in zip(replaced, now, strict=True):
                    if x.place.get(x.name) is not x.value:
                        continue  # func wrote it
                    if current is _GONE:
                        del x.place[x.name]
                    else:
                        x.place[x.name] = current

    def changes(self) -> str:
        """Return in words what has changed since the solve; "" if no change was found."""
        names = self._names()
        words = []
        for x in self.tensors:
            if x.written():
                words.append(f"{names[id(x.place)]}{x.name} was written in place")
            elif not (x.attribute or x.there()):
                words.append(f"{names[id(x.place)]}{x.name} was replaced")
        for place, name, before in self.others:
            now = _known(place.get(name, _GONE))
            if now != before:
                plain = not (isinstance(before, tuple) or isinstance(now, tuple))
                was = f"was {before!r:.40} and is {now!r:.40}" if plain else "is another object"
                words.append(f"{names[id(place)]}{name} {was}")
        return "; ".join(sorted(words))

    def _hold(self, place: dict[str, Any], name: str, x: Tensor, *, attribute: bool) -> None:
        if not is_wrapped(x):
            value = x if not x.requires_grad or id(x) in self._named else x.detach()
            self.tensors.append(Held(place, name, weakref.ref(x), version_of(x), value, attribute))

    def _objects(self) -> list[Any]:
        holder = self._holder
        if not isinstance(holder, nn.Module):
            plain = hasattr(holder, "__dict__") and not isinstance(holder, (ModuleType, type, Tensor))
            return [holder] if plain else []
        found: list[Any] = [holder]  # as holder.modules() does, in a third of its time
        seen = {holder, None}
        for one in found:
            for child in one._modules.values():
                if child not in seen:
                    seen.add(child)
                    found.append(child)
        return found

    def _names(self) -> dict[int, str]:
        """Return the prefix of the members' names, by the id of their place."""
        holder = self._holder
        if not isinstance(holder, nn.Module):
            return {id(one.__dict__): "func." for one in self._objects()}
        modules = [(f"func.{name}." if name else "func.", one.__dict__) for name, one in holder.named_modules()]
        return {id(place): name for name, own in modules for place in (own, own.get("_buffers"))}


def _known(x: Any) -> Any:
    """Return a plain value itself, and the identity of another object, which must not be kept."""
    return x if type(x) in _PLAIN else (id(x),)


def _lock_of(holder: Any) -> Any:
    """Return the lock of this object, for all its backward passes. Two objects never wait for each other."""
    with _GUARD:
        lock = _LOCKS.get(id(holder))
        if lock is None:
            lock = _LOCKS[id(holder)] = threading.RLock()
        return lock


_PLAIN = (bool, int, float, str, type(None))
_OF_MODULES = frozenset(vars(nn.Module()))
_GONE = object()
_GUARD = threading.Lock()
_LOCKS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
