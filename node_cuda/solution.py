"""What a solve returns, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from node_cuda._typing import State
from node_cuda.status import SolveError, Status


class Pending(Protocol):
    """A solve on the device whose end nobody has looked at."""

    def end(self, stats: Stats) -> SolveError | None:
        """Wait for it, and fill in what it cost: how it failed, if it did. stats: those that it is pending in."""
        ...


@dataclass
class Stats:
    """What a solve cost. Filled while it runs; nfe_backward when the gradient is taken.

    nfe: evaluations of func. nfe_backward: those of the backward pass (of the adjoint each with one vjp). accepted,
    rejected: steps (fixed grids only accept). host_reads: how often the host waited for a number from the device.
    step_times: the times between accepted steps, t0 included, if `options=dict(record_steps=True)`.

    loop: who repeats the steps, the "host", or with `options=dict(cuda_graph=True)` the device: in one launch
    ("while"), or in "batches" of launches; why: why it is not a better one. loop_backward, why_backward: the same of
    the backward pass. Of a captured solve nfe counts what the device evaluated. With throw="deferred" what it cost is
    not known before `Solution.check()`.

    Of implicit methods: jacobians: how often df/dy was computed, each with one of the nfe; factorisations of the
    matrix; linear_solves with it; newton_iterations, each with one of the nfe; rejected_by_newton: those of the
    rejected steps whose equations could not be solved. Of explicit methods with two stages at the end of a step:
    stiff_steps: how many of the accepted steps that were looked at (every 50th, and each one under suspicion) were
    limited by stability.

    Of gradient="discrete": checkpoint_slots: how many states may be held, None for one a step; peak_checkpoints: the
    most that were; recomputed_steps: steps that the backward pass took again to get states that were not kept, besides
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
    loop_backward: str = "host"
    why_backward: str | None = None
    checkpoint_slots: int | None = None
    peak_checkpoints: int = 0
    recomputed_steps: int = 0
    graph_of: str | None = None
    reconstruction_error: float | None = None
    jacobians: int = 0
    factorisations: int = 0
    linear_solves: int = 0
    newton_iterations: int = 0
    rejected_by_newton: int = 0
    stiff_steps: int = 0
    pending: list[Pending] = field(default_factory=list, repr=False, compare=False)
    reached: tuple[float, Tensor] | None = field(default=None, repr=False, compare=False)
    """Of a solve that failed: the time and the flat state, without a gradient, after its last accepted step."""

    @property
    def steps_again(self) -> int:
        """Another name of `recomputed_steps`."""
        return self.recomputed_steps

    def __getstate__(self) -> dict[str, Any]:
        # What a copy could not wait for: it lies on the device, and is the original's. What is large stays here, too.
        return {**vars(self), "pending": [], "reached": None}

    def __str__(self) -> str:
        return f"nfe = {self.nfe}, accepted steps = {self.accepted}, rejected = {self.rejected}"


@dataclass
class Solution:
    """The solution of an initial value problem.

    ts: the times, as given. ys: y at these times, of shape (len(ts), *y0.shape), or a tuple of such; after an event
    y0 and y(event_t). stats: what it cost. status: how it ended; with throw="deferred" PENDING until `check`. event_t:
    where the event was, a 0-d tensor, or None.
    integral: of what was integrated beside y, from ts[0] to these times, of shape (len(ts), *its shape), or None.
    failed_after: with `options=dict(throw=False)` the time and the state where the last accepted step of a solve that
    failed ended, without a gradient; else None.
    """

    ts: Tensor
    ys: State
    stats: Stats
    status: Status
    event_t: Tensor | None = None
    integral: Tensor | None = None
    failed_after: tuple[Tensor, State] | None = field(default=None, repr=False)

    @property
    def t_reached(self) -> Tensor:
        """The last time that the solve reached, a 0-d tensor: that of the last output, or `failed_after`."""
        return self.ts[self._last].detach() if self.failed_after is None else self.failed_after[0]

    @property
    def y_reached(self) -> State:
        """The state at `t_reached`, like y0."""
        if self.failed_after is not None:
            return self.failed_after[1]
        return tuple(part[self._last] for part in self.ys) if isinstance(self.ys, tuple) else self.ys[self._last]

    def check(self) -> Solution:
        """Raise SolveError if the solve failed, or its backward pass as far as it was taken. With
        `options=dict(throw="deferred")` this waits for the device, and fills in stats and status."""
        failures = [pending.end(self.stats) for pending in self.stats.pending]
        failure = next((f for f in failures if f is not None), None)
        if failure is not None:
            self.status = failure.status
            raise failure
        if self.stats.pending:
            self.status = Status.SUCCESS
        if self.status is not Status.SUCCESS:
            raise SolveError(self.status, float(self.t_reached), self.stats)
        return self

    @property
    def _last(self) -> int:
        """The index of the last output, or of a failed solve of the last one that is not NaN."""
        if self.status is Status.SUCCESS:
            return len(self.ts) - 1
        parts = self.ys if isinstance(self.ys, tuple) else (self.ys,)
        finite = [bool(all(x[i].isfinite().all() for x in parts)) for i in range(len(self.ts))]
        return max(finite.index(False) - 1, 0) if False in finite else len(self.ts) - 1
