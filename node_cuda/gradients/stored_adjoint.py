"""The continuous adjoint of an implicit method along the forward solution, whose steps and dense output are kept.

The backward solve integrates only da/dt = -(df/dy)^T a, at y(t) from the forward steps. With an explicit method
gradient="adjoint" also solves for y backwards. For a stiff field that explodes, because a component that decays
forwards grows backwards. The equation is linear in a, with the Jacobian -J^T. dL/dtheta = int a^T df/dtheta dt is a
quadrature over each step.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from node_cuda._typing import EventFunc
from node_cuda.gradients.autograd import DifferentiableSolve, Gradients, Saved, refuse_transforms
from node_cuda.gradients.changed import Comparison
from node_cuda.gradients.discrete.reverse_pass import by_the_flow
from node_cuda.gradients.discrete.step_adjoint import of_times
from node_cuda.gradients.parameters import Parameters
from node_cuda.gradients.reached import UsedParameters
from node_cuda.kernels import reference
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.reference import real_dot
from node_cuda.kernels.stage_times import Clock, Interval
from node_cuda.loop.assemble import arithmetic_of, find_event, make_loop
from node_cuda.loop.grids import grid_of
from node_cuda.loop.outputs import solve_outputs
from node_cuda.loop.request import SolveSpec
from node_cuda.methods.implicit.blocks import Blocks
from node_cuda.methods.implicit.jacobian import Jacobian
from node_cuda.methods.implicit.steps import ImplicitSteps
from node_cuda.methods.implicit.tableau import Rosenbrock, slope_row
from node_cuda.methods.interpolation import Interpolant, of_implicit, position
from node_cuda.methods.registry import Method, lookup
from node_cuda.methods.step import Seen, Step
from node_cuda.options import EquationOptions, FixedImplicitOptions, FixedOptions, ImplicitOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import InvalidInput, Status, Unsupported

_ROOT = math.sqrt(0.6)
GAUSS = ((0.5 - _ROOT / 2, 5 / 18), (0.5, 8 / 18), (0.5 + _ROOT / 2, 5 / 18))
"""Nodes and weights of the rule of order 6 on [0, 1]."""

NUMBER = "_node_cuda_number"
"""The attribute of a time for the field that holds its number, where the host knows it."""


def outputs(request: SolveSpec) -> tuple[Tensor, Status]:
    """Return y at the problem's times and the status. The gradient of y is by the adjoint method."""
    task = _StoredAdjoint(request, None)
    return task(), task.status


def event(request: SolveSpec, event_fn: EventFunc) -> tuple[Tensor, Tensor]:
    """Return the event's time (no gradient), and y0 and y there, with their gradient by the adjoint method."""
    refuse_transforms("An event")
    return _StoredAdjoint(request, event_fn).event()


class _StoredAdjoint(DifferentiableSolve):
    """A solve that keeps its steps, and the solve for a along them."""

    what = 'gradient="adjoint"'
    replays = False
    seen: Seen | None = None

    def __init__(self, request: SolveSpec, event_fn: EventFunc | None) -> None:
        super().__init__(request, Parameters(request.problem.func, request.adjoint.params, "adjoint method"))
        self.method, self.norm = _backward_method(request)
        self.event_fn = event_fn

    def solve(self, request: SolveSpec) -> Tensor:
        """Solve, and keep the steps."""
        # The user may write y0 before the backward pass.
        problem = request.problem._replace(y0=request.problem.y0.detach().clone())
        loop, interpolant = make_loop(
            problem, request.method, request.stats, endless=self.event_fn is not None, anywhere=True
        )
        stepper = loop.stepper
        assert isinstance(stepper, ImplicitSteps)
        self.path = _Path(problem, stepper)

        def keep(step: Step) -> None:
            self.path.add(step)
            self.seen = stepper.seen

        loop.accepted = keep
        if self.event_fn is None:
            ys, self.status = solve_outputs(loop, interpolant, request.method.options.raises)
            return ys
        self.at, y = find_event(loop, interpolant, request.method, self.event_fn)
        return torch.stack([problem.y0, y])

    def gradients(self, problem: Problem, saved: Saved, grad_ys: Tensor, wants_t: bool, wants_grid: bool) -> Gradients:
        """Solve for a along the stored solution, and return the gradients."""
        ys, params, at_event = saved.ys, saved.params, self.at is not None
        times = problem.times if self.at is None else (problem.times[0], problem.direction * self.at)
        # What a failed solve did not reach is NaN, and nothing flows back from it.
        failed = not at_event and self.status is not Status.SUCCESS
        count = max(int(torch.isfinite(ys).reshape(len(ys), -1).all(1).sum()), 1) if failed else len(ys)
        reached, before = self.reached(problem), problem.field.nfe
        if self.seen is not None:
            comparison = Comparison(problem, self.members, self.what, problem.field)
            comparison.judge(*self.seen, self.path.last)
        lam, totals = self._backwards(problem, times[:count], grad_ys, params, reached)
        adj_t = None
        if wants_t:
            adj_t = ys.new_zeros(len(saved.t), dtype=of_times(ys.dtype))
            if len(times) > 1:
                by_the_flow(adj_t, (0,), problem, ys, grad_ys, lam, real_dot)
            for m in range(1, 1 if at_event else count):
                adj_t[m] = real_dot(grad_ys[m], self.path.slope(times[m]))
            adj_t = adj_t.to(saved.t)
        reached.check(params)
        self.stats.nfe_backward += problem.field.nfe - before
        return Gradients(adj_t, None, lam + grad_ys[0], totals)

    def _backwards(
        self,
        problem: Problem,
        times: Sequence[float],
        grad_ys: Tensor,
        params: Sequence[Tensor],
        reached: UsedParameters,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return a at the start of the first step, and dL/dtheta."""
        totals = [torch.zeros_like(p) for p in params]
        a = grad_ys[len(times) - 1]
        if len(times) < 2:
            return torch.zeros_like(a), totals
        ascending = tuple(-s for s in reversed(times))
        field = _AdjointField(problem, self.path, times)
        assert isinstance(self.method.options, (ImplicitOptions, FixedImplicitOptions))
        derivative = field.derivative(self.method.options)
        options = replace(self.method.options, jac=derivative, norm=None)
        method = replace(self.method, options=options)
        backward = problem._replace(func=field, field=field, y0=a, times=ascending, direction=-problem.direction,
            t=problem.t.detach().flip(0), norm=self.norm, callbacks=problem.adjoint_callbacks, bounds=None,
        )  # fmt: skip
        points = _backward_grid(backward, method.options) if isinstance(method.options, FixedOptions) else None
        loop, _ = make_loop(
            backward, method, Stats(), stops=ascending[1:], anywhere=True, points=points, backwards=True,
            arithmetic=_numbering(arithmetic_of(backward)),
        )  # fmt: skip
        assert isinstance(loop.stepper, ImplicitSteps)
        interpolant = of_implicit(loop.stepper)
        next_output = 1
        for step in loop.steps():
            if params:
                for x, weight, a in _quadrature(step, loop.stepper, interpolant):
                    field.add(totals, -step.at.time(x), a, params, weight * step.at.h * problem.direction, reached)
            if step.t1 == ascending[next_output]:
                next_output += 1
                if next_output == len(ascending):
                    return step.y1, totals
                loop.restart(step.y1 + grad_ys[len(times) - next_output])
        raise AssertionError("the solve for a ended before it came to the first time")


class _Path:
    """The forward solution as a function of time, from its steps."""

    def __init__(self, problem: Problem, stepper: ImplicitSteps) -> None:
        self.direction = problem.direction
        self._tableau = stepper.tableau
        self._interpolant = of_implicit(stepper)
        self._steps: list[tuple[Step, Any]] = []
        self._starts: list[float] = []

    def add(self, step: Step) -> None:
        """Keep an accepted step."""
        self._steps.append((step, self._interpolant.prepare(step)))
        self._starts.append(step.t0)

    def at(self, s: float, t: Tensor | None) -> Tensor:
        """Return y at a solver time. t: the same time of the user, if its gradient is needed."""
        step, k = self._step(s)
        return self._interpolant.evaluate(step, k, position(step, s, self.direction, t))

    @property
    def last(self) -> Interval:
        """The last step."""
        return self._steps[-1][0].at

    def slope(self, s: float) -> Tensor:
        """Return dy/dt of the dense output at a solver time.

        func there would multiply the error of y by the stiffness.
        """
        step, k = self._step(s)
        row = slope_row(self._tableau, float(position(step, s, self.direction)))
        return reference.combine(torch.zeros_like(k[0]), k, row, 1.0)

    def _step(self, s: float) -> tuple[Step, Any]:
        return self._steps[max(bisect.bisect_right(self._starts, s) - 1, 0)]


class _AdjointField:
    """The field -(df/dy)^T a of the backward solve, at y(t). times: the output times of the forward solve.

    A stage may lie outside of them. It then takes y at the nearest time.
    """

    def __init__(self, problem: Problem, path: _Path, times: Sequence[float]) -> None:
        self.problem = problem
        self.path = path
        self.first, self.last = times[0], times[-1]
        self.clock = Clock(problem.direction, problem.time_dtype, problem.y0.device)
        self.copies_output = True

    @property
    def nfe(self) -> int:
        """Evaluations of func."""
        return self.problem.field.nfe

    def __call__(self, t: Tensor, a: Tensor) -> Tensor:
        with torch.enable_grad():
            t, y = self._state(t)
            f = self.problem.field(t, y)
            if not f.requires_grad:
                return torch.zeros_like(a)
            taped = t.requires_grad or (a.requires_grad and torch.is_grad_enabled())
            (found,) = torch.autograd.grad(f, y, a, create_graph=taped, allow_unused=True)
        return torch.zeros_like(a) if found is None else -found

    def derivative(self, options: EquationOptions) -> Any:
        """Return its Jacobian by a, as a function of (t, a)."""
        blocks = Blocks(self.problem, options.batch_dims)
        jacobian = Jacobian(self.problem, blocks, options.jac, Stats(), timed=False)

        def of(t: Tensor, a: Any) -> Tensor:
            with torch.no_grad():
                t, y = self._state(t)
                return -jacobian.at(t, y).jacobian.mT

        return of

    def add(
        self,
        totals: list[Tensor],
        s: float,
        a: Tensor,
        params: Sequence[Tensor],
        weight: float,
        reached: UsedParameters,
    ) -> None:
        """Add the vjp of the parameters at a solver time, times a weight."""
        with torch.enable_grad():
            (t,) = self.clock.tensors([s])
            t, y = self._state(t, s)
            f = self.problem.field(t, y.detach())
            if not f.requires_grad:
                return
            found = torch.autograd.grad(f, params, a.to(f.dtype), allow_unused=True)
        reached.see(found)
        for total, g in zip(totals, found, strict=True):
            if g is not None:
                total.add_(g, alpha=weight)

    def _state(self, t: Tensor, s: float | None = None) -> tuple[Tensor, Tensor]:
        """Return the time, within the forward solve, and y there, to differentiate by. s: the solver time, if it is
        known."""
        if s is None:
            number = getattr(t, NUMBER, None)  # otherwise it is read from the device
            s = self.problem.direction * float(t.detach() if number is None else number)
        inside = min(max(s, self.first), self.last)
        if inside != s:
            t = self.clock.tensors([inside])[0]
        y = self.path.at(inside, t if t.requires_grad else None)
        return t, y if y.requires_grad else y.detach().requires_grad_(True)


def _numbering(arithmetic: Arithmetic) -> Arithmetic:
    """Return this arithmetic, whose times for the field now also carry their numbers, so that none must be read."""

    def numbered(make: Callable[[Interval, Sequence[float], int], tuple[Tensor, ...]]) -> Any:
        def times(at: Interval, nodes: Sequence[float], side: int) -> tuple[Tensor, ...]:
            made = make(at, nodes, side)
            for t, number in zip(made, arithmetic.clock.numbers(at, nodes, side), strict=True):
                setattr(t, NUMBER, number)
            return made

        return times

    arithmetic.times, arithmetic.slots = numbered(arithmetic.times), numbered(arithmetic.slots)
    return arithmetic


def _quadrature(step: Step, stepper: ImplicitSteps, interpolant: Interpolant) -> Iterator[tuple[float, float, Tensor]]:
    """Yield nodes and weights of an integral over a step, and a there.

    By Gauss's rule along the dense output; on a fixed grid by the weights of the method and the arguments of its
    stages. Then the integral of a linear field is exact for the computed a, also where a decays within a step.
    """
    tableau = stepper.tableau
    if isinstance(tableau, Rosenbrock) or tableau.adaptive:
        for x, weight in GAUSS:
            yield x, weight, interpolant.evaluate(step, step.k, x)
        return
    for i, weight in tableau.b_row:
        yield tableau.nodes[i], weight, stepper.arithmetic.combine(step.y0, step.k, tableau.full_rows[i], step.at.dt)


def _backward_grid(problem: Problem, options: FixedOptions) -> list[float]:
    """Return the grid of the solve for a, which starts anew at every output, as in torchdiffeq."""
    points = [problem.times[0]]
    for ends in pairwise(problem.times):
        t = torch.tensor([problem.direction * s for s in ends], dtype=torch.float64, device="cpu")
        points += grid_of(problem._replace(t=t, times=ends), options)[0][1:]
    return points


def _backward_method(request: SolveSpec) -> tuple[Method, ErrorNorm]:
    """Return the method and the norm of the backward solve, by default those of the forward solve."""
    problem, given = request.problem, request.adjoint
    name = request.backward_method()
    options = dict((request.options if given.options is None else given.options) or {})
    norm = options.pop("norm", None)
    if given.options is not None and callable(norm):
        raise Unsupported(
            'gradient="adjoint" of an implicit method measures the error of a alone, and a norm of (t, y, adj_y, '
            "*adj_params) was given. Drop adjoint_options['norm']; the parameters are in no norm here."
        )
    for inherited in ("throw", "cuda_graph", "record_steps", "first_step"):
        options.pop(inherited, None)
    method = lookup(name, options, quiet=given.options is None)
    if method.implicit is None:
        raise InvalidInput(
            f"adjoint_method must be an implicit method where the forward one is: the field of a is as stiff. Got "
            f"{name!r}; leave it out."
        )
    rtol, atol = request.backward_tolerances()
    return method, ErrorNorm(rtol, atol, problem.layout.sizes)
