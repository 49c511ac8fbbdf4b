"""The backward solve of the adjoint method: (y, a) from the last time back to the first, together with dL/dtheta."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from node_cuda._typing import Tolerance
from node_cuda.gradients.adjoint.field import AdjointField, ParameterGradient
from node_cuda.gradients.adjoint.norm import AdjointNorm, backward_error_norm, smallest
from node_cuda.gradients.adjoint.reconstruction import Reconstruction
from node_cuda.gradients.reached import UsedParameters
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.loop.assemble import arithmetic_of, make_loop, show_steps
from node_cuda.loop.progress import Progress
from node_cuda.loop.scipy_solver import ScipySolve
from node_cuda.methods.registry import SCIPY, lookup
from node_cuda.methods.step import Step
from node_cuda.options import ScipyOptions
from node_cuda.problem.field import Layout
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats


@dataclass
class BackwardSettings:
    """The settings of the backward solve.

    rtol, atol: the tolerances of the flat state. method_name: of the method, as the user gave it. options: the dict
    that the user sees in `grad_fn.adjoint_options`; the backward solve reads it when it runs. checks: compare the
    reconstructed y with the outputs. jumps: the field has discontinuities in time.
    """

    rtol: Tolerance
    atol: Tolerance
    method_name: str | None
    options: dict[str, Any]
    checks: bool
    jumps: bool


Found = tuple[Tensor | None, Tensor, Sequence[Tensor]]
"""dL/dt or None, dL/dy0, and dL/dtheta."""


class Backward:
    """The problem of the backward solve, before any memory or field is made for it.

    forward: the forward problem; its y0 has a shape and a dtype, but no values. t, times: the output times; `times` are
    in the solver time of the forward solve.
    """

    def __init__(
        self,
        forward: Problem,
        settings: BackwardSettings,
        t: Tensor,
        times: Sequence[float],
        ys: Tensor,
        grad_ys: Tensor,
        params: Sequence[Tensor],
    ) -> None:
        self.forward = forward
        self.settings = settings
        self.t, self.ys, self.grad_ys = t.detach(), ys.detach(), grad_ys.to(ys.dtype)
        self.times = times
        self.params = params
        options = dict(settings.options)
        self.norm = options.pop("norm")
        self.method = lookup(settings.method_name, options, quiet=True)

    @cached_property
    def problem(self) -> Problem:
        """The problem of the flat state [y, a]; its field is set later."""
        forward, settings = self.forward, self.settings
        return forward._replace(
            y0=torch.cat([self.ys[-1].reshape(-1), self.grad_ys[-1].reshape(-1)]),
            t=self.t.flip(0),
            # Backwards from the last time, in the solver's ascending time.
            times=tuple(-s for s in reversed(self.times)),
            direction=-forward.direction,
            layout=Layout(),
            norm=backward_error_norm(forward, settings.rtol, settings.atol, self.norm, self.params),
        )

    @cached_property
    def params_norm(self) -> ErrorNorm:
        """The norm of the errors of the parameters' gradients."""
        return ErrorNorm(smallest(self.settings.rtol), smallest(self.settings.atol))

    @property
    def params_in_norm(self) -> bool:
        """Whether the errors of the parameters' gradients take part in the error norm."""
        return not isinstance(self.norm, AdjointNorm) or self.norm.params

    def parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and a of z = [y, a], as views of the state's shape."""
        y, a = z.chunk(2)
        return y.view(self.ys.shape[1:]), a.view(self.ys.shape[1:])

    def apart(self, forward: Problem, params: Sequence[Tensor]) -> Backward:
        """Return a copy with separate memory for [y, a], for this forward problem and these parameters."""
        other = copy.copy(self)
        other.forward, other.params = forward, params
        other.problem = self.problem._replace(y0=self.problem.y0.clone())
        return other

    def interval(self, i: int, z: Tensor) -> Problem:
        """Return the problem of the i-th interval, backwards. A fixed grid starts anew in each, as in torchdiffeq."""
        return self.problem._replace(y0=z, t=self.problem.t[i : i + 2], times=self.problem.times[i : i + 2])


class BackwardSolve:
    """The solve of (y, a) from the last time back to the first. The host chooses the steps."""

    def __init__(self, backward: Backward, reached: UsedParameters) -> None:
        self.backward = backward
        self.forward, self.method = backward.forward, backward.method
        self.t, self.ys, self.grad_ys = backward.t, backward.ys, backward.grad_ys
        self.arithmetic = arithmetic_of(backward.problem)
        self.field = AdjointField(self.forward, self.arithmetic, backward.params, reached)
        self.gradient = ParameterGradient(self.field, backward.params_norm, in_norm=backward.params_in_norm)
        self.problem = backward.problem._replace(field=self.field, callbacks=self._callbacks())
        self.stats = Stats()
        self.steps = 0  # since the last output
        settings, forward = backward.settings, backward.forward
        own = ErrorNorm(settings.rtol, settings.atol, forward.norm.sizes, forward.norm.custom)
        self.reconstruction = Reconstruction(own) if settings.checks else None

    def run(self, wants_t: bool) -> Found:
        """Return the gradients."""
        last = len(self.problem.times) - 1
        adj_t = torch.zeros_like(self.t) if wants_t else None
        z = self.problem.y0
        interval = self._interval()
        for i in range(last):  # from output m back to the one before it
            m = last - i
            z, f = interval(i, z)
            y, a = self.backward.parts(z)
            if self.reconstruction is not None:
                self.reconstruction.compare(float(self.t[m - 1]), y, self.ys[m - 1], self.steps)
                self.steps = 0
            if adj_t is not None:
                adj_t[m] = self.arithmetic.real_dot(self.grad_ys[m], f if f is not None else self._f(m))
                if m == 1:
                    adj_t[0] = -self.arithmetic.real_dot(a, self._f(0))
            z = self.arithmetic.jump(self.ys[m - 1], a, self.grad_ys[m - 1])
        return adj_t, self.backward.parts(z)[1], self.gradient.gradients()

    def _interval(self) -> Callable[[int, Tensor], tuple[Tensor, Tensor | None]]:
        """Return the function that solves over the i-th interval, backwards, from z at its start.

        It returns z at the end, and f at the start if that was evaluated.
        """
        if len(self.problem.times) > 1 and self.method.adaptive:
            return self._adaptive_intervals()
        return self._scipy_interval if self.method.name == SCIPY else self._grid_intervals()

    def _adaptive_intervals(self) -> Callable[[int, Tensor], tuple[Tensor, Tensor | None]]:
        """Return such a function for one solve with a step end at every output time. It keeps its step size."""
        loop, _ = make_loop(
            self.problem,
            self.method,
            self.stats,
            stops=self.problem.times[1:],
            quadrature=self.gradient,
            arithmetic=self.arithmetic,
            backwards=True,
        )
        steps = loop.steps()

        def interval(i: int, z: Tensor) -> tuple[Tensor, Tensor | None]:
            if i > 0:
                loop.restart(z)
            return self._follow(steps, self.problem.times[i + 1])

        return interval

    def _grid_intervals(self) -> Callable[[int, Tensor], tuple[Tensor, Tensor | None]]:
        """Return such a function that makes a grid for each interval. They have one bar together."""
        whole, method, bar = self.problem, self.method, None
        if method.options.progress:
            bar = Progress(whole.times, whole.direction, backwards=True)
            method = replace(method, options=replace(method.options, progress=False))

        def interval(i: int, z: Tensor) -> tuple[Tensor, Tensor | None]:
            problem = self.backward.interval(i, z)._replace(field=self.field, callbacks=whole.callbacks)
            loop, _ = make_loop(problem, method, self.stats, quadrature=self.gradient, arithmetic=self.arithmetic)
            loop.tried = None if bar is None else show_steps(bar, whole, self.stats)
            found = self._follow(loop.steps(), problem.times[1])
            if bar is not None and problem.times[1] == whole.times[-1]:
                bar.close()
            return found

        return interval

    def _follow(self, steps: Iterator[Step], end: float) -> tuple[Tensor, Tensor | None]:
        """Take accepted steps up to `end`. Return z there, and f at the start of the first step."""
        f = None
        for step in steps:
            self.gradient.commit()
            self.steps += 1
            if f is None:
                f = self.backward.parts(step.k[0])[0]
            if step.t1 >= end:
                return step.y1, f
        raise AssertionError("the steps ended before the interval did")

    def _scipy_interval(self, i: int, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Solve for (y, a) by scipy. The parameters' gradient is a Gauss rule over the dense output of each step."""
        problem = self.problem._replace(y0=z, times=self.problem.times[i : i + 2])
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
        """Return f at the m-th output."""
        return self.field.f_alone(self.t[m].to(self.ys.device, self.forward.time_dtype), self.ys[m])

    def _callbacks(self) -> dict[str, Callable[[Tensor, Any, Tensor], Any]]:
        """Return the user's adjoint callbacks. Their y0 is torchdiffeq's tuple (vjp_t, y, vjp_y, *vjp_params)."""

        shape, gradient = self.ys.shape[1:], self.gradient  # a reference to self would be a cycle

        def wrap(callback: Callable[[Tensor, Any, Tensor], Any]) -> Callable[[Tensor, Any, Tensor], Any]:
            def call(t0: Tensor, z: Tensor, dt: Tensor) -> Any:
                y, a = (part.view(shape) for part in z.chunk(2))
                return callback(t0, (torch.zeros_like(t0), y, a, *(g.clone() for g in gradient.total)), dt)

            return call

        return {name: wrap(callback) for name, callback in self.forward.adjoint_callbacks.items()}
