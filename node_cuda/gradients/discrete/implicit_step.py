"""The exact adjoint of one step of an implicit method with its outputs, the step size held fixed.

The step is taken again on the tape. A stage of an ESDIRK method is differentiated there by the implicit function
theorem at its solution, a Rosenbrock step through its linear solves; so one vjp of the step is its adjoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from node_cuda.gradients.discrete.step_adjoint import Back, Cotangent, Evaluation, Outputs
from node_cuda.gradients.discrete.trajectory import State, StepRecord
from node_cuda.gradients.reached import UsedParameters
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.sums import GradientAccumulator
from node_cuda.methods.implicit.steps import implicit_steps
from node_cuda.methods.implicit.tableau import slope_row
from node_cuda.methods.interpolation import of_implicit
from node_cuda.methods.registry import Method
from node_cuda.methods.step import Step
from node_cuda.options import ImplicitOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import SolveError, Status


class ImplicitStepAdjoint:
    """As `step_adjoint.StepAdjoint`; the graph of a step is held at once.

    first: of no use here, as no evaluation of the forward solve is made again at the same point. rates: dL/dt of the
    outputs so far, by their index: by the slope of the dense output, where func at an output would multiply its error
    by the stiffness.
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
    ) -> None:
        self.field = problem.field
        self.params = tuple(params)
        self.sums = sums
        self.reached = reached
        self.nfe = 0
        self.rates: dict[int, Tensor] = {}
        self.cotangents = arithmetic
        assert method.implicit is not None and isinstance(method.options, ImplicitOptions)
        self.stats = Stats()
        self.stepper = implicit_steps(
            problem, arithmetic, method.implicit, method.options, self.stats, everywhere=False
        )
        self.interpolant = of_implicit(self.stepper)
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
            step = self._again(taken, y0, k1)
            given = [(step.y1, outgoing.lam)]
            if outgoing.kappa is not None:
                given.append((step.k[-1], outgoing.kappa))
            if outputs is not None and outputs.places is not None:
                given += [
                    (step.y1 if x == 1.0 else self.interpolant.evaluate(step, step.k, x), g)
                    for x, g in zip(outputs.places, outputs.gradients, strict=True)
                ]
            given = [(x, g) for x, g in given if x.requires_grad]
            inputs = [y0, *([] if k1 is None else [k1]), *self.params]
            found = torch.autograd.grad(
                [x for x, _ in given], inputs, [g.to(x.dtype) for x, g in given], allow_unused=True
            )
        if outputs is not None and outputs.places is not None:
            self._rate(step, outputs.first, outputs.places, outputs.gradients)
        lam = torch.zeros_like(y0) if found[0] is None else found[0]
        kappa, of_params = (None, found[1:]) if k1 is None else (found[1], found[2:])
        self.sums.begin()
        if self.params:
            self.reached.see(of_params)
            self.sums.add(of_params, 1.0, 0.0)
        self.sums.commit()
        return Back(Cotangent(lam.detach(), None if kappa is None else kappa.detach()), None)

    def _rate(self, step: Step, first: int, places: Sequence[float], gradients: Tensor) -> None:
        k = [x.detach() for x in step.k]
        for m, (x, g) in enumerate(zip(places, gradients, strict=True), start=first):
            row = slope_row(self.stepper.tableau, x)
            slope = self.cotangents.combine(torch.zeros_like(k[0]), k, row, 1.0)
            self.rates[m] = self.cotangents.real_dot(g, slope)

    def _again(self, taken: StepRecord, y0: Tensor, k1: Tensor | None) -> Step:
        """The step, from its own Jacobian, as no other is at hand."""
        arithmetic = self.stepper.arithmetic
        (t,) = arithmetic.times(taken.start, (taken.node,), taken.side)
        before = self.field.nfe
        step = self.stepper.again(taken.at, t, y0, k1)
        self.nfe += self.field.nfe - before
        if step is None:
            raise SolveError(
                Status.NOT_SOLVED, self._direction * taken.at.t0, self.stats, "A step was taken again backwards."
            )
        return step
