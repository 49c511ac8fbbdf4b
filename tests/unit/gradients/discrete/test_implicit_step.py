"""Gradients of the steps of implicit methods: exact for the computed steps, by "backprop" and by "discrete"."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import F64, is_adaptive, linspace
from scipy.integrate import solve_ivp
from stiff_cases import Frozen, Robertson
from torch import nn

from node_cuda import odeint, odeint_event, solve
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS

METHODS = list(IMPLICIT_TABLEAUS)
ADAPTIVE = [method for method in METHODS if is_adaptive(method)]
WEIGHTS = torch.tensor([1.0, 1e3, 1.0], dtype=F64)


class Forced(nn.Module):
    """Stiff, nonlinear, and of t."""

    def __init__(self, rates=None):
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([50.0, 2.0], dtype=F64) if rates is None else rates)

    def forward(self, t, y):
        return -self.rates[0] * (y - torch.cos(self.rates[1] * t)) * (1 + 0.1 * y**2)


CASES = {
    "robertson": (Robertson, [1.0, 0.0, 0.0], [0.0, 1.0, 40.0]),
    "forced": (Forced, [0.5], [0.0, 0.4, 2.0]),
}


@pytest.mark.parametrize(
    "method, case",
    [*((method, "forced") for method in METHODS), ("rodas5p", "robertson"), ("kvaerno5", "robertson")],
)
def test_both_gradients_are_those_of_central_differences_of_the_solver_at_fixed_steps(method, case):
    make, y0, t = CASES[case]
    y0, t = torch.tensor(y0, dtype=F64), torch.tensor(t, dtype=F64)
    arguments = dict(method=method, rtol=1e-4, atol=1e-10)
    exactly = dict(newton_tol=1e-7)
    if is_adaptive(method):
        with torch.no_grad():
            recorded = solve(make(), y0, t, options=dict(record_steps=True, **exactly), **arguments).stats.step_times
        steps = dict(**Frozen(recorded).options, **exactly)
    else:
        steps = dict(step_size=0.13, interp="cubic", **exactly)

    def loss(func, y0, mode="backprop"):
        ys = solve(func, y0, t, gradient=mode, options=steps, **arguments).ys
        return (ys * WEIGHTS[: len(y0)]).sum()

    func, start = make(), y0.clone().requires_grad_()
    found = [torch.autograd.grad(loss(func, start, mode), (start, func.rates)) for mode in ("backprop", "discrete")]
    with torch.no_grad():
        for i, rate in enumerate(func.rates.tolist()):
            moved = [func.rates.clone() for _ in range(2)]
            moved[0][i] += 1e-5 * rate
            moved[1][i] -= 1e-5 * rate
            difference = (loss(make(moved[0]), y0) - loss(make(moved[1]), y0)) / (2e-5 * rate)
            for _, by_rates in found:
                assert float(by_rates[i]) == pytest.approx(float(difference), rel=1e-7)
        for i in range(len(y0)):
            step = torch.zeros_like(y0)
            step[i] = 1e-5
            difference = (loss(func, y0 + step) - loss(func, y0 - step)) / 2e-5
            for by_y0, _ in found:
                assert float(by_y0[i]) == pytest.approx(float(difference), abs=1e-7 * float(by_y0.abs().max()))


@pytest.mark.parametrize("method, rtol", [("rodas5p", 1e-6), ("rodas5p", 1e-8), ("kvaerno5", 1e-6), ("kvaerno3", 1e-5)])
def test_the_gradient_is_that_of_scipys_forward_sensitivities(method, rtol):
    """Of y(40) by the rates of Robertson's problem, in units of the sensitivity's largest part."""

    def both(t, z):
        a, b, c = z[:3]
        k = np.array([0.04, 1e4, 3e7])
        jacobian = np.array(
            [[-k[0], k[1] * c, k[1] * b], [k[0], -k[1] * c - 2 * k[2] * b, -k[1] * b], [0, 2 * k[2] * b, 0]]
        )
        f = np.array([-k[0] * a + k[1] * b * c, k[0] * a - k[1] * b * c - k[2] * b**2, k[2] * b**2])
        by_rates = np.array([[-a, b * c, 0], [a, -b * c, -(b**2)], [0, 0, b**2]])
        return np.concatenate([f, (jacobian @ z[3:].reshape(3, 3) + by_rates).ravel()])

    start = np.concatenate([[1.0, 0, 0], np.zeros(9)])
    atol = np.array([1e-16] * 3 + [1e-14, 1e-20, 1e-24] * 3)
    right = solve_ivp(both, (0, 40), start, method="Radau", rtol=1e-11, atol=atol).y[3:, -1].reshape(3, 3)
    func = Robertson()
    y = solve(func, torch.tensor([1.0, 0.0, 0.0], dtype=F64), torch.tensor([0.0, 40.0], dtype=F64), method=method,
              gradient="discrete", rtol=rtol, atol=1e-6 * rtol).ys[-1]  # fmt: skip
    for i in (0, 2):
        (found,) = torch.autograd.grad(y[i], func.rates, retain_graph=True)
        relative = np.abs(found.numpy() / right[i] - 1)
        assert relative.max() < 20 * rtol, relative


@pytest.mark.parametrize("method", ADAPTIVE)
def test_checkpoints_give_the_same_gradient_by_more_evaluations(method):
    found, cost = [], []
    for checkpoints in (None, 3):
        func = Forced()
        solution = solve(func, torch.tensor([0.5], dtype=F64), linspace(0.0, 1.0, 3), method=method, rtol=1e-3,
                         atol=1e-5, gradient="discrete", checkpoints=checkpoints)  # fmt: skip
        solution.ys.sum().backward()
        found.append(func.rates.grad)
        cost.append(solution.stats.nfe_backward)
    # A step that is taken again has its own Jacobian, and ends where Newton's tolerance lets it.
    assert torch.allclose(*found, rtol=1e-4)
    assert cost[0] < cost[1] and solution.stats.peak_checkpoints <= 3 and solution.stats.recomputed_steps > 0


@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5"])
def test_times_events_integrals_and_batches_are_differentiated(method):
    y0, t = torch.tensor([[0.5], [1.5]], dtype=F64, requires_grad=True), linspace(0.0, 1.0, 3).requires_grad_()
    arguments = dict(method=method, rtol=1e-5, atol=1e-7)
    found = []
    for gradient in ("backprop", "discrete"):
        func = Forced()
        solution = solve(func, y0, t, gradient=gradient, options=dict(batch_dims=1),
                         integral=lambda t, y, dy: y[:, 0] ** 2, **arguments)  # fmt: skip
        found.append(torch.autograd.grad(solution.ys.sum() + solution.integral.sum(), (y0, func.rates, t)))
    for by_backprop, by_discrete in zip(*found, strict=True):
        assert torch.allclose(by_backprop, by_discrete, rtol=1e-3, atol=1e-3)
    y0 = torch.tensor([2.0], dtype=F64, requires_grad=True)
    event_t, _ = odeint_event(lambda t, y: -3 * y, y0, torch.tensor(0.0, dtype=F64), event_fn=lambda t, y: y[0] - 1.0,
                              **arguments)  # fmt: skip
    assert float(torch.autograd.grad(event_t, y0)[0]) == pytest.approx(1 / (3 * 2.0), rel=1e-4)  # t = log(y0) / 3


def test_second_derivatives_are_right_by_rodas5p_and_refused_by_what_has_none():
    y0, t = torch.tensor([0.7], dtype=F64), linspace(0.0, 1.0, 2)

    def last(y, method):
        return odeint(lambda t, y: -(y**3), y, t, method=method, rtol=1e-7, atol=1e-9)[-1].sum()

    second = torch.autograd.functional.hessian(lambda y: last(y, "rodas5p"), y0)
    exact = -6 * 0.7 * (1 + 2 * 0.7**2) ** -2.5  # y(1) = y0 / sqrt(1 + 2 y0^2)
    assert float(second) == pytest.approx(exact, rel=1e-5)
    with pytest.raises(NotImplementedError, match=r"first derivatives only.*rodas5p"):
        torch.autograd.functional.hessian(lambda y: last(y, "kvaerno5"), y0)


def stretched(func, y0, t):
    return torch.cat([t[:1], t[0] + (t[-1] - t[0]) * torch.tensor([0.2, 0.31, 0.7], dtype=F64), t[-1:]])


GRIDS = {
    "t itself": {},
    "step_size and cubic": dict(step_size=0.2, interp="cubic"),
    "step_size and perturb": dict(step_size=0.2, perturb=True),
    "of one's own": dict(grid_constructor=stretched, interp="cubic"),
}


@pytest.mark.parametrize("grid, backwards", list(zip(GRIDS, (False, False, True, True), strict=True)))
@pytest.mark.parametrize("method", ["trapezoid", "sdirk2", "gl4"])
def test_on_a_fixed_grid_the_gradient_of_the_times_is_exact_too(method, grid, backwards):
    """The first stage is explicit and carried on, or implicit, or all stages depend on each other; the dense output is
    a cubic, or a polynomial of the stages. Central differences of the solver move one output time."""
    t, y0 = torch.tensor([0.0, 0.31, 0.55, 0.6, 1.27], dtype=F64), torch.tensor([0.5, -0.2], dtype=F64)
    t = t.flip(0) if backwards else t
    rates = torch.tensor([-3.0 if backwards else 3.0, 2.0], dtype=F64)
    options = GRIDS[grid] | dict(newton_tol=1e-7)
    weights = linspace(0.5, 1.5, 10).reshape(5, 2)

    def loss(t, func, mode="backprop", **more):
        return (solve(func, y0, t, method=method, gradient=mode, options=options, **more).ys * weights).sum()

    found = []
    for mode, more in (("backprop", {}), ("discrete", {}), ("discrete", dict(checkpoints=2))):
        time, func = t.clone().requires_grad_(), Forced(rates)
        found.append(torch.autograd.grad(loss(time, func, mode, **more), (time, func.rates)))
    for others in found[1:]:
        for ours, right in zip(others, found[0], strict=True):
            assert torch.allclose(ours, right, rtol=1e-9, atol=1e-10)
    if grid == "step_size and cubic":
        for m in (1, 2):  # the next one is the end of a step, where the polynomials have a kink
            step = torch.zeros(5, dtype=F64)
            step[m] = 1e-5
            with torch.no_grad():
                difference = float(loss(t + step, Forced(rates)) - loss(t - step, Forced(rates))) / 2e-5
            assert float(found[0][0][m]) == pytest.approx(difference, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("method", ["trapezoid", "sdirk2", "radauIIA3"])
def test_on_a_fixed_grid_events_integrals_tuples_and_complex_numbers_are_differentiated(method):
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0 + 2j, 1.0 - 5j], dtype=torch.complex128))

        def forward(self, t, state):
            a, b = state
            return -self.w * (a - torch.sin(t)) + 0.3 * b.sum() * a.conj(), -0.7 * b + a.abs().sum() * torch.cos(t)

    options, found = dict(step_size=0.1, newton_tol=1e-6), []
    start = (
        torch.ones(2, dtype=torch.complex128, requires_grad=True),
        torch.full((3,), 0.5, dtype=F64, requires_grad=True),
    )
    for gradient in ("backprop", "discrete"):
        func = Field()
        solution = solve(func, start, linspace(0.0, 1.0, 4), method=method, gradient=gradient, options=options,
                         integral=lambda t, y, dy: y[1] ** 2)  # fmt: skip
        a, b = solution.ys
        loss = a.abs().square().sum() + b.real.sum() + solution.integral.real.sum()
        found.append(torch.autograd.grad(loss, (*start, func.w)))
    for ours, right in zip(*found, strict=True):
        assert torch.allclose(ours, right, rtol=1e-6, atol=1e-8)
    found = []
    for solver in (dict(method=method, options=dict(step_size=0.02)), dict(method="dopri5", rtol=1e-6, atol=1e-8)):
        func = Field()
        event = solve(func, start, linspace(0.0, 1.0, 2), gradient="discrete",
                      event_fn=lambda t, y: y[1].real.sum() - 2.0, **solver)  # fmt: skip
        found.append(torch.autograd.grad(event.event_t + event.ys[0][-1].real.sum(), (*start, func.w)))
    for ours, right in zip(*found, strict=True):  # (the event is looked for on the chord of a step)
        assert torch.allclose(ours, right, rtol=0.05, atol=0.02 * float(right.abs().max()))
