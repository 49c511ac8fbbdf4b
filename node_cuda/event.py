"""Solves that end at an event, with the gradient of the event's time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from node_cuda._arguments import check_event_fn
from node_cuda._eager import eager
from node_cuda._typing import AdjointArguments, EventFunc, Func, S
from node_cuda.gradients.autograd import refuse_transforms
from node_cuda.gradients.event_time import Crossing, moving
from node_cuda.odeint import odeint
from node_cuda.problem.field import Layout
from node_cuda.status import InvalidInput, InvalidType

if TYPE_CHECKING:
    from typing_extensions import Unpack


@eager
def odeint_event(
    func: Func,
    y0: S,
    t0: Tensor,
    *,
    event_fn: EventFunc,
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Unpack[AdjointArguments],
) -> tuple[Tensor, S]:
    """Solve from t0 until an element of event_fn(t, y) changes its sign; the event's time is differentiable.

    Equivalent to torchdiffeq's `odeint_event`. t0: a tensor with one element. odeint_interface: `odeint` or
    `odeint_adjoint`, which also gets **kwargs. Returns (event_t, y). y has the shape (2, *y0.shape) and holds y0 and
    y(event_t); for a tuple y0 it is a tuple of such.

    Gradients flow to y0, t0 and the parameters of func, and to those of event_fn if it is an nn.Module. They follow
    from the implicit function theorem: c(t*, y(t*)) = 0, so dt* = -(dc/dy . dy + dc/dphi . dphi) / (dc/dt + dc/dy . f).
    Source: Chen, Amos and Nickel 2021, arXiv:2011.03902.
    """
    refuse_transforms("odeint_event")
    if not isinstance(t0, Tensor):
        raise InvalidType(f"t0 must be a torch.Tensor; got a {type(t0).__name__}. Use `torch.tensor({t0!r})`.")
    if t0.numel() != 1:
        raise InvalidInput(f"t0 must have one element; got shape {tuple(t0.shape)}. Solve once for each start.")
    check_event_fn(event_fn)
    start = t0.reshape(-1)
    step = -1.0 if reverse_time else 1.0
    found = odeint_interface(func, y0, torch.cat([start, start.detach() + step]), event_fn=event_fn, **kwargs)
    if not isinstance(found, tuple) or len(found) != 2:
        raise InvalidInput(
            "odeint_interface must return (event_t, y), as odeint and odeint_adjoint do; got a "
            f"{type(found).__name__}. Use `odeint_interface=odeint_adjoint`, or call `solve(..., event_fn=event_fn)`."
        )
    solution: Any
    event_t, ys = found
    if isinstance(ys, tuple):
        layout = Layout(tuple(part.shape[1:] for part in ys))
        first, last = (layout.flatten(tuple(part[i] for part in ys)) for i in (0, -1))
    else:
        layout, first, last = Layout(), ys[0], ys[-1]
    event_t, last = moving(Crossing(func, event_fn, layout, start[0], first), event_t, last, event_fn)
    ends = layout.unflatten(last)
    if isinstance(ys, tuple):
        solution = tuple(torch.cat([part[:-1], end[None]]) for part, end in zip(ys, ends, strict=True))
    else:
        solution = torch.cat([ys[:-1], last[None]])
    return event_t, solution
