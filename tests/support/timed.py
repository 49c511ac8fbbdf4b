"""y' = y cos(t) with known answers: its solution, and the steps that a solve takes."""

from __future__ import annotations

import torch
from problems import F64, linspace

from node_cuda import solve

Y = torch.tensor([1.0, -2.0], dtype=F64)
LOOSE = dict(rtol=1e3, atol=1e3)  # accepts every step


def timed(t, y):
    return y * torch.cos(t)


def exact(t, y0=Y):
    return y0 * torch.exp(torch.sin(t) - torch.sin(t[0]))[:, None]


def steps(func=timed, y0=Y, t=None, *, rtol=1e-6, atol=1e-8, method=None, **options):
    """Return (step times, solution) of a solve."""
    t = linspace(0.0, 2.0, 3) if t is None else t
    solution = solve(func, y0, t, rtol=rtol, atol=atol, method=method, options=dict(options, record_steps=True))
    return solution.stats.step_times, solution
