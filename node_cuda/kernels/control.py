"""Step-size control on the device: the host binds its constants once, and reads one small struct for each step."""

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
    """The state of step-size control in device memory, and the lists of times that it uses.

    outputs: the output times after the first, on the device. pauses: the solve waits for `resume` at each output but
    the last. measures: this control can choose the first step, with the norm of the kernels and without a limit.
    points: the points of a grid; all steps between them are accepted, and the law is not used. tape: the control
    records the accepted steps there; a reverse pass over the tape has another control, without a tape. reads: the host
    reads since they were last counted.
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
        """Begin at t0 with a step of size h. None: `initial_norms` and `initial_change` choose the size."""
        self._plan.start_control(t0, -1.0 if h is None else h)

    def start_at(self, t0: Tensor, h: float | None) -> None:
        """Begin at a time on the device: t0 is a tensor with one double."""
        self._plan.start_control_at(t0.data_ptr(), -1.0 if h is None else h)

    def initial_norms(self, y0: Tensor, f0: Tensor) -> None:
        """Compute the first half of Hairer's starting step. The current step is then the Euler step that probes f."""
        self._plan.initial_norms(y0.data_ptr(), f0.data_ptr())

    def initial_change(self, y0: Tensor, f0: Tensor, f1: Tensor) -> None:
        """Compute the second half, with the field f1 after the Euler step. The current step is then the first step."""
        self._plan.initial_change(y0.data_ptr(), f0.data_ptr(), f1.data_ptr())

    def judge_ratio(self, ratio: Tensor) -> None:
        """Judge the step by error ratios that were computed elsewhere: a tensor of doubles on the device."""
        self._plan.judge_ratio(_array(ratio))

    def next_of_grid(self) -> None:
        """Move to the next point of the grid. The first call begins at the first point."""
        self._plan.next_of_grid(_array(self.points))

    def resume(self) -> None:
        """Continue a solve that waits at an output."""
        self._plan.resume(_array(self.points))

    def begin_reverse(self, tape: StepLog) -> None:
        """Begin a reverse pass over the recorded steps, at the end of the last one.

        This control must be the one of the reverse pass. It becomes active if there is a step to reverse. If the tape
        does not have all steps, its status becomes RECORD_FULL.
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
        """The address of the state in device memory."""
        return self._ctl.data_ptr()

    @property
    def state(self) -> Tensor:
        """The state itself, as bytes on the device."""
        return self._ctl

    @property
    def jumped(self) -> Tensor:
        """Whether the last judged step ended at a discontinuity: a 0-d tensor on the device."""
        return self._ctl.view(torch.int32)[self._struct.JUMP_WORD] != 0

    @property
    def succeeded(self) -> Tensor:
        """Whether nothing has failed so far: a 0-d tensor on the device."""
        return self._ctl.view(torch.int32)[self._struct.STATUS_WORD] == 0

    def read(self) -> ControllerSnapshot:
        """Return a snapshot of the state. This is the only host read of a step, and the host waits only here."""
        self.reads += 1
        return self._plan.read_control(self._host.data_ptr())

    def snapshot_of(self, state: Tensor) -> ControllerSnapshot:
        """Return the snapshot in a copy of `state`. One host read."""
        on_host = state.cpu()
        return self._struct.copy(on_host.data_ptr())


def _array(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.numel()
