"""How large the next step is: Hairer's starting step, and the step-size control on the host.

A pace proposes where the next step ends and judges the step that was taken: `Adaptive` by its error, `grids.Grid` by a
list that was made before.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from node_cuda._torch_modes import recorded, refuse_batched
from node_cuda.controllers import controller
from node_cuda.kernels import reference as kernels
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.stage_times import HERE
from node_cuda.methods.step import Move, Step
from node_cuda.options import AdaptiveOptions, times_option
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import InvalidInput, SolveError, Status


class Pace(Protocol):
    """Where steps end, and whether they are good. starts_at_jump: the field is discontinuous where the solve
    begins. judges: steps may be rejected."""

    starts_at_jump: bool
    judges: bool

    def start(self, t: float, y: Tensor, k1: Tensor | None) -> None:
        """Called once, before the first step."""
        ...

    def propose(self, t: float, y: Tensor) -> Move | None:
        """The next step from (t, y); None: there is none."""
        ...

    def judge(self, step: Step) -> bool:
        """Is the step good? Also sets `step.jump`."""
        ...

    def fresh(self) -> None:
        """An output was reached: begin to count attempts anew."""
        ...


class Extra(Protocol):
    """Further errors that take part in the norm, such as those of the parameters' gradients."""

    def scaled_errors(self) -> Sequence[Tensor]:
        """Already scaled, for the step that was just taken."""
        ...

    def device_ratio(self) -> Tensor | None:
        """The largest of their rms, as a double where the state is; None: none takes part."""
        ...


def wrong_at_start(norm: ErrorNorm, y: Tensor, f0: Tensor) -> str:
    """What is not finite where a scaled norm of y0 or of func(t0, y0) is not; raises InvalidInput if neither is."""
    for name, x in (("y0", y), ("func(t0, y0)", f0)):
        if not bool(torch.isfinite(x).all()):
            return f"{name} holds NaN or infinity."
    raise InvalidInput(
        f"y0 and func(t0, y0) are finite, but not in units of atol + rtol * |y0|, in {y.dtype}: got "
        f"rtol = {norm.rtol} and atol = {norm.atol}. Raise atol, or use a wider dtype."
    )


class Adaptive:
    """Steps by the error estimate, cut to land on step_t, jump_t and `stops`.

    attempts counts since `fresh` was last called, against max_num_steps. A step that was cut to land on a stop does
    not make the next one small: the proposal from before the cut is kept.
    """

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        order: int,
        options: AdaptiveOptions,
        stats: Stats,
        stops: Sequence[float] = (),
        extra: Extra | None = None,
    ) -> None:
        self.problem = problem
        self.arithmetic = arithmetic
        self.order = order
        self.options = options
        self.stats = stats
        self.extra = extra
        self.law = controller(options.controller).law(order, options)
        start, direction = problem.times[0], problem.direction
        step_t = times_option("step_t", options.step_t, direction, start)
        jump_t = times_option("jump_t", options.jump_t, direction, start)
        self.starts_at_jump = start in jump_t
        self.judges = True
        last = [problem.times[-1]] if problem.bounds is not None and problem.times[-1] not in step_t + jump_t else []
        self._landings = collections.deque(sorted(step_t + jump_t + last))
        if len(set(self._landings)) < len(self._landings):
            raise ValueError(
                "`step_t` and `jump_t` must not have any repeated elements between them; got "
                f"step_t = {step_t} and jump_t = {jump_t}. A jump_t is a step_t already: drop it there."
            )
        self._jumps = frozenset(jump_t)
        self._stops = collections.deque(stops)
        self.attempts = 0
        self.h = 0.0
        self._history = (1.0, 1.0)
        self._carried = 0.0
        self._finite = True
        # Only the first step moves with t[0]; the ends of later ones are the solver's choice, and stay.
        self._taped = recorded(problem.t)

    def fresh(self) -> None:
        """Begin to count attempts anew."""
        self.attempts = 0

    def start(self, t: float, y: Tensor, k1: Tensor | None) -> None:
        """The first step size: the user's, or by Hairer's rule at the cost of one evaluation."""
        assert k1 is not None
        self._refuse_empty(y)
        refuse_batched(y, k1)
        h = self.options.first_step
        self.h = float(h) if h is not None else self._starting_step(t, y, k1)
        self.h = min(max(self.h, self.law.min_step), self.law.max_step)

    def propose(self, t: float, y: Tensor) -> Move | None:
        """The end of the next step."""
        self._notify("callback_step", t, y, self.h)
        if not t + self.h > t:
            self._fail(Status.STEP_UNDERFLOW if self._finite else Status.NON_FINITE, t, f"The step was {self.h:.3g}.")
        if self.attempts >= self.options.max_num_steps:
            self._fail(Status.MAX_STEPS, t, f"max_num_steps = {self.options.max_num_steps}, the step {self.h:.3g}.")
        self.attempts += 1
        return self._move(t, *self._cut(t, t + self.h, self.h))

    def judge(self, step: Step) -> bool:
        """Accept or reject, and choose the next step size. One host read."""
        assert step.error is not None
        h = step.at.h
        also = self.extra.scaled_errors() if self.extra is not None else ()
        ratio = self.arithmetic.error_ratio(step.at, step.error, step.last, step.y0, step.y1, also)
        self.stats.host_reads += 1
        accept, self.h, self._history = kernels.step_control(self.law, h, ratio, self._history)
        self._finite = math.isfinite(ratio)
        if accept:
            if not self._finite:
                self._fail(Status.NON_FINITE, step.t0, f"The step was min_step = {h:.3g}.")
            self._notify("callback_accept_step", step.t0, step.y0, h)
            self.h = max(self.h, self._carried)
            step.jump = step.t1 in self._jumps
            self.stats.accepted += 1
        else:
            self._notify("callback_reject_step", step.t0, step.y0, h)
            self.stats.rejected += 1
        return accept

    def _move(self, t: float, t1: float, h: float) -> Move:
        """The step from t, with its ends where the tape must see them."""
        if not (self._taped and t == self.problem.times[0]):
            return Move(t1, h)
        start = self.problem.t[0]
        return Move(t1, h, (start, torch.tensor(self.problem.direction * t1, dtype=start.dtype, device=start.device)))

    def _cut(self, t: float, t1: float, h: float) -> tuple[float, float]:
        """The end and size of the step, moved to land on the next time that a step must end at."""
        self._carried = 0.0
        while self._landings and self._landings[0] <= t:
            self._landings.popleft()
        # A landing that the step misses by rounding would leave a sliver for the next one.
        landed = bool(self._landings) and self._landings[0] <= t1 + 4 * math.ulp(t1)
        if landed:
            t1 = self._landings[0]
            h = min(t1 - t, h)  # rounding may make the difference larger than max_step
        while self._stops and self._stops[0] <= t:
            self._stops.popleft()
        if self._stops and (t1 >= self._stops[0] or (not landed and t + 2 * h > self._stops[0])):
            # Two steps would pass the stop: land on it, in one step, or in two even ones and no sliver.
            stop, self._carried = self._stops[0], h
            t1 = stop if t1 >= stop else t + 0.5 * (stop - t)
            h = min(t1 - t, h)
        return t1, h

    def _refuse_empty(self, y: Tensor) -> None:
        if y.numel() == 0:
            raise InvalidInput(
                f"y0 has no elements, so it has no error to choose steps by; got shape {tuple(y.shape)}. Skip "
                'the solve for an empty batch, or take a fixed grid: method="rk4".'
            )

    def _starting_step(self, t: float, y: Tensor, f0: Tensor) -> float:
        """Hairer, Norsett, Wanner, Solving ODEs I, II.4, with torchdiffeq's constants. One evaluation, three reads."""
        problem = self.problem
        d0, d1 = kernels.initial_norms(y.detach(), f0.detach(), problem.norm)
        self.stats.host_reads += 2
        if not (math.isfinite(d0) and math.isfinite(d1)):
            self._explain(t, y, f0)
        h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        if problem.bounds is not None:
            h0 = min(h0, problem.times[-1] - t)
        f1 = self._probe(t, t + h0, h0, y, f0)
        d2 = kernels.initial_change(y.detach(), f0.detach(), f1, problem.norm) / h0
        self.stats.host_reads += 1
        h1 = max(1e-6, h0 * 1e-3) if d1 <= 1e-15 and d2 <= 1e-15 else (0.01 / max(d1, d2)) ** (1.0 / self.order)
        return min(100 * h0, h1) if math.isfinite(h1) else h0

    def _probe(self, t0: float, t1: float, h: float, y: Tensor, f0: Tensor) -> Tensor:
        """The field after an Euler step, without its graph. func sees a state like those of the steps."""
        arithmetic = self.arithmetic
        at = arithmetic.interval(t0, t1, h)
        (t,) = arithmetic.slots(at, (1.0,), HERE)
        z = arithmetic.rk_stage(arithmetic.stage(((0, 1.0),), 1.0, HERE), at, y, [f0], t)
        return arithmetic.own(self.problem.field(t, z).detach())

    def _explain(self, t: float, y: Tensor, f0: Tensor) -> None:
        """Raise what is wrong at the start, where a scaled norm is not finite."""
        self._fail(Status.NON_FINITE, t, wrong_at_start(self.problem.norm, y, f0))

    def _notify(self, name: str, t: float, y: Tensor, h: float) -> None:
        if self.problem.callbacks:
            self.problem.callback(name, t, y, h, self.options.dtype)

    def _fail(self, status: Status, t: float, detail: str) -> None:
        self.stats.nfe = self.problem.field.nfe
        raise SolveError(status, self.problem.direction * t, self.stats, detail)
