"""Step control on the device, as the host sees it: bound once, and one small struct to read a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from node_cuda.kernels.step_control import ControllerSnapshot, ControlSpec
from node_cuda.kernels.step_log import StepLog

_MOST = 2**63 - 1


class DeviceStepControl:
    """The state of step-size control in device memory, and the lists of times that it looks at.

    outputs: on the device. pauses: the solve waits at each of them but the last for `resume`. measures: it can choose
    the first step, by the norm of the kernels and without a limit. points: those of a grid, whose steps are all good;
    then the law does not matter. tape: gets the accepted steps; a reverse pass over it has another control, without
    one. reads: host reads since they were last counted.
    """

    def __init__(
        self,
        module: ModuleType,
        plan: Any,
        spec: ControlSpec,
        outputs: Tensor,
        points: Sequence[float] = (),
        *,
        measures: bool = True,
        pauses: bool = False,
        tape: StepLog | None = None,
    ) -> None:
        device, law = outputs.device, spec.law
        self.measures = measures
        self.reads = 0
        self._plan = plan
        self._struct = module.ControllerState
        self._ctl = torch.empty(self._struct.SIZE, dtype=torch.uint8, device=device)
        # Pinned: the copy of a pageable tensor goes through a buffer, and waits twice.
        self._host = torch.empty_like(self._ctl, device="cpu", pin_memory=device.type == "cuda")
        self._tstops = torch.tensor(list(spec.tstops), dtype=torch.float64, device=device)
        self._is_jump = torch.tensor([s in spec.jumps for s in spec.tstops], dtype=torch.uint8, device=device)
        self.stops = torch.tensor(list(spec.stops), dtype=torch.float64, device=device)
        self._outputs = outputs if spec.ends else outputs[:0]
        self._tape = tape
        self.points = torch.tensor(list(points), dtype=torch.float64, device=device)
        plan.set_law(
            law.exponents,
            law.safety,
            law.ifactor,
            law.dfactor,
            law.keep,
            pauses,
            law.min_step,
            law.max_step,
            float(spec.order),
            min(math.ceil(min(spec.max_num_steps, _MOST)), _MOST),  # attempts are whole: 2.5 allows three of them
            _array(self._tstops),
            self._is_jump.data_ptr(),
            _array(self.stops),
            _array(self._outputs),
            0 if tape is None else tape.address,
            self._ctl.data_ptr(),
        )

    def start(self, t0: float, h: float | None) -> None:
        """Begin at t0 with a step of h; None: `initial_norms` and `initial_change` choose it."""
        self._plan.start_control(t0, -1.0 if h is None else h)

    def start_at(self, t0: Tensor, h: float | None) -> None:
        """The same at a time that the device reads: one double."""
        self._plan.start_control_at(t0.data_ptr(), -1.0 if h is None else h)

    def initial_norms(self, y0: Tensor, f0: Tensor) -> None:
        """The first half of Hairer's starting step: the step to be read is the Euler step that probes."""
        self._plan.initial_norms(y0.data_ptr(), f0.data_ptr())

    def initial_change(self, y0: Tensor, f0: Tensor, f1: Tensor) -> None:
        """The second half, with the field behind the Euler step: the step to be read is the first one."""
        self._plan.initial_change(y0.data_ptr(), f0.data_ptr(), f1.data_ptr())

    def judge_ratio(self, ratio: Tensor) -> None:
        """Step control with error ratios that were computed elsewhere: doubles on the device."""
        self._plan.judge_ratio(_array(ratio))

    def next_of_grid(self) -> None:
        """To the next point of the grid; the first call begins."""
        self._plan.next_of_grid(_array(self.points))

    def resume(self) -> None:
        """Go on where the solve waits at an output."""
        self._plan.resume(_array(self.points))

    def begin_reverse(self, tape: StepLog) -> None:
        """Begin a reverse pass over the recorded steps, at the end of the last one.

        Active if there is a step to reverse; with the status RECORD_FULL if the tape does not have all steps. This
        control is the reverse pass's.
        """
        self._plan.begin_reverse(tape.address)

    def load_step(self, tape: StepLog, time: Tensor | None = None) -> None:
        """Make the next step of the reverse pass the current one: `tape.row` is its number, and the time of its first
        stage is written to `time`."""
        self._plan.load_step(tape.address, 0 if time is None else time.data_ptr())

    def advance_reverse(self, tape: StepLog) -> None:
        """Stay active while there are steps to reverse."""
        self._plan.advance_reverse(tape.address)

    @property
    def address(self) -> int:
        """Of the state, in device memory."""
        return self._ctl.data_ptr()

    @property
    def state(self) -> Tensor:
        """The state itself, as bytes on the device."""
        return self._ctl

    @property
    def jumped(self) -> Tensor:
        """Did the step judged last end at a discontinuity? 0-d, on the device."""
        return self._ctl.view(torch.int32)[self._struct.JUMP_WORD] != 0

    @property
    def succeeded(self) -> Tensor:
        """Has nothing failed so far? 0-d, on the device."""
        return self._ctl.view(torch.int32)[self._struct.STATUS_WORD] == 0

    def read(self) -> ControllerSnapshot:
        """Where the solve stands. The one host read of a step, and the one time that the host waits."""
        self.reads += 1
        return self._plan.read_control(self._host.data_ptr())

    def snapshot_of(self, state: Tensor) -> ControllerSnapshot:
        """What a copy of `state` says. One host read."""
        on_host = state.cpu()
        return self._struct.copy(on_host.data_ptr())


def _array(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.numel()
