"""Gradients by the continuous adjoint method, in memory that does not depend on the number of steps.

Backwards from the last time, da/dt = -a^T df/dy beside dy/dt = f, with a += dL/dy(t_m) and y reset to the stored one
at every output time; dL/dtheta = int a^T df/dtheta dt as a quadrature over the steps; dL/dt_m = dL/dy(t_m) . f(t_m,
y_m) and dL/dt_0 = -a(t_0) . f(t_0, y_0). Chen et al. 2018, arXiv:1806.07366; derived in docs/adjoint.md.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from node_cuda._typing import EventFunc, Tolerance
from node_cuda.field import Layout
from node_cuda.gradients import backprop
from node_cuda.gradients.adjoint_field import AdjointField, ParameterGradient
from node_cuda.gradients.adjoint_norm import AdjointNorm, backward_error_norm, chosen_norm, smallest
from node_cuda.gradients.context import autocast_state, first_derivatives, parameters
from node_cuda.gradients.request import Request
from node_cuda.methods import SCIPY, Method, arithmetic_of, lookup, make_loop
from node_cuda.norms import ErrorNorm
from node_cuda.options import ScipyOptions
from node_cuda.problem import Problem, check_tolerance
from node_cuda.scipy_bridge import ScipySolve
from node_cuda.solution import Stats
from node_cuda.status import Status
from node_cuda.steppers.step import Step


@dataclass
class Settings:
    """How the backward solve is done: its tolerances (of the flat state), its method from the options, the options as
    the user sees them in `grad_fn.adjoint_options`, read when it runs, and the parameters."""

    rtol: Tolerance
    atol: Tolerance
    method: Callable[[dict[str, Any]], Method]
    options: dict[str, Any]
    params: tuple[Tensor, ...]


def outputs(request: Request) -> tuple[Tensor, Status]:
    """y at the problem's times; its gradient by the adjoint method."""
    status, throw = Status.SUCCESS, request.method.options.throw

    def forward() -> tuple[float, Tensor]:
        nonlocal status
        ys, status = backprop.outputs(request)
        return 0.0, ys

    # Who asked for a partial solution wants its gradient; a NaN that nobody asked for stays one.
    return _solve(request, forward, lambda: not throw and status is not Status.SUCCESS)[0], status


def event(request: Request, event_fn: EventFunc) -> tuple[Tensor, Tensor]:
    """The event's time (no gradient), and y0 and y there; their gradient by the adjoint method, up to that time."""

    def forward() -> tuple[float, Tensor]:
        event_t, ys = backprop.event(request, event_fn)
        return float(event_t), ys

    ys, event_t = _solve(request, forward, lambda: False, event_mode=True)
    return event_t, ys


def _solve(
    request: Request,
    forward: Callable[[], tuple[float, Tensor]],
    failed: Callable[[], bool],
    event_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    settings, problem = _settings(request), request.problem
    return _AdjointSolve.apply(
        forward, failed, problem, request.stats, settings, event_mode, problem.t, problem.y0, *settings.params
    )


def _settings(request: Request) -> Settings:
    """The backward solve's arguments, each by default the forward one, checked before anything is solved."""
    problem, given, func = request.problem, request.adjoint, request.problem.func
    every = parameters(func, given.params, "adjoint method")
    method = request.method_name if given.method is None else given.method
    if method != request.method_name and request.options is not None and given.options is None:
        raise ValueError(
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`; got "
            f"{method!r} and {request.method_name!r}. Pass `adjoint_options=dict(...)` as well."
        )
    inherited = {name: value for name, value in (request.options or {}).items() if name != "norm"}
    options = inherited if given.options is None else dict(given.options)
    params = tuple(p for p in every if p.requires_grad)
    norm = options.pop("norm", None)
    if callable(norm) and len(params) < len(every):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will be excluded from the "
            "adjoint pass, and will not appear as a tensor in the adjoint norm.",
            stacklevel=5,
        )
    lookup(method, options)
    options["norm"] = chosen_norm(problem.layout, norm, request.method.options.norm)
    rtol, atol = (
        forward if backward is None else check_tolerance(name, backward, problem.layout, problem.y0)
        for name, forward, backward in (
            ("adjoint_rtol", problem.norm.rtol, given.rtol),
            ("adjoint_atol", problem.norm.atol, given.atol),
        )
    )
    return Settings(rtol, atol, lambda options: lookup(method, options, quiet=True), options, params)


class _AdjointSolve(torch.autograd.Function):
    """A whole solve as one operation of the user's graph."""

    @staticmethod
    def forward(ctx, run, failed, problem, stats, settings, event_mode, t, y0, *params):
        event_t, ys = run()
        event_t = torch.tensor(event_t, dtype=t.dtype, device=t.device)
        ctx.mark_non_differentiable(event_t)
        ctx.save_for_backward(t, ys, event_t, *params)
        # Without y0: its values are in ys, and the user may want to be rid of it.
        ctx.problem = replace(problem, y0=y0.new_empty(()).expand(y0.shape))
        ctx.stats, ctx.settings, ctx.event_mode = stats, settings, event_mode
        ctx.failed = failed
        ctx.adjoint_options = settings.options
        ctx.autocast = autocast_state(y0.device.type)
        return ys, event_t

    @staticmethod
    def backward(ctx, grad_ys, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        t, ys, event_t, *params = ctx.saved_tensors
        wants_t = ctx.needs_input_grad[6]
        times = torch.stack([t[0], event_t]) if ctx.event_mode else t
        # What a failed solve did not reach is NaN, and nothing flows back from it.
        reached = max(int(torch.isfinite(ys).reshape(len(ys), -1).all(1).sum()), 1) if ctx.failed() else len(ys)
        times, ys, grad_ys = times[:reached], ys[:reached], grad_ys[:reached]
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for context in ctx.autocast():
                stack.enter_context(context)
            solve = _BackwardSolve(ctx.problem, ctx.settings, ctx.adjoint_options, times, ys, grad_ys, params)
            adj_t, adj_y0, adj_params = solve.run(wants_t)
            ctx.stats.nfe_backward += solve.field.nfe
        if adj_t is not None and (ctx.event_mode or reached < len(t)):
            # The event's time is not where the user put t[1], so only t[0] moves the solution.
            kept = 1 if ctx.event_mode else reached
            adj_t = torch.cat([adj_t[:kept], torch.zeros_like(t[kept:])])
        gradients = first_derivatives((adj_t, adj_y0, *adj_params), 'gradient="adjoint"', ctx.saved_tensors[1], grad_ys)
        return (None,) * 6 + gradients


class _BackwardSolve:
    """The solve of (y, a) from the last time back to the first."""

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        options: dict[str, Any],
        t: Tensor,
        ys: Tensor,
        grad_ys: Tensor,
        params: Sequence[Tensor],
    ) -> None:
        self.forward = problem
        self.t, self.ys, self.grad_ys = t.detach(), ys, grad_ys.to(ys.dtype)
        norm = options["norm"]
        in_norm = not isinstance(norm, AdjointNorm) or norm.params
        self.error_norm = backward_error_norm(problem, settings.rtol, settings.atol, norm, params)
        self.method = settings.method({name: value for name, value in options.items() if name != "norm"})
        backward = replace(
            problem,
            y0=torch.cat([ys[-1].reshape(-1), self.grad_ys[-1].reshape(-1)]),
            t=self.t.flip(0),
            # Backwards from the last time, in the solver's ascending time.
            times=tuple(-problem.direction * value for value in self.t.double().tolist()[::-1]),
            direction=-problem.direction,
            layout=Layout(),
            norm=self.error_norm,
        )
        self.arithmetic = arithmetic_of(backward)
        self.field = AdjointField(problem, self.arithmetic, params)
        scalar = ErrorNorm(smallest(settings.rtol), smallest(settings.atol))
        self.gradient = ParameterGradient(self.field, scalar, in_norm=in_norm)
        self.problem = replace(backward, field=self.field, callbacks=self._callbacks())
        self.stats = Stats()

    def run(self, wants_t: bool) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """(dL/dt or None, dL/dy0, dL/dparams)."""
        last = len(self.problem.times) - 1
        adj_t = torch.zeros_like(self.t) if wants_t else None
        z = self.problem.y0
        interval = self._interval()
        for i in range(last):  # from output m back to the one before it
            m = last - i
            z, f = interval(i, z)
            a = self._parts(z)[1]
            if adj_t is not None:
                adj_t[m] = self.arithmetic.real_dot(self.grad_ys[m], f if f is not None else self._f(m))
                if m == 1:
                    adj_t[0] = -self.arithmetic.real_dot(a, self._f(0))
            z = self.arithmetic.jump(self.ys[m - 1], a, self.grad_ys[m - 1])
        return adj_t, self._parts(z)[1], self.gradient.gradients()

    def _interval(self) -> Callable[[int, Tensor], tuple[Tensor, Tensor | None]]:
        """What takes z over the i-th interval, backwards: (z at its end, f at its start if that was evaluated)."""
        if len(self.problem.times) > 1 and self.method.adaptive:
            return self._adaptive_intervals()
        return self._scipy_interval if self.method.name == SCIPY else self._grid_interval

    def _adaptive_intervals(self) -> Callable[[int, Tensor], tuple[Tensor, Tensor | None]]:
        """One solve that lands on every output time; the step size goes on from one interval to the next."""
        loop, _ = make_loop(
            self.problem,
            self.method,
            self.stats,
            stops=self.problem.times[1:],
            quadrature=self.gradient,
            extra=self.gradient,
            arithmetic=self.arithmetic,
        )
        steps = loop.steps()

        def interval(i: int, z: Tensor) -> tuple[Tensor, Tensor | None]:
            if i > 0:
                loop.restart(z)
                loop.pace.fresh()
            return self._follow(steps, self.problem.times[i + 1])

        return interval

    def _grid_interval(self, i: int, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Fixed grids are laid anew between two output times, as torchdiffeq does."""
        problem = replace(self.problem, y0=z, t=self.problem.t[i : i + 2], times=self.problem.times[i : i + 2])
        loop, _ = make_loop(problem, self.method, self.stats, quadrature=self.gradient, arithmetic=self.arithmetic)
        return self._follow(loop.steps(), problem.times[1])

    def _follow(self, steps: Iterator[Step], end: float) -> tuple[Tensor, Tensor | None]:
        """Take accepted steps up to `end`: (z there, f at the first step's start)."""
        f = None
        for step in steps:
            self.gradient.commit()
            if f is None:
                f = self._parts(step.k[0])[0]
            if step.t1 >= end:
                return step.y1, f
        raise AssertionError("the steps ended before the interval did")

    def _scipy_interval(self, i: int, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """scipy steps (y, a); the parameters' gradient is a Gauss rule over each of its steps' dense output."""
        problem = replace(self.problem, y0=z, times=self.problem.times[i : i + 2])
        assert isinstance(self.method.options, ScipyOptions)
        self.field.wants(False)
        solve = ScipySolve(problem, self.method.options, self.stats)
        if solve.failure is not None:
            raise solve.failure
        if self.field.params:
            nodes, weights = np.polynomial.legendre.leggauss(5)
            for s0, s1 in zip(solve.result.t[:-1], solve.result.t[1:], strict=True):
                self.gradient.begin()
                for node, weight in zip(nodes, weights, strict=True):
                    s = float(0.5 * (s0 + s1) + 0.5 * (s1 - s0) * node)
                    self.field.wants(True)
                    self.field(solve.clock.tensors([s])[0], solve.at(s))
                    dt = problem.direction * float(s1 - s0)
                    self.gradient.add(self.field.integrands, 0.5 * weight * dt, 0.0)
                self.gradient.commit()
        return solve.at(problem.times[1]), None

    def _f(self, m: int) -> Tensor:
        """f at the m-th output."""
        return self.field.f_alone(self.t[m].to(self.ys.device, self.forward.time_dtype), self.ys[m])

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """y and a of z = [y, a], as views of the state's shape."""
        y, a = z.chunk(2)
        return y.view(self.ys.shape[1:]), a.view(self.ys.shape[1:])

    def _callbacks(self) -> dict[str, Callable[[Tensor, Any, Tensor], Any]]:
        """The user's adjoint callbacks: y0 reaches them as torchdiffeq's tuple (vjp_t, y, vjp_y, *vjp_params)."""

        shape, gradient = self.ys.shape[1:], self.gradient  # and not self, which would be a cycle

        def wrap(callback: Callable[[Tensor, Any, Tensor], Any]) -> Callable[[Tensor, Any, Tensor], Any]:
            def call(t0: Tensor, z: Tensor, dt: Tensor) -> Any:
                y, a = (part.view(shape) for part in z.chunk(2))
                return callback(t0, (torch.zeros_like(t0), y, a, *(g.clone() for g in gradient.total)), dt)

            return call

        return {name: wrap(callback) for name, callback in self.forward.adjoint_callbacks.items()}
