"""The backward solve if the fixed grid is t itself: plain PyTorch, without an object for each step.

It steps y and a as two tensors. `BackwardSolve` steps [y, a] as one state and gives the same numbers, because the
stages are sums by element. y at the end of an interval is not computed, because the stored output replaces it.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from node_cuda._user_code import in_step, tell_step
from node_cuda.gradients.adjoint.backward_solve import Backward, Found
from node_cuda.gradients.adjoint.field import Rates
from node_cuda.gradients.reached import UsedParameters
from node_cuda.kernels.reference import combine, real_dot
from node_cuda.kernels.sums import GradientAccumulator
from node_cuda.loop import plain_grid


class GridBackwardSolve:
    """The solve of y and a from the last time back to the first, in steps from output to output."""

    def __init__(self, backward: Backward, reached: UsedParameters) -> None:
        self.backward = backward
        self.field = Rates(backward.forward, backward.params, reached)

    @staticmethod
    def applies(backward: Backward) -> bool:
        """Return whether this class can solve the problem (see `loop.plain_grid.applies`)."""
        if backward.settings.checks or backward.forward.adjoint_callbacks:
            return False
        return plain_grid.applies(backward.forward, backward.method)

    def run(self, wants_t: bool) -> Found:
        """Return the gradients."""
        backward, field, tableau = self.backward, self.field, self.backward.method.tableau
        assert tableau is not None
        ys, grad_ys, sign, stages = backward.ys, backward.grad_ys, -backward.forward.direction, tableau.stages
        times = tuple(map(operator.neg, reversed(backward.times)))
        t = plain_grid.stage_times(times, sign, tableau.nodes, ys)
        sums = GradientAccumulator(field.params, with_error=False)
        adj_t = torch.zeros_like(backward.t) if wants_t else None
        a, i, h = grad_ys[-1], 0, 0.0
        try:
            for i in range(len(times) - 1):
                m = len(times) - 1 - i  # from output m back to the one before it
                h = sign * (times[i + 1] - times[i])
                y, f, v = ys[m], list[Tensor](), list[Tensor]()
                sums.begin()
                for j, (row, weight) in enumerate(zip(tableau.rows, tableau.weights, strict=True)):
                    field.wants(weight != 0.0)
                    z, b = (combine(y, f, row, h), combine(a, v, row, h)) if row else (y, a)
                    f_j, vjp = field.vjp(t[i * stages + j], z, b)
                    f.append(f_j.clone() if stages > 1 else f_j)  # func may write again into its output
                    v.append(torch.zeros_like(f_j) if vjp is None else vjp.neg())
                    if weight and field.params:
                        sums.add(field.integrands, h * -weight, 0.0)
                sums.commit()
                if adj_t is not None:
                    adj_t[m] = real_dot(grad_ys[m], f[0])
                a = combine(a, v, tableau.b_row, h)
                if adj_t is not None and m == 1:
                    t0 = backward.t[0].to(ys.device, backward.forward.time_dtype)
                    adj_t[0] = -real_dot(a, field.f_alone(t0, ys[0]))
                a = a + grad_ys[m - 1]
        except (Exception, KeyboardInterrupt) as error:
            tell_step(error, in_step(sign * times[i], h, i, 0))
            raise
        totals = zip(sums.total, field.params, strict=True)
        return adj_t, a, [g if g.dtype is p.dtype else g.type_as(p) for g, p in totals]
