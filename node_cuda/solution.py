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
    step_times: the times between accepted steps, t0 included, if `options=dict(record_steps=True)`.

    loop: who repeats the steps, the "host", or with `options=dict(cuda_graph=True)` the device: in one launch
    ("while"), or in "batches" of launches; why: why it is not a better one. Of a captured solve nfe counts what the
    device evaluated.

    Of gradient="discrete": checkpoint_slots: how many states may be held, None for one a step; peak_checkpoints: the
    most that were; steps_again: steps that the backward pass took again to get at states that were not kept, besides
    the replay of each; graph_of: what the backward pass holds a graph of, a whole "step" or, where that would take too
    much memory, a "stage" at a time. Of gradient="adjoint" with `options=dict(check_reconstruction=True)`:
    reconstruction_error, the largest error of y rebuilt backwards at an output, in units of the tolerances.
    """

    nfe: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0
    host_reads: int = 0
    step_times: list[float] | None = None
    loop: str = "host"
    why: str | None = None
    checkpoint_slots: int | None = None
    peak_checkpoints: int = 0
    steps_again: int = 0
    graph_of: str | None = None
    reconstruction_error: float | None = None

    def __str__(self) -> str:
        return f"nfe = {self.nfe}, accepted steps = {self.accepted}, rejected = {self.rejected}"


@dataclass
class Solution:
    """The solution of an initial value problem.

    ts: the times, as given. ys: y at these times, of shape (len(ts), *y0.shape), or a tuple of such; after an event
    y0 and y(event_t). stats: what it cost. status: how it ended. event_t: where the event was, a 0-d tensor, or None.
    integral: of what was integrated beside y, from ts[0] to these times, of shape (len(ts), *its shape), or None.
    """

    ts: Tensor
    ys: State
    stats: Stats
    status: Status
    event_t: Tensor | None = None
    integral: Tensor | None = None
