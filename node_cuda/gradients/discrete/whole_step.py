"""The exact adjoint of one explicit Runge-Kutta step of a small state: one vjp of the whole step.

`StepAdjoint` takes one vjp of each stage, and sums the cotangents by itself. For a small state the call of autograd
takes longer than the sums, and this file calls it once a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from node_cuda.gradients.discrete.step_adjoint import Back, Cotangent, Outputs, StepAdjoint
from node_cuda.gradients.discrete.trajectory import State, StepRecord
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.problem.problem import Problem

SMALL, FEW = 2**14, 2**16
"""A state with at most SMALL elements is small: for 2**16 elements one vjp a step saves no time. It saves none either
for more parameters than FEW, and autograd's own sum over the stages takes twice their memory."""


def is_small(problem: Problem, arithmetic: Arithmetic, params: Sequence[Tensor], timed: bool) -> bool:
    """Return whether `WholeStepAdjoint` is right and fast. timed: the cotangents of the grid are wanted.

    The kernels have no derivatives, and cotangents of half states are float32.
    """
    y0 = problem.y0
    if type(arithmetic) is not Arithmetic or timed or y0.itemsize < 4 or y0.numel() > SMALL:
        return False
    return sum(map(torch.numel, params)) <= FEW


class WholeStepAdjoint(StepAdjoint):
    """A `StepAdjoint` that holds the graph of a whole step and takes one vjp of it.

    It does so if `StepAdjoint` would hold all graphs of a step, except where an interpolant has extra stages.
    """

    def back(
        self, taken: StepRecord, state: State, outgoing: Cotangent, outputs: Outputs | None, shared: bool = True
    ) -> Back:
        """Return the cotangents before a step, from those after it and from those of its outputs.

        shared: the step before has outputs inside, which need this step's first stage. It is then evaluated apart from
        the others, so that both steps use one evaluation.
        """
        form, at, last = self.form, taken.at, self.form.own - 1
        inside = outputs is not None and any(x < 1.0 for x in outputs.places or ())
        compares = self.first is not None  # the first evaluation is looked at
        if compares or not self.at_once or self.field.copies_output or (inside and form.stages > form.own):
            return super().back(taken, state, outgoing, outputs, shared)
        self.sums.begin()
        lam, at_start, extra = self.into_stages(at, outgoing, outputs)
        if form.fsal and outgoing.stage is not None and last in extra:  # the field at y1, evaluated in the next step
            mu, _ = self.vjp(outgoing.stage, extra.pop(last))
            lam = lam if mu is None else lam + mu
        stage = None
        with torch.enable_grad():
            y0 = state.y0.detach().requires_grad_(True)
            if state.k1 is not None:
                k = [state.k1.detach().requires_grad_(True)]
            elif taken.carried and shared:
                stage = self.taped(*self.first_stage(taken, state))
                assert stage.k is not None
                k = [stage.k.detach().requires_grad_(True)]
            else:
                k = [self.plain(self.first_stage(taken, state)[0], y0)]
            for i, t in self.slots(at, form.own - form.fsal):
                k.append(self.plain(t, self.arithmetic.rk_stage(self.prepared[i], at, y0, k, t)))
            y1, _ = self.end(at, state._replace(y0=y0), k)
            if form.fsal and last in extra:
                (t,) = self.arithmetic.times(at, (1.0,), form.sides[last])
                k.append(self.plain(t, y1))
        passed = state.k1 is not None or stage is not None  # the step before computes the first stage's vjp
        ends = [(y1, lam), *((k[i], kappa) for i, kappa in extra.items() if k[i].requires_grad)]
        inputs = (y0, *([k[0]] if passed else ()), *self.params)
        mu, *found = torch.autograd.grad([x for x, _ in ends], inputs, [g for _, g in ends], allow_unused=True)
        kappa = found.pop(0) if passed else None
        if self.params and any(x.requires_grad for x in k[passed:]):
            self.reached.see(found)
            self.sums.add(found, 1.0, 0.0)
        self.commit_sums()
        return Back(Cotangent(sum(at_start, mu), kappa, stage), None)
