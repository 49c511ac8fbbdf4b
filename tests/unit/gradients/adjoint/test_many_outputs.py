"""The adjoint with many outputs costs a step for each: the user is told once, with both costs and the mend."""

from __future__ import annotations

import re
import threading
import warnings

import pytest
import torch
from problems import F64, MLP, linspace, loss_of

from node_cuda import NeuralODE, PerformanceWarning, odeint_adjoint, solve
from node_cuda.gradients.adjoint import many_outputs

Y = torch.tensor([0.7, -0.4], dtype=F64)
FEW, MANY = linspace(0.0, 0.5, 5), linspace(0.0, 0.5, 200)
LOOSE = dict(rtol=1e-3, atol=1e-3)


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    """No solve of this process has told yet."""
    monkeypatch.setattr(many_outputs, "_untold", threading.Lock())


def told(call):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        call()
    assert all(w.category is PerformanceWarning and w.filename == __file__ for w in heard)
    return [str(w.message) for w in heard]


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun", "dopri8"])
def test_both_costs_and_what_to_type_are_told(method):
    found = []
    (text,) = told(lambda: found.append(solve(MLP(), Y, MANY, gradient="adjoint", method=method, **LOOSE)))
    stats = found[0].stats
    assert f"{stats.accepted} steps" in text and f"the forward solve needed {stats.nfe}" in text
    assert '`gradient="discrete", checkpoints="auto"`' in text
    loss_of(found[0].ys).backward()
    estimate = int(re.search(r"about (\d+) evaluations", text)[1])
    # A step of all stages for each output; the first step is chosen by one more.
    assert stats.nfe_backward - 2 <= estimate <= stats.nfe_backward


def test_it_is_told_once():
    assert [len(told(lambda: odeint_adjoint(MLP(), Y, MANY, **LOOSE))) for _ in range(3)] == [1, 0, 0]


def test_it_is_told_at_the_end_of_the_forward_pass_and_not_backwards():
    ys = []
    assert len(told(lambda: ys.append(odeint_adjoint(MLP(), Y, MANY, **LOOSE)))) == 1
    many_outputs._untold.release()
    assert told(lambda: loss_of(ys[0]).backward()) == []


def without_gradient():
    with torch.no_grad():
        odeint_adjoint(MLP(), Y, MANY, **LOOSE)


QUIET = {
    "few outputs": lambda: odeint_adjoint(MLP(), Y, FEW, **LOOSE),
    "as many steps": lambda: odeint_adjoint(MLP(), Y, MANY, options=dict(max_step=0.5 / 20)),
    "no_grad": without_gradient,
    "nothing wants a gradient": lambda: odeint_adjoint(lambda t, y: -y, Y, MANY, adjoint_params=(), **LOOSE),
    "a fixed grid": lambda: odeint_adjoint(MLP(), Y, MANY, method="rk4", options=dict(step_size=0.1)),
    "a fixed grid backwards": lambda: odeint_adjoint(MLP(), Y, MANY, adjoint_method="rk4", adjoint_options={}, **LOOSE),
    "discrete": lambda: odeint_adjoint(MLP(), Y, MANY, gradient="discrete", **LOOSE),
    "the layer": lambda: NeuralODE(MLP(), MANY, **LOOSE)(Y),
    "failed": lambda: solve(MLP(), Y, MANY, gradient="adjoint", options=dict(throw=False, max_num_steps=0), **LOOSE),
}


@pytest.mark.parametrize("case", QUIET)
def test_nothing_is_told_where_the_outputs_cost_nothing(case):
    assert told(QUIET[case]) == []


def test_a_field_of_chance_is_not_sent_to_discrete_which_refuses_it():
    class Noisy(MLP):
        def forward(self, t, y):
            return super().forward(t, y) + 1e-6 * torch.randn_like(y)

    with pytest.warns(UserWarning, match="non-deterministic") as heard:
        odeint_adjoint(Noisy(), Y, MANY, **LOOSE)
    assert len(heard) == 1


def test_samples_of_a_vmap_count_together():
    def loss(y0):
        return odeint_adjoint(func, y0, MANY, **LOOSE).sum()

    func, batch = MLP(), torch.stack([Y, -Y, 2 * Y])
    (text,) = told(lambda: torch.func.vmap(torch.func.grad(loss))(batch))
    assert f"{3 * (len(MANY) - 1)} of them" in text
