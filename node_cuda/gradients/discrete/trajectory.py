"""The record of a forward solve for the discrete adjoint: the intervals of all accepted steps, and some states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from node_cuda.gradients.discrete.checkpoints import Checkpoints
from node_cuda.kernels.reference import nothing_lost
from node_cuda.kernels.stage_times import HERE, JUST_AFTER, JUST_BEFORE, Interval
from node_cuda.loop.host_loop import HostLoop
from node_cuda.methods.explicit_rk import ExplicitRK
from node_cuda.methods.implicit.steps import ImplicitSteps
from node_cuda.methods.step import Seen, Step
from node_cuda.problem.problem import Problem


class State(NamedTuple):
    """The beginning of a step: y0, and its first stage k1.

    k1 is None unless the step before passed it on and it is not the field at y0. lost: what y0 lost by rounding; None
    if the solve is not compensated.
    """

    y0: Tensor
    k1: Tensor | None
    lost: Tensor | None = None


class StepRecord(NamedTuple):
    """An accepted step: its interval, and the origin of its first stage.

    carried: the first stage is the last stage of the step before. start, node, side: the time of the first stage, as a
    node of the interval `start` (see `kernels.stage_times`).
    """

    at: Interval
    carried: bool
    start: Interval
    node: float
    side: int


class Trajectory:
    """The accepted steps of a solve in order. No tensor is copied: no step writes into the tensors of an earlier one.

    replayed: of the last step, the first stage that its replay evaluates again. None after a captured solve.
    seen: of the last step of an implicit method, an evaluation; its replay makes none of them again.
    """

    def __init__(self, steps: list[StepRecord], checkpoints: Checkpoints[State]) -> None:
        self.steps = steps
        self.checkpoints = checkpoints
        self.replayed: Tensor | None = None
        self.seen: Seen | None = None
        self._first: State | None = None
        self._lost: Tensor | None = None  # of the last step
        self._jump = False

    @classmethod
    def of(
        cls, loop: HostLoop, stepper: ExplicitRK | ImplicitSteps, slots: int | None, count: int | None
    ) -> Trajectory:
        """Return the trajectory that this loop will fill.

        slots: the number of states that may be kept. count: the number of steps that there will be, if it is known.
        """
        self = cls([], Checkpoints(slots, count))
        self._jump = loop.selector.starts_at_jump
        loop.accepted = lambda step: self._record(step, stepper)
        return self

    @classmethod
    def of_grid(cls, states: Sequence[Tensor], last: Step | None, problem: Problem) -> Trajectory:
        """Return the trajectory of a solve by `loop.plain_grid`. states: those that its steps began with."""
        self = cls([], Checkpoints(None, len(states)))
        for n, (y0, t0, t1) in enumerate(zip(states, problem.times, problem.times[1:], strict=False)):
            signed = problem.direction * (t1 - t0)
            at = Interval(t0, t1, t1 - t0, signed, signed)
            self.steps.append(StepRecord(at, False, at, 0.0, HERE))
            self.checkpoints.offer(n, State(y0 if n else y0.new_empty(0), None))  # see `_record`
        self.replayed = None if last is None else last.k[0]
        return self

    def _record(self, step: Step, stepper: ExplicitRK | ImplicitSteps) -> None:
        tableau, before = stepper.tableau, self.steps[-1].at if self.steps else None
        k1 = None
        if tableau.carry_last_stage and before is not None and not self._jump:
            k1 = None if tableau.fsal else step.k[0]
            taken = StepRecord(step.at, True, before, 1.0, JUST_BEFORE)
        else:
            # Adaptive methods evaluate the first stage at t0, or just after t0 if a jump is there.
            inside = self._jump if tableau.adaptive else stepper.inside
            taken = StepRecord(step.at, False, step.at, 0.0, JUST_AFTER if inside else HERE)
        # The first state is the user's tensor, and the user may write into it: `begin` gets it from the outputs.
        y0 = step.y0 if self.steps else step.y0.new_empty(0)
        self.checkpoints.offer(len(self.steps), State(y0, k1, self._lost))
        self.steps.append(taken)
        self._lost = step.lost
        if isinstance(stepper, ExplicitRK):
            self.replayed = step.k[0 if k1 is None else 1]
        else:
            self.seen = stepper.seen
        self._jump = step.jump

    def begin(self, y0: Tensor) -> None:
        """Set the state that the first step began with."""
        self._first = State(y0, None, None if self._lost is None else nothing_lost(y0))
        self.checkpoints.replace_first(self._first)

    def reverse(self, advance: Callable[[int, State], State], back: Callable[[int, State], None]) -> None:
        """Call back(i, state) for every step i, the last one first (see `Checkpoints.reverse`).

        The first call drops the states. Another call recomputes them from the first state.
        """
        if self.checkpoints.spent and self._first is not None:
            count, state = len(self.steps), self._first
            self.checkpoints = Checkpoints(self.checkpoints.slots, count)
            for i in range(count):
                self.checkpoints.offer(i, state)
                state = advance(i, state) if i + 1 < count else state
        self.checkpoints.reverse(advance, back)
