"""Step-size control on the host. Its functions match those of csrc/control/control.h, which does the same on the
device.

Times are solver times, which ascend; all numbers are doubles. tests/kernels/test_kernels_shim.py compares both call by
call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from node_cuda.kernels import reference
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.reference import ControllerParams
from node_cuda.status import Status


class Rule(Protocol):
    """A rule for judging steps, in place of `ControllerParams`."""

    def start(self) -> None:
        """Start a solve."""
        ...

    def __call__(self, h: float, ratio: float) -> tuple[bool, float]:
        """Return whether a step of size h with this error ratio is accepted, and the size of the next step."""
        ...


class ControlSpec(NamedTuple):
    """The settings of the step-size control of a solve.

    order: the order of the method, for the starting step. max_num_steps: attempts allowed since the last output.
    tstops: times that a step must end at; those in `jumps` are discontinuities. stops: times that a step must end at,
    approached without a very small step before them. ends: the solve ends at the last of the output times. limit: the
    Euler step that probes the first step size does not go past it. rule: a Python rule in place of the parameters.
    """

    law: ControllerParams
    order: int
    max_num_steps: float = math.inf
    tstops: Sequence[float] = ()
    jumps: frozenset[float] = frozenset()
    stops: Sequence[float] = ()
    ends: bool = False
    limit: float = math.inf
    rule: Rule | None = None


class ControllerSnapshot(Protocol):
    """The state of the step-size control: `StepControl` itself, or a copy of ControllerState in csrc/control/control.h.

    t0, t1, h: the step to be tried. last_*: the step judged last. proposal: the step before it was cut. status: a value
    of `Status`. Only a solve on the device sets the last three. paused: it waits at an output. gave_up: its last
    attempt was neither accepted nor rejected. never_began: it found no first step.
    """

    t0: float
    t1: float
    h: float
    last_t0: float
    last_t1: float
    last_h: float
    proposal: float
    carried: float
    ratio: float
    history: tuple[float, float]
    norm_0: float
    norm_1: float
    attempts: int
    accepted: int
    rejected: int
    next_tstop: int
    next_stop: int
    first_output: int
    next_output: int
    accept: bool
    jump: bool
    status: int
    active: bool
    finite: bool
    paused: bool
    gave_up: bool
    never_began: bool


class StepControl:
    """The step-size control of a solve: its state, as `ControllerSnapshot`, and the functions that change it.

    outputs: ascending, the start not among them. reads: host reads since they were last counted. measures: it can
    choose the first step.
    """

    measures = True
    paused = gave_up = never_began = False

    def __init__(self, spec: ControlSpec, norm: ErrorNorm, outputs: Sequence[float] = ()) -> None:
        self.law, self.rule = spec.law, spec.rule
        self.order, self.max_num_steps, self.limit = spec.order, spec.max_num_steps, spec.limit
        self.tstops, self.jumps, self.stops = spec.tstops, spec.jumps, spec.stops
        self.norm = norm
        self.outputs = outputs if spec.ends else ()
        self.reads = 0
        self.start(0.0, None)

    def read(self) -> ControllerSnapshot:
        """Return the state of the solve."""
        return self

    # ------------------------------------------------------------------ the start

    def start(self, t0: float, h: float | None) -> None:
        """Start at t0 with a step of h; None: `initial_norms` and `initial_change` choose it."""
        self.t0 = self.t1 = self.last_t0 = self.last_t1 = t0
        self.h = self.last_h = self.proposal = self.carried = self.ratio = 0.0
        self.history = (1.0, 1.0)
        self.norm_0 = self.norm_1 = 0.0
        self.attempts = self.accepted = self.rejected = 0
        self.next_tstop = self.next_stop = self.first_output = self.next_output = 0
        self.accept = self.jump = False
        self.status = Status.SUCCESS.value
        self.active = self.finite = True
        if self.rule is not None:
            self.rule.start()
        if h is not None:
            self.proposal = self._within(h)
            self._propose(t0)

    def initial_norms(self, y0: Tensor, f0: Tensor) -> None:
        """Compute the first half of the starting step; propose the Euler step that probes the change of the field.

        Hairer, Norsett, Wanner, Solving ODEs I, II.4, with torchdiffeq's constants.
        """
        self.norm_0, self.norm_1 = reference.initial_norms(y0.detach(), f0.detach(), self.norm)
        self.reads += 2
        self._initial_probe(self.norm_0, self.norm_1)

    def initial_change(self, y0: Tensor, f0: Tensor, f1: Tensor) -> None:
        """Compute the second half, with the field at the end of the Euler step: choose and propose the first step."""
        self.reads += 1
        self._initial_step(reference.initial_change(y0.detach(), f0.detach(), f1, self.norm))

    def _initial_probe(self, d0: float, d1: float) -> None:
        if not (math.isfinite(d0) and math.isfinite(d1)):
            return self._fail(self.t0, Status.NON_FINITE)
        h0 = min(1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1, self.limit - self.t0)
        self.t1, self.h = self.t0 + h0, h0
        return None

    def _initial_step(self, change: float) -> None:
        h0, d1 = self.h, self.norm_1
        d2 = change / h0
        h1 = max(1e-6, h0 * 1e-3) if d1 <= 1e-15 and d2 <= 1e-15 else (0.01 / max(d1, d2)) ** (1.0 / self.order)
        self.proposal = self._within(min(100 * h0, h1) if math.isfinite(h1) else h0)
        self._propose(self.t0)

    # ------------------------------------------------------------------ a step

    def judge_ratio(self, ratio: float) -> None:
        """Judge the step by its error ratio, move to its end if it is accepted, and propose the next step."""
        self.reads += 1
        self.first_output = self.next_output
        self.last_t0, self.last_t1, self.last_h, self.ratio = self.t0, self.t1, self.h, ratio
        self.jump = False
        if self.rule is None:
            self.accept, self.proposal, self.history = reference.step_control(self.law, self.h, ratio, self.history)
        else:
            self.accept, self.proposal = self.rule(self.h, ratio)
        self.finite = math.isfinite(ratio)
        if not self.accept:
            self.rejected += 1
            return self._propose(self.last_t0)
        if not self.finite:
            self.accept = False
            return self._fail(self.last_t0, Status.NON_FINITE)
        self.proposal = max(self.proposal, self.carried)
        self.accepted += 1
        self.jump = self.last_t1 in self.jumps
        if self._pass_outputs():
            self._propose(self.last_t1)
        return None

    def _pass_outputs(self) -> bool:
        """Count the outputs in the accepted step. Return False if the last output was reached."""
        while self.next_output < len(self.outputs) and self.outputs[self.next_output] <= self.last_t1:
            self.next_output += 1
        if self.next_output == self.first_output:
            return True
        self.attempts = 0
        self.active = self.next_output < len(self.outputs)
        if not self.active:
            self.t0, self.t1, self.h = self.last_t1, self.last_t1, 0.0
        return self.active

    def _propose(self, t: float) -> None:
        if not t + self.proposal > t:
            return self._fail(t, Status.STEP_UNDERFLOW if self.finite else Status.NON_FINITE)
        if self.attempts >= self.max_num_steps:
            return self._fail(t, Status.MAX_STEPS)
        self.attempts += 1
        self._cut(t)
        return None

    def _cut(self, t: float) -> None:
        """Propose the step from t. Its end is moved to the next time that a step must end at."""
        h = self.proposal
        t1 = t + h
        self.carried = 0.0
        if not (self.tstops or self.stops):
            self.t0, self.t1, self.h = t, t1, h
            return
        while self.next_tstop < len(self.tstops) and self.tstops[self.next_tstop] <= t:
            self.next_tstop += 1
        # Without this, a tstop that the step misses by rounding would leave a very small step.
        landed = self.next_tstop < len(self.tstops) and self.tstops[self.next_tstop] <= t1 + 4 * math.ulp(t1)
        if landed:
            t1 = self.tstops[self.next_tstop]
            h = min(t1 - t, h)  # rounding may make the difference larger than max_step
        while self.next_stop < len(self.stops) and self.stops[self.next_stop] <= t:
            self.next_stop += 1
        stop = self.stops[self.next_stop] if self.next_stop < len(self.stops) else math.inf
        if t1 >= stop or (not landed and t + 2 * h > stop):
            # Two steps would pass the stop. End at the stop, in one step or in two equal ones, without a very small
            # step.
            self.carried = h
            t1 = stop if t1 >= stop else t + 0.5 * (stop - t)
            h = min(t1 - t, h)
        self.t0, self.t1, self.h = t, t1, h

    def _fail(self, t: float, status: Status) -> None:
        self.status = status.value
        self.active = False
        self.t0, self.t1, self.h = t, t, 0.0

    def _within(self, h: float) -> float:
        return min(max(h, self.law.min_step), self.law.max_step)
