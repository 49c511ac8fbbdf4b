"""The gradient of an event's time, by the implicit function theorem.

c(t*, y(t*)) = 0, so dt* = -(dc/dy . dy + dc/dphi . dphi) / (dc/dt + dc/dy . f), with dy the change of y at a fixed time
and phi the parameters of c (Chen, Amos and Nickel 2021, arXiv:2011.03902).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from node_cuda._eager import eager
from node_cuda._torch_modes import first_derivatives, recordable
from node_cuda._typing import EventFunc, Func
from node_cuda._user_code import tell
from node_cuda.kernels.reference import real_dot
from node_cuda.problem.field import Layout


def moving(crossing: Crossing, event_t: Tensor, y: Tensor, event_fn: EventFunc) -> tuple[Tensor, Tensor]:
    """Return event_t with its gradient, and y(event_t) with the gradient that it has when the event moves.

    y: flat, with the gradient that it has at a fixed time. event_fn: if it is an nn.Module, its parameters get a
    gradient.
    """
    phi = tuple(p for p in event_fn.parameters() if p.requires_grad) if isinstance(event_fn, nn.Module) else ()
    return _EventGradient.apply(crossing, event_t, y, *phi)


class Crossing:
    """The field and the event function, as functions of a flat state. t0, y0: the start of the solve; y0 is flat."""

    def __init__(self, func: Func, event_fn: EventFunc, layout: Layout, t0: Tensor, y0: Tensor) -> None:
        self.func = func
        self.event_fn = event_fn
        self.layout = layout
        with torch.no_grad():
            self._signs = torch.sign(self._values(t0.detach().to(y0.dtype.to_real()), y0.detach()))

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        """Return f(t, y), flat. func gets a copy of the state, and may write into it."""
        state = self.layout.unflatten(y.clone())
        try:
            out = self.func(t, state)
        except Exception as error:
            tell(error, "func", self.func, t=t, y=state)
            raise
        return self.layout.flatten(out).to(y.dtype)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the element of event_fn that crosses zero here.

        It is the smallest one, after each got the sign that makes it positive at the start of the solve.
        """
        values = self._values(t, y)
        return values[(values.detach() * self._signs).argmin()]

    def _values(self, t: Tensor, y: Tensor) -> Tensor:
        state = self.layout.unflatten(y)
        try:
            value = self.event_fn(t, state)
        except Exception as error:
            tell(error, "event_fn", self.event_fn, t=t, y=state)
            raise
        return value.reshape(-1) if isinstance(value, Tensor) else torch.as_tensor(value).reshape(-1)


SECOND = "finite differences of the first derivative, or a solve to a fixed time"
"""What gives second derivatives in place of the time of an event."""


class _EventGradient(torch.autograd.Function):
    """The identity on (t*, y(t*)). Its backward pass adds the gradients by which the event's time moves."""

    @staticmethod
    def forward(ctx, crossing, event_t, y, *phi):
        ctx.crossing = crossing
        ctx.save_for_backward(event_t, y, *phi)
        return event_t.clone(), y.clone()

    @staticmethod
    @eager
    def backward(ctx, grad_t, grad_y):  # pyright: ignore[reportIncompatibleMethodOverride]
        of = (*ctx.saved_tensors[:2], grad_t, grad_y)
        with torch.inference_mode(False), torch.no_grad():  # in inference mode autograd would record nothing below
            gradients = _EventGradient.moved(ctx, *recordable(grad_t, grad_y))
        return None, *first_derivatives(gradients, "the time of an event", *of, instead=SECOND)

    @staticmethod
    def moved(ctx, grad_t, grad_y):
        """Return the gradients of t*, y(t*) and phi."""
        event_t, y, *phi = ctx.saved_tensors
        t, y = event_t.detach().to(y.dtype.to_real()), y.detach()
        f = ctx.crossing.field(t, y)
        with torch.enable_grad():
            inputs = (t.clone().requires_grad_(True), y.clone().requires_grad_(True), *phi)
            c = ctx.crossing.condition(*inputs[:2])
            grads = torch.autograd.grad(c, inputs, allow_unused=True) if c.requires_grad else [None] * len(inputs)
        dc_dt, dc_dy, *dc_dphi = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True))
        rate = dc_dt + real_dot(dc_dy, f)
        if not rate.abs() > 0:
            rate = rate + 1e-12
        moved = -(grad_t + real_dot(grad_y, f)) / rate
        return (None, grad_y + moved * dc_dy, *(moved * g for g in dc_dphi))
