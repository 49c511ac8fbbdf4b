"""Solving up to an event, with the gradient of the event's time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from node_cuda._typing import EventFunc, Func, State
from node_cuda.eager import eager
from node_cuda.field import Layout
from node_cuda.gradients.context import first_derivatives
from node_cuda.gradients.operation import refuse_transforms
from node_cuda.odeint import odeint
from node_cuda.status import InvalidInput, InvalidType


@eager
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
    refuse_transforms("odeint_event")
    if not isinstance(t0, Tensor):
        raise InvalidType(f"t0 must be a torch.Tensor; got a {type(t0).__name__}. Use `torch.tensor({t0!r})`.")
    if t0.numel() != 1:
        raise InvalidInput(f"t0 must have one element; got shape {tuple(t0.shape)}. Solve for each start by itself.")
    start = t0.reshape(-1)
    step = -1.0 if reverse_time else 1.0
    event_t, ys = odeint_interface(func, y0, torch.cat([start, start.detach() + step]), event_fn=event_fn, **kwargs)
    is_tuple = isinstance(ys, tuple)
    parts = ys if is_tuple else (ys,)
    shapes = tuple(part.shape[1:] for part in parts)
    layout = Layout(shapes)
    flat = layout.flatten(tuple(part[-1] for part in parts))
    crossing = _Crossing(func, event_fn, shapes, is_tuple, start.detach(), tuple(part[0].detach() for part in parts))
    phi = tuple(p for p in event_fn.parameters() if p.requires_grad) if isinstance(event_fn, nn.Module) else ()
    event_t, flat = _EventGradient.apply(crossing, event_t, flat, *phi)
    ends = layout.unflatten(flat)
    stitched = tuple(torch.cat([part[:-1], end[None]]) for part, end in zip(parts, ends, strict=True))
    return event_t, stitched if is_tuple else stitched[0]


class _Crossing:
    """The field and the event function at an event, of a flat state."""

    def __init__(
        self,
        func: Func,
        event_fn: EventFunc,
        shapes: tuple[torch.Size, ...],
        is_tuple: bool,
        t0: Tensor,
        y0: tuple[Tensor, ...],
    ) -> None:
        self.func = func
        self.event_fn = event_fn
        self.layout = Layout(shapes)
        self.is_tuple = is_tuple
        with torch.no_grad():
            self._signs = torch.sign(self._values(t0[0].to(y0[0].dtype.to_real()), self.layout.flatten(y0)))

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        """f(t, y), flat; the state is a copy, which func may write into."""
        out = self.func(t, self._state(y.clone()))
        return self.layout.flatten(out if self.is_tuple else (out,)).to(y.dtype)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """The element of event_fn that crosses zero here: the least of those that all began positive."""
        values = self._values(t, y)
        return values[(values.detach() * self._signs).argmin()]

    def _values(self, t: Tensor, y: Tensor) -> Tensor:
        value = self.event_fn(t, self._state(y))
        return value.reshape(-1) if isinstance(value, Tensor) else torch.as_tensor(value).reshape(-1)

    def _state(self, y: Tensor) -> State:
        parts = self.layout.unflatten(y)
        return parts if self.is_tuple else parts[0]


class _EventGradient(torch.autograd.Function):
    """The identity on (t*, y(t*)); backwards it adds what moves the event's time."""

    @staticmethod
    def forward(ctx, crossing, event_t, y, *phi):
        ctx.crossing = crossing
        ctx.save_for_backward(event_t, y, *phi)
        return event_t.clone(), y.clone()

    @staticmethod
    @eager
    def backward(ctx, grad_t, grad_y):  # pyright: ignore[reportIncompatibleMethodOverride]
        of = (*ctx.saved_tensors[:2], grad_t, grad_y)
        with torch.no_grad():
            gradients = _EventGradient.moved(ctx, grad_t, grad_y)
        return None, *first_derivatives(gradients, "the time of an event", *of)

    @staticmethod
    def moved(ctx, grad_t, grad_y):
        """The gradients of t*, y(t*) and phi."""
        event_t, y, *phi = ctx.saved_tensors
        t, y = event_t.detach().to(y.dtype.to_real()), y.detach()
        f = ctx.crossing.field(t, y)
        with torch.enable_grad():
            inputs = (t.clone().requires_grad_(True), y.clone().requires_grad_(True), *phi)
            c = ctx.crossing.condition(*inputs[:2])
            grads = torch.autograd.grad(c, inputs, allow_unused=True) if c.requires_grad else [None] * len(inputs)
        dc_dt, dc_dy, *dc_dphi = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True))
        rate = dc_dt + torch.vdot(dc_dy, f).real
        if not rate.abs() > 0:
            rate = rate + 1e-12
        moved = -(grad_t + torch.vdot(grad_y, f).real) / rate
        return (None, grad_y + moved * dc_dy, *(moved * g for g in dc_dphi))
