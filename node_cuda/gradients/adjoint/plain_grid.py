"""The backward solve if the fixed grid is t itself: plain PyTorch, without an object for each step.

It steps y and a as two tensors. `BackwardSolve` steps [y, a] as one state and gives the same numbers, because the
stages are sums by element. y at the end of an interval is not computed, because the stored output replaces it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from node_cuda._user_code import in_step, tell_step
from node_cuda.gradients.adjoint.field import AdjointField, ParameterGradient
from node_cuda.kernels.reference import combine, real_dot
from node_cuda.kernels.stage_times import Interval
from node_cuda.loop.plain_grid import stage_times
from node_cuda.methods.tableau import Tableau
from node_cuda.problem.problem import Problem


def run_grid(
    problem: Problem,
    tableau: Tableau,
    field: AdjointField,
    gradient: ParameterGradient,
    ys: Tensor,
    grad_ys: Tensor,
    f_at: Callable[[int], Tensor] | None,
) -> tuple[dict[int, Tensor], Tensor]:
    """Return dL/dt by the index of the output, and dL/dy0; the parameters' gradients are in `gradient`.

    problem: the problem of [y, a], backwards. ys, grad_ys: the outputs and their gradients, in the order of the forward
    solve. f_at: evaluates func at an output; None if dL/dt is not wanted.
    """
    times, sign, stages = problem.times, problem.direction, tableau.stages
    weights = [float(b) for b in tableau.b]
    t = stage_times(problem, tableau.nodes)
    adj_t: dict[int, Tensor] = {}
    a, i, h = grad_ys[-1], 0, 0.0
    try:
        for i in range(len(times) - 1):
            m = len(times) - 1 - i  # from output m back to the one before it
            h = sign * (times[i + 1] - times[i])
            at = Interval(times[i], times[i + 1], times[i + 1] - times[i], h, h)
            y, f, v = ys[m], list[Tensor](), list[Tensor]()
            gradient.begin()
            for j, (row, weight) in enumerate(zip(tableau.rows, weights, strict=True)):
                gradient.wants(bool(weight))
                z = (combine(y, f, row, h), combine(a, v, row, h)) if row else (y, a)
                f_j, v_j = field.rates(t[i * stages + j], *z)
                f.append(f_j.clone() if stages > 1 else f_j)  # func may write again into the buffer that it returned
                v.append(v_j)
                if weight:
                    gradient.add(field.integrands, weight, 0.0, at)
            gradient.commit()
            if f_at is not None:
                adj_t[m] = real_dot(grad_ys[m], f[0])
            a = combine(a, v, tableau.b_row, h)
            if f_at is not None and m == 1:
                adj_t[0] = -real_dot(a, f_at(0))
            a = a + grad_ys[m - 1]
    except (Exception, KeyboardInterrupt) as error:
        tell_step(error, in_step(sign * times[i], h, i, 0))
        raise
    return adj_t, a
