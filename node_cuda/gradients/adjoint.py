"""Gradients by the continuous adjoint method, in memory that does not depend on the number of steps.

Backwards from the last time, da/dt = -a^T df/dy beside dy/dt = f, with a += dL/dy(t_m) and y reset to the stored one
at every output time; dL/dtheta = int a^T df/dtheta dt as a quadrature over the steps; dL/dt_m = dL/dy(t_m) . f(t_m,
y_m) and dL/dt_0 = -a(t_0) . f(t_0, y_0). Chen et al. 2018, arXiv:1806.07366; derived in docs/adjoint.md.
"""

from __future__ import annotations

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
from node_cuda.gradients.operation import Gradients, Saved, Task, refuse_transforms
from node_cuda.gradients.parameters import Parameters
from node_cuda.gradients.reached import Reached
from node_cuda.gradients.reconstruction import Reconstruction
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
    """How the backward solve is done: its tolerances (of the flat state), its method from the options, and the options
    as the user sees them in `grad_fn.adjoint_options`, read when it runs. checks: compare what it rebuilds."""

    rtol: Tolerance
    atol: Tolerance
    method: Callable[[dict[str, Any]], Method]
    options: dict[str, Any]
    checks: bool


def outputs(request: Request) -> tuple[Tensor, Status]:
    """y at the problem's times; its gradient by the adjoint method."""
    task = _AdjointTask(request, None)
    return task()[0], task.status


def event(request: Request, event_fn: EventFunc) -> tuple[Tensor, Tensor]:
    """The event's time (no gradient), and y0 and y there; their gradient by the adjoint method, up to that time."""
    refuse_transforms("An event")
    ys, at = _AdjointTask(request, event_fn)()
    return at.to(request.problem.t.dtype), ys


class _AdjointTask(Task):
    """A solve and its backward solve."""

    what = 'gradient="adjoint"'
    replays = False

    def __init__(self, request: Request, event_fn: EventFunc | None) -> None:
        super().__init__(request, Parameters(request.problem.func, request.adjoint.params, "adjoint method"))
        self.settings = _settings(request, self.parameters)
        self.event_fn = event_fn

    @property
    def shown(self) -> dict[str, Any]:
        """See `Task`."""
        return {"adjoint_options": self.settings.options}

    def solve(self, request: Request) -> tuple[Tensor, float]:
        """See `Task`."""
        if self.event_fn is not None:
            event_t, ys = backprop.event(request, self.event_fn)
            return ys, float(event_t)
        ys, self.status = backprop.outputs(request)
        # Who asked for a partial solution wants its gradient; a NaN that nobody asked for stays one.
        self.failed = not request.method.options.raises and self.status not in (Status.SUCCESS, Status.PENDING)
        return ys, request.problem.direction * request.problem.times[-1]

    def gradients(self, problem: Problem, saved: Saved, grad_ys: Tensor, wants_t: bool, wants_grid: bool) -> Gradients:
        """See `Task`."""
        t, _, ys, at, params = saved
        event_mode = self.event_fn is not None
        times = torch.stack([t[0], at.to(t.dtype)]) if event_mode else t
        # What a failed solve did not reach is NaN, and nothing flows back from it.
        failed = not event_mode and self.failed
        count = max(int(torch.isfinite(ys).reshape(len(ys), -1).all(1).sum()), 1) if failed else len(ys)
        used = self.reached(problem)
        solve = _BackwardSolve(problem, self.settings, times[:count], ys[:count], grad_ys[:count], params, used)
        adj_t, adj_y0, adj_params = solve.run(wants_t)
        used.check(params)
        self.stats.nfe_backward += solve.field.nfe
        if solve.reconstruction is not None:
            self.stats.reconstruction_error = solve.reconstruction.worst
            solve.reconstruction.warn()
        if adj_t is not None and (event_mode or count < len(t)):
            # The event's time is not where the user put t[1], so only t[0] moves the solution.
            kept = 1 if event_mode else count
            adj_t = torch.cat([adj_t[:kept], torch.zeros_like(t[kept:])])
        return Gradients(adj_t, None, adj_y0, adj_params)


def _settings(request: Request, parameters: Parameters) -> Settings:
    """The backward solve's arguments, each by default the forward one, checked before anything is solved."""
    problem, given = request.problem, request.adjoint
    method = request.method_name if given.method is None else given.method
    if method != request.method_name and request.options is not None and given.options is None:
        raise ValueError(
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`; got "
            f"{method!r} and {request.method_name!r}. Pass `adjoint_options=dict(...)` as well."
        )
    inherited = {name: value for name, value in (request.options or {}).items() if name != "norm"}
    options = inherited if given.options is None else dict(given.options)
    norm = options.pop("norm", None)
    if callable(norm) and len(parameters.wanted) < len(parameters.every):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will be excluded from the "
            "adjoint pass, and will not appear as a tensor in the adjoint norm.",
            stacklevel=5,
        )
    checks = lookup(method, options).options.check_reconstruction or request.method.options.check_reconstruction
    options["norm"] = chosen_norm(problem.layout, norm, request.method.options.norm)
    rtol, atol = (
        forward if backward is None else check_tolerance(name, backward, problem.layout, problem.y0)
        for name, forward, backward in (
            ("adjoint_rtol", problem.norm.rtol, given.rtol),
            ("adjoint_atol", problem.norm.atol, given.atol),
        )
    )
    return Settings(rtol, atol, lambda options: lookup(method, options, quiet=True), options, checks)


class _BackwardSolve:
    """The solve of (y, a) from the last time back to the first."""

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        t: Tensor,
        ys: Tensor,
        grad_ys: Tensor,
        params: Sequence[Tensor],
        reached: Reached,
    ) -> None:
        self.forward = problem
        self.t, self.ys, self.grad_ys = t.detach(), ys, grad_ys.to(ys.dtype)
        options = settings.options
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
        self.field = AdjointField(problem, self.arithmetic, params, reached)
        scalar = ErrorNorm(smallest(settings.rtol), smallest(settings.atol))
        self.gradient = ParameterGradient(self.field, scalar, in_norm=in_norm)
        self.problem = replace(backward, field=self.field, callbacks=self._callbacks())
        self.stats = Stats()
        self.steps = 0  # since the last output
        own = ErrorNorm(settings.rtol, settings.atol, problem.norm.sizes, problem.norm.custom)
        self.reconstruction = Reconstruction(own) if settings.checks else None

    def run(self, wants_t: bool) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """(dL/dt or None, dL/dy0, dL/dparams)."""
        last = len(self.problem.times) - 1
        adj_t = torch.zeros_like(self.t) if wants_t else None
        z = self.problem.y0
        interval = self._interval()
        for i in range(last):  # from output m back to the one before it
            m = last - i
            z, f = interval(i, z)
            y, a = self._parts(z)
            if self.reconstruction is not None:
                self.reconstruction.compare(float(self.t[m - 1]), y, self.ys[m - 1], self.steps)
                self.steps = 0
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
            self.steps += 1
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
        self.steps += len(solve.result.t) - 1
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
