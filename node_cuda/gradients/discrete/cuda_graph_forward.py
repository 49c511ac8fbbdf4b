"""The forward solve of the discrete adjoint by graphs: the device records its accepted steps and keeps their states.

What it kept lies in the memory of the captured solve. It stays there for the backward pass if no other solve begins
before; else it is copied first, as many rows as were used.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from node_cuda.cuda_graphs.cache import GraphCache, captured_or_why, fallback_reason, key_of
from node_cuda.cuda_graphs.device_loop import OutputLoop
from node_cuda.cuda_graphs.forward import CapturedForward, points_of, solve_captured
from node_cuda.gradients.discrete.checkpoints import Checkpoints, slots_for
from node_cuda.gradients.discrete.trajectory import State, StepRecord, Trajectory
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.fused import Fused, can_sum
from node_cuda.kernels.stage_times import HERE, JUST_AFTER, JUST_BEFORE
from node_cuda.kernels.step_log import StepLog
from node_cuda.loop.request import SolveSpec
from node_cuda.methods.registry import Method
from node_cuda.methods.step import Step
from node_cuda.options import AdaptiveOptions, FixedOptions, times_option
from node_cuda.problem.problem import Problem
from node_cuda.status import Status

FEWEST_STATES, MOST_STATES, FIRST_BYTES = 64, 1024, 2**23
"""Room for states where no solve before told how many steps there are: for as many as fit these bytes, within these
bounds."""


class RecordingLoop(OutputLoop):
    """A solve that records its steps. states: a row a step, and one more, for what is not kept."""

    def __init__(
        self, problem: Problem, method: Method, arithmetic: Fused, points: Sequence[float] | None, tape: StepLog
    ) -> None:
        super().__init__(problem, method, arithmetic, points=points, tape=tape)
        self.tape = tape
        self.states = self.y.new_zeros((tape.capacity + 1, *self.y.shape))

    def put_outputs(self, step: Step, outputs: object) -> None:
        """See `DeviceLoop`; and the state that the step began with."""
        super().put_outputs(step, outputs)
        self.states.index_copy_(0, self.tape.slot, self.y.unsqueeze(0))


class CapturedRecording(CapturedForward):
    """A forward solve that leaves a `SavedTrajectory`. capacity: the steps that it has room for, with their states."""

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
        """See `CapturedForward`."""
        first, carries = _first_stages(problem, method)
        tape = StepLog(arithmetic.module, problem.y0.device, self.capacity, first=first, carries=carries)
        return RecordingLoop(problem, method, arithmetic, points, tape)

    def run(self, problem: Problem, points: Sequence[float] | None) -> Tensor:
        """See `CapturedForward`. What the solve before left is saved first, if somebody still wants it."""
        self.evict()
        return super().run(problem, points)

    def evict(self) -> None:
        """Make the memory free for another record."""
        holder = None if self.holder is None else self.holder()
        self.holder = None
        if holder is not None:
            self.follow()
            holder.save()


class SavedTrajectory:
    """What a solve left for its backward pass. count: its accepted steps; None: nobody looked yet. succeeded: did it
    end well, where nobody looked."""

    def __init__(self, owner: CapturedRecording, count: int | None) -> None:
        self.owner = owner
        self.count = count
        self.succeeded = owner.loop.control.succeeded.clone() if count is None else None
        self._saved: list[Tensor] | None = None
        owner.holder = weakref.ref(self)

    def save(self) -> None:
        """Copy what the solve left."""
        self._saved = [x.clone() for x in self._memory()]

    def load(self) -> None:
        """Put it where the captured solves find it."""
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
        """The same for a backward pass by the host, which then need not be loaded. One host read."""
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
    """The forward solve by graphs, or None where that is the host loop's: then `stats.why` says why."""
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
        stats.accepted = stats.rejected = 0  # it is solved once more
        stats.loop, stats.why = "host", f"it took {count} steps, and there was room to record {capacity}"
        return None
    return ys, status, record


def _most_states(request: SolveSpec, graphs: GraphCache[CapturedRecording], key: Any) -> int | None:
    """How many may be kept; None: all. Memory is asked for once, as there is less when the first solve has its own."""
    if request.checkpoints != "auto" or not key:
        return request.checkpoints if isinstance(request.checkpoints, int) else None
    if ("auto", key) not in graphs.rooms:
        y0 = request.problem.y0
        graphs.rooms["auto", key] = slots_for(y0.numel() * y0.itemsize, y0.device)
    return graphs.rooms["auto", key]


def _power_of_two(steps: int) -> int:
    """The next one: room for solves that take a few steps more."""
    return 2 ** (steps - 1).bit_length()


def _first_room(problem: Problem) -> int:
    states = FIRST_BYTES // max(problem.y0.numel() * problem.y0.itemsize, 1)
    return min(max(states, FEWEST_STATES), MOST_STATES)


def why_not_recorded(problem: Problem, method: Method, params: Sequence[Tensor]) -> str | None:
    """Why the discrete adjoint is the host's, as far as that is known before."""
    if problem.y0.dtype in (torch.float16, torch.bfloat16):
        return "the cotangents of half precision are wider than its states"
    if method.tableau is not None and method.tableau.carry_last_stage and not method.tableau.fsal:
        return f"{method.name} carries a stage on that is not the field at its end"
    if not can_sum(params, problem.y0.device):
        return "a parameter is on another device than the state, or of a kind that the kernels do not have"
    return None


def _first_stages(problem: Problem, method: Method) -> tuple[int, bool]:
    """When the first stage of the first step takes place (1: just beyond its start), and whether the others' are
    carried on from the step before."""
    options = method.options
    if isinstance(options, AdaptiveOptions):
        start = problem.times[0]
        return int(start in times_option("jump_t", options.jump_t, problem.direction, start)), True
    assert isinstance(options, FixedOptions)
    return int(options.perturb), False
