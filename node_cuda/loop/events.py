"""Events: the first time at which a function of (t, y) changes its sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from node_cuda._torch_modes import batched
from node_cuda.loop.host_loop import HostLoop
from node_cuda.methods.interpolation import Interpolant, position
from node_cuda.methods.step import Step
from node_cuda.status import SolveError, Status, UnsupportedTransform


def solve_event(
    loop: HostLoop,
    interpolant: Interpolant,
    event_fn: Callable[[Tensor, Tensor], Tensor],
    max_steps: int | None,
    search: Interpolant,
    checks: int,
) -> tuple[float, Tensor]:
    """Return the user's time and the state at which event_fn, a function of (t, flat state), first changes its sign.

    The sign is checked at the end of every step, and at `checks` points inside it. The interpolant `search`, which
    evaluates nothing, gives the state at these points. The event is then bisected on `interpolant`, to within atol of
    time. Raises SolveError(NO_EVENT) after max_steps steps.
    """
    problem = loop.problem

    def sign(s: float, y: Tensor) -> float:
        t = torch.tensor(problem.direction * s, dtype=problem.time_dtype, device=y.device)
        loop.stats.host_reads += 1
        with torch.no_grad():
            value = event_fn(t, y)
        if batched(value):
            raise UnsupportedTransform(
                "torch.func.vmap cannot go over an event, whose time is one number. Solve each sample by itself."
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
                # Inside a step the crossing may exist on `search` only.
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
