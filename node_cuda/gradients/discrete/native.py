"""The compiled discrete adjoint: the record of a compiled solve, and the reverse loop over it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from node_cuda.gradients.discrete.checkpoints import Checkpoints, slots_for
from node_cuda.loop.outputs import grid_status
from node_cuda.loop.request import SolveSpec
from node_cuda.methods.registry import Method
from node_cuda.native.build import traced
from node_cuda.native.cache import NativeCache, Seen, Then, key_of, refused, why_eager
from node_cuda.native.forward import Begun, CompiledForward, Segment, account, begin, compiled_or_why, name_of, solve
from node_cuda.native.loop import Scheme, extra_evaluations
from node_cuda.native.numbers import point_of
from node_cuda.native.reverse import ReverseLoop, Shape
from node_cuda.native.tracing import Refused, TracedField
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import Status

MOST_STEPS = 64
"""The most steps that one call records."""

BYTES = 2**25
"""The most memory that the record of one call takes, if it has more than one step."""

FEWEST = 4
"""With room for fewer states than these the host takes the steps, which can use one state at a time."""


class Start(NamedTuple):
    """The state at the beginning of a call: y and its first stage."""

    y: Tensor
    k1: Tensor


class Record:
    """What a compiled solve leaves for its backward pass.

    most: the number of states that may be kept; None: all. If there are more, only states at the beginning of calls are
    kept, and the backward pass makes the calls again.
    """

    def __init__(self, made: CompiledForward, begun: Begun, seen: Seen, method: Method, most: int | None) -> None:
        self.made, self.begun, self.seen, self.method, self.most = made, begun, seen, method, most
        self.then = Then(seen)
        self.segments: list[Segment] = []
        self.starts: Checkpoints[Start] | None = None
        self.peak = 0

    def add(self, segment: Segment) -> None:
        """Take the steps of one call."""
        room, segments = self.made.room.steps, self.segments
        segments.append(segment)
        if self.starts is None:
            if self.most is None or (len(segments) + 1) * room <= self.most:  # the next call needs room, too
                self.peak = sum(s.steps for s in segments)
                return
            self._drop_tapes(max((self.most - room) // 2, 1))
        else:
            self.starts.offer(len(segments) - 1, Start(segment.y, segment.k1))
            segments[-1] = self._bare(segment)
        assert self.starts is not None
        self.peak = max(self.peak, room + 2 * self.starts.peak)

    def _drop_tapes(self, slots: int) -> None:
        self.starts = Checkpoints(slots)
        for i, segment in enumerate(self.segments):
            self.starts.offer(i, Start(segment.y, segment.k1))
        self.segments = list(map(self._bare, self.segments))

    def _bare(self, segment: Segment) -> Segment:
        nothing = self.begun.y0[:0]
        return segment._replace(tape=None, y=nothing, k1=nothing, end=nothing)


def room_for(problem: Problem, most: int | None) -> int:
    """Return how many steps a call records."""
    fitting = BYTES // max(problem.y0.numel() * problem.y0.element_size(), 1)
    steps = max(1, min(MOST_STEPS, fitting))
    return steps if most is None else min(steps, max(most // 2, 1))


def try_native(request: SolveSpec, why: str | None) -> tuple[Tensor, Status, Record] | None:
    """Return (y at the outputs, status, record) by a compiled solve, or None if the host loop must solve.

    Then `stats.why` gives the reason. why: a reason that is already known, or None.
    """
    problem, method, stats = request.problem, request.method, request.stats
    most = request.checkpoints
    if isinstance(most, str):
        state = problem.y0.numel() * problem.y0.itemsize
        most = slots_for(state, problem.y0.device)
    if why is None and most is not None and most < FEWEST:
        why = f"checkpoints={most} leaves no room to record the steps of a call"
    why = why or why_eager(problem, method)
    begun = begin(problem, method) if why is None else None
    steps = room_for(problem, most)
    found = compiled_or_why(problem, method, begun, why, steps)
    if isinstance(found, str) or begun is None:
        stats.why = str(found)
        return None
    made, seen = found
    account(made, stats)
    record = Record(made, begun, seen, method, most)
    done = solve(made, problem, method, stats, seen, begun, record.add)
    stats.checkpoint_slots = most
    status = done.status
    if status is Status.SUCCESS and not made.scheme.adaptive:
        status = grid_status(done.ys, stats)
    return done.ys, status, record


class CompiledReverse:
    """The compiled reverse loop of one kind of solve."""

    def __init__(self, problem: Problem, method: Method, scheme: Scheme, seen: Seen, shape: Shape) -> None:
        start = time.perf_counter()
        field = TracedField(problem, seen.tensors)
        field.probe()
        run = ReverseLoop(scheme, shape, field)
        y = torch.zeros(problem.y0.shape, dtype=problem.y0.dtype)
        numbers = torch.zeros(shape.form.length, dtype=torch.float64)
        count = torch.zeros((), dtype=torch.int64)
        tape = [y.new_zeros(shape.steps, *y.shape), numbers.new_zeros(shape.steps, 5)]
        tape += [tape[0].clone()] if scheme.keeps_k1 else []
        g = y.new_zeros(shape.form.times, *y.shape)
        tensors = [torch.zeros_like(x) for x in seen.bare()]
        examples = [numbers, count, g, y, y.clone(), y.clone(), *tape, *tensors]
        what = f'gradient="discrete" by {method.name} of {name_of(problem.func)}'
        self.call = traced(run, examples, len(tensors), what)
        self.seconds = time.perf_counter() - start
        self.told = False


def gradients(
    record: Record, problem: Problem, grad_ys: Tensor, params: Sequence[Tensor], wanted: Sequence[Tensor], stats: Stats
) -> tuple[Tensor, list[Tensor]]:
    """Return dL/dy0 without the first output's, and dL/dtheta. wanted: the parameters as func knows them.

    Raises InvalidField if func has changed since the forward pass.
    """
    made, begun, scheme = record.made, record.begun, record.made.scheme
    places = {id(x): i for i, x in enumerate(record.seen.tensors)}
    known = [places.get(id(x)) for x in wanted]
    shape = Shape(begun.form, made.room.steps, tuple(sorted({i for i in known if i is not None})))
    cache = record.method.options.compile
    assert isinstance(cache, NativeCache)
    found = cache.get(
        key_of(problem, record.method, "discrete", shape),
        problem.func,
        lambda seen: CompiledReverse(problem, record.method, scheme, seen, shape),
    )
    if isinstance(found, str):
        raise Refused(refused(record.method, found))
    reverse_, seen = found
    record.then.refuse_changes(seen, 'gradient="discrete"')
    account(reverse_, stats)
    tensors = seen.bare()
    for i, x in zip(known, params, strict=True):
        if i is not None:
            tensors[i] = x.detach()
    lam, kappa = torch.zeros_like(begun.y0), torch.zeros_like(begun.y0)
    sums = [torch.zeros_like(tensors[i]) for i in shape.wanted]
    g = grad_ys.to(begun.y0.dtype).contiguous()

    def back(segment: Segment) -> None:
        nonlocal lam, kappa, sums
        given = [begun.inputs(segment.point)[0], torch.tensor(segment.steps), g, segment.end, lam, kappa]
        lam, kappa, *more = reverse_.call([*given, *(segment.tape or ()), *tensors])
        sums = [a + b for a, b in zip(sums, more, strict=True)]
        stats.host_reads += 1

    def again(i: int, start: Start) -> tuple[Segment, Start]:
        """Make call i again. Return its steps, and the state at its end."""
        segment = record.segments[i]
        given = begun.inputs(segment.point, start.y, start.k1, float(segment.attempts))
        point, y, k1, _, *tape = made.call([*given, *tensors])
        stats.nfe_backward += point_of(point.tolist()).nfe - segment.point.nfe
        return segment._replace(tape=tape, end=y), Start(y, k1)

    def advance(i: int, start: Start) -> Start:
        stats.recomputed_steps += record.segments[i].steps
        return again(i, start)[1]

    if record.starts is None:
        for segment in reversed(record.segments):
            back(segment)
    else:
        if record.starts.spent:  # a second backward pass
            starts: Checkpoints[Start] = Checkpoints(record.starts.slots)
            start = Start(begun.y0, begun.y0)
            for i in range(len(record.segments)):
                starts.offer(i, start)
                start = advance(i, start)
            record.starts = starts
        record.starts.reverse(advance, lambda i, start: back(again(i, start)[0]))
        record.peak = max(record.peak, made.room.steps + 2 * record.starts.peak)
    stats.peak_checkpoints = max(stats.peak_checkpoints, record.peak)
    steps = sum(s.steps for s in record.segments)
    cost = scheme.tableau.stages - (scheme.tableau.fsal and scheme.extra is None) - scheme.keeps_k1
    stats.nfe_backward += steps * (cost + extra_evaluations(scheme)) + len(record.segments)
    stats.graph_of, stats.loop_backward = "step", "native"
    by_place = dict(zip(shape.wanted, sums, strict=True))
    return lam, [torch.zeros_like(x) if i is None else by_place[i] for i, x in zip(known, params, strict=True)]
