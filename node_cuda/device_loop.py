"""The loop over steps on the device: every attempt is the same launches, at the same addresses, and may be captured.

    attempt, outputs, judge, commit                    (host_loop.py: propose, attempt, judge, move)

What the host loop decides is decided by the kernels (csrc/control.h): when, how far, whether it was good, whether it
was the last. An attempt after the last one changes nothing. The steps are the host loop's, by the same stepper and the
same kernels, so their bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from node_cuda.controllers import Grid
from node_cuda.device_pace import DeviceAdaptive
from node_cuda.field import share_memory
from node_cuda.kernels.control import Control, Reading
from node_cuda.kernels.fused import Fused
from node_cuda.methods import Method, grid_of, make_loop
from node_cuda.options import AdaptiveOptions, FixedOptions
from node_cuda.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import SolveError, Status
from node_cuda.steppers.explicit_rk import ExplicitRK


class DeviceLoop:
    """Solves of one field, method and number of outputs. y: where y0 is put before `begin`. ys: the outputs, NaN where
    they were not reached."""

    def __init__(self, problem: Problem, method: Method, arithmetic: Fused) -> None:
        options, y0 = method.options, problem.y0
        points = grid_of(problem, options)[0] if isinstance(options, FixedOptions) else None
        loop, interpolant = make_loop(problem, method, Stats(), arithmetic=arithmetic, points=points)
        assert isinstance(loop.stepper, ExplicitRK)
        self.problem = problem
        self.arithmetic = arithmetic
        self.stepper = loop.stepper
        self.interpolant = interpolant
        self.y = torch.empty_like(y0, memory_format=torch.contiguous_format)
        self.k1 = torch.empty_like(self.y)
        self.ys = y0.new_empty((len(problem.times), *y0.shape))
        self.pace = loop.pace
        self.jumps = False
        if isinstance(self.pace, DeviceAdaptive):
            assert isinstance(options, AdaptiveOptions)
            self.jumps = options.jump_t is not None
            self.control: Control = self.pace.control
        else:
            assert isinstance(self.pace, Grid) and points is not None
            self.control = arithmetic.grid_control(points)
        self.first_nfe = self.nfe = 0  # of `begin`, and of an attempt

    def begin(self) -> None:
        """From y: the first output, and all that the first attempt needs."""
        before = self.problem.field.nfe
        t0 = self.problem.times[0]
        self.ys.fill_(math.nan)
        self.ys[0].copy_(self.y)
        if isinstance(self.pace, DeviceAdaptive):
            k1 = self.stepper.first(t0, self.y, None, self.pace.starts_at_jump)
            assert k1 is not None
            self.k1.copy_(k1)
            self.pace.begin(t0, self.y, self.k1)
        else:
            self.control.start(t0, None)
            self.control.next_of_grid()
        self.first_nfe = self.problem.field.nfe - before

    def attempt(self) -> None:
        """A step, its outputs, and the move to its end if it was good."""
        before = self.problem.field.nfe
        stepper, arithmetic, at = self.stepper, self.arithmetic, self.arithmetic.current()
        adaptive = stepper.tableau.adaptive
        k1 = self.k1 if adaptive else stepper.slope_at_beginning(at, self.y)
        step = stepper.attempt_at(at, self.y, k1)
        if share_memory(step.k) and not self.problem.field.copies_output:
            # func returned a buffer that held an earlier stage: take the step again, on copies.
            self.problem.field.copies_output = True
            step = stepper.attempt_at(at, self.y, k1)
        k = self.interpolant.prepare(step)  # before the control moves on, and `at` with it
        if adaptive:
            assert step.error is not None
            arithmetic.judge(at, step.error, step.last, self.y, step.y1, None)
        else:
            self.control.next_of_grid()
        self.interpolant.outputs(step, k, 1, self.ys[1:])
        if adaptive:
            carried = step.k[-1]
            if self.jumps:  # the field beyond the jump, in case there was one
                beyond = stepper.slope_at_beginning(at, step.y1)
                carried = torch.where(self.control.jumped, beyond, carried)
            arithmetic.commit([self.y, self.k1], [step.y1, carried])
        else:
            arithmetic.commit([self.y], [step.y1])
        self.nfe = self.problem.field.nfe - before

    def cost(self, now: Reading, stats: Stats) -> None:
        """What a solve that is over cost."""
        stats.accepted, stats.rejected = now.accepted, now.rejected
        stats.nfe = self.first_nfe + self.nfe * (now.accepted + now.rejected)

    def failure(self, now: Reading, stats: Stats) -> SolveError | None:
        """How a solve that is over failed, if it did."""
        status = Status(now.status)
        if status is Status.SUCCESS:
            return None
        return SolveError(status, self.problem.direction * now.t0, stats, f"The step was {now.proposal:.3g}.")

    def rebind(self, y0: Tensor, times: Sequence[float]) -> None:
        """The next solve: from y0, with outputs at these times; the first of them is that of the solve before."""
        self.y.copy_(y0)
        if tuple(times) != self.problem.times:
            self.problem = replace(self.problem, times=tuple(times))
            self.arithmetic.set_times(times)
