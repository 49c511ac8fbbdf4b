"""The loop over steps on the host, the only one.

    propose, attempt, judge, move

A step selector (step_control.py, grids.py) proposes and judges, a stepper (methods/) attempts, the loop moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from node_cuda._torch_modes import recorded
from node_cuda.loop.step_control import StepSelector
from node_cuda.methods.step import Step, Stepper
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import SolveError


class HostLoop:
    """Where a solve stands: (t, y) in solver time, and k1 if it is known. accepted, watch: told of every accepted
    step."""

    def __init__(
        self, problem: Problem, stepper: Stepper, selector: StepSelector, stats: Stats, record: bool = False
    ) -> None:
        self.problem = problem
        self.stepper = stepper
        self.selector = selector
        self.stats = stats
        self.t = problem.times[0]
        self.y = problem.y0
        self.k1: Tensor | None = None
        self.accepted: Callable[[Step], None] | None = None
        self.watch: Callable[[Step], None] | None = None
        if record:
            stats.step_times = [problem.direction * self.t]

    def steps(self) -> Iterator[Step]:
        """The accepted steps, one after another, until the selector proposes no more or the caller has enough."""
        try:
            yield from self._steps()
        except SolveError:
            self.note_reached()
            raise
        self.stats.nfe = self.problem.field.nfe

    def _steps(self) -> Iterator[Step]:
        span = (self.problem.t[0], self.problem.t[0]) if self._taped() else None
        self.k1 = self.stepper.first(self.t, self.y, span, self.selector.starts_at_jump)
        self.selector.start(self.t, self.y, self.k1)
        while (move := self.selector.propose(self.t, self.y)) is not None:
            step = self.stepper.attempt(self.t, move, self.y, self.k1)
            if self.selector.judge(step):
                self.t, self.y, self.k1 = step.t1, step.y1, self.stepper.carry(step)
                if self.stats.step_times is not None:
                    self.stats.step_times.append(self.problem.direction * step.t1)
                if self.watch is not None:
                    self.watch(step)
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
