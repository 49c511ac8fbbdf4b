"""The captured forward solve of the discrete adjoint: the device records its accepted steps and keeps their states.

The record lies in the memory of the captured solve. The backward pass reads it there if no other solve begins before.
Otherwise the rows in use are copied before that solve begins.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from node_cuda.cuda_graphs.cache import GraphCache, captured_or_why, fallback_reason, key_of
from node_cuda.cuda_graphs.device_loop import OutputLoop
from node_cuda.cuda_graphs.forward import CapturedForward, points_of, solve_captured
from node_cuda.gradients.discrete.checkpoints import Checkpoints, slots_for
from node_cuda.gradients.discrete.trajectory import State, StepRecord, Trajectory
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.fused import Fused, can_sum
from node_cuda.kernels.norms import HALF
from node_cuda.kernels.stage_times import HERE, JUST_AFTER, JUST_BEFORE
from node_cuda.kernels.step_log import StepLog
from node_cuda.loop.request import SolveSpec
from node_cuda.methods.registry import Method
from node_cuda.methods.step import Step
from node_cuda.options import AdaptiveOptions, FixedOptions, times_option
from node_cuda.problem.problem import Problem
from node_cuda.status import Status

FEWEST_STATES, MOST_STATES, FIRST_BYTES = 64, 1024, 2**23
"""The room for states if no earlier solve shows the number of steps: as many as fit in FIRST_BYTES, within these
bounds."""


class RecordingLoop(OutputLoop):
    """A solve that records its steps. states: one row for each step, and one more row for states that are not kept."""

    def __init__(
        self, problem: Problem, method: Method, arithmetic: Fused, points: Sequence[float] | None, tape: StepLog
    ) -> None:
        super().__init__(problem, method, arithmetic, points=points, tape=tape)
        self.tape = tape
        self.states = self.y.new_zeros((tape.capacity + 1, *self.y.shape))

    def put_outputs(self, step: Step, outputs: object) -> None:
        """Write the outputs that lie in the step, and keep the state that it began with, if the step was accepted."""
        super().put_outputs(step, outputs)
        self.states.index_copy_(0, self.tape.slot, self.y.unsqueeze(0))


class CapturedRecording(CapturedForward):
    """The captured graphs of a forward solve that leaves a `SavedTrajectory`.

    capacity: the number of steps, with their states, that it has room for.
    """

    loop: RecordingLoop

    def __init__(
        self, problem: Problem, method: Method, points: Sequence[float] | None, tier: str | None, capacity: int
    ) -> None:
        self.capacity = capacity
        self.holder: weakref.ref[SavedTrajectory] | None = None
        super().__init__(problem, method, points, tier)

    def make_loop(
        self, problem: Problem, method: Method, arithmetic: Fused, points: Sequence[float] | None
    ) -> OutputLoop:
        """Return the loop to capture, which records its steps."""
        first, carries = _first_stages(problem, method)
        tape = StepLog(arithmetic.module, problem.y0.device, self.capacity, first=first, carries=carries)
        return RecordingLoop(problem, method, arithmetic, points, tape)

    def run(self, problem: Problem, points: Sequence[float] | None) -> Tensor:
        """Launch the solve, and return y at the problem's times. A record that is still needed is saved first."""
        self.evict()
        return super().run(problem, points)

    def evict(self) -> None:
        """Free the memory for another record: save the record that lies there, if it is still needed."""
        holder = None if self.holder is None else self.holder()
        self.holder = None
        if holder is not None:
            self.follow()
            holder.save()


class SavedTrajectory:
    """The record of a forward solve for its backward pass.

    count: the number of accepted steps; None if the status has not been read back yet. Then `succeeded` says on the
    device whether the solve succeeded.
    """

    def __init__(self, owner: CapturedRecording, count: int | None) -> None:
        self.owner = owner
        self.count = count
        self.succeeded = owner.loop.control.succeeded.clone() if count is None else None
        self._saved: list[Tensor] | None = None
        owner.holder = weakref.ref(self)

    def save(self) -> None:
        """Copy the record out of the memory of the captured solve."""
        self._saved = [x.clone() for x in self._memory()]

    def load(self) -> None:
        """Copy the record back into the memory that the captured solves use, if it is not there."""
        holder = None if self.owner.holder is None else self.owner.holder()
        if holder is self:
            return
        self.owner.evict()
        assert self._saved is not None
        for x, saved in zip(self._memory(), self._saved, strict=True):
            x.copy_(saved)
        self._saved = None
        self.owner.holder = weakref.ref(self)

    def trajectory(self, arithmetic: Arithmetic) -> Trajectory:
        """Return the record as a `Trajectory`, for a backward pass in the host loop. One host read."""
        assert self.count is not None
        with self.owner.lock:
            self.owner.follow()
            self.load()
            read = self.owner.loop.tape.read(self.count)
            states = self.owner.loop.states[: self.count].clone()
        steps: list[StepRecord] = []
        checkpoints: Checkpoints[State] = Checkpoints(None)
        for i, (t0, t1, h, begins) in enumerate(read):
            checkpoints.offer(i, State(states[i], None))
            at = arithmetic.interval(t0, t1, h)
            if begins < 0:
                steps.append(StepRecord(at, True, steps[-1].at, 1.0, JUST_BEFORE))
            else:
                steps.append(StepRecord(at, False, at, 0.0, JUST_AFTER if begins else HERE))
        return Trajectory(steps, checkpoints)

    def _memory(self) -> list[Tensor]:
        loop = self.owner.loop
        return [*loop.tape.memory(self.count), loop.states[: self.count]]


def try_captured(request: SolveSpec, why: str | None) -> tuple[Tensor, Status, SavedTrajectory] | None:
    """Return (y at the outputs, status, record) by a captured solve, or None if the host loop must solve.

    Then `stats.why` gives the reason. why: a reason that is already known, or None.
    """
    problem, method, stats = request.problem, request.method, request.stats
    why = why or fallback_reason(problem, method)
    points = points_of(problem, method) if why is None else None
    graphs: GraphCache[CapturedRecording] = method.options.cuda_graph
    key = () if why is not None else ("discrete", *key_of(problem, method), points and len(points))
    steps = len(points) - 1 if points is not None else graphs.rooms.get(key)
    most = _most_states(request, graphs, key)
    if why is None and steps is not None and most is not None and steps > most:
        why = f"checkpoints={request.checkpoints!r} gives {most} states, and there were {steps} steps"
    capacity = _first_room(problem) if steps is None else steps if points is not None else _power_of_two(steps)
    capacity = capacity if most is None else min(capacity, most)
    found: CapturedRecording | str = captured_or_why(
        method.options,
        why,
        lambda: (*key, capacity),
        problem,
        lambda: CapturedRecording(problem, method, points, graphs.tier, capacity),
    )
    if isinstance(found, str):
        stats.why = found
        return None
    with found.lock:
        done = solve_captured(found, problem, method, stats, points)
        if done is None:
            return None
        ys, status = done
        count = None if status is Status.PENDING else stats.accepted
        record = SavedTrajectory(found, count)
    stats.checkpoint_slots = most
    if count is not None and count > capacity:
        graphs.rooms[key] = count  # for the next solve
        stats.accepted = stats.rejected = 0  # the host loop solves again
        stats.loop, stats.why = "host", f"it took {count} steps, and there was room to record {capacity}"
        return None
    return ys, status, record


def _most_states(request: SolveSpec, graphs: GraphCache[CapturedRecording], key: Any) -> int | None:
    """Return the number of states that may be kept; None: all.

    The free memory is read once for each kind of solve, because the memory of the first solve reduces it.
    """
    if request.checkpoints != "auto" or not key:
        return request.checkpoints if isinstance(request.checkpoints, int) else None
    if ("auto", key) not in graphs.rooms:
        y0 = request.problem.y0
        graphs.rooms["auto", key] = slots_for(y0.numel() * y0.itemsize, y0.device)
    return graphs.rooms["auto", key]


def _power_of_two(steps: int) -> int:
    """Return the next power of two. It gives room for solves that take a few steps more."""
    return 2 ** (steps - 1).bit_length()


def _first_room(problem: Problem) -> int:
    states = FIRST_BYTES // max(problem.y0.numel() * problem.y0.itemsize, 1)
    return min(max(states, FEWEST_STATES), MOST_STATES)


def why_not_recorded(problem: Problem, method: Method, params: Sequence[Tensor]) -> str | None:
    """Return the reason why the discrete adjoint cannot be captured, or None. Only reasons known before the capture."""
    if problem.y0.dtype in HALF:
        return "half-precision states have float32 cotangents, and the kernels need one dtype"
    if method.tableau is not None and method.tableau.carry_last_stage and not method.tableau.fsal:
        return f"{method.name} reuses its last stage, which is not the field at the end of the step"
    if not can_sum(params, problem.y0.device):
        return "a parameter is on another device than the state, or its dtype or layout is not one of the kernels'"
    return None


def _first_stages(problem: Problem, method: Method) -> tuple[int, bool]:
    """Return the time of the first step's first stage (0: its start, 1: just after it), and whether the first stages of
    later steps are carried over from the step before."""
    options = method.options
    if isinstance(options, AdaptiveOptions):
        start = problem.times[0]
        return int(start in times_option("jump_t", options.jump_t, problem.direction, start)), True
    assert isinstance(options, FixedOptions)
    return int(options.perturb), False
