"""The loop over steps on the host.

    propose, attempt, judge, move

A step selector (step_control.py, grids.py) proposes and judges a step, a stepper (methods/) attempts it, and the loop
moves to its end. Two kinds of solve do not need it: grids that are the output times (plain_grid.py, the same steps
without an object for each), and SciPy's solvers, which choose their steps themselves (scipy_solver.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from node_cuda._torch_modes import recorded
from node_cuda._user_code import in_step, tell_step
from node_cuda.loop.step_control import StepSelector
from node_cuda.methods.step import ProposedStep, Step, Stepper
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats, TriedStep
from node_cuda.status import SolveError


class HostLoop:
    """The current point (t, y) of a solve in solver time, and k1 if it is known.

    accepted, watch: functions that are called with every accepted step. tried: a function that is called with every
    step that was tried, and whether it was accepted; ended: one that is called at the end of the steps.
    """

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
        self.move: ProposedStep | None = None
        self.watch: Callable[[Step], None] | None = None
        self.tried: Callable[[Step, bool], None] | None = None
        self.ended: Callable[[], None] | None = None
        if record:
            stats.step_times, stats.steps = [problem.direction * self.t], []

    def steps(self) -> Iterator[Step]:
        """Yield the accepted steps until the selector proposes no more, or until the caller stops."""
        try:
            yield from self._steps()
        except SolveError:
            self.note_reached()
            raise
        except (Exception, KeyboardInterrupt) as error:
            self._tell_step(error)
            raise
        finally:
            if self.ended is not None:
                self.ended()
        self.stats.nfe = self.problem.field.nfe

    def _steps(self) -> Iterator[Step]:
        span = (self.problem.t[0], self.problem.t[0]) if self._taped() else None
        self.k1 = self.stepper.first(self.t, self.y, span, self.selector.starts_at_jump)
        self.selector.start(self.t, self.y, self.k1)
        while (move := self.selector.propose(self.t, self.y)) is not None:
            self.move = move
            step = self.stepper.attempt(self.t, move, self.y, self.k1)
            fits = self.selector.judge(step)
            if self.stats.steps is not None:
                self._record(step, fits)
            if self.tried is not None:
                self.tried(step, fits)
            if fits:
                self.t, self.y, self.k1 = step.t1, step.y1, self.stepper.carry(step)
                if self.stats.step_times is not None:
                    self.stats.step_times.append(self.problem.direction * step.t1)
                if self.watch is not None:
                    self.watch(step)
                if self.accepted is not None:
                    self.accepted(step)
                yield step
            elif self.k1 is None:
                self.k1 = step.k[0]  # the field at the unchanged start, which is known now

    def _record(self, step: Step, accepted: bool) -> None:
        sign = self.problem.direction
        assert self.stats.steps is not None
        self.stats.steps.append(TriedStep(sign * step.t0, sign * step.at.h, self.selector.ratio, accepted))

    def note_reached(self) -> None:
        """Store in the statistics how far a failed solve came."""
        self.stats.reached = self.problem.direction * self.t, self.y.detach()

    def _tell_step(self, error: BaseException) -> None:
        """Say where the solve stood, from numbers that the host has."""
        problem, move, beyond = self.problem, self.move, None
        t = problem.direction * self.t
        if move is None:
            words = f"t = {t:.6g}, where it looked for the size of its first step."
        else:
            words = in_step(t, problem.direction * move.h, self.stats.accepted, self.stats.rejected)
            # On the CPU the time of the call is known, and tells more.
            if problem.bounds is None and problem.y0.device.type != "cpu" and move.t1 > problem.times[-1]:
                beyond = problem.ends
        tell_step(error, words, beyond=beyond)

    def restart(self, y: Tensor) -> None:
        """Continue from another state at the same time, and evaluate the field there."""
        self.y, self.k1 = y, None

    def _taped(self) -> bool:
        return recorded(self.problem.t)
