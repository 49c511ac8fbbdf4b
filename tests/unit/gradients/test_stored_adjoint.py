"""The adjoint of implicit methods, along the stored forward solution."""

from __future__ import annotations

import math

import pytest
import torch
from problems import F64, linspace
from stiff_cases import Robertson
from tolerances import SLOPE
from torch import nn

from node_cuda import Status, odeint, odeint_adjoint, odeint_event, solve
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS

METHODS = [name for name, tableau in IMPLICIT_TABLEAUS.items() if tableau.adaptive]


class Relaxing(nn.Module):
    """y' = -lam (y - cos t), whose solution from y(0) = 2 is known."""

    def __init__(self, lam=1000.0):
        super().__init__()
        self.lam = nn.Parameter(torch.tensor(lam, dtype=F64))

    def forward(self, t, y):
        return -self.lam * (y - torch.cos(t))


def relaxed(lam, t=1.0):
    return (lam**2 * math.cos(t) + lam * math.sin(t)) / (1 + lam**2) + (2 - lam**2 / (1 + lam**2)) * math.exp(-lam * t)


@pytest.mark.parametrize("method", METHODS)
def test_a_field_too_stiff_to_be_run_backwards_has_its_gradient(method):
    """A factor e^1000 a unit of time backwards; a solve of y and a together does not end."""
    func, t = Relaxing(), linspace(0.0, 1.0, 2)
    tolerance = 1e-5 if method == "trbdf2_adaptive" else 1e-7
    y = odeint_adjoint(func, torch.full((1,), 2.0, dtype=F64), t, method=method, rtol=tolerance, atol=tolerance / 100)
    y[-1].sum().backward()
    right = (relaxed(1000 * 1.00001) - relaxed(1000 * 0.99999)) / 0.02
    assert float(y[-1].detach()) == pytest.approx(relaxed(1000.0), abs=10 * tolerance)
    # dL/dlam is 5e-7, and comes of a cancellation of y and cos t.
    assert float(func.lam.grad) == pytest.approx(right, rel=1e-2)


@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5"])
@pytest.mark.parametrize("backwards", [False, True])
def test_it_is_the_discrete_gradient_to_the_tolerance_with_tuples_complex_numbers_and_both_directions(
    method, backwards
):
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0 + 20j, 1.0 - 5j], dtype=torch.complex128))
            self.r = nn.Parameter(torch.tensor(0.7, dtype=F64))

        def forward(self, t, state):
            a, b = state
            return -self.w * (a - torch.sin(t)) + 0.3 * b.sum() * a.conj(), -self.r * b + a.abs().sum() * torch.cos(t)

    t, found = linspace(0.0, 1.0, 4), []
    t = (t.flip(0) if backwards else t).requires_grad_()
    start = (
        torch.ones(2, dtype=torch.complex128, requires_grad=True),
        torch.full((3,), 0.5, dtype=F64, requires_grad=True),
    )
    for gradient in ("adjoint", "discrete"):
        func = Field()
        if backwards:
            func.w.data.neg_()
        a, b = solve(func, start, t, method=method, gradient=gradient, rtol=1e-6, atol=1e-6).ys
        loss = a.abs().square().sum() + (b.real * linspace(1.0, 2.0, 3)).sum()
        found.append(torch.autograd.grad(loss, (*start, func.w, func.r, t)))
    for ours, exact in zip(*found, strict=True):
        assert torch.allclose(ours, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


def test_events_and_partial_solutions_have_their_gradient():
    func = Relaxing(50.0)
    y0 = torch.full((1,), 2.0, dtype=F64, requires_grad=True)
    found = []
    for gradient in ("adjoint", "discrete"):
        event_t, ys = odeint_event(func, y0, torch.tensor(0.0, dtype=F64), event_fn=lambda t, y: y[0] - 1.05,
                                   method="kvaerno5", odeint_interface=odeint_adjoint, gradient=gradient,
                                   rtol=1e-8, atol=1e-8)  # fmt: skip
        found.append(torch.autograd.grad(event_t + ys[-1].sum(), (y0, func.lam)))
    for ours, exact in zip(*found, strict=True):
        assert torch.allclose(ours, exact, rtol=1e-5)

    def blows_up(t, y):
        return y**2

    y0 = torch.ones(1, dtype=F64, requires_grad=True)
    solution = solve(blows_up, y0, torch.tensor([0.0, 0.5, 2.0], dtype=F64), method="kvaerno5", gradient="adjoint",
                     adjoint_params=(), rtol=1e-6, atol=1e-8, options=dict(throw=False, max_num_steps=300))  # fmt: skip
    assert solution.status is not Status.SUCCESS and bool(solution.ys[-1].isnan())
    solution.ys[1].sum().backward()
    assert float(y0.grad) == pytest.approx(4.0, rel=1e-4)  # y = y0 / (1 - y0 t)


def test_a_batch_with_its_own_jacobians_has_the_gradient_of_its_samples():
    rates = torch.tensor([[0.04, 1e4, 3e7], [0.1, 1e3, 1e6]], dtype=F64)
    y0, t = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64).expand(2, 3), torch.tensor([0.0, 1.0], dtype=F64)
    arguments = dict(method="kvaerno5", rtol=1e-7, atol=1e-11)
    func = Robertson(rates.clone())
    odeint_adjoint(func, y0, t, options=dict(batch_dims=1), **arguments)[-1, :, 0].sum().backward()
    for i in range(2):
        alone = Robertson(rates[i].clone())
        odeint(alone, y0[i], t, **arguments)[-1, 0].backward()
        assert torch.allclose(func.rates.grad[i], alone.rates.grad, rtol=1e-3)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(adjoint_method="dopri5"), "implicit method where the forward one is"),
        (dict(adjoint_options=dict(norm=lambda parts: parts[0].abs())), "adjoint_options"),
    ],
)
def test_what_it_cannot_do_is_refused_in_words(arguments, words):
    with pytest.raises(ValueError, match=words):
        odeint_adjoint(Relaxing(), torch.ones(1, dtype=F64), linspace(0.0, 1.0, 2), method="kvaerno5", **arguments)


GRIDS = [name for name, tableau in IMPLICIT_TABLEAUS.items() if not tableau.adaptive]


@pytest.mark.parametrize("method", GRIDS)
def test_on_a_fixed_grid_it_has_the_order_of_the_method_or_one_more_than_its_dense_output(method):
    tableau, errors = IMPLICIT_TABLEAUS[method], []

    def gradients(**arguments):
        func, y0 = Relaxing(2.0), torch.full((1,), 2.0, dtype=F64, requires_grad=True)
        t = linspace(0.0, 2.0, 3).requires_grad_()
        ys = solve(func, y0, t, **arguments).ys
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad((ys**2).sum(), (y0, func.lam, t))])

    exact = gradients(method="dopri8", gradient="backprop", rtol=1e-11, atol=1e-12,
                      options=dict(dense="accurate", step_t=[1.0, 2.0]))  # fmt: skip
    for h in (1 / 8, 1 / 16):
        found = gradients(method=method, gradient="adjoint", options=dict(step_size=h, newton_tol=1e-6))
        errors.append((found - exact).abs())
    # dL/dt is the slope of the dense output, of an order less
    order, slopes = min(tableau.order, tableau.dense.order + 1), min(tableau.order, tableau.dense.order)
    for (i, j), expected in (((0, 2), order), ((2, 5), slopes)):
        assert math.log2(float(errors[0][i:j].max() / errors[1][i:j].max())) > expected - 2 * SLOPE


@pytest.mark.parametrize("method", ["implicit_euler", "radauIIA3", "radauIIA5", "sdirk2"])
def test_on_a_fixed_grid_a_field_too_stiff_to_be_run_backwards_has_its_gradient(method):
    """y = p cos t but for 1e-3, in steps of 40 time constants: a decays within one step."""
    p, t = torch.tensor(1.5, dtype=F64, requires_grad=True), linspace(0.0, 1.0, 5)
    y0 = torch.full((1,), 1.5, dtype=F64)
    ys = odeint_adjoint(lambda t, y: -1000.0 * (y - p * torch.cos(t)), y0, t, method=method, gradient="adjoint",
                        adjoint_params=(p,), options=dict(step_size=0.04))  # fmt: skip
    (found,) = torch.autograd.grad(ys[1:].sum(), p)
    assert float(found) == pytest.approx(float(torch.cos(t[1:]).sum()), rel=0.04)  # cos t may be off by a step


@pytest.mark.parametrize("method", [*METHODS, "trapezoid", "gl4"])
def test_the_solve_for_a_reads_no_time_of_an_evaluation_from_the_device(method, monkeypatch):
    """The host chose the steps. A Rosenbrock method reads one for each Jacobian, as it differentiates by the time."""
    grid = dict(options=dict(step_size=0.02)) if method in GRIDS else dict(rtol=1e-6, atol=1e-8)
    func = Relaxing(50.0)
    ys = odeint_adjoint(func, torch.ones(1, dtype=F64), linspace(0.0, 1.0, 2), method=method, **grid)
    count, before = 0, torch.Tensor.__float__

    def counted(self):
        nonlocal count
        count += self.ndim == 0
        return before(self)

    monkeypatch.setattr(torch.Tensor, "__float__", counted)
    nfe = ys.grad_fn.task.stats.nfe
    ys.sum().backward()
    stats = ys.grad_fn.task.stats
    assert stats.nfe_backward > 60 and nfe > 60
    assert count <= (stats.nfe_backward / 5 if method == "rodas5p" else 2)
