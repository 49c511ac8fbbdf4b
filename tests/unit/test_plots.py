"""Solution.plot() and stats.plot(), on axes that are read back."""

from __future__ import annotations

import sys

import pytest
import torch
from problems import F64, linspace

from node_cuda import InvalidInput, solve

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

Y = torch.tensor([2.0, 0.0], dtype=F64)
T = linspace(0.0, 10.0, 40)


def oscillator(t, y):
    """Van der Pol's equation, whose solve rejects steps."""
    return torch.stack([y[1], 5 * (1 - y[0] ** 2) * y[1] - y[0]])


@pytest.fixture
def recorded():
    solution = solve(oscillator, Y, T, rtol=1e-5, atol=1e-5, options=dict(record_steps=True))
    yield solution
    plt.close("all")


def test_every_tried_step_is_recorded(recorded):
    stats = recorded.stats
    accepted = [step for step in stats.steps if step.accepted]
    rejected = [step for step in stats.steps if not step.accepted]
    assert (len(accepted), len(rejected)) == (stats.accepted, stats.rejected) and rejected
    assert [step.t for step in accepted] == stats.step_times[:-1]
    assert all(step.error <= 1 for step in accepted) and all(step.error > 1 for step in rejected)
    ends = [step.t + step.h for step in accepted]
    assert ends == pytest.approx(stats.step_times[1:])
    assert f"steps=<{len(stats.steps)} steps>" in repr(stats)


def test_the_steps_of_a_reversed_grid_are_in_the_users_time():
    options = dict(record_steps=True, step_size=0.5)
    steps = solve(lambda t, y: -y, Y, linspace(1.0, 0.0, 2), method="euler", options=options).stats.steps
    assert [(step.t, step.h, step.accepted) for step in steps] == [(1.0, -0.5, True), (0.5, -0.5, True)]
    assert all(step.error != step.error for step in steps), "a grid has no error estimate"


def test_a_solution_is_drawn_with_a_line_for_each_element(recorded):
    ax = recorded.plot()
    labels = [line.get_label() for line in ax.lines]
    assert labels == ["y[0]", "y[1]", "steps"]
    assert torch.equal(torch.from_numpy(ax.lines[1].get_ydata()), recorded.ys[:, 1])
    assert list(ax.lines[2].get_xdata()) == recorded.stats.step_times


def test_a_tuple_and_many_elements_are_drawn_in_part(recorded):
    def func(t, s):
        return -s[0], -s[1]

    solution = solve(func, (torch.ones(8, dtype=F64), torch.ones(8, dtype=F64)), linspace(0.0, 1.0, 3))
    ax = solution.plot(plt.figure().gca())
    assert [line.get_label() for line in ax.lines] == [*(f"y[0][{j}]" for j in range(8)), "y[1][0]", "y[1][1]"]
    assert ax.get_ylabel() == "y, 10 of 16 elements"


def test_the_steps_are_drawn_with_the_rejected_ones_and_their_errors(recorded):
    sizes, errors = recorded.stats.plot()
    accepted, rejected = sizes.lines
    assert (len(accepted.get_xdata()), len(rejected.get_xdata())) == (recorded.stats.accepted, recorded.stats.rejected)
    assert min(errors.lines[1].get_ydata()) > 1 and max(errors.lines[0].get_ydata()) <= 1
    assert errors.get_xlabel() == "t" and sizes.get_yscale() == "log"


def test_steps_that_were_not_recorded_cannot_be_drawn():
    with pytest.raises(InvalidInput, match=r"`solve\(..., options=dict\(record_steps=True\)\)`"):
        solve(oscillator, Y, T[:2]).stats.plot()


def test_a_plot_without_matplotlib_says_what_to_install(recorded, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"Solution.plot\(\) needs matplotlib.*`pip install \"node_cuda\[plot\]\"`"):
        recorded.plot()
