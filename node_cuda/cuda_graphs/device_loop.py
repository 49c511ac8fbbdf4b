"""The loop over steps on the device: every attempt is the same launches, at the same addresses, and may be captured.

    attempt, outputs, judge, commit                    (host_loop.py: propose, attempt, judge, move)

What the host loop decides is decided by the kernels (csrc/control/control.h): when, how far, whether it was good,
whether it was the last. An attempt after the last one changes nothing. The steps are the host loop's, by the same
stepper and the same kernels, so their bits are the same.
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
    """What is integrated beside the state, by the device as well."""

    def restart(self) -> None:
        """A solve begins: the sums over steps are zero."""
        ...

    def keep(self, integrands: Sequence[Tensor | None]) -> SavedIntegrands:
        """A copy of the integrands with which a step begins, in memory that is always the same."""
        ...

    def keep_if_accepted(self, integrands: Sequence[Tensor | None], at: Interval) -> None:
        """Put these in their place, if the step was accepted."""
        ...

    def commit_if_accepted(self, at: Interval) -> None:
        """Add the step's sums, if it was accepted."""
        ...


class DeviceLoop:
    """Steps of one field and method, from the problem's y0, which is this loop's own memory: `y`.

    points: those of a fixed grid. pauses: at every output but the last the device waits for `control.resume`. tape: it
    records the accepted steps there.
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
        # What keeps this loop is in the options, and would be kept by it.
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
        self.first_nfe = self.nfe = 0  # of `begin`, and of an attempt

    @property
    def adaptive(self) -> bool:
        """Steps are chosen by an error estimate, and carry their last stage on."""
        return self.stepper.tableau.adaptive

    def begin(self) -> None:
        """From y: all that the first attempt needs."""
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
        """As `AdaptiveSteps.start` at a time on the device, with nothing read: the step that probes the field is the
        control's."""
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
        """From where the device pauses, and y was set anew."""
        self.control.resume()
        if self.adaptive:
            self.set_slope(inside=True)

    def slope(self, *, inside: bool | None = None) -> Tensor:
        """The field at y, where the next step begins; inside: just beyond that, by default as the other stages are."""
        return self.stepper.slope_at_beginning(self.arithmetic.current(), self.y, inside=inside)

    def set_slope(self, *, inside: bool) -> None:
        """The next step begins with the field at y."""
        self.k1.copy_(self.slope(inside=inside))
        if self.quadrature is not None:
            self.kept = self.quadrature.keep(self.stepper.integrands)

    def attempt(self) -> None:
        """A step, its outputs, and the move to its end if it was good."""
        before = self.problem.field.nfe
        stepper, arithmetic, at = self.stepper, self.arithmetic, self.arithmetic.current()
        step = self._step(at)
        if share_memory(step.k) and not self.problem.field.copies_output:
            # func returned a buffer that held an earlier stage: take the step again, on copies.
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
            if self.jumps:  # the field beyond the jump, in case there was one
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
        """What the outputs of a step are made of."""

    def put_outputs(self, step: Step, outputs: Any) -> None:
        """The outputs that lie in the step, if it was accepted."""

    def _step(self, at: Interval) -> Step:
        if self.adaptive:
            self.stepper.first_integrands = self.kept
            return self.stepper.attempt_at(at, self.y, self.k1)
        return self.stepper.attempt_at(at, self.y, self.slope())

    def cost(self, now: ControllerSnapshot, stats: Stats) -> int:
        """What a solve that is over cost: its steps, and how often it evaluated the field."""
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
        """The next solve: from y0, at so many times, points and stops as before, with tolerances of the same kind."""
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
    """A solve with its outputs. ys: NaN where they were not reached."""

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
        """See `DeviceLoop`."""
        self.ys.fill_(math.nan)
        self.ys[0].copy_(self.y)
        super().begin()

    def interpolated(self, step: Step) -> Any:
        """See `DeviceLoop`."""
        return self.interpolant.prepare(step)

    def put_outputs(self, step: Step, outputs: Any) -> None:
        """See `DeviceLoop`."""
        self.interpolant.outputs(step, outputs, 1, self.ys[1:])


def set_apart(problem: Problem) -> Problem:
    """The problem with a field and a y0 of its own. Whoever looks at the first evaluation of the field does so now."""
    if problem.field.nfe == 0:
        problem.field(problem.t[0].to(problem.y0.device, problem.time_dtype), problem.y0)
    y0 = problem.y0.detach().clone(memory_format=torch.contiguous_format)
    return replace(with_field_of_its_own(problem), y0=y0, t=problem.t.detach())


def with_field_of_its_own(problem: Problem) -> Problem:
    """The problem with another field for the same function, which may be released."""
    assert isinstance(problem.field, VectorField)
    own = problem.field_of(problem.field.func)
    # A callback that the method does not call would keep func alive.
    return replace(problem, func=own, field=own, callbacks={}, adjoint_callbacks={})


def release(problem: Problem) -> None:
    """The field of its own lets func go: it is not evaluated any more."""
    assert isinstance(problem.field, VectorField)
    problem.field.release()


def _where(condition: Tensor, yes: Sequence[Tensor | None], no: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """One or the other, for each pair; None stands for zeros."""
    zero = torch.zeros((), device=condition.device)
    return [
        None if a is None and b is None else torch.where(condition, zero if a is None else a, zero if b is None else b)
        for a, b in zip(yes, no, strict=True)
    ]


def upload(to: Tensor, values: Sequence[float]) -> None:
    """Numbers to the device; the host does not wait."""
    on_host = torch.tensor(values, dtype=to.dtype)
    to.copy_(on_host.pin_memory() if to.is_cuda else on_host, non_blocking=True)
