"""Functions of both adjoint methods: they restore autocast, and raise an error for a second derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def autocast_state(device_type: str) -> Callable[[], list[Any]]:
    """Return a function that returns the contexts that restore the present autocast, for this device and the CPU.

    It returns no contexts if autocast has not changed by then.
    """
    kinds = [name for name in dict.fromkeys((device_type, "cpu")) if torch.amp.is_autocast_available(name)]
    before = _autocast(kinds)

    def contexts() -> list[Any]:
        states, cache = before
        if _autocast(kinds) == before:
            return []
        return [torch.autocast(name, dtype=dtype, enabled=on, cache_enabled=cache) for name, on, dtype in states]

    return contexts


def _autocast(kinds: Sequence[str]) -> tuple[list[tuple[str, bool, torch.dtype]], bool]:
    """Return the state of autocast for these kinds of device, and whether its cache is enabled."""
    states = [(name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in kinds]
    return states, torch.is_autocast_cache_enabled()


def autocasts(device_type: str) -> bool:
    """Return whether autocast is on for this device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def first_derivatives(gradients: Sequence[Tensor | None], what: str, *of: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients, which depend on the tensors `of` in a way that is not on the tape.

    To differentiate them again raises an error. torch's once_differentiable would lose that dependence if another term
    has a gradient.
    """
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
        refuse_second_derivative(ctx.what)


def refuse_second_derivative(what: str) -> NoReturn:
    """Raise NotImplementedError. Without it, torch would drop this derivative silently."""
    raise NotImplementedError(
        f'{what} gives first derivatives only, and this needs a second one. Use gradient="backprop", as odeint does.'
    )
