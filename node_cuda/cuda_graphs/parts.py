"""A search for every tensor and every other value that the Python code of a function can reach, each with a name.

    net.0.weight    a parameter of a module        scale           a variable of a closure
    net.training    an attribute                   settings.rate   a global that the code names
    rates[2]        an item of a list              code()          the code of the function itself

The search starts at the function. It follows attributes, items of lists and dicts, hooks, closures, defaults, globals
that the code names, and methods that the code may call. Python's and PyTorch's own code does not change: the search
does not go into it.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import os
import random
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules
from torch.nn.parameter import is_lazy

LARGEST = 1024
"""The largest list, dict or set that is searched. A larger one would take too long before each solve."""


class Unseen(Exception):
    """A value cannot be inspected. The message is the reason, as half a sentence."""


def parts(func: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the values and the tensors that func can reach, by name. Two values are equal if their content is.

    Raises Unseen if Python cannot inspect a value, such as the state of a scripted module. The search does not find
    what func reads in other ways, from a file or from the environment.
    """
    search = _Search()
    everywhere = {f"torch{key}": vars(of_all_modules)[f"_global{key}"] for key in _HOOKS}
    search.add("", {"": func, **{key: tuple(hooks.values()) for key, hooks in everywhere.items() if hooks}})
    search.run()
    return search.values, search.tensors


_PLAIN = frozenset((bool, int, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size))
_PLAIN |= {torch.layout, torch.memory_format}
# Two of these are equal if their repr is equal: 0.0 differs from -0.0, and NaN equals NaN.
_WRITTEN = frozenset((float, complex, range, slice, bytearray, torch.finfo, torch.iinfo))
_TENSORS = frozenset((Tensor, nn.Parameter))
_CONTAINERS = (list, tuple, deque, set, frozenset)
# These are compared by identity, and not by their state: a lock, a stream, a logger, a compiled function.
_BY_IDENTITY = (ModuleType, torch.Generator, torch.Stream, torch.Event, torch._C.ScriptFunction)
_BY_IDENTITY_IN = ("_io.", "_thread.", "concurrent.", "io.", "logging.", "multiprocessing.", "threading.", "triton.")
_BY_IDENTITY_IN += ("torch._dynamo.", "torch._ops.", "torch.cuda.", "torch.library.")
# Python cannot see what these objects compute with, or they compute another number each time.
_HIDDEN = (torch.jit.ScriptModule, torch._C.ScriptModule, torch._C.ScriptMethod, torch._C.ScriptObject)
_HIDDEN += (random.Random, np.random.Generator, np.random.RandomState, threading.local)
# Attributes of nn.Module that are searched in another way, or that have no effect on what forward computes.
_OF_MODULES = frozenset((*vars(nn.Module()), "_is_full_backward_hook", "_non_persistent_buffers_set")) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_METHODS = (FunctionType, staticmethod, classmethod, property, functools.cached_property)
_NO_DATA = (types.GetSetDescriptorType, types.MemberDescriptorType, *_METHODS)
_WRAPPERS = (MethodType, functools.partial, *_METHODS[1:])
_WRAPPED = ("__self__", "__func__", "fget", "fset", "func", "args", "keywords", "__dict__")
# Methods that PyTorch calls by itself, as Python calls methods that begin with two underscores.
_CALLED = ("forward", "backward", "setup_context", "vjp", "jvp")


class _Search:
    """A search for everything that can be reached from a function."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._todo: list[tuple[str, Any]] = []
        # By the id of an object: its name, and the object itself, so that no other object gets this id meanwhile.
        self._seen: dict[int, tuple[str, Any]] = {}
        self._classes: dict[type, str] = {}
        self._attributes = set(_CALLED)  # the names of attributes in all code that was found
        self._methods: set[str] = set()

    def add(self, below: str, members: dict[str, Any]) -> None:
        """Put members on the list of values to search. The name of each is `below` and its key."""
        if members:
            self._todo += [(below + key, x) for key, x in reversed(members.items())]  # the last one is taken first

    def run(self) -> None:
        """Search all values on the list, and all values that they lead to."""
        todo, values, seen = self._todo, self.values, self._seen
        while todo or self._add_methods():
            name, x = todo.pop()
            kind = type(x)
            if kind in _PLAIN:
                values[name] = kind, x
            elif kind in _WRITTEN:
                values[name] = kind, repr(x)
            elif kind in _TENSORS:
                self._tensor(x, kind, name)
            elif id(x) in seen:  # record its name: an attribute may refer to one of two modules
                values[f"{name} is"] = seen[id(x)][0]
            else:
                seen[id(x)] = name, x
                self._look(x, kind, name, f"{name}." if name else "")

    def _look(self, x: Any, kind: type, name: str, below: str) -> None:
        if isinstance(x, nn.Module) and not isinstance(x, torch.jit.ScriptModule):
            self._module(x, kind, below)
        elif isinstance(x, Tensor):
            self._tensor(x, kind, name)
        elif isinstance(x, FunctionType):
            self._function(x, below)
        elif isinstance(x, _HIDDEN):
            raise _unseen(x, name)
        elif isinstance(x, _WRAPPERS):
            self.add(below, {key: getattr(x, key) for key in _WRAPPED if hasattr(x, key)})
        elif isinstance(x, type):
            self.values[name] = x
            self._class(x, below)
        elif isinstance(x, weakref.ref):
            self.add(name, {"()": x()})
        elif isinstance(x, (np.ndarray, np.generic)) and not x.dtype.hasobject:
            self.values[name] = kind, x.dtype.str, x.shape, x.tobytes()
        elif _is_one_of_a_kind(x, kind):
            self.values[name] = _Same(x, name)
        else:
            self._object(x, kind, name, below)

    def _tensor(self, x: Any, kind: type, name: str) -> None:
        if x.__dict__ or kind not in _TENSORS:
            self.add(f"{name}.", {"type()": kind, **_attributes(x, kind)})
        if is_lazy(x) or x.layout is not torch.strided or x.is_nested:
            raise Unseen(f"func's {name!r} is a tensor that has no values yet, or that is not dense")
        self.tensors[name] = x

    def _module(self, x: nn.Module, kind: type, below: str) -> None:
        self.values[below + "type()"] = kind
        own = vars(x)
        if modules := own["_modules"]:
            self.values[below + "modules()"] = tuple(modules)
            self.add(below, modules)
        if own.get("_forward_hooks") or own.get("_forward_pre_hooks"):
            self.add(below, {key: tuple(own[key].values()) for key in _HOOKS})
        attributes = {key: own[key] for key in own.keys() - _OF_MODULES}
        self.add(below, {**attributes, **own["_parameters"], **own["_buffers"]})
        self._class(kind, below + "type().")

    def _object(self, x: Any, kind: type, name: str, below: str) -> None:
        self.values[below + "type()"] = kind
        self.add(below, _attributes(x, kind))
        if isinstance(x, (dict, types.MappingProxyType, *_CONTAINERS)):
            self._items(x, name, below)
        elif _has_hidden_state(kind):
            self.add(below, {"pickled()": _pickled(x, name)})
        self._class(kind, below + "type().")

    def _items(self, x: Any, name: str, below: str) -> None:
        if len(x) > LARGEST:
            raise Unseen(f"func's {name!r} has {len(x)} items, too many to search: make it a tensor")
        self.values[below + "length()"] = len(x)
        if isinstance(x, _CONTAINERS):
            self.add(name, {f"[{i}]": item for i, item in enumerate(x)})
        else:
            self.add(name, {f"[key {i}]": key for i, key in enumerate(x)})
            self.add(name, {f"[{key!r}]" if type(key) is str else f"[value {i}]": x[key] for i, key in enumerate(x)})

    def _function(self, function: FunctionType, below: str) -> None:
        code = function.__code__
        self.values[below + "code()"] = code
        if function.__defaults__ or function.__kwdefaults__:
            self.add(below, {"defaults()": function.__defaults__, "keywords()": function.__kwdefaults__})
        if function.__dict__:
            self.add(f"{below}__dict__.", function.__dict__)
        for key, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.add(below, {key: cell.cell_contents})
            except ValueError:  # not filled yet
                continue
        if not _is_foreign(function.__globals__.get("__name__")):
            attributes, chains = _names_in(code)
            self._attributes |= attributes
            self.add(below, dict(_globals(function.__globals__, chains)))

    def _class(self, cls: type, below: str) -> None:
        """Search the data of cls and of its base classes that users wrote. Methods are added when code names them."""
        for i, owner in enumerate(_users_classes(cls)):
            if owner not in self._classes:
                self._classes[owner] = below + "super()." * i
                data = {key: x for key, x in vars(owner).items() if not isinstance(x, _NO_DATA)}
                self.add(self._classes[owner], {key: data[key] for key in data if not key.startswith(("__", "_abc_"))})

    def _add_methods(self) -> bool:
        """Add the methods of the found classes that the code may call. Return whether there is more to search."""
        for owner, below in self._classes.items():
            for key, x in vars(owner).items():
                is_called = key[:2] == "__" or key in self._attributes
                if is_called and isinstance(x, _METHODS) and below + key not in self._methods:
                    self._methods.add(below + key)
                    self.add(below, {key: x})
        return bool(self._todo)


def _is_one_of_a_kind(x: Any, kind: type) -> bool:
    if kind is types.BuiltinFunctionType and type(x.__self__).__name__ == "PyCapsule":  # a function of an extension
        return True
    return isinstance(x, _BY_IDENTITY) or f"{kind.__module__}.".startswith(_BY_IDENTITY_IN)


class _Same:
    """Compares an object by identity, and never calls its `==`. A later object at the same address is not equal."""

    def __init__(self, x: Any, name: str) -> None:
        try:
            self.ref: Any = weakref.ref(x)
        except TypeError:
            if not isinstance(x, _BY_IDENTITY):
                raise _unseen(x, name) from None
            self.ref = x  # a generator, a stream or an event of an older torch; it is small

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.ref is other.ref  # Python makes one weak reference for each object

    def __hash__(self) -> int:
        return id(self.ref)


def _unseen(x: Any, name: str) -> Unseen:
    return Unseen(f"func's {name!r} is of {type(x).__module__}.{type(x).__qualname__}, which cannot be inspected")


def _attributes(x: Any, kind: type) -> dict[str, Any]:
    return {**{key: getattr(x, key) for key in _slots(kind) if hasattr(x, key)}, **getattr(x, "__dict__", {})}


@functools.lru_cache(maxsize=4096)
def _slots(cls: type) -> tuple[str, ...]:
    members = ((key, x) for owner in cls.__mro__ if "__slots__" in vars(owner) for key, x in vars(owner).items())
    return tuple(key for key, x in members if isinstance(x, types.MemberDescriptorType))


@functools.lru_cache(maxsize=4096)
def _has_hidden_state(cls: type) -> bool:
    """Return whether objects of a class written in C hold more than their attributes. (pickle does the same check.)"""
    pointers = len(_slots(cls)) + (cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0)
    return cls.__itemsize__ > 0 or cls.__basicsize__ > object.__basicsize__ + pointers * np.dtype(np.intp).itemsize


def _pickled(x: Any, name: str) -> Any:
    """Return what pickle would save of an object of a class written in C."""
    try:
        reduce = copyreg.dispatch_table.get(type(x))
        return reduce(x) if reduce is not None else x.__reduce_ex__(4)
    except Exception:
        raise _unseen(x, name) from None


@functools.lru_cache(maxsize=4096)
def _is_foreign(module: Any) -> bool:
    """Return whether a module belongs to Python, torch, numpy or scipy. Their code, and its globals, do not change."""
    root = str(module).split(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None)  # a user's file may have the name of a module of Python
    is_python = root in sys.stdlib_module_names and (file is None or file.startswith(os.path.dirname(os.__file__)))
    return is_python or root in ("torch", "numpy", "scipy")


@functools.lru_cache(maxsize=4096)
def _users_classes(cls: type) -> tuple[type, ...]:
    return tuple(owner for owner in cls.__mro__ if not _is_foreign(owner.__module__))


def _globals(given: Mapping[str, Any], chains: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, Any]]:
    """Yield what the code names as a, a.b or a.b.c. If a is a module, only the members that the code names."""
    for chain in chains:
        value, depth = given.get(chain[0]), 1
        while isinstance(value, ModuleType) and depth < len(chain) and not _is_foreign(value.__name__):
            value, depth = getattr(value, chain[depth], None), depth + 1
        is_code = isinstance(value, type) or (isinstance(value, FunctionType) and not value.__closure__)
        if not (isinstance(value, ModuleType) or (is_code and _is_foreign(value.__module__))):
            yield ".".join(chain[:depth]), value


@functools.lru_cache(maxsize=4096)
def _names_in(code: CodeType) -> tuple[frozenset[str], tuple[tuple[str, ...], ...]]:
    """Return the names in a function's code and its inner functions: attributes, and globals with their attributes."""
    attributes, chains, codes = set[str](), dict[tuple[str, ...], None](), [code]
    for inner in codes:
        codes += (x for x in inner.co_consts if isinstance(x, CodeType))
        chain: tuple[str, ...] = ()
        for step in dis.get_instructions(inner):
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD"):
                attributes.add(step.argval)
                chain = (*chain, step.argval) if chain else ()
            else:
                chains[chain] = None
                chain = (step.argval,) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") else ()
    return frozenset(attributes), tuple(filter(None, chains))
