"""A compiled forward solve: what the host does between the calls of the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from node_cuda._user_code import in_step, tell_step
from node_cuda.controllers import Controller, controller
from node_cuda.cuda_graphs.parts import Unseen, parts
from node_cuda.kernels.stage_times import Clock
from node_cuda.loop.grids import grid_of
from node_cuda.loop.outputs import grid_status
from node_cuda.loop.step_control import look_at_length, next_look, tstops_of, wrong_at_start
from node_cuda.methods.registry import Method
from node_cuda.native.build import Native, traced
from node_cuda.native.cache import NativeCache, Seen, Then, key_of, refused, why_eager
from node_cuda.native.loop import ForwardLoop, Room, scheme_of
from node_cuda.native.numbers import CAP, Form, Point, Settings, point_of, settings_of_law
from node_cuda.native.tracing import TracedField
from node_cuda.options import AdaptiveOptions, FixedOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import SolveError, Status

BYTES = 2**26
"""The memory that the record of steps with outputs may take in one call."""

SECONDS = 0.2
"""How long one call should take at most, so that Ctrl-C is answered."""


class CompiledForward:
    """The compiled forward loop of one kind of solve. steps: how many steps a call records for a backward pass."""

    def __init__(self, problem: Problem, method: Method, seen: Seen, begun: Begun, steps: int) -> None:
        start = time.perf_counter()
        self.scheme = scheme_of(method)
        field = TracedField(problem, seen.tensors)  # it is not kept: func would exist as long as its compiled code
        state = problem.y0.numel() * problem.y0.element_size()
        rows = BYTES // max(state * (2 + len(self.scheme.rows)), 1)
        self.room = Room(min(max(rows, 1), begun.form.times - 1), steps)
        field.probe()
        begin = time.perf_counter()
        field.probe()
        self.attempt_seconds = (time.perf_counter() - begin) / 2 * self.scheme.tableau.stages
        shown = tuple(isinstance(tol, Tensor) for tol in (problem.norm.rtol, problem.norm.atol))
        sizes = problem.norm.sizes
        run = ForwardLoop(self.scheme, order_of(method), sizes, self.room, field, begun.form, shown)  # pyright: ignore
        examples = [torch.zeros_like(x) for x in (*begun.inputs(begun.point), *seen.bare())]
        what = f"the solve by {method.name} of {name_of(problem.func)}"
        self.call: Native = traced(run, examples, len(seen.tensors), what)
        self.seconds = time.perf_counter() - start
        self.told = False


def order_of(method: Method) -> int:
    """Return the order of an explicit Runge-Kutta method."""
    assert method.tableau is not None
    return method.tableau.order


def name_of(func: Any) -> str:
    """Return a name of func for messages."""
    return type(func).__name__ if isinstance(func, nn.Module) else getattr(func, "__qualname__", type(func).__name__)


class Begun(NamedTuple):
    """What the host prepares for the calls of a solve. times: the numbers of the form, one kind after the other."""

    form: Form
    point: Point
    settings: Settings
    times: list[float]
    y0: Tensor
    tolerances: list[Tensor]

    def inputs(self, point: Point, y: Tensor | None = None, k1: Tensor | None = None, cap: float = 0.0) -> list[Tensor]:
        """Return the inputs of a call, before func's tensors."""
        numbers = [*point, *self.settings, *self.times]
        numbers[CAP] = cap
        y = self.y0 if y is None else y
        return [
            torch.tensor(numbers, dtype=torch.float64, device="cpu"),
            y,
            y if k1 is None else k1,
            *self.tolerances,
        ]


def begin(problem: Problem, method: Method) -> Begun:
    """Return the inputs of the first call."""
    options, norm, y0 = method.options, problem.norm, problem.y0.detach().contiguous()
    rtol, atol = norm.rtol, norm.atol
    real, start = problem.time_dtype, problem.times[0]
    t_k1, proposal, fresh = start, 0.0, 0
    of_method: dict[str, float] = {}
    tstops: list[float] = []
    jumps: list[float] = []
    grid: list[float] = []
    if isinstance(options, AdaptiveOptions):
        chosen = controller(options.controller)
        assert isinstance(chosen, Controller)
        law = chosen.law(order_of(method), options)
        of_method = {**settings_of_law(law), "max_num_steps": float(options.max_num_steps)}
        if options.step_t is not None or options.jump_t is not None or problem.bounds is not None:
            tstops, jumps, at_jump = tstops_of(problem, options)
            if at_jump:
                t_k1 = Clock(1.0, real, y0.device).after(start)
        first, fresh = options.first_step, 2
        if first is not None:
            proposal, fresh = min(max(float(first), law.min_step), law.max_step), 1
    else:
        assert isinstance(options, FixedOptions)
        points, _ = grid_of(problem, options)
        grid = padded(points, room_of(points))
    if problem.bounds is not None:
        of_method.update(low=problem.bounds[0], high=problem.bounds[1], limit=problem.times[-1])
    settings = Settings(
        problem.direction,
        0.0 if isinstance(rtol, Tensor) else rtol,
        0.0 if isinstance(atol, Tensor) else atol,
        **of_method,
    )
    point = Point(start, proposal, t_k1=t_k1, fresh=fresh)
    tolerances = [tol.to(real).expand(y0.shape).contiguous() for tol in (rtol, atol) if isinstance(tol, Tensor)]
    form = Form(len(problem.times), len(tstops), len(jumps), len(grid))
    return Begun(form, point, settings, [*problem.times, *tstops, *jumps, *grid], y0, tolerances)


def room_of(points: Sequence[float]) -> int:
    """Return the length to which a grid is padded: a power of two, so that similar grids need the same code."""
    return 1 << (len(points) - 1).bit_length()


def padded(points: Sequence[float], room: int) -> list[float]:
    """Return a grid with its last point repeated. The loop ends before the repeated points."""
    return [*points, *[points[-1]] * (room - len(points))]


class Segment(NamedTuple):
    """The steps of one call. point, y, k1: where it began. attempts: how many it tried. steps: how many it took.

    tape: their y0, times (see `loop.ForwardLoop`), and their k1 if it is kept; None if it was dropped. end: the state
    after the last of them.
    """

    point: Point
    y: Tensor
    k1: Tensor
    attempts: int
    steps: int
    tape: list[Tensor] | None
    end: Tensor


class Result(NamedTuple):
    """A solve that has ended: y at the outputs, NaN where they were not reached."""

    ys: Tensor
    status: Status


def solve(
    made: CompiledForward,
    problem: Problem,
    method: Method,
    stats: Stats,
    seen: Seen,
    begun: Begun,
    record: Callable[[Segment], None] | None = None,
) -> Result:
    """Run the loop to the end of the solve, in one call or more. Raises SolveError.

    record: called with the steps of each call.
    """
    options, count, p = method.options, len(problem.times), begun.point
    tensors, ys = seen.bare(), None
    y = k1 = begun.y0
    cap = float(max(int(SECONDS / max(made.attempt_seconds, 1e-7)), 1))
    while True:
        looked_at = next_look(p.accepted + p.rejected)
        allowed = min(cap, looked_at - p.accepted - p.rejected)
        before = p, y, k1
        try:
            point, y, k1, outputs, *tape = made.call([*begun.inputs(p, y, k1, allowed), *tensors])
        except KeyboardInterrupt as error:
            sign = problem.direction
            tell_step(error, in_step(sign * p.t, sign * p.proposal, p.accepted, p.rejected))
            raise
        p = point_of(point.tolist())
        stats.host_reads += 1
        if record is not None and p.steps:
            record(Segment(*before, p.calls, p.steps, tape, y))
        first = before[0].output
        if ys is None:
            ys = outputs
        else:
            ys[first : p.output] = outputs[first : p.output]
        if p.status or p.output >= count:
            break
        if p.accepted + p.rejected == looked_at and made.scheme.adaptive:
            chance = look_at_length(problem, p.t, y, p.proposal, p.accepted + p.rejected, p.rejected, False)
            if chance is not None:
                p = p._replace(status=Status.BY_CHANCE.value)
                break
    stats.nfe, stats.accepted, stats.rejected = p.nfe, p.accepted, p.rejected
    stats.loop = "native"
    status = Status(p.status)
    if status is not Status.SUCCESS:
        ys[p.output :] = torch.nan
        failure = failure_of(problem, method, stats, p, y, k1)
        stats.reached = problem.direction * p.t, y
        if options.raises:
            raise failure
    return Result(ys, status)


def failure_of(problem: Problem, method: Method, stats: Stats, p: Point, y: Tensor, k1: Tensor) -> SolveError:
    """Return the error of a solve that ended at this point."""
    status, detail = Status(p.status), f"The step was {p.proposal:.3g}."
    assert isinstance(method.options, AdaptiveOptions)
    if status is Status.NON_FINITE and p.nfe == 1:
        detail = wrong_at_start(problem.norm, y, k1)
    elif status is Status.NON_FINITE and p.t + p.proposal > p.t:
        detail = f"The step was min_step = {p.proposal:.3g}."
    elif status is Status.MAX_STEPS:
        detail = f"max_num_steps = {method.options.max_num_steps}, the step {p.proposal:.3g}."
    return SolveError(status, problem.direction * p.t, stats, detail)


def compiled_or_why(
    problem: Problem, method: Method, begun: Begun | None, why: str | None, steps: int = 0
) -> tuple[CompiledForward, Seen] | str:
    """Return the compiled loop for this solve, compiled now if necessary, or the reason why there is none."""
    cache = method.options.compile
    assert isinstance(cache, NativeCache)
    if why is not None or begun is None:
        return refused(method, why or "")
    found = cache.get(
        key_of(problem, method, "forward", steps, begun.form),
        problem.func,
        lambda seen: CompiledForward(problem, method, seen, begun, steps),
    )
    return refused(method, found) if isinstance(found, str) else found


def account(made: Any, stats: Stats) -> None:
    """Count the seconds of compilation in the solve that caused it."""
    if not made.told:
        made.told = True
        stats.compile_seconds += made.seconds


class Noted(Protocol):
    """Keeps what func reached in a solve."""

    seen: Any


def try_native(
    problem: Problem, method: Method, stats: Stats, why: str | None = None, noted: Noted | None = None
) -> tuple[Tensor, Status] | None:
    """Return (y at the problem's times, status) by a compiled solve, or None if the host loop must solve.

    Then `stats.why` gives the reason. why: a reason that is already known, or None. Raises SolveError.
    """
    why = why or why_eager(problem, method) or _gradient_obstacle(problem)
    begun = begin(problem, method) if why is None else None
    found = compiled_or_why(problem, method, begun, why)
    if isinstance(found, str) or begun is None:
        stats.why = str(found)
        return None
    made, seen = found
    if noted is not None:
        noted.seen = Then(seen)
    account(made, stats)
    with torch.no_grad():
        result = solve(made, problem, method, stats, seen, begun)
    status = result.status
    if status is Status.SUCCESS and not made.scheme.adaptive:
        status = grid_status(result.ys, stats)
    return result.ys, status


def _gradient_obstacle(problem: Problem) -> str | None:
    if not torch.is_grad_enabled():
        return None
    func, records = problem.func, problem.y0.requires_grad or problem.t.requires_grad
    if not records and isinstance(func, nn.Module):
        records = any(p.requires_grad for p in func.parameters())
    try:
        records = records or any(x.requires_grad for x in parts(func)[1].values())
    except Unseen as why:
        return str(why)
    if records:
        return 'autograd records the steps; gradient="adjoint" and "discrete" compile them, and so does torch.no_grad()'
    return None
