"""Gradients by the continuous adjoint method, in memory that does not depend on the number of steps.

Backwards from the last time, da/dt = -a^T df/dy beside dy/dt = f, with a += dL/dy(t_m) and y reset to the stored one
at every output time; dL/dtheta = int a^T df/dtheta dt as a quadrature over the steps; dL/dt_m = dL/dy(t_m) . f(t_m, y_m)
and dL/dt_0 = -a(t_0) . f(t_0, y_0). Chen et al. 2018, arXiv:1806.07366; derived in docs/adjoint.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from node_cuda._typing import EventFunc, Norm, Tolerance
from node_cuda.field import Layout
from node_cuda.gradients import backprop
from node_cuda.kernels import reference as kernels
from node_cuda.methods import SCIPY, Method, make_loop
from node_cuda.norms import ErrorNorm, rms
from node_cuda.options import ScipyOptions
from node_cuda.problem import Problem
from node_cuda.scipy_bridge import ScipySolve
from node_cuda.solution import Stats
from node_cuda.status import Status
from node_cuda.steppers.step import Step


class AdjointNorm:
    """The default norms of the backward solve: rms of y and of a, and with params=True of every parameter's gradient.

    user_norm: the user's norm of the forward solve, which then measures y and a. Callable, as torchdiffeq's are, with
    a tuple (t, y, adj_y, *adj_params) of flat tensors.
    """

    def __init__(self, layout: Layout, user_norm: Norm | None, *, params: bool) -> None:
        self.layout = layout
        self.user_norm = user_norm
        self.params = params

    def __call__(self, parts: Sequence[Tensor]) -> float:
        t, y, adj_y, *adj_params = parts
        values = [t.abs(), self._of_state(y), self._of_state(adj_y), rms(adj_params) if self.params else 0.0]
        return max(float(value) for value in values)

    def _of_state(self, y: Tensor) -> Tensor | float:
        parts = self.layout.unflatten(y)
        if self.user_norm is not None:
            return self.user_norm(parts)
        return rms(parts if isinstance(parts, tuple) else (parts,))


@dataclass
class Settings:
    """How the backward solve is done: its tolerances (flat, as the forward problem's), its method from the options, the
    options as the user sees them in `grad_fn.adjoint_options`, read when it runs, and the parameters."""

    rtol: Tolerance
    atol: Tolerance
    method: Callable[[dict[str, Any]], Method]
    options: dict[str, Any]
    params: tuple[Tensor, ...]


def outputs(problem: Problem, method: Method, stats: Stats, settings: Settings) -> tuple[Tensor, Status]:
    """y at the problem's times; its gradient by the adjoint method."""

    status = Status.SUCCESS

    def forward() -> tuple[float, Tensor]:
        nonlocal status
        ys, status = backprop.outputs(problem, method, stats)
        return 0.0, ys

    ys, _ = _AdjointSolve.apply(forward, problem, stats, settings, False, problem.t, problem.y0, *settings.params)
    return ys, status


def event(
    problem: Problem, method: Method, stats: Stats, event_fn: EventFunc, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The event's time (no gradient) and y there; the gradient of y by the adjoint method, up to that time."""

    def forward() -> tuple[float, Tensor]:
        event_t, y = backprop.event(problem, method, stats, event_fn)
        return event_t, torch.stack([problem.y0, y])

    ys, event_t = _AdjointSolve.apply(forward, problem, stats, settings, True, problem.t, problem.y0, *settings.params)
    return event_t, ys


class _AdjointSolve(torch.autograd.Function):
    """A whole solve as one operation of the user's graph."""

    @staticmethod
    def forward(ctx, run, problem, stats, settings, event_mode, t, y0, *params):  # type: ignore[override]
        event_t, ys = run()
        event_t = torch.tensor(event_t, dtype=t.dtype, device=t.device)
        ctx.mark_non_differentiable(event_t)
        ctx.save_for_backward(t, ys, event_t, *params)
        ctx.problem, ctx.stats, ctx.settings, ctx.event_mode = problem, stats, settings, event_mode
        ctx.adjoint_options = settings.options
        ctx.autocast = _autocast_state(y0.device.type)
        return ys, event_t

    @staticmethod
    def backward(ctx, grad_ys, _):  # type: ignore[override]
        t, ys, event_t, *params = ctx.saved_tensors
        wants_t = ctx.needs_input_grad[5]
        times = torch.stack([t[0], event_t]) if ctx.event_mode else t
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for context in ctx.autocast():
                stack.enter_context(context)
            solve = _BackwardSolve(ctx.problem, ctx.settings, ctx.adjoint_options, times, ys, grad_ys, params)
            adj_t, adj_y0, adj_params = solve.run(wants_t)
            ctx.stats.nfe_backward += solve.field.nfe
        if wants_t and ctx.event_mode:
            # The event's time is not where the user put t[1], so only t[0] moves the solution.
            adj_t = torch.cat([adj_t[:1], torch.zeros_like(t[1:])])
        return (None, None, None, None, None, adj_t, adj_y0, *adj_params)


def _autocast_state(device_type: str) -> Callable[[], list[Any]]:
    """Contexts that put autocast back to what it is now, for this device and the CPU."""
    states = [
        (name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name))
        for name in dict.fromkeys((device_type, "cpu"))
    ]
    cache = torch.is_autocast_cache_enabled()
    return lambda: [torch.autocast(name, dtype=dtype, enabled=on, cache_enabled=cache) for name, on, dtype in states]


class _AdjointField:
    """The field of the flat state z = [y, a]: (f, -a^T df/dy), and a^T df/dtheta as the quadrature's integrands."""

    def __init__(self, problem: Problem, params: Sequence[Tensor]) -> None:
        self.field = problem.field
        self.params = tuple(params)
        self.shape = problem.y0.shape
        self.nfe = 0
        self.integrands: Sequence[Tensor] = ()
        self._with_params = True
        self._zeros: list[Tensor | None] = [None] * len(self.params)

    def wants(self, needed: bool) -> None:
        """Does the next evaluation need the parameters' vjp?"""
        self._with_params = needed and bool(self.params)

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        """dz/dt at z; one evaluation of f and one vjp."""
        self.nfe += 1
        y, a = (part.view(self.shape) for part in z.chunk(2))
        params = self.params if self._with_params else ()
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            f = self.field(t, y)
            if f.requires_grad:
                vjp_y, *vjps = torch.autograd.grad(f, (y, *params), a, allow_unused=True)
            else:
                vjp_y, vjps = None, [None] * len(params)
        self.integrands = [self._zero(i) if g is None else g for i, g in enumerate(vjps)]
        vjp_y = torch.zeros_like(y) if vjp_y is None else vjp_y
        return torch.cat([f.detach().reshape(-1), vjp_y.reshape(-1).neg()])

    def f_alone(self, t: Tensor, y: Tensor) -> Tensor:
        """f(t, y) without a vjp."""
        self.nfe += 1
        return self.field(t, y)

    def _zero(self, i: int) -> Tensor:
        zero = self._zeros[i]
        if zero is None:
            zero = self._zeros[i] = torch.zeros_like(self.params[i])
        return zero


class _ParameterGradient:
    """dL/dtheta = int a^T df/dtheta dt by the weights of the method that steps (y, a): it never enters a stage.

    total: what accepted steps gave. Half and bfloat16 parameters accumulate in float32.
    """

    def __init__(self, field: _AdjointField, norm: ErrorNorm, *, in_norm: bool) -> None:
        self.field = field
        self.norm = norm
        self.in_norm = in_norm
        self.dtypes = [torch.promote_types(p.dtype, torch.float32) for p in field.params]
        self.total = [torch.zeros_like(p, dtype=d) for p, d in zip(field.params, self.dtypes, strict=True)]
        self._sum: list[Tensor] | None = None
        self._error: list[Tensor] | None = None
        self._next: list[Tensor] | None = None

    def begin(self) -> None:
        """See `Quadrature`."""
        self._sum = self._error = None

    def wants(self, needed: bool) -> None:
        """See `Quadrature`."""
        self.field.wants(needed)

    def take(self) -> Sequence[Tensor]:
        """See `Quadrature`."""
        return self.field.integrands

    def add(self, integrands: Sequence[Tensor], weight: float, error_weight: float) -> None:
        """See `Quadrature`. The minus turns the integral from t1 down to t0 into the one from t0 up to t1."""
        if weight:
            self._sum = kernels.accumulate(self._sum, integrands, -weight, self.dtypes)
        if error_weight and self.in_norm:
            self._error = kernels.accumulate(self._error, integrands, -error_weight, self.dtypes)

    def scaled_errors(self) -> list[Tensor]:
        """The errors of the step that was just tried, for the norm."""
        self._next = None
        if not self.in_norm or self._error is None or self._sum is None:
            return []
        self._next = list(torch._foreach_add(self.total, self._sum))
        return kernels.scaled_sums(self._error, self.total, self._next, self.norm)

    def commit(self) -> None:
        """The step was accepted."""
        if self._next is not None:
            self.total = self._next
        elif self._sum is not None:
            torch._foreach_add_(self.total, self._sum)

    def gradients(self) -> list[Tensor]:
        """In the parameters' own dtypes."""
        return [g.to(p.dtype) for g, p in zip(self.total, self.field.params, strict=True)]


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
        self.field = _AdjointField(problem, params)
        norm = options["norm"]
        in_norm = not isinstance(norm, AdjointNorm) or norm.params
        self.error_norm = _backward_error_norm(problem, settings, norm, params)
        scalar = ErrorNorm(_smallest(settings.rtol), _smallest(settings.atol))
        self.gradient = _ParameterGradient(self.field, scalar, in_norm=in_norm)
        self.method = settings.method({name: value for name, value in options.items() if name != "norm"})
        # Backwards from the last time, in the solver's ascending time.
        backwards = tuple(-problem.direction * value for value in self.t.double().tolist()[::-1])
        self.problem = replace(
            problem,
            field=self.field,
            y0=self._joined(ys[-1], self.grad_ys[-1]),
            t=self.t.flip(0),
            times=backwards,
            direction=-problem.direction,
            layout=Layout(),
            norm=self.error_norm,
            callbacks=self._callbacks(),
        )
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
                adj_t[m] = _real_dot(self.grad_ys[m], f if f is not None else self._f(m))
                if m == 1:
                    adj_t[0] = -_real_dot(a, self._f(0))
            z = self._joined(self.ys[m - 1], a + self.grad_ys[m - 1])
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
        )
        steps = loop.steps()

        def interval(i: int, z: Tensor) -> tuple[Tensor, Tensor | None]:
            if i > 0:
                loop.restart(z)
                loop.pace.fresh()  # type: ignore[attr-defined]
            return self._follow(steps, self.problem.times[i + 1])

        return interval

    def _grid_interval(self, i: int, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Fixed grids are laid anew between two output times, as torchdiffeq does."""
        problem = replace(self.problem, y0=z, t=self.problem.t[i : i + 2], times=self.problem.times[i : i + 2])
        loop, _ = make_loop(problem, self.method, self.stats, quadrature=self.gradient)
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

    @staticmethod
    def _joined(y: Tensor, a: Tensor) -> Tensor:
        return torch.cat([y.reshape(-1), a.reshape(-1)])

    def _callbacks(self) -> dict[str, Callable[[Tensor, Any, Tensor], Any]]:
        """The user's adjoint callbacks: y0 reaches them as torchdiffeq's tuple (vjp_t, y, vjp_y, *vjp_params)."""

        def wrap(callback: Callable[[Tensor, Any, Tensor], Any]) -> Callable[[Tensor, Any, Tensor], Any]:
            def call(t0: Tensor, z: Tensor, dt: Tensor) -> Any:
                return callback(t0, (torch.zeros_like(t0), *self._parts(z), *self.gradient.total), dt)

            return call

        return {name: wrap(callback) for name, callback in self.forward.adjoint_callbacks.items()}


def _backward_error_norm(problem: Problem, settings: Settings, norm: Any, params: Sequence[Tensor]) -> ErrorNorm:
    """The norm of the backward solve as one of the flat state [y, a] and of the parameters' scaled errors."""
    shape, n = problem.y0.shape, problem.y0.numel()
    rtol, atol = (_doubled(tol, problem) for tol in (settings.rtol, settings.atol))
    if isinstance(norm, AdjointNorm) and norm.user_norm is None:
        return ErrorNorm(rtol, atol, (problem.layout.sizes or (n,)) * 2)

    zeros: list[Tensor] = []

    def custom(scaled: Tensor, also: Sequence[Tensor]) -> Tensor | float:
        y, a = (part.view(shape) for part in scaled.chunk(2))
        if not also and params:
            zeros.extend(torch.zeros_like(p) for p in params[len(zeros) :])
        return norm((scaled.new_zeros(()).real, y, a, *(also or zeros)))

    return ErrorNorm(rtol, atol, None, custom)


def _doubled(tol: Tolerance, problem: Problem) -> Tolerance:
    """A tolerance of the state as one of [y, a]."""
    if not isinstance(tol, Tensor):
        return tol
    flat = tol.expand(problem.y0.shape).reshape(-1)
    return torch.cat([flat, flat])


def _smallest(tol: Tolerance) -> float:
    return float(tol.min()) if isinstance(tol, Tensor) else float(tol)


def _real_dot(g: Tensor, f: Tensor) -> Tensor:
    """Re sum conj(g) f, which is dL for a change f of y where dL/dy = g."""
    return torch.vdot(g.reshape(-1), f.reshape(-1).to(g.dtype)).real
