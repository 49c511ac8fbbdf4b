"""The results of a solve besides its outputs: recorded steps, statistics, and the requested times."""

from __future__ import annotations

import torch
from problems import Counting, linspace
from timed import Y, steps, timed

from node_cuda import Status, odeint_dense, solve


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


def test_a_solution_is_shown_in_a_line():
    solution = solve(timed, Y, linspace(1.0, 0.0, 4))
    nfe, accepted, rejected = solution.stats.nfe, solution.stats.accepted, solution.stats.rejected
    assert repr(solution) == (
        "Solution(SUCCESS, 4 times, t0 = 1, t1 = 0, ys of shape (4, 2), torch.float64, "
        f"nfe = {nfe}, accepted steps = {accepted}, rejected = {rejected}, nfe_backward = 0)"
    )


def test_the_line_of_a_tuple_an_event_and_an_integral_says_so():
    solution = solve(
        lambda t, s: (-s[0], -s[1]),
        (Y, Y[:1]),
        linspace(0.0, 1.0, 2),
        event_fn=lambda t, s: s[0][0] - 0.5,
        integral=lambda t, s, ds: s[0],
    )
    shown = repr(solution)
    assert "2 times, t0 = 0, t1 = 0.693147, up to an event, ys of shape (2, 2), (2, 1), torch.float64" in shown
    assert "integral of shape (2, 2)" in shown and "\n" not in shown


def test_statistics_are_shown_in_a_line_that_leaves_out_what_was_not_used():
    shown = repr(solve(timed, Y, linspace(0.0, 1.0, 4)).stats)
    assert shown.startswith("Stats(nfe=") and "nfe_backward=0, accepted=" in shown
    assert "checkpoint" not in shown and "None" not in shown and "pending" not in shown
    _, recorded = steps(timed)
    assert f"step_times=<{len(recorded.stats.step_times)} times>" in repr(recorded.stats)


def test_the_backward_pass_is_in_the_line_once_it_was_taken():
    solution = solve(timed, Y.clone().requires_grad_(), linspace(0.0, 1.0, 2), gradient="adjoint", adjoint_params=())
    solution.ys.sum().backward()
    assert solution.stats.nfe_backward > 0
    assert f"nfe_backward = {solution.stats.nfe_backward})" in repr(solution)
    assert f"nfe_backward={solution.stats.nfe_backward}, " in repr(solution.stats)


def test_a_solution_as_a_function_is_shown_with_its_ends():
    shown = repr(odeint_dense(lambda t, s: (-s[0], -s[1]), (Y, Y[:1]), 1.0, -2.0))
    assert shown.startswith("DenseSolution(t0 = 1, t1 = -2, y of shape (2,), (1,), torch.float64, nfe = ")
    assert shown.endswith("nfe_backward = 0)")
