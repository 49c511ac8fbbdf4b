"""A test whether a field depends on time. If it does not, dL/dt0 can be computed without a(t0).

Then a shift of all times changes nothing: sum_m dL/dt_m = 0, so dL/dt_0 = -sum_{m > 0} g_m . f(t_m, y_m). The general
formula dL/dt_0 = -a(t0) . f(t0, y0) contains the error of a(t0), which is large if the backward solve is unstable.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from node_cuda.gradients.inspection import sources
from node_cuda.problem.problem import Problem

PLACES = (0.0, 0.2764, 0.7236, 1.0)
"""The times at which the field is evaluated, as fractions of the solve. The ends show a switch at any time between
them. The other two times are unlikely to be points of a grid."""


def ignores_time(problem: Problem, y: Tensor, last: float) -> bool:
    """Return whether func has the same bits at several times up to the solver time `last`, and t is not in its graph.

    Evaluates func at most len(PLACES) times, at one state.

    y: a state inside the solve. At the start, a term that depends on time is often multiplied by zero.

    If func reads t as a number (`float(t)`, a table), only the bits can show that it depends on time. If it differs
    only between two of these times, the result is wrong: list its discontinuities as `jump_t`.
    """
    first, expected = problem.times[0], None
    for place in PLACES:
        s = problem.direction * (first + place * (last - first))
        looks = place == PLACES[-1]  # record the graph only once, after the other bits agreed
        t = torch.tensor(s, dtype=problem.time_dtype, device=y.device, requires_grad=looks)
        with torch.set_grad_enabled(looks), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True to a scalar")
            out = problem.field(t, y.detach())
        if expected is None:
            expected = out.detach()
        if not torch.equal(out.detach(), expected) or id(t) in sources(out, (t,), {})[0]:
            return False
    return True
