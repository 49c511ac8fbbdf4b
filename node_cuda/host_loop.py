"""The loop over steps on the host, the only one, and what is made of its steps: outputs and events.

    propose, attempt, judge, move

A pace (controllers.py) proposes and judges, a stepper (steppers/) attempts, the loop moves.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from node_cuda.controllers import Pace
from node_cuda.derivatives import batched, recorded, transformed
from node_cuda.interpolation import Interpolant, position
from node_cuda.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import SolveError, Status, UnsupportedTransform
from node_cuda.steppers.step import Step, Stepper


class HostLoop:
    """Where a solve stands: (t, y) in solver time, and k1 if it is known. accepted: told of every accepted step."""

    def __init__(self, problem: Problem, stepper: Stepper, pace: Pace, stats: Stats, record: bool = False) -> None:
        self.problem = problem
        self.stepper = stepper
        self.pace = pace
        self.stats = stats
        self.t = problem.times[0]
        self.y = problem.y0
        self.k1: Tensor | None = None
        self.accepted: Callable[[Step], None] | None = None
        if record:
            stats.step_times = [problem.direction * self.t]

    def steps(self) -> Iterator[Step]:
        """The accepted steps, one after another, until the pace proposes no more or the caller has enough."""
        try:
            yield from self._steps()
        except SolveError:
            self.note_reached()
            raise
        self.stats.nfe = self.problem.field.nfe

    def _steps(self) -> Iterator[Step]:
        span = (self.problem.t[0], self.problem.t[0]) if self._taped() else None
        self.k1 = self.stepper.first(self.t, self.y, span, self.pace.starts_at_jump)
        self.pace.start(self.t, self.y, self.k1)
        while (move := self.pace.propose(self.t, self.y)) is not None:
            step = self.stepper.attempt(self.t, move, self.y, self.k1)
            if self.pace.judge(step):
                self.t, self.y, self.k1 = step.t1, step.y1, self.stepper.carry(step)
                if self.stats.step_times is not None:
                    self.stats.step_times.append(self.problem.direction * step.t1)
                if self.accepted is not None:
                    self.accepted(step)
                yield step
            elif self.k1 is None:
                self.k1 = step.k[0]  # the field at an unchanged start, known by now

    def note_reached(self) -> None:
        """The solve failed: tell the statistics how far it came."""
        self.stats.reached = self.problem.direction * self.t, self.y.detach()

    def restart(self, y: Tensor) -> None:
        """Go on from another state at the same time; the field is evaluated there anew."""
        self.y, self.k1 = y, None

    def _taped(self) -> bool:
        return recorded(self.problem.t)


def solve_outputs(loop: HostLoop, interpolant: Interpolant, throw: bool) -> tuple[Tensor, Status]:
    """y at the problem's times, of shape (len(times), *y0.shape), and how the solve ended.

    Evaluates the interpolant only in steps that hold an output. With throw=False a failed solve gives NaN in what was
    not reached.
    """
    problem = loop.problem
    outputs = _Outputs(problem)
    status = Status.SUCCESS
    try:
        if outputs.missing:
            for step in loop.steps():
                if problem.times[outputs.count] <= step.t1:
                    outputs.take(step, interpolant)
                    loop.pace.fresh()
                    if not outputs.missing:
                        break
    except SolveError as failure:
        if throw:
            raise
        status = failure.status
        outputs.fill_missing()
    loop.stats.nfe = problem.field.nfe
    ys = outputs.stacked()
    # A fixed grid judges no step: as in torchdiffeq its NaN is returned, but the status says so.
    if status is Status.SUCCESS and len(ys) > 1 and not loop.pace.judges and not batched(ys):
        loop.stats.host_reads += 1
        if not bool(torch.isfinite(ys[-1]).all()):
            status = Status.NON_FINITE
    return ys, status


class _Outputs:
    """y at the problem's times, filled as steps reach them: into one tensor, or as a list while autograd records.

    A list, because writing into one tensor would cost autograd a copy of it for every output, and transforms of
    torch.func do not let each tensor be written into.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.count = 1
        in_list = torch.is_grad_enabled() or transformed()
        self._list: list[Tensor] | None = [problem.y0] if in_list else None
        y0 = problem.y0
        self._slab = y0 if self._list else y0.new_empty((len(problem.times), *y0.shape))
        if self._list is None:
            self._slab[0] = y0

    @property
    def missing(self) -> int:
        """How many outputs were not reached yet."""
        return len(self.problem.times) - self.count

    def take(self, step: Step, interpolant: Interpolant) -> None:
        """All outputs that lie in this step: in one go where no tape looks."""
        k = interpolant.prepare(step)
        first, times = self.count, self.problem.times
        self.count = bisect.bisect_right(times, step.t1, lo=first)
        if self._list is None:
            interpolant.outputs(step, k, first, self._slab[first : self.count])
        elif self._taped(step, k):
            self._list.extend(output_at(step, k, interpolant, self.problem, i) for i in range(first, self.count))
        else:
            rows = step.y0.new_empty((self.count - first, *step.y0.shape))
            interpolant.outputs(step, k, first, rows)
            self._list.extend(rows.unbind())

    def _taped(self, step: Step, k: list[Tensor]) -> bool:
        """Autograd, forward mode or a transform records outputs of this step."""
        return transformed() or self.problem.t.requires_grad or any(x.requires_grad for x in (step.y0, step.y1, *k))

    def fill_missing(self) -> None:
        """NaN in what was not reached."""
        if self._list is not None:
            self._list.extend([torch.full_like(self.problem.y0, math.nan)] * self.missing)
        else:
            self._slab[self.count :].fill_(math.nan)

    def stacked(self) -> Tensor:
        """The outputs as one tensor."""
        return self._slab if self._list is None else torch.stack(self._list)


def output_at(step: Step, k: list[Tensor], interpolant: Interpolant, problem: Problem, i: int) -> Tensor:
    """The i-th output, which lies in this step, on the tape."""
    t = problem.t[i] if recorded(problem.t) else None
    if t is None and problem.times[i] == step.t1:
        return step.y1
    return interpolant.evaluate(step, k, position(step, problem.times[i], problem.direction, t))


def solve_event(
    loop: HostLoop,
    interpolant: Interpolant,
    event_fn: Callable[[Tensor, Tensor], Tensor],
    max_steps: int | None,
    search: Interpolant,
    checks: int,
) -> tuple[float, Tensor]:
    """The user's time and state at which event_fn, of (t, flat state), changes its sign for the first time.

    The sign is looked at where steps end, and at so many points inside of them (`checks`), by the interpolant `search`,
    which evaluates nothing; the event is then bisected on `interpolant`, to within atol of time.
    Raises SolveError(NO_EVENT) after max_steps steps.
    """
    problem = loop.problem

    def sign(s: float, y: Tensor) -> float:
        t = torch.tensor(problem.direction * s, dtype=problem.time_dtype, device=y.device)
        loop.stats.host_reads += 1
        with torch.no_grad():
            value = event_fn(t, y)
        if batched(value):
            raise UnsupportedTransform(
                "torch.func.vmap over an event: its time is one number. Solve each sample outside."
            )
        value = float(value)
        if math.isnan(value):
            loop.stats.nfe = problem.field.nfe
            loop.note_reached()
            raise SolveError(Status.NON_FINITE, problem.direction * s, loop.stats, "event_fn returned NaN.")
        return math.copysign(1.0, value) if value else 0.0

    def inside(step: Step, by: Interpolant, k: Sequence[Tensor], s: float) -> Tensor:
        with torch.no_grad():
            return by.evaluate(step, k, position(step, s, problem.direction))

    def looks(step: Step) -> Iterator[tuple[float, Tensor]]:
        if checks:
            k = search.prepare(step)
            for i in range(1, checks + 1):
                s = step.t0 + i / (checks + 1) * (step.t1 - step.t0)
                yield s, inside(step, search, k, s)
        yield step.t1, step.y1

    latest = 1e-3 * torch.finfo(problem.time_dtype).max  # a few more steps would overflow t
    start = sign(loop.t, loop.y)
    if start == 0.0:
        return problem.direction * loop.t, loop.y
    atol = problem.norm.atol
    tolerance = float(atol.min()) if isinstance(atol, Tensor) else atol
    for count, step in enumerate(loop.steps(), start=1):
        low, k = step.t0, None
        for high, y in looks(step):
            changed = sign(high, y) != start
            if changed:
                k = interpolant.prepare(step) if k is None else k
                # Inside the step only `search` may have the crossing.
                changed = high == step.t1 or sign(high, inside(step, interpolant, k, high)) != start
            if not changed or k is None:
                low = high
                continue
            while high - low > tolerance and low < (middle := 0.5 * (low + high)) < high:
                y = inside(step, interpolant, k, middle)
                low, high = (middle, high) if sign(middle, y) == start else (low, middle)
            s = 0.5 * (low + high)
            loop.stats.nfe = problem.field.nfe
            return problem.direction * s, interpolant.evaluate(step, k, position(step, s, problem.direction))
        if count == max_steps or not abs(step.t1) < latest:
            break
    loop.stats.nfe = problem.field.nfe
    loop.note_reached()
    detail = f"Reached maximum number of iterations {max_steps}." if max_steps else "No event before the end of time."
    raise SolveError(Status.NO_EVENT, problem.direction * loop.t, loop.stats, detail)
