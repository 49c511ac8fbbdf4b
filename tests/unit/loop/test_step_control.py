"""Steps: the first, the longest, the shortest, those with a given end, and rejected ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import F64, Counting, linspace
from timed import LOOSE, Y, steps, timed
from torch import nn

from node_cuda import Status, solve


def test_first_step_is_the_first_step():
    assert steps(first_step=0.125, **LOOSE)[0][1] == 0.125


def test_without_first_step_the_start_costs_two_evaluations():
    func = Counting(timed)
    _, solution = steps(func, **LOOSE)
    assert func.nfe == 2 + 6 * solution.stats.accepted


def test_no_step_is_longer_than_max_step():
    times, _ = steps(max_step=0.125, **LOOSE)
    assert max(b - a for a, b in itertools.pairwise(times)) <= 0.125 * (1 + 1e-12)


def test_a_step_of_size_min_step_is_accepted_with_any_error():
    times, solution = steps(lambda t, y: -1e3 * y, t=linspace(0.0, 0.01, 2), min_step=1e-3, rtol=1e-12, atol=1e-12)
    assert min(b - a for a, b in itertools.pairwise(times)) >= 1e-3 * (1 - 1e-9)
    assert solution.status is Status.SUCCESS


def test_steps_end_on_every_step_t():
    wanted = [0.1, 0.75, 1.3, 1.9]
    times, _ = steps(step_t=torch.tensor(wanted, dtype=F64), **LOOSE)
    assert set(wanted) <= set(times)


def test_step_t_may_be_unsorted_a_list_and_reach_beyond_the_interval():
    times, _ = steps(step_t=[1.3, -5.0, 0.1, 99.0], **LOOSE)
    assert {0.1, 1.3} <= set(times) and -5.0 not in times


@pytest.mark.parametrize("key", ["step_t", "jump_t"])
def test_a_step_that_is_rounded_above_max_step_is_not_rejected_forever(key):
    """1/2 - (1/6 + 1/6) is one ulp more than 1/6: the third step must end at 1/2, and exceeds max_step by rounding."""
    options = {key: torch.tensor([0.5, 1.0, 1.5], dtype=F64)}
    times, solution = steps(first_step=1 / 6, max_step=1 / 6, max_num_steps=40, **options, **LOOSE)
    assert {0.5, 1.0, 1.5} <= set(times)
    assert solution.stats.accepted <= 13


def test_a_step_ends_at_a_jump_and_the_field_is_evaluated_again_after_it():
    seen = []

    def func(t, y):
        seen.append(float(t))
        return torch.where(t < 0.5, 1.0, -3.0) * torch.ones_like(y)

    times, solution = steps(func, t=linspace(0.0, 1.0, 2), jump_t=torch.tensor([0.5], dtype=F64))
    assert 0.5 in times
    assert 0.5 not in seen, "neither side of the jump is the jump itself"
    assert any(0.5 < t < 0.5 + 1e-15 for t in seen) and any(0.5 - 1e-15 < t < 0.5 for t in seen)
    assert torch.allclose(solution.ys[-1], Y - 1.0, atol=1e-12)
    assert solution.stats.rejected == 0


@pytest.mark.parametrize("key", ["step_t", "jump_t"])
@pytest.mark.parametrize("kind", [list, lambda v: torch.tensor(v, dtype=F64)], ids=["list", "tensor"])
def test_step_t_and_jump_t_are_the_users_times_when_time_runs_backwards(key, kind):
    times, _ = steps(t=linspace(1.0, 0.0, 2), **{key: kind([0.25, 0.6])}, **LOOSE)
    assert {0.25, 0.6} <= set(times)
    assert times == sorted(times, reverse=True)


def test_max_num_steps_is_counted_per_output_interval():
    _, free = steps(max_step=0.1, t=linspace(0.0, 2.0, 5))
    _, counted = steps(max_step=0.1, t=linspace(0.0, 2.0, 5), max_num_steps=8)
    assert counted.stats.accepted == free.stats.accepted > 8


def test_a_rejected_step_leaves_the_state_untouched():
    states = []

    class Field(nn.Module):
        def forward(self, t, y):
            return torch.where(t < 0.5, 1.0, 50.0) * torch.cos(40 * t) * y

        def callback_step(self, t0, y0, dt):
            states.append((float(t0), y0.clone()))

    _, solution = steps(Field(), first_step=0.4)
    assert solution.stats.rejected > 0
    repeated = [(a, b) for (s, a), (t, b) in itertools.pairwise(states) if s == t]
    assert len(repeated) == solution.stats.rejected
    assert all(torch.equal(a, b) for a, b in repeated)


def test_the_recorded_steps_start_at_t0_and_cover_the_interval():
    times, solution = steps(t=linspace(0.5, 2.0, 4))
    assert times[0] == 0.5 and times[-1] >= 2.0
    assert len(times) == solution.stats.accepted + 1
    assert all(b > a for a, b in itertools.pairwise(times))


def test_steps_are_recorded_only_on_request():
    assert solve(timed, Y, linspace(0.0, 1.0, 2)).stats.step_times is None


def test_a_jump_without_jump_t_costs_more_evaluations():
    def func(t, y):
        return torch.where(t < 0.5, 1.0, -3.0) * torch.ones_like(y)

    _, told = steps(func, t=linspace(0.0, 1.0, 2), jump_t=torch.tensor([0.5], dtype=F64))
    _, untold = steps(func, t=linspace(0.0, 1.0, 2))
    assert told.stats.nfe < untold.stats.nfe
