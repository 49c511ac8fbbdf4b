"""The reverse pass of the discrete adjoint as a CUDA graph: each replay reverses one step; the device holds its index.

    begin, reverse the last step, reverse steps ...

All states are kept. If they do not fit in memory, the host loop does the forward solve and the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from node_cuda.cuda_graphs.cache import captured_or_why, key_of
from node_cuda.cuda_graphs.captured import CapturedSolve, OnFinish
from node_cuda.cuda_graphs.device_loop import release, upload, with_field_of_its_own
from node_cuda.gradients.discrete.cuda_graph_forward import SavedTrajectory
from node_cuda.gradients.discrete.step_adjoint import Cotangent, Outputs, StageTable, StepAdjoint
from node_cuda.gradients.discrete.trajectory import State, StepRecord
from node_cuda.gradients.leaves import with_leaves
from node_cuda.gradients.reached import UsedParameters
from node_cuda.kernels.fused import Fused
from node_cuda.kernels.fused_sums import FusedGradientAccumulator
from node_cuda.kernels.stage_times import HERE
from node_cuda.kernels.step_control import ControllerSnapshot
from node_cuda.loop.assemble import arithmetic_of
from node_cuda.methods.registry import Method
from node_cuda.options import Common
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import SolveError, Status


class DeviceStepAdjoint(StepAdjoint):
    """Reverses the step `here`, which the device holds. start: a 0-d tensor, the time of its first stage."""

    start: Tensor
    here: StepRecord

    def first_stage(self, taken: StepRecord, state: State) -> tuple[Tensor, Tensor]:
        """Return (t, z) of the first stage, with its time from the device."""
        return self.start, state.y0

    def commit_sums(self) -> None:
        """Add the step's gradients of the parameters to the total, if there was a step to reverse."""
        if isinstance(self.sums, FusedGradientAccumulator):
            self.sums.commit_if_accepted(self.here.at)


class CapturedReversePass(CapturedSolve):
    """The captured graphs of a reverse pass.

    lam: at the end, the cotangent of the state that the solve began with, without the gradient of the output there.
    """

    def __init__(
        self, record: SavedTrajectory, problem: Problem, form: StageTable, params: Sequence[Tensor], tier: str | None
    ) -> None:
        super().__init__(problem, tier)
        self.owner = record.owner  # its memory is used
        loop = self.owner.loop
        self.tape, self.states = loop.tape, loop.states
        with self.recorder.aside(), torch.no_grad():
            problem, params = with_leaves(problem, params, loop.y)
            own = with_field_of_its_own(problem._replace(y0=torch.empty_like(loop.y)))
            arithmetic = arithmetic_of(own)
            assert isinstance(arithmetic, Fused)
            self.arithmetic = arithmetic
            self.control = arithmetic.grid_control(())
            self.y, self.lam = torch.empty_like(loop.y), torch.zeros_like(loop.y)
            self.times, self.gradients = problem.times, torch.zeros_like(loop.ys)
            self.reached = UsedParameters(range(len(params)))
            self.params = params
            self.sums = arithmetic.sums(params, with_error=False)
            self.adjoint = DeviceStepAdjoint(
                own, arithmetic, arithmetic, form, params, self.sums, self.reached, timed=False
            )
            (self.adjoint.start,) = arithmetic.slots(arithmetic.current(), (0.0,), HERE)
            self.adjoint.here = StepRecord(arithmetic.current(), False, arithmetic.current(), 0.0, HERE)
            self.times = problem.times
            self._several = len(problem.times) > 2
            self.nfe: dict[str, int] = {}
            self._begin, self._last, self._step = self.record(
                self._begin_walk,
                self._counted("last", lambda: self._reverse_step(dense=True)),
                self._counted("step", lambda: self._reverse_step(dense=self._several)),
            )
            self.repeat, self.why = self.recorder.repeat(self._step, self.control)
        release(own)

    def run(self, record: SavedTrajectory, times: tuple[float, ...], grad_ys: Tensor) -> None:
        """Launch the reverse pass over all steps of a record. The host reads nothing.

        times, grad_ys: the output times, and the gradient of the outputs.
        """
        self.owner.follow()
        self.follow()
        record.load()
        if times != self.times:
            self.times = times
            upload(self.arithmetic.device_times, times)
        self.gradients.copy_(grad_ys)
        self._begin.replay()
        self._last.replay()
        if record.count is not None and self.repeat.tier == "batches":  # the length is known
            self._step.replay(record.count - 1)
        else:
            self.repeat.run()

    def cost(self, count: int) -> int:
        """Return the number of field evaluations in a reverse pass over so many steps."""
        return self.nfe["last"] + (count - 1) * self.nfe["step"]

    def of_params(self) -> list[Tensor]:
        """Return copies of dL/dtheta, each in the dtype of its parameter."""
        return [g.to(p.dtype, copy=True) for g, p in zip(self.sums.total, self.params, strict=True)]

    def _begin_walk(self) -> None:
        self.control.start(0.0, 0.0)
        if isinstance(self.sums, FusedGradientAccumulator):
            self.sums.restart()
        self.lam.zero_()
        self.control.begin_reverse(self.tape)

    def _reverse_step(self, *, dense: bool) -> None:
        state = self._load()
        outputs = Outputs(1, self.gradients[1:], None) if dense else None
        lam = self.adjoint.back(self.adjoint.here, state, Cotangent(self.lam), outputs).cotangent.lam
        self.arithmetic.commit([self.lam], [lam])
        self.control.advance_reverse(self.tape)

    def _load(self) -> State:
        """Load the next step of the reverse pass, and return the state that it began with."""
        self.control.load_step(self.tape, self.adjoint.start)
        torch.index_select(self.states, 0, self.tape.row, out=self.y.unsqueeze(0))
        return State(self.y, None)

    def _counted(self, name: str, work: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does the work and counts its field evaluations in `nfe`."""

        def counted() -> None:
            before = self.adjoint.nfe
            work()
            self.nfe[name] = self.adjoint.nfe - before

        return counted


def try_captured(
    record: SavedTrajectory,
    problem: Problem,
    method: Method,
    form: StageTable,
    grad_ys: Tensor,
    params: Sequence[Tensor],
    used: UsedParameters,
    stats: Stats,
    why: str | None,
) -> tuple[Tensor, list[Tensor]] | None:
    """Return (lam at the first state, dL/dtheta) by a captured reverse pass, or None if the host must do it.

    Then `stats.why_backward` gives the reason. why: a reason that is already known, or None.
    """
    options = method.options
    found: CapturedReversePass | str = captured_or_why(
        options,
        why,
        lambda: (
            "walk",
            record.owner,
            *key_of(problem, method),
            tuple((p.data_ptr(), p.shape, p.stride(), p.dtype) for p in params),
        ),
        problem,
        lambda: _capture(record, problem, form, params, options),
    )
    if isinstance(found, str):
        stats.why_backward = found
        return None
    stats.why_backward = found.why
    stats.graph_of = "stage" if found.adjoint.at_once is False else "step"
    used.reach_as(found.reached)
    with record.owner.lock, found.lock:
        stats.loop_backward = found.repeat.tier
        found.run(record, problem.times, grad_ys)
        lam, of_params = found.lam.clone(), found.of_params()
        walked = found.control.succeeded
        if record.count is None:
            found.begun(found.control, stats, _account(found), options)
    if record.count is not None:
        stats.nfe_backward += found.cost(record.count)
        stats.peak_checkpoints = max(stats.peak_checkpoints, record.count)
        return lam, of_params
    assert record.succeeded is not None
    ok = record.succeeded & walked
    return torch.where(ok, lam, math.nan), [torch.where(ok, g, math.nan) for g in of_params]


def _capture(
    record: SavedTrajectory, problem: Problem, form: StageTable, params: Sequence[Tensor], options: Common
) -> CapturedReversePass:
    with record.owner.lock:
        record.owner.follow()
        record.load()  # the runs before the capture reverse the steps of this record
        return CapturedReversePass(record, problem, form, params, options.cuda_graph.tier)


def _account(walk: CapturedReversePass) -> OnFinish:
    """Return the callback for the end of a reverse pass whose length was not known at its launch.

    The status of the forward solve is read before, so that `stats.accepted` is known.
    """

    def on_finish(now: ControllerSnapshot, stats: Stats) -> SolveError | None:
        status = Status(now.status)
        if status is not Status.SUCCESS:
            return SolveError(status, math.nan, stats)
        stats.nfe_backward += walk.cost(stats.accepted)
        stats.peak_checkpoints = max(stats.peak_checkpoints, stats.accepted)
        return None

    return on_finish
