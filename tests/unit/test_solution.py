"""The results of a solve besides its outputs: recorded steps, statistics, and the requested times."""

from __future__ import annotations

import torch
from problems import Counting, linspace
from timed import Y, steps, timed

from node_cuda import Status, solve


def test_the_statistics_count_evaluations_and_host_reads():
    func = Counting(timed)
    _, solution = steps(func)
    assert solution.stats.nfe == func.nfe
    assert solution.stats.nfe_backward == 0
    assert solution.stats.host_reads > 0


def test_a_solution_has_the_requested_times():
    t = linspace(0.0, 1.0, 4)
    solution = solve(timed, Y, t)
    assert torch.equal(solution.ts, t)
    assert solution.ys.shape == (4, 2)
    assert solution.status is Status.SUCCESS
    assert solution.event_t is None
