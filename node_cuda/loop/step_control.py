"""Step selection for adaptive methods on the host: Hairer's starting step, and the calls of the step-size control.

A step selector proposes the end of the next step, and judges the step that was taken. `AdaptiveSteps` uses the error of
the step; `grids.GridSteps` uses a list of points made in advance.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from node_cuda._torch_modes import recorded, refuse_batched
from node_cuda.controllers import Controller, OnHost, controller, runs_on_host
from node_cuda.kernels.arithmetic import Arithmetic, ErrorTerm
from node_cuda.kernels.control import DeviceStepControl
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.stage_times import HERE
from node_cuda.kernels.step_control import ControllerSnapshot, ControlSpec, StepControl
from node_cuda.kernels.step_log import StepLog
from node_cuda.methods.step import ProposedStep, Step
from node_cuda.options import AdaptiveOptions, times_option
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import InvalidInput, SolveError, Status

LONG = 10_000
"""Number of attempts after which a solve is logged, once, because it may not end."""

EARLY = 1_000
"""Number of attempts after which a solve is looked at for the first time."""

ROUNDING = 100.0
"""In eps of the largest element: two answers of one field may differ so much, as sums on a GPU may."""

_log = logging.getLogger("node_cuda")


class StepSelector(Protocol):
    """Chooses where steps end, and accepts or rejects them.

    starts_at_jump: the field is discontinuous at the start of the solve. judges: the selector may reject steps. ratio:
    the error of the step judged last, in units of the tolerances; NaN if it has no estimate.
    """

    starts_at_jump: bool
    judges: bool

    @property
    def ratio(self) -> float: ...

    def start(self, t: float, y: Tensor, k1: Tensor | None) -> None:
        """Start the solve. Called once, before the first step."""
        ...

    def propose(self, t: float, y: Tensor) -> ProposedStep | None:
        """Return the next step from (t, y), or None if the solve has ended."""
        ...

    def judge(self, step: Step) -> bool:
        """Return whether the step is accepted, and set `step.jump`."""
        ...


def wrong_at_start(norm: ErrorNorm, y: Tensor, f0: Tensor) -> str:
    """Return which of y0 and func(t0, y0) is not finite, after a scaled norm of them was not finite.

    Raises InvalidInput if both are finite.
    """
    for name, x in (("y0", y), ("func(t0, y0)", f0)):
        if not bool(torch.isfinite(x).all()):
            return f"{name} holds NaN or infinity."
    raise InvalidInput(
        f"y0 and func(t0, y0) are finite, but not in units of atol + rtol * |y0|, in {y.dtype}: got "
        f"rtol = {norm.rtol} and atol = {norm.atol}. Raise atol, or use a wider dtype."
    )


def next_look(tried: int) -> float:
    """Return the number of attempts at which a solve is looked at next, by `look_at_length`."""
    return next((n for n in (EARLY, LONG) if tried < n), math.inf)


def look_at_length(
    problem: Problem, t: float, y: Tensor, h: float, tried: int, rejected: int, endless: bool
) -> str | None:
    """Look at a solve of EARLY or of LONG attempts. Return how its field answers by chance, or None.

    At LONG attempts it logs where the solve stands. It evaluates the field twice, at EARLY attempts only where so many
    have come so near that LONG will not be enough.
    """
    first, last = problem.times[0], problem.times[-1]
    if tried < LONG and (endless or t - first > (last - first) * EARLY / LONG):
        return None
    if tried == LONG:
        _log_length(problem, t, h, rejected, endless)
    at = torch.tensor(problem.direction * t, dtype=problem.time_dtype, device=y.device)
    one, other = (problem.field(at, y).detach() for _ in range(2))
    if torch.equal(one, other):
        return None
    change, size = float((other - one).abs().max()), float(one.abs().max())
    if change > ROUNDING * torch.finfo(one.dtype).eps * size:
        return f"dy/dt changed by {change:.3g}, of {size:.3g}."
    return None


def _log_length(problem: Problem, t: float, h: float, rejected: int, endless: bool) -> None:
    _log.warning(
        "A solve has tried %d steps, and goes on: t = %.6g of %s, h = %.3g, %.0f%% of the steps rejected. If it "
        'does not end: loosen rtol and atol; for a stiff field use method="rodas5p"; '
        "name the times where func jumps as options=dict(jump_t=...); or set "
        "options=dict(max_num_steps=...) as a limit.",
        LONG,
        problem.direction * t,
        "an event" if endless else f"{problem.direction * problem.times[-1]:.6g}",
        h,
        100 * rejected / LONG,
    )


class TimesToStopAt(NamedTuple):
    """The times that a step must end at, those of them where func is discontinuous, and whether the start is one."""

    times: list[float]
    jumps: list[float]
    starts_at_jump: bool


def tstops_of(problem: Problem, options: AdaptiveOptions) -> TimesToStopAt:
    """Return what step_t, jump_t and clip say about the ends of steps. Raises ValueError for a time given twice."""
    start, direction = problem.times[0], problem.direction
    step_t = times_option("step_t", options.step_t, direction, start)
    jump_t = times_option("jump_t", options.jump_t, direction, start)
    last = [problem.times[-1]] if problem.bounds is not None and problem.times[-1] not in step_t + jump_t else []
    tstops = sorted(step_t + jump_t + last)
    if len(set(tstops)) < len(tstops):
        raise ValueError(
            "`step_t` and `jump_t` must not have any repeated elements between them; got "
            f"step_t = {step_t} and jump_t = {jump_t}. Each jump_t is also a step_t: drop it from step_t."
        )
    return TimesToStopAt(tstops, jump_t, start in jump_t)


class AdaptiveSteps:
    """Steps chosen by the error estimate, and shortened to end at step_t, jump_t and `stops`.

    The step-size control of the arithmetic decides (`kernels.step_control`, on CUDA `kernels.control`). This class adds
    what a solve on the host needs: callbacks, statistics and exceptions. errors: the errors of integrals that are
    computed with the state. endless: the solve does not end at the last of the problem's times. pauses: the device
    waits at each of the other times. tape: the device records the accepted steps there.
    """

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        order: int,
        options: AdaptiveOptions,
        stats: Stats,
        stops: Sequence[float] = (),
        errors: ErrorTerm | None = None,
        *,
        endless: bool = False,
        pauses: bool = False,
        tape: StepLog | None = None,
    ) -> None:
        self.problem = problem
        self.arithmetic = arithmetic
        self.options = options
        self.stats = stats
        self.errors = errors
        self.endless = endless
        chosen = controller(options.controller)
        law = (chosen if isinstance(chosen, Controller) else Controller()).law(order, options)
        stops_at = tstops_of(problem, options)
        self.starts_at_jump, self.judges = stops_at.starts_at_jump, True
        self.spec = ControlSpec(
            law,
            order,
            options.max_num_steps,
            stops_at.times,
            frozenset(stops_at.jumps),
            stops,
            ends=not endless,
            limit=math.inf if problem.bounds is None else problem.times[-1],
            rule=OnHost(chosen, order, options) if runs_on_host(chosen) else None,
        )
        self.control = arithmetic.control(self.spec, pauses=pauses, tape=tape)
        # For autograd only the start of the first step depends on t[0]; the solver chose the later points, which are
        # constants.
        self._taped = recorded(problem.t)
        self._unsolved = False  # the equations of the last step

    def start(self, t: float, y: Tensor, k1: Tensor | None) -> None:
        """Choose the first step size: the user's, or by Hairer's rule, which costs one evaluation."""
        assert k1 is not None
        self._refuse_empty(y)
        refuse_batched(y, k1)
        h, control = self.options.first_step, self.control
        if h is not None:
            control.start(t, float(h))
        elif control.measures:
            self._choose_first_step(control, t, y, k1)
        else:
            on_host = StepControl(self.spec, self.problem.norm)
            self._choose_first_step(on_host, t, y, k1)
            control.start(t, self._read(on_host).proposal)
        self._read(control)

    def propose(self, t: float, y: Tensor) -> ProposedStep | None:
        """Return the next step, or None if the solve has ended."""
        now = self.now
        tried = now.accepted + now.rejected
        if tried in (EARLY, LONG) and now.active:
            chance = look_at_length(self.problem, t, y, now.proposal, tried, now.rejected, self.endless)
            if chance is not None:
                self._fail(Status.BY_CHANCE, t, chance)
        if self.problem.callbacks:
            self._notify("callback_step", t, y, now.proposal)
        if now.status:
            status, detail = Status(now.status), f"The step was {now.proposal:.3g}."
            if self._unsolved and status in (Status.STEP_UNDERFLOW, Status.NON_FINITE):
                status = Status.NOT_SOLVED
            if status is Status.MAX_STEPS:
                status = Status.NO_EVENT if self.endless else status
                detail = f"max_num_steps = {self.options.max_num_steps}, the step {now.proposal:.3g}."
            self._fail(status, t, detail)
        return self._move(t, now.t1, now.h) if now.active else None

    def judge(self, step: Step) -> bool:
        """Accept or reject the step, and choose the next step size. One host read."""
        assert step.error is not None
        rejected = self.now.rejected
        self._unsolved = step.unsolved
        self.arithmetic.control_step(self.control, step.at, step.error, step.last, step.y0, step.y1, self.errors)
        now = self._read(self.control)
        if now.accept:
            if self.problem.callbacks:
                self._notify("callback_accept_step", step.t0, step.y0, step.at.h)
            step.jump = bool(now.jump)
            self.stats.accepted += 1
            return True
        if now.rejected == rejected:
            self._fail(Status.NON_FINITE, step.t0, f"The step was min_step = {step.at.h:.3g}.")
        if self.problem.callbacks:
            self._notify("callback_reject_step", step.t0, step.y0, step.at.h)
        self.stats.rejected += 1
        return False

    @property
    def ratio(self) -> float:
        """The error of the step judged last, in units of the tolerances."""
        return self.now.ratio

    def _choose_first_step(self, control: StepControl | DeviceStepControl, t: float, y: Tensor, k1: Tensor) -> None:
        control.start(t, None)
        control.initial_norms(y, k1)
        now = self._read(control)
        if now.status:
            self._fail(Status.NON_FINITE, t, wrong_at_start(self.problem.norm, y, k1))
        control.initial_change(y, k1, self._probe(t, now.t1, now.h, y, k1))

    def _probe(self, t0: float, t1: float, h: float, y: Tensor, f0: Tensor) -> Tensor:
        """Return the field after an Euler step, without its autograd graph. The state for func is made as in other
        steps."""
        arithmetic = self.arithmetic
        at = arithmetic.interval(t0, t1, h)
        (t,) = arithmetic.slots(at, (1.0,), HERE)
        z = arithmetic.rk_stage(arithmetic.stage(((0, 1.0),), 1.0, HERE), at, y, [f0], t)
        return arithmetic.as_contiguous(self.problem.field(t, z).detach())

    def _read(self, control: StepControl | DeviceStepControl) -> ControllerSnapshot:
        self.now = control.read()
        self.stats.host_reads += control.reads
        control.reads = 0
        return self.now

    def _move(self, t: float, t1: float, h: float) -> ProposedStep:
        """Return the step from t, with its ends as tensors where autograd records them."""
        if not (self._taped and t == self.problem.times[0]):
            return ProposedStep(t1, h)
        start = self.problem.t[0]
        return ProposedStep(
            t1, h, (start, torch.tensor(self.problem.direction * t1, dtype=start.dtype, device=start.device))
        )

    def _refuse_empty(self, y: Tensor) -> None:
        if y.numel() == 0:
            raise InvalidInput(
                f"y0 has no elements, so it has no error to choose steps by; got shape {tuple(y.shape)}. Skip "
                'the solve for an empty batch, or take a fixed grid: method="rk4".'
            )

    def _notify(self, name: str, t: float, y: Tensor, h: float) -> None:
        self.problem.callback(name, t, y, h, self.options.dtype)

    def _fail(self, status: Status, t: float, detail: str) -> None:
        self.stats.nfe = self.problem.field.nfe
        raise SolveError(status, self.problem.direction * t, self.stats, detail)
