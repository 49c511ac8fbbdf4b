"""How many Python functions a short solve calls. In a step of a small state they take as long as its arithmetic."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from torch import nn

from node_cuda import odeint, odeint_adjoint


class Field(nn.Module):
    """A field as most people write it. Its own calls, some 20 an evaluation, are counted with the others."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 3))

    def forward(self, t, y):
        return self.net(y)


def calls(run):
    """Return the calls of Python functions in a run, after two others that fill what is kept between solves."""
    counted: Counter[str] = Counter()

    def count(frame, event, argument):
        if event == "call":
            counted[frame.f_code.co_name] += 1

    run(), run()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return sum(counted.values())


def euler(steps):
    func, y0, t = Field(), torch.randn(24, 3), torch.linspace(0, 1, steps + 1)

    def run():
        with torch.no_grad():
            odeint(func, y0, t, method="euler")

    return calls(run)


def test_one_euler_step_without_a_gradient_calls_at_most_60_functions():
    assert euler(1) <= 60


def test_each_further_step_calls_at_most_25():
    assert euler(11) - euler(1) <= 10 * 25


@pytest.mark.parametrize(("method", "most"), [("euler", 200), ("midpoint", 256)])
def test_one_step_with_its_backward_solve_calls_few(method, most):
    """74 of those of euler are torch's and the field's. A list that becomes a generator adds one for each element."""
    func, y0, t = Field(), torch.randn(24, 3), torch.linspace(0, 1, 2)

    def run():
        odeint_adjoint(func, y0, t, method=method)[-1].sum().backward()

    assert calls(run) <= most
