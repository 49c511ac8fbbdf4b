"""What a function computes with, besides its arguments: where its tensors lie, its numbers, and its code.

Work that was recorded reads tensors where they were, and has numbers as they were. As long as the fingerprint of the
function is the same, its Python would launch the same work again. A fingerprint keeps no object alive but code.
"""

from __future__ import annotations

import dis
import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

Fingerprint = dict[str, Any]
"""What was found, by where it was found: "net.0.weight", say."""

LARGEST = 256
"""Of a longer list or dict the items are told apart, and not looked into: it is data, and no part of a formula."""

_PLAIN = (bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_KNOWN = frozenset(_PLAIN)
# Of nn.Module: looked at apart, or of no matter to what forward computes.
_OF_MODULES = frozenset((*vars(nn.Module()), "_is_full_backward_hook", "_non_persistent_buffers_set")) - {"training"}
# Whose classes, functions and numbers do not change, and are not looked into.
_FOREIGN = frozenset(
    {
        "abc",
        "builtins",
        "collections",
        "concurrent",
        "contextlib",
        "copy",
        "dataclasses",
        "enum",
        "functools",
        "inspect",
    }
    | {"io", "itertools", "logging", "math", "multiprocessing", "numbers", "numpy", "operator", "os", "random", "scipy"}
    | {"sys", "threading", "time", "torch", "types", "typing", "warnings", "weakref", "_io", "_thread", "_weakrefset"}
)
# Objects of these are machinery that changes as it works.
_OPAQUE = frozenset({"concurrent", "io", "logging", "multiprocessing", "threading", "_io", "_thread"})
# What Python calls without being told its name.
_UNNAMED = ("forward", "__call__", "__getattr__", "__getattribute__", "__getitem__", "__torch_function__")


def fingerprint(func: Callable[..., Any]) -> Fingerprint:
    """Of a module: parameters, buffers, attributes, hooks, and those of its modules; of another object: attributes; of
    both what their classes hold, and the methods that are called by name; of a function: its code, closure, defaults
    and attributes, and the globals that it names, other functions included. What a field finds out in other ways, from
    the environment or a file, say, is not seen."""
    look = _Look()
    look.at(func, "")
    for hooks in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        look.at_all(_numbered(getattr(of_all_modules, hooks, {}).values()), f"torch{hooks}.")
    look.at_methods()
    return look.found


def difference(a: Fingerprint, b: Fingerprint) -> str | None:
    """Where two of them differ first; None if they are the same."""
    if a == b:
        return None
    return next((name for name in (*a, *b) if name not in a or name not in b or a[name] != b[name]), None)


def written(before: Fingerprint, after: Fingerprint) -> frozenset[str]:
    """What is another thing in the second: what func itself writes, if nothing but func ran between them."""
    return frozenset(name for name in (*before, *after) if before.get(name, _NONE) != after.get(name, _NONE))


def without(found: Fingerprint, written: frozenset[str]) -> Fingerprint:
    """A fingerprint without what func itself writes, and without what it may put into a list or dict that it fills."""
    if not written:
        return found
    below = tuple(name.removesuffix("length") for name in written if name.endswith(".length"))
    return {name: x for name, x in found.items() if name not in written and not (below and name.startswith(below))}


def surroundings(kind: str) -> tuple[Any, ...]:
    """What the launches of a field on a device of this kind depend on, that is torch's own."""
    kinds = (kind,) if kind == "cpu" else (kind, "cpu")
    return (
        torch.get_default_dtype(),
        # A default device is a mode, and to ask for it costs more than all the others.
        torch.get_default_device() if torch._C._len_torch_function_stack() else None,
        tuple(torch.is_autocast_enabled(name) and torch.get_autocast_dtype(name) for name in kinds),
        torch.are_deterministic_algorithms_enabled(),
        tuple(flag() for flag in _FLAGS),
        tuple(_PRECISION(*of) for of in _PRECISIONS),
    )


_NONE = object()
# Read as torch.backends reads them, which takes ten times as long. Where torch has precisions of float32 by name, it
# refuses to be asked in the old way for what was set in the new one.
_PRECISION: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
_PRECISIONS = (
    (("generic", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"), ("mkldnn", "matmul"))
    if _PRECISION is not None
    else ()
)
_FLAGS: tuple[Callable[[], Any], ...] = tuple(
    getattr(torch._C, f"_get_{name}")
    for name in (
        "cudnn_enabled",
        "cudnn_benchmark",
        "cudnn_deterministic",
        "mkldnn_enabled",
        "flash_sdp_enabled",
        "mem_efficient_sdp_enabled",
        "math_sdp_enabled",
        "cudnn_sdp_enabled",
        "cublas_allow_fp16_reduced_precision_reduction",
        "cublas_allow_bf16_reduced_precision_reduction",
        *(() if _PRECISION is not None else ("cublas_allow_tf32", "cudnn_allow_tf32", "float32_matmul_precision")),
    )
    if hasattr(torch._C, f"_get_{name}")
)


class _Look:
    """A look at everything that can be reached from a function."""

    def __init__(self) -> None:
        self.found: Fingerprint = {}
        # Where an object was found first; the object as well, so that no other one gets its id meanwhile.
        self._seen: dict[int, tuple[str, Any]] = {}
        self._classes: dict[type, str] = {}
        self._names = set(_UNNAMED)  # of attributes, in the code that was found
        self._methods: set[tuple[type, str]] = set()

    def at(self, x: Any, name: str) -> None:
        """Note what x is, and what is in it."""
        value = _value(x)
        if value is not _NONE:
            self.found[name] = value
        elif id(x) in self._seen:
            # By name, as one of two modules may be chosen by an attribute of its own.
            self.found[f"{name} is"] = self._seen[id(x)][0]
        else:
            self._seen[id(x)] = name, x
            self._inside(x, name)

    def at_all(self, members: Mapping[str, Any], below: str) -> None:
        """The same of several."""
        for key, value in members.items():
            self.at(value, below + key)

    def at_methods(self) -> None:
        """What the code that was found may call by name of the classes that were found: last, as that finds more."""
        while todo := [
            (owner, name)
            for owner in self._classes
            for name in self._names & vars(owner).keys()
            if (owner, name) not in self._methods
        ]:
            self._methods.update(todo)
            for owner, name in sorted(todo, key=lambda pair: (self._classes[pair[0]], pair[0].__qualname__, pair[1])):
                below = f"{self._classes[owner]}{owner.__name__}.{name}"
                self.at_all(_numbered(_functions(vars(owner)[name])), f"{below}.")

    def _inside(self, x: Any, name: str) -> None:
        below = f"{name}." if name else ""
        if isinstance(x, nn.Module):
            self._module(x, below)
        elif isinstance(x, functools.partial):
            self.at_all({"func": x.func, "args": x.args, "keywords": x.keywords}, below)
        elif isinstance(x, MethodType):
            self.at_all({"self": x.__self__, "function": x.__func__}, below)
        elif isinstance(x, FunctionType):
            self._function(x, below)
        elif isinstance(x, (list, tuple, deque, Mapping)):
            self._items(x, name, below)
        elif isinstance(x, (set, frozenset)):
            self.found[name] = type(x), frozenset(map(_known, x))
        elif isinstance(x, weakref.ref):
            self.at(x(), below + "()")
        elif isinstance(x, type):
            self.found[name] = _identity(x)
            self._class(x, below)
        elif isinstance(x, ModuleType) or _root(type(x)) in _OPAQUE or _is_machinery(type(x)):
            self.found[name] = _identity(x)
        else:
            self._object(x, name, below)

    def _module(self, x: nn.Module, below: str) -> None:
        self.found[below + "type"] = type(x)
        own = vars(x)
        for key, value in list(own.items()):
            if key not in _OF_MODULES:
                self.at(value, below + key)
        for members in (x._parameters, x._buffers):
            self.at_all(members, below)
        for key in ("_forward_hooks", "_forward_pre_hooks"):
            if hooks := own.get(key):
                self.at_all(_numbered(hooks.values()), f"{below}{key}.")
        modules = x._modules
        if modules:
            self.found[below + "modules"] = tuple(modules.keys())
            self.at_all(modules, below)
        self._class(type(x), below)

    def _items(self, x: Any, name: str, below: str) -> None:
        is_map = isinstance(x, Mapping)
        if len(x) > LARGEST:
            items = ((_known(key), _known(value)) for key, value in x.items()) if is_map else map(_known, x)
            self.found[name] = type(x), tuple(items)
            return
        self.found[below + "length"] = tuple(map(_known, x)) if is_map else len(x)
        if is_map:  # its keys were noted: where they are no names, their places are
            self.at_all({key if isinstance(key, str) else f"[{i}]": x[key] for i, key in enumerate(x)}, below)
        else:
            self.at_all(_numbered(x), below)

    def _object(self, x: Any, name: str, below: str) -> None:
        members = {**dict(_slots(x)), **getattr(x, "__dict__", {})}
        if members or _is_ours(type(x)):
            self.found[below + "type"] = type(x)
            self.at_all(members, below)
            self._class(type(x), below)
        else:
            self.found[name] = _identity(x)

    def _class(self, cls: type, below: str) -> None:
        for owner in _ours(cls):
            if owner in self._classes:
                continue
            self._classes[owner] = below
            for key, value in list(vars(owner).items()):
                if not (key.startswith(("__", "_abc_")) or _functions(value) or isinstance(value, _DESCRIPTORS)):
                    self.at(value, f"{below}{owner.__name__}.{key}")

    def _function(self, function: FunctionType, below: str) -> None:
        code = function.__code__
        self.found[below + "code"] = code  # itself: another one might come to lie at its address
        if _root(function) in _FOREIGN:
            return
        for key, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.at(cell.cell_contents, below + key)
            except ValueError:  # not filled yet
                self.found[below + key] = None
        self.at_all({"defaults": function.__defaults__ or (), **(function.__kwdefaults__ or {})}, below)
        self.at_all(vars(function), below)
        attributes, chains = _named_by(code)
        self._names |= attributes
        for chain in chains:
            self._global(function.__globals__, chain, below)

    def _global(self, given: dict[str, Any], chain: tuple[str, ...], below: str) -> None:
        """What is named by a, a.b or a.b.c; of a file of Python what is named in it."""
        if chain[0] not in given:
            return
        value, depth = given[chain[0]], 1
        while isinstance(value, ModuleType):
            if depth == len(chain) or value.__name__.split(".")[0] in _FOREIGN:
                return
            value, depth = getattr(value, chain[depth], None), depth + 1
        if not _is_foreign_code(value):
            self.at(value, below + ".".join(chain[:depth]))


_DESCRIPTORS = (GetSetDescriptorType, MemberDescriptorType)


def _value(x: Any) -> Any:
    """What stands for x, if it is a tensor or a number or the like."""
    kind = type(x)
    if kind in _KNOWN:  # most of all
        return kind, x
    if isinstance(x, Tensor):
        return _of_tensor(x)
    if isinstance(x, (float, complex)):  # told apart from others as they are written: -0.0 and 0.0, NaN and NaN
        return type(x), repr(x)
    if isinstance(x, _PLAIN):
        return type(x), x
    if isinstance(x, (np.ndarray, np.generic)):
        return type(x), x.dtype.str, x.shape, x.tobytes()
    if isinstance(x, (range, slice, bytearray)):
        return type(x), repr(x)
    return _NONE


def _known(x: Any) -> Any:
    """What stands for an item that is not looked into."""
    value = _value(x)
    return _identity(x) if value is _NONE else value


class _Same:
    """Is equal for one object only, also when its address is used again; and never asks it for its own `==`."""

    def __init__(self, x: Any) -> None:
        self.ref = weakref.ref(x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.ref is other.ref  # there is one such reference to an object

    def __hash__(self) -> int:
        return id(self.ref)


def _identity(x: Any) -> Any:
    """What is the same for this object only; not safe from addresses that are used again where nothing can refer to it
    weakly."""
    try:
        return _Same(x)
    except TypeError:
        return type(x), id(x)


def _of_tensor(x: Tensor) -> Any:
    """Where it lies and how; of one on the host that the function may read, its values."""
    kind = (x.dtype, x.device, x.shape, x.requires_grad, x.is_conj(), x.is_neg())
    flatten: Any = None if type(x) in (Tensor, nn.Parameter) else getattr(x, "__tensor_flatten__", None)
    if flatten is not None:  # a wrapper of others
        names, _ = flatten()
        return (*kind, *((name, _of_tensor(getattr(x, name))) for name in names))
    if x.layout is not torch.strided or x.device.type == "meta":
        return (*kind, _identity(x))
    if x.device.type == "cpu" and x.numel() <= 1:  # kernels get it as a number
        return (*kind, repr(x.tolist()))
    return (*kind, x.stride(), x.data_ptr())


def _numbered(items: Iterable[Any]) -> dict[str, Any]:
    return {str(i): item for i, item in enumerate(items)}


def _functions(x: Any) -> tuple[Any, ...]:
    """The functions of what stands in a class under a method's name; none of data."""
    if isinstance(x, FunctionType):
        return (x,)
    if isinstance(x, (staticmethod, classmethod)):
        return (x.__func__,)
    if isinstance(x, property):
        return tuple(part for part in (x.fget, x.fset) if part is not None)
    if isinstance(x, functools.cached_property):
        return (x.func,)
    return ()


def _slots(x: Any) -> Iterator[tuple[str, Any]]:
    for owner in _ours(type(x)):
        for key, member in vars(owner).items():
            if isinstance(member, MemberDescriptorType) and hasattr(x, key):
                yield key, getattr(x, key)


def _root(x: Any) -> str:
    return str(getattr(x, "__module__", "")).split(".")[0]


def _is_ours(cls: type) -> bool:
    """A class of the user's, which may be changed."""
    return _root(cls) not in _FOREIGN


@functools.lru_cache(maxsize=4096)
def _ours(cls: type) -> tuple[type, ...]:
    """The classes of the user's that it is made of."""
    return tuple(owner for owner in cls.__mro__ if _is_ours(owner))


def _is_foreign_code(x: Any) -> bool:
    return isinstance(x, (type, FunctionType)) and _root(x) in _FOREIGN


def _is_machinery(cls: type) -> bool:
    """A part of torch that changes as it works."""
    return str(cls.__module__).startswith(("torch._", "torch.jit", "torch.cuda"))


@functools.lru_cache(maxsize=4096)
def _named_by(code: CodeType) -> tuple[frozenset[str], tuple[tuple[str, ...], ...]]:
    """The names that code and the code inside it uses: of attributes, and of globals, as chains of attributes."""
    attributes: set[str] = set()
    chains: dict[tuple[str, ...], None] = {}
    chain: tuple[str, ...] = ()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            chain = (step.argval,)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD"):
            attributes.add(step.argval)
            chain = (*chain, step.argval) if chain else ()
        else:
            if chain:
                chains[chain] = None
            chain = ()
    for inner in _codes(code.co_consts):
        more, others = _named_by(inner)
        attributes |= more
        chains.update(dict.fromkeys(others))
    return frozenset(attributes), tuple(chains)


def _codes(constants: Iterable[Any]) -> Iterator[CodeType]:
    return (x for x in constants if isinstance(x, CodeType))
