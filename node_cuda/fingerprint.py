"""What a function computes with, besides its arguments: where its tensors lie, and its numbers.

Work that was recorded reads tensors where they were, and has numbers as they were. As long as the fingerprint of the
function is the same, its Python would launch the same work again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Fingerprint = dict[str, Any]
"""What was found, by where it was found: "net.0.weight", say."""

LARGEST = 64
"""A longer list or dict is known by its identity and length: it is data, and no part of a formula."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# Of nn.Module: looked at apart, or of no matter to what forward computes.
_OF_MODULES = frozenset((*vars(nn.Module()), "_is_full_backward_hook", "_non_persistent_buffers_set")) - {"training"}


def fingerprint(func: Callable[..., Any]) -> Fingerprint:
    """Of a module: parameters, buffers and attributes, and those of its modules, and the global tensors and numbers
    that its `forward` names; of a function: its closure, defaults and globals; of another object: its attributes."""
    found: Fingerprint = {}
    _look(func, "", found, set())
    return found


def difference(a: Fingerprint, b: Fingerprint) -> str | None:
    """Where two of them differ first; None if they are the same."""
    if a == b:
        return None
    return next((name for name in (*a, *b) if name not in a or name not in b or a[name] != b[name]), None)


def _look(x: Any, name: str, found: Fingerprint, seen: set[int]) -> None:
    if isinstance(x, Tensor):
        found[name] = _of_tensor(x)
    elif isinstance(x, _PLAIN):
        found[name] = (type(x), x)
    elif id(x) in seen:
        return
    else:
        seen.add(id(x))
        _look_inside(x, name, found, seen)


def _look_inside(x: Any, name: str, found: Fingerprint, seen: set[int]) -> None:
    below = f"{name}." if name else ""
    if isinstance(x, nn.Module):
        found[below + "type"] = type(x)
        hooks = (x._forward_hooks, x._forward_pre_hooks)
        found[below + "hooks"] = tuple(id(hook) for each in hooks for hook in each.values())
        own = {key: value for key, value in vars(x).items() if key not in _OF_MODULES}
        for members in (own, x._parameters, x._buffers, x._modules):
            _look_at_all(members, below, found, seen)
        if not type(x).__module__.startswith("torch."):
            _look(type(x).forward, below + "forward", found, seen)
    elif isinstance(x, functools.partial):
        _look_at_all({"func": x.func, "args": x.args, "keywords": x.keywords}, below, found, seen)
    elif isinstance(x, MethodType):
        _look_at_all({"self": x.__self__, "function": x.__func__}, below, found, seen)
    elif isinstance(x, FunctionType):
        _look_at_function(x, below, found, seen)
    elif isinstance(x, (list, tuple, Mapping)) and len(x) <= LARGEST:
        found[below + "length"] = len(x)
        items = x.items() if isinstance(x, Mapping) else enumerate(x)
        _look_at_all({str(key): value for key, value in items}, below, found, seen)
    elif isinstance(x, (list, tuple, Mapping, set)):
        found[name] = (type(x), len(x), id(x))
    elif isinstance(x, (type, ModuleType)) or not hasattr(x, "__dict__"):
        found[name] = id(x)
    else:
        found[below + "type"] = type(x)
        _look_at_all(vars(x), below, found, seen)


def _look_at_all(members: Mapping[str, Any], below: str, found: Fingerprint, seen: set[int]) -> None:
    for key, value in members.items():
        _look(value, below + key, found, seen)


def _look_at_function(function: FunctionType, below: str, found: Fingerprint, seen: set[int]) -> None:
    code = function.__code__
    found[below + "code"] = id(code)
    for key, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            _look(cell.cell_contents, below + key, found, seen)
        except ValueError:  # not filled yet
            found[below + key] = None
    _look_at_all({"defaults": function.__defaults__ or (), **(function.__kwdefaults__ or {})}, below, found, seen)
    given = function.__globals__
    for key in code.co_names:
        value = given.get(key)
        # Other functions of the file may be many, and hold what has nothing to do with this one.
        if isinstance(value, (Tensor, nn.Module, *_PLAIN)) and value is not None:
            _look(value, below + key, found, seen)
        elif inspect.isfunction(value):
            found[below + key] = id(value.__code__)


def _of_tensor(x: Tensor) -> Any:
    """Where it lies and how; of one on the host that the function may read, its values."""
    kind = (x.dtype, x.device, x.shape, x.requires_grad)
    if x.layout is not torch.strided or x.device.type == "meta":
        return (*kind, id(x))
    if x.device.type == "cpu" and x.numel() <= 1:  # kernels get it as a number
        return (*kind, x.item())
    return (*kind, x.stride(), x.data_ptr())
