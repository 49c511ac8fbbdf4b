"""Chooses the path that computes the steps of a solve: the compiled kernels or plain PyTorch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from node_cuda._torch_modes import CPU
from node_cuda.extension import loading as extension
from node_cuda.kernels import self_check
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.fused import DTYPES, Fused, Launch
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.status import InvalidInput, Unsupported, did_you_mean

BACKENDS = ("auto", "reference", "fused")
VARIABLE = "NODE_CUDA_BACKEND"

# A look for a name that os.environ does not have raises and catches two exceptions. One in its dict does not.
_ENVIRONMENT, _KEY = getattr(os.environ, "_data", os.environ), os.environ.encodekey(VARIABLE)

_TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
_inside: ContextVar[str | None] = ContextVar("node_cuda.backend", default=None)


def backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Choose how solves that start in this context, and their backward passes, compute their steps.

    "auto": by the kernels if the state is on a CUDA device and they can run and passed their self-check, else in plain
    PyTorch. "reference": in plain PyTorch. "fused": by the kernels; raises Unsupported with the reason if that is not
    possible. Outside any such context the environment variable NODE_CUDA_BACKEND decides, by default "auto". The
    context applies to this thread only. Raises InvalidInput for other names.
    """
    return _entered(_checked(name, "backend(name)"))


@contextlib.contextmanager
def _entered(name: str) -> Iterator[None]:
    token = _inside.set(name)
    try:
        yield
    finally:
        _inside.reset(token)


def chosen() -> str:
    """Return the backend of the innermost context, or of the environment if there is no context."""
    inside = _inside.get()
    if inside is not None:
        return inside
    named = os.environ[VARIABLE] if _KEY in _ENVIRONMENT else ""
    return _checked(named, VARIABLE) if named else "auto"


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        raise InvalidInput(f"{where} must be one of {known}; got {name!r}.{did_you_mean(name, BACKENDS)}")
    return name


def make_arithmetic(wanted: str, y0: Tensor, direction: float, norm: ErrorNorm, times: Sequence[float]) -> Arithmetic:
    """Return the arithmetic of a solve. Raises Unsupported if "fused" is wanted and not possible."""
    if is_plain(wanted, y0):
        if wanted == "fused":
            raise Unsupported(
                f'The backend "fused" was chosen, but {why_plain(wanted, y0)}. Use "auto" to solve without the kernels.'
            )
        return Arithmetic(y0, direction, norm, times)
    module, on = _kernels(y0.device)
    assert module is not None
    return Fused(module, on, y0, direction, norm, times)


def is_plain(wanted: str, y0: Tensor) -> bool:
    """Return whether plain PyTorch computes the steps. Where kernels cannot be, this is known without the other
    reasons."""
    return not _has_kernels(y0.device) or why_plain(wanted, y0) is not None


def why_plain(wanted: str, y0: Tensor) -> str | None:
    """Return the reason why plain PyTorch computes the steps, as half a sentence, or None if the kernels do."""
    if wanted == "reference":
        return 'the backend is "reference"'
    if (fallback_reason := _fallback_reason(y0)) is not None:
        return fallback_reason
    module = module_for(y0.device)
    if module is None:
        return "there are no kernels for this device; `python -m node_cuda` says why"
    return self_check.fallback_reason(module, y0.device, y0.dtype)


def module_for(device: torch.device) -> ModuleType | None:
    """Return the compiled module, or None."""
    return _kernels(device)[0]


def _fallback_reason(y0: Tensor) -> str | None:
    """Return the reason why the kernels cannot work on a state like y0, as half a sentence, or None."""
    if not _has_kernels(y0.device):
        return f"the state is on {y0.device}, and the kernels run on CUDA devices"
    if y0.dtype not in DTYPES:
        return f"there are no kernels for {y0.dtype}"
    # The modes below observe torch operations, and would not observe our kernels.
    if type(y0) not in (Tensor, torch.nn.Parameter):
        return f"the state is a {type(y0).__name__}, and the kernels take plain tensors"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or any(map(torch._C._get_dispatch_mode, _TRACERS)):
        return "the solve is being compiled or traced"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return "a torch.func transform is active"
    return None


def _has_kernels(device: torch.device) -> bool:
    return device != CPU and device.type == "cuda" and torch.version.hip is None


def _kernels(device: torch.device) -> tuple[ModuleType | None, Launch]:
    """Return the compiled module, and the stream and device to launch on."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return extension.kernels(device), (torch.cuda.current_stream(device).cuda_stream, index)
