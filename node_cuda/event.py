"""Solving up to an event, with the gradient of the event's time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from node_cuda._typing import EventFunc, Func, State
from node_cuda.field import Layout
from node_cuda.odeint import odeint
from node_cuda.status import InvalidType


def odeint_event(
    func: Func,
    y0: State,
    t0: Tensor,
    *,
    event_fn: EventFunc,
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Solve from t0 until an element of event_fn(t, y) changes its sign; the event's time is differentiable.

    As torchdiffeq's `odeint_event`. t0: a tensor with one element. odeint_interface: `odeint` or `odeint_adjoint`,
    which also gets **kwargs. Returns (event_t, y) with y of shape (2, *y0.shape): y0 and y(event_t), or tuples of such.

    Gradients flow to y0, t0 and the parameters of func, and to those of event_fn if it is an nn.Module. By the implicit
    function theorem: c(t*, y(t*)) = 0, so dt* = -(dc/dy . dy + dc/dphi . dphi) / (dc/dt + dc/dy . f)
    (Chen, Amos and Nickel 2021, arXiv:2011.03902).
    """
    if not isinstance(t0, Tensor):
        raise InvalidType(f"t0 must be a torch.Tensor; got a {type(t0).__name__}. Use `torch.tensor({t0!r})`.")
    start = t0.reshape(-1)
    step = -1.0 if reverse_time else 1.0
    event_t, ys = odeint_interface(func, y0, torch.cat([start, start.detach() + step]), event_fn=event_fn, **kwargs)
    is_tuple = isinstance(ys, tuple)
    parts = ys if is_tuple else (ys,)
    layout = Layout(tuple(part.shape[1:] for part in parts))
    flat = layout.flatten(tuple(part[-1] for part in parts))
    phi = tuple(event_fn.parameters()) if isinstance(event_fn, nn.Module) else ()
    event_t, flat = _EventGradient.apply(
        func, event_fn, layout if is_tuple else Layout(), parts[0].shape[1:], event_t, flat, *phi
    )
    ends = layout.unflatten(flat)
    stitched = tuple(torch.cat([part[:-1], end[None]]) for part, end in zip(parts, ends, strict=True))
    return event_t, stitched if is_tuple else stitched[0]


class _EventGradient(torch.autograd.Function):
    """The identity on (t*, y(t*)); backwards it adds what moves the event's time."""

    @staticmethod
    def forward(ctx, func, event_fn, layout, shape, event_t, y, *phi):
        ctx.func, ctx.event_fn, ctx.layout, ctx.shape = func, event_fn, layout, shape
        ctx.save_for_backward(event_t, y, *phi)
        return event_t.clone(), y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_t, grad_y):  # pyright: ignore[reportIncompatibleMethodOverride]
        event_t, y, *phi = ctx.saved_tensors

        def state(flat: Tensor) -> State:
            return ctx.layout.unflatten(flat) if ctx.layout.shapes is not None else flat.view(ctx.shape)

        t = event_t.detach().to(y.dtype.to_real())
        f = ctx.layout.flatten(ctx.func(t, state(y.detach()))).reshape(-1).to(y.dtype)
        with torch.enable_grad():
            t_, y_ = t.clone().requires_grad_(True), y.detach().clone().requires_grad_(True)
            c = ctx.event_fn(t_, state(y_)).reshape(-1)
            # The element that is zero here is the one that made the event.
            grads = torch.autograd.grad(c[c.detach().abs().argmin()], (t_, y_, *phi), allow_unused=True)
        dc_dt, dc_dy, *dc_dphi = (
            torch.zeros_like(x) if g is None else g for g, x in zip(grads, (t_, y_, *phi), strict=True)
        )
        rate = dc_dt + torch.vdot(dc_dy, f).real
        if not rate.abs() > 0:
            rate = rate + 1e-12
        moved = -(grad_t + torch.vdot(grad_y, f).real) / rate
        return (None, None, None, None, None, grad_y + moved * dc_dy, *(moved * g for g in dc_dphi))
