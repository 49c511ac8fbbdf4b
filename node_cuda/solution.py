"""What a solve returns, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from node_cuda._typing import State
from node_cuda.status import Status


@dataclass
class Stats:
    """What a solve cost. Filled while it runs; nfe_backward when the gradient is taken.

    nfe: evaluations of func. nfe_backward: those of the backward pass (of the adjoint each with one vjp). accepted,
    rejected: steps (fixed grids only accept). host_reads: how often the host waited for a number from the device.
    step_times: the times between accepted steps, t0 included, if `options=dict(record_steps=True)`. Of
    gradient="discrete", peak_checkpoints: the most states held at a time; steps_again: steps that the backward pass
    took again to get at states that were not kept, besides the replay of each.
    """

    nfe: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0
    host_reads: int = 0
    step_times: list[float] | None = None
    peak_checkpoints: int = 0
    steps_again: int = 0

    def __str__(self) -> str:
        return f"nfe = {self.nfe}, accepted steps = {self.accepted}, rejected = {self.rejected}"


@dataclass
class Solution:
    """The solution of an initial value problem.

    ts: the times, as given. ys: y at these times, of shape (len(ts), *y0.shape), or a tuple of such; after an event
    y0 and y(event_t). stats: what it cost. status: how it ended. event_t: where the event was, a 0-d tensor, or None.
    """

    ts: Tensor
    ys: State
    stats: Stats
    status: Status
    event_t: Tensor | None = None
