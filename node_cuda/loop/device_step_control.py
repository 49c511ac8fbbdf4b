"""How large the next step is, decided on the device: `Adaptive` over the step control of the compiled kernels.

The host reads where the control stands, once a step, and computes none of it again: its `pow` differs in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from node_cuda.kernels.control import Reading
from node_cuda.kernels.fused import Fused
from node_cuda.kernels.stage_times import HERE
from node_cuda.kernels.step_log import Tape
from node_cuda.loop.step_control import Adaptive, Extra
from node_cuda.methods.step import Move, Step
from node_cuda.options import AdaptiveOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import Status


class DeviceAdaptive(Adaptive):
    """See `Adaptive`. endless: the solve does not end with the last of the problem's times; pauses: the device waits at
    each of the others; tape: it records the accepted steps there."""

    def __init__(
        self,
        problem: Problem,
        arithmetic: Fused,
        order: int,
        options: AdaptiveOptions,
        stats: Stats,
        stops: Sequence[float] = (),
        extra: Extra | None = None,
        *,
        endless: bool = False,
        pauses: bool = False,
        tape: Tape | None = None,
    ) -> None:
        super().__init__(problem, arithmetic, order, options, stats, stops, extra)
        self.fused = arithmetic
        self.control = arithmetic.control(
            self.law,
            order,
            options.max_num_steps,
            self._landings,
            self._jumps,
            self._stops,
            outputs=not endless,
            pauses=pauses,
            tape=tape,
        )

    def fresh(self) -> None:
        """Nothing: the control knows the outputs, and counts for itself."""

    def start(self, t: float, y: Tensor, k1: Tensor | None) -> None:
        """See `Adaptive`. Two host reads, one more evaluation; one read for a step that the user gave."""
        assert k1 is not None
        self._refuse_empty(y)
        h, custom = self.options.first_step, self.problem.norm.custom is not None
        if h is not None or custom or self.problem.bounds is not None:  # a user's norm is measured on the host
            self.control.start(t, self._starting_step(t, y, k1) if h is None else float(h))
        else:
            self.control.start(t, None)
            self.control.initial_norms(y, k1)
            now = self._read()
            if now.status:
                self._explain(t, y, k1)
            self.control.initial_change(y, k1, self._probe(t, now.t1, now.h, y, k1))
        self._read()

    def begin(self, t: Tensor, y: Tensor, k1: Tensor) -> None:
        """As `start` at a time on the device, with nothing read: the step that probes the field is the control's
        own."""
        h = self.options.first_step
        if h is not None:
            return self.control.start_at(t, float(h))
        fused = self.fused
        self.control.start_at(t, None)
        self.control.initial_norms(y, k1)
        at = fused.current()
        (probed,) = fused.slots(at, (1.0,), HERE)
        z = fused.rk_stage(fused.stage(((0, 1.0),), 1.0, HERE), at, y, [k1], probed)
        self.control.initial_change(y, k1, fused.own(self.problem.field(probed, z)))
        return None

    def propose(self, t: float, y: Tensor) -> Move | None:
        now = self.now
        self._notify("callback_step", t, y, now.proposal)
        status = Status(now.status)
        if status is Status.MAX_STEPS:
            self._fail(status, t, f"max_num_steps = {self.options.max_num_steps}, the step {now.proposal:.3g}.")
        if status is not Status.SUCCESS:
            self._fail(status, t, f"The step was {now.proposal:.3g}.")
        return self._move(t, now.t1, now.h)

    def judge(self, step: Step) -> bool:
        """See `Adaptive`. One host read."""
        assert step.error is not None
        rejected = self.now.rejected
        self._judge(step)
        now = self._read()
        if now.accept:
            self._notify("callback_accept_step", step.t0, step.y0, step.at.h)
            step.jump = bool(now.jump)
            self.stats.accepted += 1
        elif now.rejected == rejected:
            self._fail(Status.NON_FINITE, step.t0, f"The step was min_step = {step.at.h:.3g}.")
        else:
            self._notify("callback_reject_step", step.t0, step.y0, step.at.h)
            self.stats.rejected += 1
        return bool(now.accept)

    def _judge(self, step: Step) -> None:
        """Let the control judge the step, by the kernels' norm or by the user's."""
        error, last, extra, custom = step.error, step.last, self.extra, self.problem.norm.custom
        assert error is not None
        with torch.no_grad():
            if custom is None:
                also = None if extra is None else extra.device_ratio()
                self.fused.judge(step.at, error, last, step.y0, step.y1, also)
                return
            scaled = self.fused.scaled_error(step.at, error, last, step.y0, step.y1)
            norm = custom(scaled, () if extra is None else extra.scaled_errors())
            ratio = norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64, device="cpu")
            self.control.judge_ratio(ratio.to(scaled.device, torch.float64).abs().reshape(1))

    def _read(self) -> Reading:
        self.now = self.control.read()
        self.stats.host_reads += 1
        return self.now
