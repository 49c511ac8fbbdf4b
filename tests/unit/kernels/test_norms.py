"""Tolerances and norms: they decide whether the error of a step is small."""

from __future__ import annotations

import torch
from problems import BY_NAME, F64, linspace, relative_difference
from timed import Y, exact, timed

from node_cuda import odeint, solve


def test_a_component_with_a_loose_tolerance_does_not_affect_the_step_size():
    def func(t, y):
        return torch.stack([-y[0], 30 * torch.cos(30 * t)])

    y0 = torch.tensor([1.0, 0.0], dtype=F64)
    both = solve(func, y0, linspace(0.0, 1.0, 2), rtol=1e-6, atol=1e-6)
    first = solve(func, y0, linspace(0.0, 1.0, 2), rtol=1e-6, atol=torch.tensor([1e-6, 1e3], dtype=F64))
    assert first.stats.nfe < both.stats.nfe / 2


def test_tolerances_may_be_given_for_elements_for_components_and_as_tensors():
    t = linspace(0.0, 1.0, 3)
    plain = odeint(timed, Y, t, rtol=1e-5, atol=1e-7)
    elementwise = odeint(timed, Y, t, rtol=torch.full((2,), 1e-5, dtype=F64), atol=torch.tensor(1e-7, dtype=F64))
    assert relative_difference(elementwise, plain) < 1e-10
    state = (Y, Y.repeat(2, 1))

    def func(t, state):
        return tuple(timed(t, part) for part in state)

    plain = odeint(func, state, t, rtol=1e-5, atol=1e-7)
    tupled = odeint(func, state, t, rtol=(1e-5, 1e-5), atol=(1e-7, torch.full((4,), 1e-7, dtype=F64)))
    assert relative_difference(tupled, plain) < 1e-10


def test_with_rtol_zero_only_atol_controls_the_step():
    t = linspace(0.0, 2.0, 3)
    ys = odeint(timed, Y, t, rtol=0.0, atol=1e-6)
    assert relative_difference(ys, exact(t)) < 1e-4


def test_a_custom_norm_sees_a_tensor_of_the_states_shape():
    shapes = set()

    def norm(y):
        shapes.add(y.shape)
        return y.abs().max()

    odeint(timed, torch.ones(2, 3, dtype=F64), linspace(0.0, 1.0, 3), options=dict(norm=norm))
    assert shapes == {torch.Size([2, 3])}


def test_a_custom_norm_sees_a_tuple_when_the_state_is_one():
    problem, seen = BY_NAME["tuple"], []

    def norm(state):
        seen.append([part.shape for part in state])
        assert isinstance(state, tuple)
        return max(part.abs().max() for part in state)

    odeint(problem.make(), problem.y0, problem.t, options=dict(norm=norm))
    assert all(shapes == [(2, 2), (2, 2)] for shapes in seen) and seen


def test_a_larger_norm_takes_more_evaluations():
    small = solve(timed, Y, linspace(0.0, 2.0, 2), options=dict(norm=lambda y: y.abs().max()))
    large = solve(timed, Y, linspace(0.0, 2.0, 2), options=dict(norm=lambda y: 100 * y.abs().max()))
    assert large.stats.nfe > small.stats.nfe


def test_the_norm_of_a_tuple_is_the_largest_of_its_components():
    """A large component with a small error does not hide the error of a small component."""

    def func(t, state):
        return 30 * torch.cos(30 * t) * torch.ones_like(state[0]), torch.zeros_like(state[1])

    t = linspace(0.0, 1.0, 2)
    quiet = torch.zeros(10000, dtype=F64)
    lively = torch.zeros(1, dtype=F64)
    together = solve(func, (lively, quiet), t, rtol=1e-5, atol=1e-5)
    alone = solve(lambda t, y: 30 * torch.cos(30 * t) * torch.ones_like(y), lively, t, rtol=1e-5, atol=1e-5)
    assert together.stats.accepted == alone.stats.accepted
