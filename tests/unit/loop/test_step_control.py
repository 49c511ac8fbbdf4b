"""Steps: the first, the longest, the shortest, those with a given end, and rejected ones."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from problems import F64, Counting, linspace
from timed import LOOSE, Y, steps, timed
from torch import nn

from node_cuda import SolveError, Status, odeint, odeint_adjoint, solve
from node_cuda.loop import step_control


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


# ------------------------------------------------------------------ solves that may not end
def wave(t, y):
    return torch.cos(40 * t) * y


def attempts(solution):
    return solution.stats.accepted + solution.stats.rejected


def test_a_long_solve_is_logged_once_with_where_it_stands_and_what_to_try(monkeypatch, caplog):
    t = linspace(0.0, 4.0, 2)
    quiet = solve(wave, Y, t)
    assert not caplog.records and attempts(quiet) > 60
    monkeypatch.setattr(step_control, "LONG", 50)
    func = Counting(wave)
    told = solve(func, Y, t)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("node_cuda", logging.WARNING)
    words = record.getMessage()
    assert words.startswith("A solve has tried 50 steps, and goes on: t = ") and " of 4, h = " in words
    for mend in ("rtol", 'method="rodas5p"', "jump_t", "max_num_steps"):
        assert mend in words
    assert torch.equal(told.ys, quiet.ys)
    assert told.stats.nfe == func.nfe == quiet.stats.nfe + 2, "the field is asked twice at one point, and only then"


def test_the_log_tells_the_share_of_rejected_steps(monkeypatch, caplog):
    monkeypatch.setattr(step_control, "LONG", 10)
    solve(wave, Y, linspace(0.0, 4.0, 2), options=dict(first_step=4.0))
    share = int(caplog.records[0].getMessage().split("% of the steps rejected")[0].split()[-1])
    assert 0 < share < 100 and share % 10 == 0


@pytest.mark.parametrize("noise", [1.0, 1e-3])
def test_a_field_of_chance_that_does_not_end_is_a_solve_error(monkeypatch, caplog, noise):
    monkeypatch.setattr(step_control, "LONG", 60)
    with pytest.raises(SolveError, match=r"dy/dt changed by .*answers differently.*func\.eval\(\)") as caught:
        odeint(lambda t, y: -y + noise * torch.randn_like(y), Y, linspace(0.0, 4.0, 2))
    assert caught.value.status is Status.BY_CHANCE and len(caplog.records) == 1


def drawn(size):
    return lambda t, y: -y + size * torch.randn_like(y)


def test_a_field_of_chance_that_will_not_end_is_noticed_early(monkeypatch, caplog):
    """Steps that it shrinks are accepted: the share of rejected ones says nothing."""
    monkeypatch.setattr(step_control, "EARLY", 20)
    monkeypatch.setattr(step_control, "LONG", 200)
    with pytest.raises(SolveError, match="BY_CHANCE at t = ") as caught:
        odeint(drawn(1.0), Y, linspace(0.0, 4.0, 2))
    assert caught.value.stats.accepted + caught.value.stats.rejected == 20 and not caplog.records


def test_only_a_slow_solve_is_asked_early_and_goes_on_in_silence(monkeypatch, caplog):
    t = linspace(0.0, 4.0, 2)
    monkeypatch.setattr(step_control, "EARLY", 20)
    quiet = solve(wave, Y, t, options=dict(first_step=1e-9))
    for long, asked in ((300, 2), (4000, 0)):  # 20 attempts come to less than 20/300 of t, and to more than 20/4000
        monkeypatch.setattr(step_control, "LONG", long)
        func = Counting(wave)
        solution = solve(func, Y, t, options=dict(first_step=1e-9))
        assert 20 < attempts(quiet) < 300 and solution.stats.nfe == func.nfe == quiet.stats.nfe + asked
        assert torch.equal(solution.ys, quiet.ys)
    monkeypatch.setattr(step_control, "LONG", 4000)
    torch.manual_seed(0)
    ended = solve(drawn(1e-3), Y, t, rtol=1e-6, atol=1e-6)
    assert ended.status is Status.SUCCESS and attempts(ended) > 20
    assert not caplog.records


def test_a_difference_of_rounding_is_no_chance(monkeypatch, caplog):
    monkeypatch.setattr(step_control, "LONG", 50)
    signs = itertools.cycle((1.0, -1.0))
    solution = solve(lambda t, y: wave(t, y) * (1 + 4e-16 * next(signs)), Y, linspace(0.0, 4.0, 2))
    assert solution.status is Status.SUCCESS and len(caplog.records) == 1


def test_a_field_that_differentiates_by_its_state_may_take_long(monkeypatch, caplog):
    monkeypatch.setattr(step_control, "LONG", 50)

    def func(t, y):
        return torch.cos(40 * t) * torch.autograd.grad((y**2).sum() / 2, y, create_graph=True)[0]

    odeint(func, Y.clone().requires_grad_(), linspace(0.0, 4.0, 2))
    assert len(caplog.records) == 1


def test_a_long_backward_pass_is_logged_too_and_its_gradient_is_the_same(monkeypatch, caplog):
    def gradient():
        y0 = Y.clone().requires_grad_()
        ys = odeint_adjoint(wave, y0, linspace(0.0, 2.0, 2), adjoint_params=(), adjoint_rtol=1e-9)
        monkeypatch.setattr(step_control, "LONG", 50)
        return torch.autograd.grad(ys[-1].sum(), y0)[0]

    expected = gradient()
    assert len(caplog.records) == 1
    monkeypatch.undo()
    assert torch.equal(gradient(), expected)
