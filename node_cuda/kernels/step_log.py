"""The tape of a solve on the device: its accepted steps, and the rows for the states that they began with.

What is on it is decided by csrc/control/tape.h; here lies its memory. The states themselves are the owner's: rows of
one tensor, `capacity` of them and one more for what is not kept.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


class StepLog:
    """In device memory. capacity: the steps that can be recorded, at least one.

    first: when the first stage of the first step takes place: at its start (0) or just beyond it (1). carries: those of
    the other steps are carried on from the step before, but beyond jumps; else they take place as the first one's.
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
        """The row for the state that the step judged last began with; `capacity` for one that is not kept."""
        self.row = words[row : row + 1]
        """The number of the step taken back last, and the row of the state that it began with."""

    @property
    def address(self) -> int:
        """Of the struct, in device memory."""
        return self._struct.data_ptr()

    def memory(self, count: int | None) -> list[Tensor]:
        """The tensors that say what is on it, as far as so many steps need them; None: all."""
        used = self.capacity if count is None else count
        return [self._struct, self._steps[: used * self._size]]

    def read(self, count: int) -> list[tuple[float, float, float, int]]:
        """(t0, t1, h, begins) of the first steps on it. One host read."""
        content = self._steps[: count * self._size].cpu()
        return self._module.recorded_steps(content.data_ptr(), count)
