"""The note for an exception from user code: how the code was called, where the solve stood, and what to type.

Every call of func, event_fn, an integral or a norm is in a `try`, and its `except` calls `tell`. Without an exception
no code of this file runs. The note contains only what the host already knows. It reads nothing from a device, because
such a read would raise another exception after a CUDA error.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from typing import Any

import torch
from torch import Tensor

from node_cuda.status import InvalidField

BEGINNING = "node_cuda: "
STEP = "\nThe solve stood at "

_HAS_NOTES = hasattr(BaseException, "add_note")  # Python 3.11
_REWRITTEN = (TypeError, ValueError, IndexError, AttributeError, RuntimeError)
"""The text of the note follows the message of these exceptions, if the message is their only argument. Others get it
as a note of Python 3.11."""


def tell(error: Exception, name: str, code: Any, ends: tuple[float, float] | None = None, /, **arguments: Any) -> None:
    """Add the note to an exception from user code, unless a solve inside that code has added one.

    name: the user's name for the code. code: the function that was called. ends: the user's first and last time; func
    must be defined between them. arguments: the arguments of the call, by name. An InvalidField gets no note, because
    its message already says what func did.
    """
    if isinstance(error, InvalidField) or _note_of(error) is not None:
        return
    lines = [f"{BEGINNING}{name}({', '.join(arguments)}) was called with"]
    lines += [_described(*item) for item in arguments.items()]
    if name == "func":
        t = number(arguments["t"])
        lines += ["" if t is None or ends is None else _outside(t, ends), _mend(error, code, arguments["y"])]
    _write(error, "\n".join(filter(None, lines)))


def tell_step(error: BaseException, where: str, *, beyond: tuple[float, float] | None = None) -> None:
    """Add where the solve stood to the note of `tell`. A KeyboardInterrupt gets a new note if it has none.

    beyond: the ends of t, if the step passes the last one and the host does not know the time of the call.
    """
    note = _note_of(error)
    if isinstance(error, KeyboardInterrupt) and note is None:
        _write(error, f"{BEGINNING}interrupted.{STEP}{where}")
    elif note is not None and STEP not in note:
        clip = "" if beyond is None else f"\nThe step passes the last time. {_clip(beyond)}"
        _write(error, f"{note}{STEP}{where}{clip}", instead_of=note)


def in_step(t: float, h: float, accepted: int, rejected: int) -> str:
    """Return in words where a solve stands: the step from t of signed size h, and the numbers of steps before it."""
    return f"t = {t:.6g}, in a step of h = {h:.3g}, after {accepted} accepted and {rejected} rejected steps."


def number(t: Any) -> float | None:
    """Return a time as a number, or None if the host does not have it."""
    if isinstance(t, Tensor) and t.device.type == "cpu":
        with contextlib.suppress(Exception):  # a tensor of a transform, or one without data
            return float(t.detach())
    return None


def order_mend(func: Any) -> str:
    """Return what to type if func takes (y, t), to judge by the names of its arguments; "" for any other func."""
    names = _names(func)
    times = ("t", "time", "times", "tau")
    if len(names) < 2 or names[1] not in times or names[0] in times:
        return ""
    return (
        f"func takes ({names[0]}, {names[1]}), and is called as func(t, y). Swap its arguments, or use "
        "`lambda t, y: func(y, t)`."
    )


def _described(name: str, value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "\n".join(_described(f"{name}[{i}]", part) for i, part in enumerate(value))
    if not isinstance(value, Tensor):
        return f"  {name}: a {type(value).__name__}"
    known = number(value) if name == "t" else None
    size = f"shape {tuple(value.shape)}, {value.dtype}, {value.device}"
    return f"  {name}: {size}" + ("" if known is None else f", t = {known:.6g}")


def _outside(t: float, ends: tuple[float, float]) -> str:
    if min(ends) <= t <= max(ends):
        return ""
    return f"t = {t:.6g} lies outside of the interval from t[0] = {ends[0]:.6g} to t[-1] = {ends[1]:.6g}. {_clip(ends)}"


def _clip(ends: tuple[float, float]) -> str:
    low, high = sorted(ends)
    return (
        f"If func is defined only between {low:.6g} and {high:.6g}, use options=dict(clip=True): then it is "
        "called at no other time."
    )


def _mend(error: Exception, func: Any, y: Any) -> str:
    """Return what to type, for the most common mistakes; "" for others."""
    words = str(error)
    if mend := order_mend(func):
        return mend
    if isinstance(error, TypeError) and takes(func, 1):
        if isinstance(func, torch.nn.Module):
            return (
                f"{type(func).__name__} takes y alone, and is called as func(t, y). {of_y_alone(func)} Or use "
                "`lambda t, y: func(y)`, with adjoint_params=tuple(func.parameters()) for the gradient."
            )
        return "func takes y alone, and is called as func(t, y). Use `lambda t, y: func(y)`."
    if isinstance(error, TypeError) and "missing" in words and (further := _further_names(func)):
        given = ", ".join(further)
        use = "Use"
        if isinstance(func, torch.nn.Module):
            use = f"Keep {given} in the module, `self.{further[0]}`, or use"
        return f"func needs {given} as well, and is called as func(t, y). {use} `lambda t, y: func(t, y, {given})`."
    if "zero-dimensional" in words and "concatenated" in words:
        return (
            "t is a tensor of shape (), which cannot be concatenated. Use `t.expand(*y.shape[:-1], 1)`, as in "
            "`torch.cat([y, t.expand(*y.shape[:-1], 1)], -1)`."
        )
    if isinstance(error, RuntimeError) and _names_two_dtypes(words):
        state = next((x.dtype for x in (y if isinstance(y, (tuple, list)) else (y,)) if isinstance(x, Tensor)), None)
        other = "y0.double()" if state is torch.float32 else "y0.float()"
        return (
            f"y is {state}, and func computes with another dtype. Use `func.to({state})` for its parameters, or start "
            f"from a y0 of their dtype, e.g. `{other}`."
        )
    return ""


def _names_two_dtypes(words: str) -> bool:
    if not re.search(r"(?i)same dtype|scalar type|should be the same|dtype", words):
        return False
    named = re.findall(r"(?i)\b(?:c10::|torch\.|torch\.cuda\.)?(float64|float32|double|float|half|bfloat16)", words)
    return len({{"float64": "double", "float32": "float"}.get(x.lower(), x.lower()) for x in named}) > 1


def _signature(func: Any) -> inspect.Signature | None:
    with contextlib.suppress(TypeError, ValueError):  # raised for a builtin
        # A decorator may take other arguments than the function that it wraps.
        return inspect.signature(func.forward if isinstance(func, torch.nn.Module) else func, follow_wrapped=False)
    return None


def _names(func: Any) -> list[str]:
    signature = _signature(func)
    return [] if signature is None else list(signature.parameters)


def _further_names(func: Any) -> list[str]:
    """Return the names of the arguments that func needs after the first two."""
    signature = _signature(func)
    if signature is None:
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    further = list(signature.parameters.values())[2:]
    return [x.name for x in further if x.default is inspect.Parameter.empty and x.kind not in kinds]


def takes(func: Any, count: int) -> bool:
    """Return whether func can be called with so many arguments and with no other number, of 1 and 2."""
    signature = _signature(func)
    if signature is None or getattr(func, "_forward_pre_hooks", None):  # a hook may change the arguments
        return False
    with contextlib.suppress(TypeError):
        signature.bind(*(None,) * (3 - count))
        return False
    with contextlib.suppress(TypeError):
        signature.bind(*(None,) * count)
        return True
    return False


def of_y_alone(func: torch.nn.Module) -> str:
    """Return how to make a field of a module that takes y alone."""
    return (
        "Use a module with `def forward(self, t, y): return self.net(y)`, or the layer "
        f"`node_cuda.nn.ODEBlock({type(func).__name__}(...))`, which takes such a module."
    )


def _note_of(error: BaseException) -> str | None:
    """Return the note that this file added, or None."""
    for note in (*error.args[:1], *getattr(error, "__notes__", ())):
        if isinstance(note, str) and BEGINNING in note:
            return note[note.index(BEGINNING) :]
    return None


def _write(error: BaseException, note: str, instead_of: str | None = None) -> None:
    if type(error) in _REWRITTEN and len(error.args) == 1 and type(error.args[0]) is str:
        words = error.args[0] if instead_of is None else error.args[0].removesuffix(f"\n{instead_of}")
        error.args = (f"{words}\n{note}",)
    elif _HAS_NOTES:
        notes: list[str] = getattr(error, "__notes__", [])
        if instead_of in notes:
            notes[notes.index(instead_of)] = note
        else:
            error.add_note(note)  # pyright: ignore[reportAttributeAccessIssue]
