"""A mark for functions that torch.compile must call without tracing them, because a solve depends on values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

REASON = (
    "node_cuda chooses the steps of a solve by values, which torch.compile cannot trace: a solve is one graph break. "
    "Drop fullgraph=True, and compile func instead: `odeint(torch.compile(func), y0, t)` runs it compiled inside"
)


def eager(function: F) -> F:
    """Mark the function: torch.compile breaks its graph around it, and runs everything that it calls in Python.

    A func that was compiled stays compiled. `torch.compiler.disable` does the same, but it imports the compiler, which
    takes seconds.
    """
    frames: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
    marked: Any = function
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    else:
        marked = _switched_off(function, frames)
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = REASON
    return marked


def _switched_off(function: Callable[..., Any], frames: Any) -> Callable[..., Any]:
    """Return the function with the compiler off while it runs, for torch 2.6: a mark holds for one frame there."""

    def call(*args: Any, **kwargs: Any) -> Any:
        compiler = frames.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            frames.set_eval_frame(compiler)

    frames.skip_code(call.__code__)
    return functools.update_wrapper(call, function)
