"""The exact adjoint of one step of an implicit method and its outputs, for a constant step size.

The step is taken again while autograd records. Stages that Newton's iterations found are differentiated by the implicit
function theorem at their solution, and a Rosenbrock step through its linear solves. So the adjoint is one vjp of the
step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from node_cuda.gradients.discrete.step_adjoint import Back, Cotangent, Evaluation, Outputs, TimeCotangent, of_times
from node_cuda.gradients.discrete.trajectory import State, StepRecord
from node_cuda.gradients.reached import UsedParameters
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.stage_times import Interval
from node_cuda.kernels.sums import GradientAccumulator
from node_cuda.methods.implicit.steps import implicit_steps
from node_cuda.methods.implicit.tableau import slope_row
from node_cuda.methods.interpolation import of_implicit
from node_cuda.methods.registry import Method
from node_cuda.methods.step import Span, Step
from node_cuda.options import FixedImplicitOptions, ImplicitOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import SolveError, Status


class ImplicitStepAdjoint:
    """Propagates cotangents back over single steps, as `step_adjoint.StepAdjoint` does. It holds the graph of a whole
    step.

    first: not called, because no evaluation of the forward solve is made again at the same point. timed: compute the
    cotangents of the grid too. rates: dL/dt of the outputs so far, by their index. They come from the slope of the
    dense output, because func at an output would multiply its error by the stiffness.
    """

    at_once = True
    first: Callable[[Evaluation], None] | None = None

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        method: Method,
        params: Sequence[Tensor],
        sums: GradientAccumulator,
        reached: UsedParameters,
        *,
        timed: bool,
    ) -> None:
        self.field = problem.field
        self.params = tuple(params)
        self.sums = sums
        self.reached = reached
        self.nfe = 0
        self.rates: dict[int, Tensor] = {}
        self.cotangents = arithmetic
        assert method.implicit is not None
        assert isinstance(method.options, (ImplicitOptions, FixedImplicitOptions))
        self.timed = timed
        self.stats = Stats()
        self.stepper = implicit_steps(
            problem, arithmetic, method.implicit, method.options, self.stats, everywhere=False
        )
        self.chord = isinstance(method.options, FixedImplicitOptions) and method.options.interp == "linear"
        self.interpolant = of_implicit(self.stepper, chord=self.chord)
        self._direction = problem.direction

    def plain(self, t: Tensor, z: Tensor) -> Tensor:
        """The field at (t, z), without a graph."""
        self.nfe += 1
        return self.field(t, z)

    def advance(self, taken: StepRecord, state: State, then: StepRecord) -> State:
        """Return the state at the end of a step, with which the step `then` begins."""
        step = self._again(taken, state.y0, state.k1)
        return State(step.y1, step.k[-1] if then.carried else None)

    def back(self, taken: StepRecord, state: State, outgoing: Cotangent, outputs: Outputs | None, shared: bool) -> Back:
        """Return the cotangents at the start of a step, from those at its end and from its outputs."""
        with torch.enable_grad():
            y0 = state.y0.detach().requires_grad_(True)
            k1 = None if state.k1 is None else state.k1.detach().requires_grad_(True)
            ends = self._ends(taken.at) if self.timed else ()
            step = self._again(taken, y0, k1, ends)
            given = [(step.y1, outgoing.lam)]
            if outgoing.kappa is not None:
                given.append((step.k[-1], outgoing.kappa))
            if outputs is not None and outputs.places is not None:
                given += [
                    (step.y1 if x == 1.0 else self.interpolant.evaluate(step, step.k, x), g)
                    for x, g in zip(outputs.places, outputs.gradients, strict=True)
                ]
            given = [(x, g) for x, g in given if x.requires_grad]
            inputs = [y0, *([] if k1 is None else [k1]), *ends, *self.params]
            found = list(
                torch.autograd.grad([x for x, _ in given], inputs, [g.to(x.dtype) for x, g in given], allow_unused=True)
            )
        lam = found.pop(0)
        lam = torch.zeros_like(y0) if lam is None else lam.detach()
        kappa = None if k1 is None else found.pop(0)
        by_ends = [found.pop(0) for _ in ends]
        self.sums.begin()
        if self.params:
            self.reached.see(found)
            self.sums.add(found, 1.0, 0.0)
        self.sums.commit()
        slopes = self._slopes(step, outputs)
        if outputs is not None:
            self.rates.update({outputs.first + i: slope / step.at.signed for i, slope in enumerate(slopes)})
        cotangent = Cotangent(lam, None if kappa is None else kappa.detach())
        return Back(cotangent, self._of_time(by_ends, y0, slopes) if self.timed else None)

    def _slopes(self, step: Step, outputs: Outputs | None) -> list[Tensor]:
        """Return dL/dx of each output, x its place in the step."""
        if outputs is None or outputs.places is None:
            return []
        k, slopes = [x.detach() for x in step.k], []
        for x, g in zip(outputs.places, outputs.gradients, strict=True):
            if self.chord:
                slope = (step.y1 - step.y0).detach()
            else:
                row = slope_row(self.stepper.tableau, x)
                slope = self.cotangents.combine(torch.zeros_like(k[0]), k, row, step.at.signed)
            slopes.append(self.cotangents.real_dot(g, slope))
        return slopes

    def _ends(self, at: Interval) -> Span:
        """Return the ends of a step as tensors of which autograd records derivatives."""
        clock = self.stepper.arithmetic.clock
        start, stop = (
            torch.tensor(self._direction * s, dtype=clock.dtype, device=clock.device, requires_grad=True)
            for s in (at.t0, at.t1)
        )
        return start, stop

    @staticmethod
    def _of_time(by_ends: Sequence[Tensor | None], y0: Tensor, slopes: list[Tensor]) -> TimeCotangent:
        """Return the cotangents of the grid, from those of both ends of the step."""
        zero = torch.zeros((), dtype=of_times(y0.dtype), device=y0.device)
        start, stop = (zero if g is None else g.to(zero) for g in by_ends)
        return TimeCotangent(stop, start + stop, [slope.to(zero) for slope in slopes])

    def _again(self, taken: StepRecord, y0: Tensor, k1: Tensor | None, ends: Span | tuple[()] = ()) -> Step:
        """Return the step, from its own Jacobian, as no other is at hand. ends: its ends, where autograd records."""
        at, span = taken.at, None
        (t,) = self.stepper.arithmetic.times(taken.start, (taken.node,), taken.side)
        if ends:
            start, stop = span = ends
            size = stop - start
            at = self.stepper.arithmetic.interval(at.t0, at.t1, at.h, at.signed + (size - size.detach()))
            t = t + (start - start.detach())
        before = self.field.nfe
        step = self.stepper.again(at, t, y0, k1, span)
        self.nfe += self.field.nfe - before
        if step is None:
            raise SolveError(
                Status.NOT_SOLVED, self._direction * taken.at.t0, self.stats, "A step was taken again backwards."
            )
        return step
