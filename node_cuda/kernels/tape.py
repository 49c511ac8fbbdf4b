"""The tape of a solve on the device: its accepted steps, and which of the states that they began with are kept.

What is on it is decided by csrc/tape.h; here lies its memory. The kept states themselves are the owner's: rows of one
tensor, `slots` of them and one more for what is not kept.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

_LAYOUT = struct.Struct("=4q2i7q2i")  # struct Tape of csrc/tape.h
_RECORDED = struct.Struct("=4d2q2i")  # struct Recorded
_SLOT, _ROW = 9, 11  # Tape.slot and Tape.row, as numbers of words of eight bytes


class Tape:
    """In device memory. capacity: the steps that can be recorded; slots: the states that can be kept, at least one.

    first: when the first stage of the first step takes place: at its start (0) or just beyond it (1). carries: those of
    the other steps are carried on from the step before, but beyond jumps; else they take place as the first one's.
    """

    def __init__(self, device: torch.device, capacity: int, slots: int, *, first: int, carries: bool) -> None:
        if capacity < 0 or slots < 1:
            raise ValueError(f"a tape has room for at least no step and one state; got {capacity} and {slots}")
        self.capacity = capacity
        self.slots = slots
        self._steps = torch.zeros(capacity * _RECORDED.size, dtype=torch.uint8, device=device)
        self.places = torch.zeros(slots, dtype=torch.int64, device=device)
        constants = self._steps.data_ptr(), capacity, self.places.data_ptr(), slots, first, carries
        empty = 0, 0, 1, 0, slots, -1, slots, 0, 0  # as start_control leaves it
        content = bytearray(_LAYOUT.pack(*constants, *empty))
        self._struct = torch.frombuffer(content, dtype=torch.uint8).to(device, copy=True)
        words = self._struct.view(torch.int64)
        self.slot = words[_SLOT : _SLOT + 1]
        """The row for the state that the step judged last began with; `slots` for one that is not kept."""
        self.row = words[_ROW : _ROW + 1]
        """The row of the state that the step taken back last began with."""

    @property
    def address(self) -> int:
        """Of the struct, in device memory."""
        return self._struct.data_ptr()

    def memory(self, count: int | None) -> list[Tensor]:
        """The tensors that say what is on it, as far as so many steps need them; None: all."""
        used = self.capacity if count is None else min(count, self.capacity)
        return [self._struct, self.places, self._steps[: used * _RECORDED.size]]

    def read(self, count: int) -> list[tuple[float, float, float, int]]:
        """(t0, t1, h, begins) of the first steps on it. One host read."""
        content = self._steps[: count * _RECORDED.size].cpu().numpy().tobytes()
        return [(t0, t1, h, begins) for t0, t1, h, _, _, _, begins, _ in _RECORDED.iter_unpack(content)]


def slots_after(steps: int, slots: int) -> dict[int, int]:
    """Which states are kept when so many steps were accepted, as {the number of the step: the slot}.

    Those that `gradients.checkpoints.Checkpoints` keeps of an unknown number of steps; the slots are those of the tape.
    """
    kept: dict[int, int] = {}
    free = iter(range(slots))
    stride, i = 1, 0
    while i < steps:
        if len(kept) == slots:
            stride *= 2
            kept = {place: slot for place, slot in kept.items() if place % stride == 0}
            free = iter(sorted(set(range(slots)) - set(kept.values())))
            i += i % stride  # to the next multiple
            continue
        kept[i] = next(free)
        i += stride
    return kept
