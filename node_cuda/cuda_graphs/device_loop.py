"""The loop over steps on the device: every attempt has the same launches at the same addresses, so it can be captured.

    attempt, outputs, judge, commit                    (host_loop.py: propose, attempt, judge, move)

The kernels make the decisions of the host loop (csrc/control/control.h): where a step begins, its size, whether it is
accepted, and whether it is the last one. An attempt after the last step changes nothing. The stepper and the kernels
are those of the host loop, so the steps have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from node_cuda.kernels.control import DeviceStepControl
from node_cuda.kernels.fused import Fused
from node_cuda.kernels.fused_sums import SavedIntegrands
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.stage_times import HERE, Interval
from node_cuda.kernels.step_control import ControllerSnapshot
from node_cuda.kernels.step_log import StepLog
from node_cuda.loop.assemble import make_loop
from node_cuda.loop.grids import GridSteps
from node_cuda.loop.step_control import AdaptiveSteps
from node_cuda.methods.explicit_rk import ExplicitRK
from node_cuda.methods.registry import Method
from node_cuda.methods.step import Quadrature, Step
from node_cuda.options import AdaptiveOptions
from node_cuda.problem.field import VectorField, share_memory
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats


class DeviceQuadrature(Quadrature, Protocol):
    """An integral that is computed beside the state, and whose sums the device controls too."""

    def restart(self) -> None:
        """Set the sums over steps to zero, at the beginning of a solve."""
        ...

    def keep(self, integrands: Sequence[Tensor | None]) -> SavedIntegrands:
        """Copy the integrands at the beginning of a step into memory at a fixed address, and return the copy."""
        ...

    def keep_if_accepted(self, integrands: Sequence[Tensor | None], at: Interval) -> None:
        """Copy these integrands into that memory, if the step was accepted."""
        ...

    def commit_if_accepted(self, at: Interval) -> None:
        """Add the sums of the step to the total, if the step was accepted."""
        ...


class DeviceLoop:
    """Steps of one field and one method, from the problem's y0. The loop owns the memory of y0, and calls it `y`.

    points: the points of a fixed grid. pauses: the device waits for `control.resume` at every output but the last.
    tape: the device records the accepted steps there.
    """

    def __init__(
        self,
        problem: Problem,
        method: Method,
        arithmetic: Fused,
        *,
        points: Sequence[float] | None = None,
        stops: Sequence[float] = (),
        pauses: bool = False,
        quadrature: DeviceQuadrature | None = None,
        tape: StepLog | None = None,
    ) -> None:
        # The cache in the options refers to this loop. A reference back would be a cycle.
        method = replace(method, options=replace(method.options, cuda_graph=False))
        loop, self.interpolant = make_loop(
            problem,
            method,
            Stats(),
            arithmetic=arithmetic,
            points=points,
            stops=stops,
            pauses=pauses,
            quadrature=quadrature,
            tape=tape,
        )
        assert isinstance(loop.stepper, ExplicitRK)
        self.problem = problem
        self.arithmetic = arithmetic
        self.quadrature = quadrature
        self.stepper = loop.stepper
        self.selector = loop.selector
        self.y = problem.y0
        self.k1 = torch.empty_like(self.y)
        self.kept: Sequence[Tensor | None] = ()  # the integrands of k1
        self.points = points
        self.stops = stops
        self.jumps = False
        self.times = problem.times
        self.first_step: float | None = None
        self.control: DeviceStepControl
        if isinstance(self.selector, AdaptiveSteps):
            assert isinstance(method.options, AdaptiveOptions)
            self.jumps, self.first_step = method.options.jump_t is not None, method.options.first_step
            self.control = self.selector.control
        else:
            assert isinstance(self.selector, GridSteps) and points is not None
            self.control = arithmetic.grid_control(points, pauses=pauses, tape=tape)
        self.first_nfe = self.nfe = 0  # evaluations of the field in `begin`, and in one attempt

    @property
    def adaptive(self) -> bool:
        """Whether an error estimate chooses the steps. Then the last stage is the first stage of the next step."""
        return self.stepper.tableau.adaptive

    def begin(self) -> None:
        """Compute what the first attempt needs, from the state in `y`."""
        before = self.problem.field.nfe
        if self.quadrature is not None:
            self.quadrature.restart()
        t0 = self.arithmetic.device_times
        self.control.start_at(t0, None)
        if isinstance(self.selector, AdaptiveSteps):
            self.set_slope(inside=self.selector.starts_at_jump)
            self._choose_first_step(t0)
        else:
            self.control.next_of_grid()
        self.first_nfe = self.problem.field.nfe - before

    def _choose_first_step(self, t: Tensor) -> None:
        """Choose the first step as `AdaptiveSteps.start` does, from a time on the device and without a host read.

        The control on the device holds the Euler step that probes the field.
        """
        control, fused = self.control, self.arithmetic
        if self.first_step is not None:
            return control.start_at(t, float(self.first_step))
        control.start_at(t, None)
        control.initial_norms(self.y, self.k1)
        at = fused.current()
        (probed,) = fused.slots(at, (1.0,), HERE)
        z = fused.rk_stage(fused.stage(((0, 1.0),), 1.0, HERE), at, self.y, [self.k1], probed)
        control.initial_change(self.y, self.k1, fused.as_contiguous(self.problem.field(probed, z)))
        return None

    def resume(self) -> None:
        """Continue after a pause at an output. `y` was set to a new state."""
        self.control.resume()
        if self.adaptive:
            self.set_slope(inside=True)

    def slope(self, *, inside: bool | None = None) -> Tensor:
        """Return the field at y and at the time at which the next step begins.

        inside: evaluate the field just after that time; None: as for the other stages.
        """
        return self.stepper.slope_at_beginning(self.arithmetic.current(), self.y, inside=inside)

    def set_slope(self, *, inside: bool) -> None:
        """Set the first stage of the next step to the field at y."""
        self.k1.copy_(self.slope(inside=inside))
        if self.quadrature is not None:
            self.kept = self.quadrature.keep(self.stepper.integrands)

    def attempt(self) -> None:
        """Attempt a step, write its outputs, and move to its end if it is accepted."""
        before = self.problem.field.nfe
        stepper, arithmetic, at = self.stepper, self.arithmetic, self.arithmetic.current()
        step = self._step(at)
        if share_memory(step.k) and not self.problem.field.copies_output:
            # func returned a buffer that held an earlier stage: repeat the step with copies.
            self.problem.field.copies_output = True
            step = self._step(at)
        outputs = self.interpolated(step)  # before the control moves on, and `at` with it
        if self.adaptive:
            assert step.error is not None
            also = None if self.quadrature is None else self.quadrature.device_ratio()
            arithmetic.judge(at, step.error, step.last, self.y, step.y1, also)
        else:
            self.control.next_of_grid()
        self.put_outputs(step, outputs)
        if self.quadrature is not None:
            self.quadrature.commit_if_accepted(at)
        if self.adaptive:
            carried, integrands = step.k[-1], stepper.integrands
            if self.jumps:  # the field after the jump, used if the step ended at one
                beyond = stepper.slope_at_beginning(at, step.y1, inside=True)
                carried = torch.where(self.control.jumped, beyond, carried)
                integrands = _where(self.control.jumped, stepper.integrands, integrands)
            arithmetic.commit([self.y, self.k1], [step.y1, carried])
            if self.quadrature is not None:
                self.quadrature.keep_if_accepted(integrands, at)
        else:
            arithmetic.commit([self.y], [step.y1])
        self.nfe = self.problem.field.nfe - before

    def interpolated(self, step: Step) -> Any:
        """Return what the interpolant needs for the outputs of a step."""

    def put_outputs(self, step: Step, outputs: Any) -> None:
        """Write the outputs that lie in the step, if the step was accepted."""

    def _step(self, at: Interval) -> Step:
        if self.adaptive:
            self.stepper.first_integrands = self.kept
            return self.stepper.attempt_at(at, self.y, self.k1)
        return self.stepper.attempt_at(at, self.y, self.slope())

    def cost(self, now: ControllerSnapshot, stats: Stats) -> int:
        """Store the steps of a finished solve in the statistics, and return its number of field evaluations."""
        stats.accepted, stats.rejected = now.accepted, now.rejected
        return self.first_nfe + self.nfe * (now.accepted + now.rejected + now.gave_up)

    def rebind(
        self,
        y0: Tensor,
        times: Sequence[float],
        norm: ErrorNorm,
        points: Sequence[float] | None,
        stops: Sequence[float] = (),
    ) -> None:
        """Prepare the next solve, from y0.

        The numbers of times, points and stops are as before, and the tolerances are of the same kind.
        """
        self.y.copy_(y0)
        if times != self.times:
            self.times = times
            upload(self.arithmetic.device_times, times)
        if points != self.points:
            assert points is not None
            self.points = points
            upload(self.control.points, points)
        if stops != self.stops:
            self.stops = stops
            if self.adaptive:
                upload(self.control.stops, stops)
        self.arithmetic.set_tolerances(norm)


class OutputLoop(DeviceLoop):
    """A solve with its outputs. ys: the outputs; an output that was not reached is NaN."""

    def __init__(
        self,
        problem: Problem,
        method: Method,
        arithmetic: Fused,
        *,
        points: Sequence[float] | None = None,
        tape: StepLog | None = None,
    ) -> None:
        super().__init__(problem, method, arithmetic, points=points, tape=tape)
        self.ys = self.y.new_empty((len(problem.times), *self.y.shape))

    def begin(self) -> None:
        """Set all outputs but the first to NaN, and compute what the first attempt needs."""
        self.ys.fill_(math.nan)
        self.ys[0].copy_(self.y)
        super().begin()

    def interpolated(self, step: Step) -> Any:
        """Return the step's polynomial, which the outputs are evaluated with."""
        return self.interpolant.prepare(step)

    def put_outputs(self, step: Step, outputs: Any) -> None:
        """Write the outputs that lie in the step into `ys`, if the step was accepted."""
        self.interpolant.outputs(step, outputs, 1, self.ys[1:])


def set_apart(problem: Problem) -> Problem:
    """Return the problem with a separate field and a copy of y0.

    Some code inspects the first evaluation of the field. If the field was not evaluated yet, that is done here.
    """
    if problem.field.nfe == 0:
        problem.field(problem.t[0].to(problem.y0.device, problem.time_dtype), problem.y0)
    y0 = problem.y0.detach().clone(memory_format=torch.contiguous_format)
    return with_field_of_its_own(problem)._replace(y0=y0, t=problem.t.detach())


def with_field_of_its_own(problem: Problem) -> Problem:
    """Return the problem with a new field for the same function. `release` can release that field."""
    assert isinstance(problem.field, VectorField)
    own = problem.field_of(problem.field.func)
    # A callback that the method does not call would keep func alive.
    return problem._replace(func=own, field=own, callbacks={}, adjoint_callbacks={})


def release(problem: Problem) -> None:
    """Drop the field's reference to func. The captured graph no longer calls func."""
    assert isinstance(problem.field, VectorField)
    problem.field.release()


def _where(condition: Tensor, yes: Sequence[Tensor | None], no: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return torch.where of each pair. None stands for zeros."""
    zero = torch.zeros((), device=condition.device)
    return [
        None if a is None and b is None else torch.where(condition, zero if a is None else a, zero if b is None else b)
        for a, b in zip(yes, no, strict=True)
    ]


def upload(to: Tensor, values: Sequence[float]) -> None:
    """Copy numbers to the device. The host does not wait."""
    on_host = torch.tensor(values, dtype=to.dtype)
    to.copy_(on_host.pin_memory() if to.is_cuda else on_host, non_blocking=True)
