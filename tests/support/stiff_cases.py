"""Stiff problems with their reference values: the test set of Hairer & Wanner II and of Bari, to 1e-12."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from problems import F64
from torch import Tensor, nn

from node_cuda import Solution, solve

RATES = (0.04, 1e4, 3e7)


class Stiff(NamedTuple):
    """atol: in units of rtol. start, end: y0 and y(t)."""

    field: Callable[[Tensor, Tensor], Tensor]
    start: tuple[float, ...]
    t: float
    atol: float
    end: tuple[float, ...]


class Robertson(nn.Module):
    """Three reactions, with their rates as parameters; over any dimensions of samples."""

    def __init__(self, rates: Tensor | None = None):
        super().__init__()
        self.rates = nn.Parameter(torch.tensor(RATES, dtype=F64) if rates is None else rates)

    def forward(self, t, y):
        a, b, c = y.unbind(-1)
        slow, back, fast = self.rates.unbind(-1)
        r1, r2, r3 = slow * a, back * b * c, fast * b**2
        return torch.stack([r2 - r1, r1 - r2 - r3, r3], -1)


def robertson(t, y):
    return Robertson.forward(_CONSTANT, t, y)


class _CONSTANT:
    rates = torch.tensor(RATES, dtype=F64)


def hires(t, y):
    a, b, c, d, e, f, g, h = y.unbind(-1)
    r = 280.0 * f * h
    return torch.stack(
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -r + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            r - 1.81 * g,
            -r + 1.81 * g,
        ],
        -1,
    )


def orego(t, y):
    a, b, c = y.unbind(-1)
    return torch.stack([77.27 * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / 77.27, 0.161 * (a - c)], -1)


def van_der_pol(t, y):
    a, b = y.unbind(-1)
    return torch.stack([b, ((1 - a**2) * b - a) / 1e-6], -1)


PROBLEMS = {
    "robertson": Stiff(
        robertson, (1.0, 0.0, 0.0), 1e11, 1e-6,
        (0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050),
    ),
    "hires": Stiff(
        hires, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057), 321.8122, 1e-4,
        (0.7371312573325668e-3, 0.1442485726316185e-3, 0.5888729740967575e-4, 0.1175651343283149e-2,
         0.2386356198831331e-2, 0.6238968252742796e-2, 0.2849998395185769e-2, 0.2850001604814231e-2),
    ),
    "orego": Stiff(
        orego, (1.0, 2.0, 3.0), 360.0, 1e-6, (0.1000814870318523e1, 0.1228178521549917e4, 0.1320554942846706e3)
    ),
    "van der pol": Stiff(van_der_pol, (2.0, 0.0), 2.0, 1.0, (0.1706167732170483e1, -0.8928097010247975)),
}  # fmt: skip


def solved(name: str, method: str, rtol: float, **options) -> tuple[Solution, float]:
    """The solution of a problem, without a graph, and its largest error at the end in units of atol + rtol |y|."""
    problem = PROBLEMS[name]
    y0, t = torch.tensor(problem.start, dtype=F64), torch.tensor([0.0, problem.t], dtype=F64)
    atol = problem.atol * rtol
    with torch.no_grad():
        solution = solve(problem.field, y0, t, method=method, rtol=rtol, atol=atol, options=options)
    end = torch.tensor(problem.end, dtype=F64)
    return solution, float(((solution.ys[-1] - end).abs() / (atol + rtol * end.abs())).max())


class Frozen:
    """A controller that takes given steps, whatever their errors: for differences of the solver itself."""

    def __init__(self, times: list[float]) -> None:
        self.sizes = [abs(b - a) for a, b in pairwise(times)]

    def start(self, order, options):
        return 1

    def accept(self, h, ratio, state):
        return True

    def propose(self, h, ratio, accepted, state):
        return self.sizes[min(state, len(self.sizes) - 1)], state + 1

    @property
    def options(self) -> dict:
        return dict(first_step=self.sizes[0], controller=self)
