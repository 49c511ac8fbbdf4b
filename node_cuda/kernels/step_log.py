"""The tape of a solve on the device: its accepted steps, and the rows for the states that they began with.

csrc/control/tape.h writes it; this module allocates its memory. The owner of the tape holds the states as rows of one
tensor: `capacity` rows, and one more row for states that are not kept.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


class StepLog:
    """The tape in device memory. capacity: the number of steps that can be recorded, at least one.

    first: the time of the first step's first stage: its start (0), or just after it (1). carries: the first stages of
    later steps are the last stages of the steps before, except after jumps. If it is False, they are at the same place
    as that of the first step.
    """

    def __init__(self, module: ModuleType, device: torch.device, capacity: int, *, first: int, carries: bool) -> None:
        if capacity < 1:
            raise ValueError(f"a tape has room for at least one step; got {capacity}")
        self.capacity = capacity
        self._module = module
        self._size = module.RECORDED_SIZE
        self._steps = torch.zeros(capacity * self._size, dtype=torch.uint8, device=device)
        content = bytearray(module.step_log(self._steps.data_ptr(), capacity, first, carries))
        self._struct = torch.frombuffer(content, dtype=torch.uint8).to(device, copy=True)
        words, slot, row = self._struct.view(torch.int64), module.STEP_LOG_SLOT, module.STEP_LOG_ROW
        self.slot = words[slot : slot + 1]
        """The row for the state that the last judged step began with; `capacity` for a state that is not kept."""
        self.row = words[row : row + 1]
        """The number of the last reversed step, which is also the row of the state that it began with."""

    @property
    def address(self) -> int:
        """The address of the struct in device memory."""
        return self._struct.data_ptr()

    def memory(self, count: int | None) -> list[Tensor]:
        """Return the tensors that hold the content of the tape, for the first `count` steps; None: for all steps."""
        used = self.capacity if count is None else count
        return [self._struct, self._steps[: used * self._size]]

    def read(self, count: int) -> list[tuple[float, float, float, int]]:
        """Return (t0, t1, h, begins) of the first `count` steps. One host read."""
        content = self._steps[: count * self._size].cpu()
        return self._module.recorded_steps(content.data_ptr(), count)
