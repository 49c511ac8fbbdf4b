"""The modes of torch during a solve: recording of derivatives, transforms, capture of a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from node_cuda.status import InvalidField, UnsupportedTransform

_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def forward_mode() -> bool:
    """Return whether forward mode is on (jvp, jacfwd, dual tensors)."""
    return torch.autograd.forward_ad._current_level >= 0


def transformed() -> bool:
    """Return whether a transform of torch.func, or forward mode, is active."""
    return _functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def recordable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors; those of inference mode as copies that autograd can record. Call it outside of it."""
    return tuple([x.clone() if x.is_inference() else x for x in tensors])


def in_transform(x: Tensor) -> bool:
    """Return whether x belongs to a transform of torch.func, or has a tangent of forward mode."""
    if not transformed():
        return False
    return _functorch.is_functorch_wrapped_tensor(x) or torch.autograd.forward_ad.unpack_dual(x).tangent is not None


def recorded(x: Tensor) -> bool:
    """Return whether autograd or forward mode records derivatives by x."""
    return (x.requires_grad and torch.is_grad_enabled()) or in_transform(x)


def batched(x: Tensor) -> bool:
    """Return whether x stands for the samples of a torch.func.vmap, which have no single value for the host to read."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def numbers(x: Tensor) -> list[float]:
    """Return the numbers in a 1-D tensor. Inside a transform torch 2.6 reads only one at a time."""
    try:
        return x.tolist()
    except RuntimeError:
        if not transformed():
            raise
        return [value.item() for value in x]


def refuse_batched(*tensors: Tensor) -> None:
    """Raise UnsupportedTransform if the samples of a torch.func.vmap would have to share a step."""
    if any(map(batched, tensors)):
        raise UnsupportedTransform(
            "torch.func.vmap over odeint: the solver cannot choose other steps for each sample here. Use "
            '`odeint_adjoint(...)`, also with gradient="discrete", which solves one sample after another; or leave '
            'vmap out and give all samples as one batch y0; or take a fixed grid, e.g. method="rk4".'
        )


def vjp(output: Tensor, inputs: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """Return `torch.autograd.grad(output, inputs, cotangent, allow_unused=True)`.

    The checks of that function take as long as the derivative of a small field. The solver knows what they check:
    cotangent has the shape, dtype and device of output.
    """
    try:
        if _run_backward is None or type(output) is not Tensor or type(cotangent) is not Tensor:
            return torch.autograd.grad(output, tuple(inputs), cotangent, allow_unused=True)
        return _run_backward((output,), (cotangent,), False, False, tuple(inputs), True, accumulate_grad=False)
    except RuntimeError as error:
        if "through the graph a second time" not in str(error):
            raise
        raise InvalidField(
            "func keeps a tensor with its graph from one evaluation to the next: a buffer that it writes into, as in "
            "`self.buffer.copy_(...)`, or a result that it stores. Return a new tensor, and store `x.detach()`."
        ) from error


# The function that torch.autograd.grad calls after its checks. It is not public; a torch without it has the slower way.
_run_backward: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)


set_recording = torch._C._set_grad_enabled
"""Sets whether autograd records, in a third of the time of `torch.enable_grad()`. The caller sets it back."""


CPU = torch.device("cpu")
"""A comparison with it takes a fifth of the time of reading a device's type, which makes a string."""


def capturing(device: torch.device) -> bool:
    """Return whether the current stream of this device is being captured into a CUDA graph."""
    return device != CPU and device.type == "cuda" and torch.cuda.is_current_stream_capturing()


BACKPROP = 'gradient="backprop", as odeint does'
"""What gives second derivatives."""


def first_derivatives(
    gradients: Sequence[Tensor | None], what: str, *of: Tensor, instead: str = BACKPROP
) -> tuple[Tensor | None, ...]:
    """Return the gradients, which depend on the tensors `of` in a way that autograd does not record.

    To differentiate them again raises an error. torch's once_differentiable would lose that dependence if another term
    has a gradient. instead: what gives second derivatives.
    """
    given = [g for g in gradients if g is not None]
    if not (torch.is_grad_enabled() and given):
        return tuple(gradients)
    marked = iter(_First.apply(what, instead, len(given), *given, *of))
    return tuple(None if g is None else next(marked) for g in gradients)


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx, what, instead, count, *tensors):
        ctx.refusal = what, instead
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        refuse_second_derivative(*ctx.refusal)


def refuse_second_derivative(what: str, instead: str = BACKPROP) -> NoReturn:
    """Raise NotImplementedError. Without it, torch would drop this derivative silently."""
    raise NotImplementedError(f"{what} gives first derivatives only, and a second one was asked for. Use {instead}.")
