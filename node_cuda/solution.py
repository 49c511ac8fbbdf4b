"""The result of a solve, and its statistics."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Generic, NamedTuple, Protocol

from torch import Tensor

from node_cuda._plots import plot_solution, plot_steps
from node_cuda._typing import S_co
from node_cuda.status import SolveError, Status


class Pending(Protocol):
    """A solve on the device whose status has not been read back yet."""

    def end(self, stats: Stats) -> SolveError | None:
        """Wait for the solve, fill in the statistics, and return the SolveError if it failed, else None.

        stats: the statistics of the solution that waits for this solve.
        """
        ...


class TriedStep(NamedTuple):
    """A step that was tried, from t to t + h. error: its error in units of the tolerances; NaN on a fixed grid."""

    t: float
    h: float
    error: float
    accepted: bool


@dataclass
class Stats:
    """The statistics of a solve. Filled in while it runs; nfe_backward when the gradient is computed.

    nfe: evaluations of func. nfe_backward: evaluations in the backward pass (in the adjoint each with one vjp).
    accepted, rejected: steps (fixed grids reject none). host_reads: how often the host waited for a number from the
    device. With `options=dict(record_steps=True)` step_times: the times between accepted steps, t0 included; and steps:
    all steps that were tried, also the rejected ones, as `TriedStep(t, h, error, accepted)`.

    loop: where the step loop runs: the "host", or with `options=dict(cuda_graph=True)` the device, in one launch
    ("while") or in "batches" of launches, or with `options=dict(compile=True)` as "native" code. why: the reason why a
    faster loop was not used. loop_backward, why_backward: the same for the backward pass. nfe of a captured solve
    counts the evaluations on the device. With throw="deferred" the statistics are complete only after
    `Solution.check()`.

    why_gradient: with gradient="auto" the reason why "adjoint" was taken; None where "discrete" was.

    compile_seconds: the time that this solve waited for the compiler, with options=dict(compile=True).

    Of implicit methods: jacobians: how often df/dy was computed, each with one of the nfe; factorisations of the
    matrix; linear_solves with it; newton_iterations, each with one of the nfe; rejected_by_newton: those of the
    rejected steps whose equations could not be solved. Of explicit methods with two stages at the end of a step:
    stiff_steps: how many of the accepted steps that were looked at (every 50th, and each one under suspicion) were
    limited by stability.

    With gradient="discrete": checkpoint_slots: the number of states that may be kept, None for one for each step.
    peak_checkpoints: the largest number that were kept. recomputed_steps: steps that the backward pass repeated to get
    states that were not kept, without the one repeat of each step. graph_of: the unit of the autograd graph in the
    backward pass, a whole "step", or a "stage" if a step would take too much memory. With gradient="adjoint" and
    `options=dict(check_reconstruction=True)`: reconstruction_error, the largest error of the reconstructed y at an
    output, in units of the tolerances.
    """

    nfe: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0
    host_reads: int = 0
    step_times: list[float] | None = None
    steps: list[TriedStep] | None = None
    loop: str = "host"
    why: str | None = None
    loop_backward: str = "host"
    why_backward: str | None = None
    why_gradient: str | None = None
    compile_seconds: float = 0.0
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
    """For a failed solve: the time and the flat state after its last accepted step, without a gradient."""

    def plot(self, axes: Any = None) -> Any:
        """Plot the sizes of the steps, rejected ones too, and their errors against t. Needs matplotlib.

        The solve must have recorded them: `solve(..., options=dict(record_steps=True))`. axes: two matplotlib axes, by
        default those of a new figure. Returns the axes.
        """
        return plot_steps(self.steps, axes)

    @property
    def steps_again(self) -> int:
        """Another name for `recomputed_steps`."""
        return self.recomputed_steps

    def __getstate__(self) -> dict[str, Any]:
        # A copy cannot wait for solves on the device; the original can. The large state is not copied either.
        return {**vars(self), "pending": [], "reached": None}

    def __repr__(self) -> str:
        shown = [f"{name}={getattr(self, name)!r}" for name in ("nfe", "nfe_backward", "accepted", "rejected")]
        for f in fields(self)[4:]:
            value = getattr(self, f.name)
            if f.repr and value != f.default:
                kind = "steps" if f.name == "steps" else "times"
                listed = isinstance(value, list)
                shown.append(f"{f.name}=<{len(value)} {kind}>" if listed else f"{f.name}={value!r}")
        return f"Stats({', '.join(shown)})"

    def __str__(self) -> str:
        return f"nfe = {self.nfe}, accepted steps = {self.accepted}, rejected = {self.rejected}"


@dataclass
class Solution(Generic[S_co]):
    """The solution of an initial value problem.

    ts: the times, as given. ys: y at these times, of shape (len(ts), *y0.shape), or a tuple of such; after an event y0
    and y(event_t). stats: the statistics. status: how the solve ended; with throw="deferred" PENDING until `check`.
    event_t: the time of the event, a 0-d tensor, or None. integral: the integral along y, from ts[0] to these times, of
    shape (len(ts), *its shape), or None. failed_after: for a failed solve with `options=dict(throw=False)` the time and
    the state at the end of its last accepted step, without a gradient; else None.
    """

    ts: Tensor
    ys: S_co
    stats: Stats
    status: Status
    event_t: Tensor | None = None
    integral: Tensor | None = None
    failed_after: tuple[Tensor, S_co] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        parts: tuple[Any, ...] = self.ys if isinstance(self.ys, tuple) else (self.ys,)
        shapes = ", ".join(str(tuple(x.shape)) for x in parts)
        event = "" if self.event_t is None else ", up to an event"
        integral = "" if self.integral is None else f", integral of shape {tuple(self.integral.shape)}"
        state = f"ys of shape {shapes}, {parts[0].dtype}{integral}"
        return (
            f"Solution({self.status.name}, {_between(self.ts)}{event}, {state}, {self.stats}, "
            f"nfe_backward = {self.stats.nfe_backward})"
        )

    def plot(self, ax: Any = None) -> Any:
        """Plot y against t, one line for each element, for the first ones only if they are many. Needs matplotlib.

        Where the steps were recorded, `options=dict(record_steps=True)`, their ends are marks on the axis of t. ax: a
        matplotlib axes, by default that of a new figure. Returns it.
        """
        return plot_solution(self.ts, self.ys, self.stats.step_times, ax)

    @property
    def t_reached(self) -> Tensor:
        """The last time that the solve reached, a 0-d tensor: the time of the last output, or that of
        `failed_after`."""
        return self.ts[self._last].detach() if self.failed_after is None else self.failed_after[0]

    @property
    def y_reached(self) -> S_co:
        """The state at `t_reached`, like y0."""
        if self.failed_after is not None:
            return self.failed_after[1]
        ys: Any = self.ys
        last: Any = tuple(part[self._last] for part in ys) if isinstance(ys, tuple) else ys[self._last]
        return last

    def check(self) -> Solution[S_co]:
        """Raise SolveError if the solve failed, or if its backward pass has failed so far.

        With `options=dict(throw="deferred")` this waits for the device, and fills in stats and status.
        """
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
        """The index of the last output; for a failed solve that of the last output without NaN."""
        if self.status is Status.SUCCESS:
            return len(self.ts) - 1
        parts: tuple[Any, ...] = self.ys if isinstance(self.ys, tuple) else (self.ys,)
        finite = [bool(all(x[i].isfinite().all() for x in parts)) for i in range(len(self.ts))]
        return max(finite.index(False) - 1, 0) if False in finite else len(self.ts) - 1


def _between(ts: Tensor) -> str:
    """The first and the last of these times, in words."""
    ends = ", ".join(f"{name} = {t:.6g}" for name, t in zip(("t0", "t1"), ts.detach()[[0, -1]].tolist(), strict=True))
    return f"{len(ts)} times, {ends}"
