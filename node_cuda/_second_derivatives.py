"""No second derivative in silence, where a backward pass gives first ones only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

BACKPROP = 'gradient="backprop", as odeint does'
"""What gives second derivatives."""


def first_derivatives(
    gradients: Sequence[Tensor | None], what: str, *of: Tensor, instead: str = BACKPROP
) -> tuple[Tensor | None, ...]:
    """The gradients, which depend on the tensors `of` in a way that is not on the tape: whoever differentiates them
    again gets an error. torch's once_differentiable loses that dependence where another term has a gradient."""
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
    """A sentence, where torch would lose the derivative without one."""
    raise NotImplementedError(f"{what} gives first derivatives only, and a second one was asked for. Use {instead}.")
