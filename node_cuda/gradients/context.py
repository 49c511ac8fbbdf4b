"""What the backward passes by hand share: the parameters, autocast as it was, and no second derivative in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from node_cuda._typing import Func


def parameters(func: Func, named: Iterable[Tensor] | None, method: str) -> tuple[Tensor, ...]:
    """The tensors to differentiate by, each once: those that the caller named, or the module's parameters. Raises
    ValueError if there is neither, for this method of differentiation."""
    if named is None and not isinstance(func, nn.Module):
        raise ValueError(
            f"func must be an nn.Module to find its parameters by the {method}; got a {type(func).__name__}. Pass the "
            "tensors to differentiate by as `adjoint_params=(...)`, or `adjoint_params=()` if there are none."
        )
    if named is not None or not isinstance(func, nn.Module):
        found: Iterable[Any] = named or ()
    elif getattr(func, "_is_replica", False):
        # In a replica of DataParallel the parameters are plain tensor attributes, which parameters() does not find.
        members = (vars(module).values() for module in func.modules())
        found = (x for values in members for x in values if isinstance(x, Tensor) and x.requires_grad)
    else:
        found = func.parameters()
    return tuple({id(x): x for x in found}.values())


def autocast_state(device_type: str) -> Callable[[], list[Any]]:
    """Contexts that put autocast back to what it is now, for this device and the CPU."""
    states = [
        (name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name))
        for name in dict.fromkeys((device_type, "cpu"))
    ]
    cache = torch.is_autocast_cache_enabled()
    return lambda: [torch.autocast(name, dtype=dtype, enabled=on, cache_enabled=cache) for name, on, dtype in states]


def first_derivatives(gradients: Sequence[Tensor | None], what: str, *of: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients, which depend on the tensors `of` in a way that is not on the tape: whoever differentiates them
    again gets an error. torch's once_differentiable loses that dependence where another term has a gradient."""
    given = [g for g in gradients if g is not None]
    if not (torch.is_grad_enabled() and given):
        return tuple(gradients)
    marked = iter(_First.apply(what, len(given), *given, *of))
    return tuple(None if g is None else next(marked) for g in gradients)


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx, what, count, *tensors):
        ctx.what = what
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f'{ctx.what} gives first derivatives only, and a second one was asked for. Use gradient="backprop", as '
            "odeint does."
        )
