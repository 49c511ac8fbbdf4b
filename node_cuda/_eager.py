"""A mark for functions that torch.compile must call without tracing them, because a solve depends on values."""

from __future__ import annotations

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
    takes seconds. A torch that is too old for this mark traces the function, which is slow but correct.
    """
    frames: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = REASON
    return function
