"""How large the next step is: Hairer's starting step, and the step-size control on the host.

A step selector proposes where the next step ends, and judges the step that was taken: `AdaptiveSteps` by its error,
`grids.GridSteps` by a list that was made before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from node_cuda._torch_modes import recorded, refuse_batched
from node_cuda.controllers import Controller, OnHost, controller, runs_on_host
from node_cuda.kernels.arithmetic import Arithmetic, ErrorTerm
from node_cuda.kernels.control import ControllerSnapshot, DeviceStepControl
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.stage_times import HERE
from node_cuda.kernels.step_control import ControlSpec, StepControl
from node_cuda.kernels.step_log import StepLog
from node_cuda.methods.step import ProposedStep, Step
from node_cuda.options import AdaptiveOptions, times_option
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import InvalidInput, SolveError, Status


class StepSelector(Protocol):
    """Where steps end, and whether they are good. starts_at_jump: the field is discontinuous where the solve
    begins. judges: steps may be rejected."""

    starts_at_jump: bool
    judges: bool

    def start(self, t: float, y: Tensor, k1: Tensor | None) -> None:
        """Called once, before the first step."""
        ...

    def propose(self, t: float, y: Tensor) -> ProposedStep | None:
        """The next step from (t, y); None: there is none."""
        ...

    def judge(self, step: Step) -> bool:
        """Is the step good? Also sets `step.jump`."""
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


class AdaptiveSteps:
    """Steps by the error estimate, cut to land on step_t, jump_t and `stops`.

    The control of the arithmetic decides (`kernels.step_control`, on CUDA `kernels.control`); this is what a solve on
    the host makes of it: callbacks, statistics, and errors. errors: of what is integrated beside the state. endless:
    the solve does not end with the last of the problem's times. pauses: the device waits at each of the others. tape:
    the device records the accepted steps there.
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
        chosen = controller(options.controller)
        law = (chosen if isinstance(chosen, Controller) else Controller()).law(order, options)
        start, direction = problem.times[0], problem.direction
        step_t = times_option("step_t", options.step_t, direction, start)
        jump_t = times_option("jump_t", options.jump_t, direction, start)
        self.starts_at_jump = start in jump_t
        self.judges = True
        last = [problem.times[-1]] if problem.bounds is not None and problem.times[-1] not in step_t + jump_t else []
        tstops = sorted(step_t + jump_t + last)
        if len(set(tstops)) < len(tstops):
            raise ValueError(
                "`step_t` and `jump_t` must not have any repeated elements between them; got "
                f"step_t = {step_t} and jump_t = {jump_t}. A jump_t is a step_t already: drop it there."
            )
        self.spec = ControlSpec(
            law,
            order,
            options.max_num_steps,
            tstops,
            frozenset(jump_t),
            stops,
            ends=not endless,
            limit=math.inf if problem.bounds is None else problem.times[-1],
            rule=OnHost(chosen, order, options) if runs_on_host(chosen) else None,
        )
        self.control = arithmetic.control(self.spec, pauses=pauses, tape=tape)
        # Only the first step moves with t[0]; the ends of later ones are the solver's choice, and stay.
        self._taped = recorded(problem.t)
        self._unsolved = False  # the equations of the last step

    def start(self, t: float, y: Tensor, k1: Tensor | None) -> None:
        """The first step size: the user's, or by Hairer's rule at the cost of one evaluation."""
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
        """The next step; None where the solve has ended."""
        now = self.now
        self._notify("callback_step", t, y, now.proposal)
        if now.status:
            status, detail = Status(now.status), f"The step was {now.proposal:.3g}."
            if self._unsolved and status in (Status.STEP_UNDERFLOW, Status.NON_FINITE):
                status = Status.NOT_SOLVED
            if status is Status.MAX_STEPS:
                detail = f"max_num_steps = {self.options.max_num_steps}, the step {now.proposal:.3g}."
            self._fail(status, t, detail)
        return self._move(t, now.t1, now.h) if now.active else None

    def judge(self, step: Step) -> bool:
        """Accept or reject, and choose the next step size. One host read."""
        assert step.error is not None
        rejected = self.now.rejected
        self._unsolved = step.unsolved
        self.arithmetic.control_step(self.control, step.at, step.error, step.last, step.y0, step.y1, self.errors)
        now = self._read(self.control)
        if now.accept:
            self._notify("callback_accept_step", step.t0, step.y0, step.at.h)
            step.jump = bool(now.jump)
            self.stats.accepted += 1
            return True
        if now.rejected == rejected:
            self._fail(Status.NON_FINITE, step.t0, f"The step was min_step = {step.at.h:.3g}.")
        self._notify("callback_reject_step", step.t0, step.y0, step.at.h)
        self.stats.rejected += 1
        return False

    def _choose_first_step(self, control: StepControl | DeviceStepControl, t: float, y: Tensor, k1: Tensor) -> None:
        control.start(t, None)
        control.initial_norms(y, k1)
        now = self._read(control)
        if now.status:
            self._fail(Status.NON_FINITE, t, wrong_at_start(self.problem.norm, y, k1))
        control.initial_change(y, k1, self._probe(t, now.t1, now.h, y, k1))

    def _probe(self, t0: float, t1: float, h: float, y: Tensor, f0: Tensor) -> Tensor:
        """The field after an Euler step, without its graph. func sees a state like those of the steps."""
        arithmetic = self.arithmetic
        at = arithmetic.interval(t0, t1, h)
        (t,) = arithmetic.slots(at, (1.0,), HERE)
        z = arithmetic.rk_stage(arithmetic.stage(((0, 1.0),), 1.0, HERE), at, y, [f0], t)
        return arithmetic.as_contiguous(self.problem.field(t, z).detach())

    def _read(self, control: StepControl | DeviceStepControl) -> StepControl | ControllerSnapshot:
        self.now = control.read()
        self.stats.host_reads += control.reads
        control.reads = 0
        return self.now

    def _move(self, t: float, t1: float, h: float) -> ProposedStep:
        """The step from t, with its ends where the tape must see them."""
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
        if self.problem.callbacks:
            self.problem.callback(name, t, y, h, self.options.dtype)

    def _fail(self, status: Status, t: float, detail: str) -> None:
        self.stats.nfe = self.problem.field.nfe
        raise SolveError(status, self.problem.direction * t, self.stats, detail)
