"""dL/dt0 of a field that does not depend on time, without a(t0).

If all times move together, nothing changes: sum_m dL/dt_m = 0, so dL/dt_0 = -sum_{m > 0} g_m . f(t_m, y_m). The general
dL/dt_0 = -a(t0) . f(t0, y0) carries the whole error of a(t0), which is large where the backward solve is unstable.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from node_cuda.gradients.inspection import sources
from node_cuda.problem.problem import Problem

PLACES = (0.0, 0.2764, 0.7236, 1.0)
"""Where the field is asked, in units of the solve: its ends, so that a switch shows wherever it lies, and two times
that no grid is likely to have."""


def ignores_time(problem: Problem, y: Tensor, last: float) -> bool:
    """func gives the same bits at one state for several times up to the solver time `last`, and t is not in its graph.
    Evaluates func len(PLACES) times at the most.

    y: a state inside the solve and not its start, where what depends on time is often multiplied by a zero.

    A field that reads t as a number (`float(t)`, a table) shows in the bits only; where it does not, as it is another
    one between two of these times only, it is taken for one that does not depend on time: name the entries as `jump_t`.
    """
    first, expected = problem.times[0], None
    for place in PLACES:
        s = problem.direction * (first + place * (last - first))
        looks = place == PLACES[-1]  # what depends on time in the other ways is known by then
        t = torch.tensor(s, dtype=problem.time_dtype, device=y.device, requires_grad=looks)
        with torch.set_grad_enabled(looks), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True to a scalar")
            out = problem.field(t, y.detach())
        if expected is None:
            expected = out.detach()
        if not torch.equal(out.detach(), expected) or id(t) in sources(out, (t,), {})[0]:
            return False
    return True
