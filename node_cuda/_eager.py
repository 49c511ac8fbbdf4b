"""Functions that torch.compile calls as they are, without a look inside: what a solve does depends on values."""

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
    """The function itself, marked: torch.compile breaks its graph around it, and leaves all that it calls to Python.

    A func that was compiled stays so. As `torch.compiler.disable`, which imports the compiler, for seconds. A torch
    that is too old for this mark looks inside, which is slow and no mistake.
    """
    frames: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = REASON
    return function
