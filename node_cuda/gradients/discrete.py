"""Exact gradients of the computed solution: the discrete adjoint, one state kept for every accepted step.

The forward solve runs without a tape. The backward pass takes each accepted step again from the state it began with,
and its cotangents through it (`step_adjoint`): what autograd through the same steps would give, in the memory of one
step's graph. The step sizes are held fixed, as the exact flow does not depend on them; of an adaptive solve
dL/dt_m = dL/dy(t_m) . f(t_m, y_m) and dL/dt_0 = -dL/dy_0 . f(t_0, y_0), of a fixed grid dL/dt is exact as well.
Zhuang et al. 2020, arXiv:2006.02493; Matsubara, Miyatake and Yaguchi 2021, arXiv:2102.09750.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from node_cuda._typing import EventFunc
from node_cuda.gradients.backprop import MAX_EVENT_STEPS
from node_cuda.gradients.checkpoints import slots_for
from node_cuda.gradients.context import autocast_state, first_derivatives, parameters
from node_cuda.gradients.request import Request
from node_cuda.gradients.step_adjoint import Cotangent, Form, Output, StepAdjoint, adaptive_form, grid_form
from node_cuda.gradients.trajectory import State, Trajectory
from node_cuda.host_loop import HostLoop, solve_event, solve_outputs
from node_cuda.interpolation import dense_of
from node_cuda.kernels.arithmetic import position
from node_cuda.methods import arithmetic_of, grid_of, make_loop
from node_cuda.options import AdaptiveOptions, FixedOptions
from node_cuda.problem import Problem
from node_cuda.status import Status, Unsupported
from node_cuda.steppers.explicit_rk import ExplicitRK


@dataclass
class Run:
    """A forward solve: y at `times` (solver times, the first is the start), the steps in between, how it ended."""

    ys: Tensor
    times: tuple[float, ...]
    trajectory: Trajectory
    status: Status = Status.SUCCESS


def outputs(request: Request) -> tuple[Tensor, Status]:
    """y at the problem's times; its gradient by the discrete adjoint."""
    problem, options = request.problem, request.method.options
    form = _form(request)
    points, grid = grid_of(problem, options) if isinstance(options, FixedOptions) else (None, None)
    status = Status.SUCCESS

    def forward() -> Run:
        nonlocal status
        loop, interpolant = make_loop(problem, request.method, request.stats, points=points)
        trajectory = _recorded(loop, request, None if points is None else len(points) - 1)
        ys, status = solve_outputs(loop, interpolant, options.throw)
        return Run(ys, problem.times, trajectory, status)

    return _DiscreteSolve.apply(forward, request, form, problem.t, grid, problem.y0, *_params(request))[0], status


def event(request: Request, event_fn: EventFunc) -> tuple[Tensor, Tensor]:
    """The event's time (no gradient), and y0 and y there; their gradient by the discrete adjoint."""
    problem, method = request.problem, request.method
    form = _form(request)

    def forward() -> Run:
        loop, interpolant = make_loop(problem, method, request.stats, endless=True)
        trajectory = _recorded(loop, request, None)
        at, y = solve_event(loop, interpolant, event_fn, None if method.adaptive else MAX_EVENT_STEPS)
        return Run(torch.stack([problem.y0, y]), (problem.times[0], problem.direction * at), trajectory)

    ys, at = _DiscreteSolve.apply(forward, request, form, problem.t, None, problem.y0, *_params(request))
    return at.to(problem.t.dtype), ys


def _recorded(loop: HostLoop, request: Request, steps: int | None) -> Trajectory:
    """The trajectory that the loop will fill. steps: how many, where that is known."""
    assert isinstance(loop.stepper, ExplicitRK)
    y0, slots, tableau = request.problem.y0, request.checkpoints, loop.stepper.tableau
    if isinstance(slots, str):  # "auto"
        tensors = 2 if tableau.carry_last_stage and not tableau.fsal else 1
        slots = slots_for(tensors * y0.numel() * y0.itemsize, y0.device)
    return Trajectory(loop, loop.stepper, slots, steps)


def _form(request: Request) -> Form:
    """The method's stages as the backward pass sees them. Raises Unsupported for what is no Runge-Kutta method."""
    method, options = request.method, request.method.options
    if method.tableau is None:
        raise Unsupported(
            f'gradient="discrete" replays the steps of explicit Runge-Kutta methods; got method={method.name!r}. '
            'Use gradient="adjoint", or method="dopri5" or "rk4".'
        )
    if isinstance(options, AdaptiveOptions):
        return adaptive_form(method.tableau, dense_of(method.tableau, options.dense))
    assert isinstance(options, FixedOptions)
    return grid_form(method.tableau, inside=options.perturb, cubic=options.interp != "linear")


def _params(request: Request) -> tuple[Tensor, ...]:
    """What to differentiate by, besides y0 and t."""
    every = parameters(request.problem.func, request.adjoint.params, "discrete adjoint")
    return tuple(p for p in every if p.requires_grad)


class _DiscreteSolve(torch.autograd.Function):
    """A whole solve as one operation of the user's graph."""

    @staticmethod
    def forward(ctx, run: Callable[[], Run], request: Request, form: Form, t, grid, y0, *params):
        done = run()
        at = torch.tensor(request.problem.direction * done.times[-1], dtype=torch.float64, device=t.device)
        ctx.mark_non_differentiable(at)
        ctx.save_for_backward(t, grid, done.ys, *params)
        ctx.times, ctx.trajectory, ctx.failed = done.times, done.trajectory, done.status is not Status.SUCCESS
        # Without the tensors that hold the user's graph.
        ctx.problem = replace(request.problem, y0=y0.detach(), t=t.detach())
        ctx.form, ctx.stats = form, request.stats
        ctx.autocast = autocast_state(y0.device.type)
        return done.ys, at

    @staticmethod
    def backward(ctx, grad_ys, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        t, grid, ys, *params = ctx.saved_tensors
        wants_t, wants_grid = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for context in ctx.autocast():
                stack.enter_context(context)
            walk = _Backwards(ctx, grad_ys.to(ys.dtype), ys, params, grid if wants_grid else None)
            adj_y0, adj_t, adj_grid = walk.run(t, wants_t)
            gradients = (adj_t, adj_grid, adj_y0, *walk.gradients())
        stats = ctx.stats
        stats.nfe_backward += walk.adjoint.nfe
        stats.steps_again += walk.steps_again
        stats.peak_checkpoints = max(stats.peak_checkpoints, ctx.trajectory.checkpoints.peak)
        return (None,) * 3 + first_derivatives(gradients, 'gradient="discrete"', ys, grad_ys)


class _Backwards:
    """The walk over the steps from the last one to the first."""

    def __init__(self, ctx: Any, grad_ys: Tensor, ys: Tensor, params: list[Tensor], grid: Tensor | None) -> None:
        problem: Problem = ctx.problem
        self.problem, self.params, self.grid, self.ys = problem, params, grid, ys
        self.trajectory: Trajectory = ctx.trajectory
        self.trajectory.begin(ys.detach()[0])  # a view of ys itself would hold the graph that holds the trajectory
        self.times: tuple[float, ...] = ctx.times
        self.arithmetic = arithmetic_of(problem)
        self.sums = self.arithmetic.sums(params, with_error=False)
        self.sums.begin()
        self.steps_again = 0
        self.adjoint = StepAdjoint(problem, self.arithmetic, ctx.form, params, self.sums, timed=grid is not None)
        # What a failed solve did not reach is NaN, and nothing flows back from it.
        finite = torch.isfinite(ys).reshape(len(ys), -1).all(1) if ctx.failed else None
        self.reached = len(ys) if finite is None else max(int(finite.sum()), 1)
        self.grad_ys = [self.arithmetic.own(g) for g in grad_ys[: self.reached]]

    def run(self, t: Tensor, wants_t: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(dL/dy0, dL/dt or None, dL/dgrid or None)."""
        steps, times = self.trajectory.steps, self.times[: self.reached]
        exact = self.grid is not None
        # In double, and on the state's device, wherever t is: a step waits for nothing.
        adj_t = self.ys.new_zeros(len(t), dtype=torch.float64) if wants_t else None
        adj_grid = None if self.grid is None else self.ys.new_zeros(len(self.grid), dtype=torch.float64)
        flowing = Cotangent(torch.zeros_like(self.grad_ys[0]))
        stop = len(times)

        def advance(n: int, state: State) -> State:
            self.steps_again += 1
            return self.adjoint.advance(steps[n], state, steps[n + 1])

        def back(n: int, state: State) -> None:
            nonlocal flowing, stop
            at = steps[n].at
            first = bisect_right(times, at.t0, 1, stop)
            places = [1.0 if s == at.t1 else position(at, s) for s in times[first:stop]]
            given = [Output(x, g) for x, g in zip(places, self.grad_ys[first:stop], strict=True)]
            flowing, timed = self.adjoint.back(steps[n], state, flowing, given)
            if timed is not None and adj_grid is not None:
                adj_grid[n + 1] += timed.size
                adj_grid[n] += timed.start - timed.size
                for m, x, slope in zip(range(first, stop), places, timed.places, strict=True):
                    rate = slope / at.signed
                    adj_grid[n + 1] -= x * rate
                    adj_grid[n] -= (1.0 - x) * rate
                    if adj_t is not None:
                        adj_t[m] += rate
            stop = first

        self.trajectory.reverse(advance, back)
        if adj_t is not None and not exact:
            self._times_by_the_flow(adj_t, flowing.lam)
        adj_y0 = (flowing.lam + self.grad_ys[0]).reshape(self.problem.y0.shape)
        return (
            adj_y0,
            None if adj_t is None else adj_t.to(t),
            None if adj_grid is None or self.grid is None else adj_grid.to(self.grid),
        )

    def _times_by_the_flow(self, adj_t: Tensor, lam0: Tensor) -> None:
        """dL/dt of the exact flow. The time of an event is not where the user put t[1], so only t[0] moves it."""
        t, problem = self.problem.t, self.problem
        asked = range(self.reached) if self.times == problem.times else (0,)
        for m in asked if len(self.times) > 1 else ():
            self.adjoint.nfe += 1
            f = problem.field(t[m].to(self.ys.device, problem.time_dtype), self.ys[m])
            cotangent = -lam0 if m == 0 else self.grad_ys[m]
            adj_t[m] = self.arithmetic.real_dot(cotangent, f)

    def gradients(self) -> list[Tensor]:
        """dL/dtheta in the parameters' own dtypes."""
        self.sums.commit()
        return [g.to(p.dtype) for g, p in zip(self.sums.total, self.params, strict=True)]
