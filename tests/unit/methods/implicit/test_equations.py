"""What the implicit methods on fixed grids do with equations that are hard or impossible to solve, and with options."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from problems import F64, linspace, order_of
from stiff_cases import robertson
from tolerances import SLOPE

from node_cuda import SolveError, Status, odeint, odeint_adjoint, solve
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS

METHODS = [name for name, tableau in IMPLICIT_TABLEAUS.items() if not tableau.adaptive]
KINDS = ["trapezoid", "sdirk2", "gl4"]
"""An explicit first stage, an implicit one, and stages that all depend on each other."""
T = linspace(0.0, 1.0, 2)
GAUSS = ("implicit_midpoint", "gl4", "gl6")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_converges_with_its_order(method):
    t, errors = linspace(0.0, 2.0, 3), []

    def field(t, y):
        return y * torch.cos(t) - 0.1 * y**2

    with torch.no_grad():
        exact = odeint(field, torch.ones(1, dtype=F64), t, rtol=1e-13, atol=1e-13, method="dopri8",
                       options=dict(dense="accurate"))  # fmt: skip
        for h in (1 / 4, 1 / 8):
            y = odeint(field, torch.ones(1, dtype=F64), t, method=method,
                       options=dict(step_size=h, newton_tol=1e-6))  # fmt: skip
            errors.append(float((y - exact).abs().max()))
    assert abs(math.log2(errors[0] / errors[1]) - order_of(method)) < SLOPE


@pytest.mark.parametrize("method", METHODS)
def test_a_component_of_minus_a_million_leaves_each_method_its_error(method):
    """Prothero and Robinson: y = sin t, on steps of 1/8. Radau and Lobatto have an error of h^s / lambda, Gauss one of
    its stages, h^(s + 1) or h^s, whatever lambda is."""
    t = linspace(0.0, 2.0, 3)
    with torch.no_grad():
        ys = odeint(lambda t, y: -1e6 * (y - torch.sin(t)) + torch.cos(t), torch.zeros(1, dtype=F64), t, method=method,
                    options=dict(step_size=1 / 8))  # fmt: skip
    stages = IMPLICIT_TABLEAUS[method].stages
    error = float((ys[:, 0] - torch.sin(t)).abs().max())
    assert error < (0.5 * (1 / 8) ** (stages + stages % 2) if method in GAUSS else 1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_robertsons_problem_is_solved_on_a_grid_of_decades(method):
    """Eight steps for each decade from 1e-3 to 1e4."""
    grid = torch.cat([torch.zeros(1, dtype=F64), torch.logspace(-3, 4, 57, dtype=F64)])
    t = torch.stack([grid[0], grid[-1]])
    with torch.no_grad():
        y = odeint(robertson, torch.tensor([1.0, 0.0, 0.0], dtype=F64), t, method=method, rtol=1e-6, atol=1e-10,
                   options=dict(grid_constructor=lambda func, y0, t: grid))[-1]  # fmt: skip
    # rodas5p at a rtol of 1e-8; the errors are 0.12, 5e-3 to 1.3e-2, and at most 4e-4
    assert float(y[0]) == pytest.approx(0.107300428, rel={1: 0.2, 2: 2e-2}.get(order_of(method), 1e-3))


# ------------------------------------------------------------------ the last attempt
@pytest.mark.parametrize("method", METHODS)
def test_where_one_jacobian_does_not_do_each_iteration_has_its_own(method):
    """y' = -1000 y^3 in one step: its Jacobian at the start is a hundred times that at the end."""
    y0 = torch.ones(2, dtype=F64)
    solution = solve(lambda t, y: -1e3 * y**3, y0, T, method=method)
    assert solution.status is Status.SUCCESS and solution.stats.rejected_by_newton == 0
    assert solution.stats.jacobians > 3
    if method == "implicit_euler":
        y = solution.ys[-1]
        assert torch.allclose(y + 1e3 * y**3, y0, rtol=1e-7)


@pytest.mark.parametrize("method", KINDS)
def test_equations_without_a_solution_say_that_a_smaller_step_is_needed(method):
    """y' = y^2 from 1 is infinite at t = 1, and a step of 1 has no solution by these methods."""
    y0 = torch.ones(1, dtype=F64)
    with pytest.raises(SolveError, match=r"NOT_SOLVED at t = 0\. The step was 3; take a smaller step_size\."):
        odeint(lambda t, y: 5.0 * y**2, y0, 3 * T, method=method, options=dict(max_iters=20))
    t = torch.tensor([0.0, 0.02, 3.0], dtype=F64)
    partial = solve(lambda t, y: 5.0 * y**2, y0, t, method=method, options=dict(max_iters=20, throw=False))
    assert partial.status is Status.NOT_SOLVED and partial.stats.accepted == 1
    assert bool(partial.ys[1].isfinite()) and bool(partial.ys[2].isnan())
    assert float(partial.t_reached) == pytest.approx(0.02)


@pytest.mark.parametrize("method", KINDS)
def test_the_gradient_behind_full_iterations_is_exact(method):
    y0 = torch.tensor([1.0], dtype=F64)

    def last(y, **arguments):
        return odeint_adjoint(lambda t, y: -1e3 * y**3, y, T, method=method, adjoint_params=(),
                              options=dict(newton_tol=1e-6), **arguments)[-1]  # fmt: skip

    difference = float((last(y0 + 1e-6) - last(y0 - 1e-6)) / 2e-6)
    y0.requires_grad_()
    (found,) = torch.autograd.grad(last(y0, gradient="discrete"), y0)
    assert float(found) == pytest.approx(difference, rel=1e-6)


# ------------------------------------------------------------------ options
@pytest.mark.parametrize("method", METHODS)
def test_single_precision_works_at_the_default_tolerances_and_is_not_warned_of(method):
    y0, t = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ys = odeint(lambda t, y: torch.stack([-1e3 * (y[0] - y[1]), y[0] - 2.0 * y[1]]), y0, t, method=method,
                    options=dict(step_size=0.02))  # fmt: skip
    exact = odeint(lambda t, y: torch.stack([-1e3 * (y[0] - y[1]), y[0] - 2.0 * y[1]]), y0.double(), t.double(),
                   method="rodas5p", rtol=1e-8)  # fmt: skip
    # (the fast component, which not every method damps in steps of 20 of its time constants, takes part in the slow)
    assert abs(float(ys[-1, 1]) / float(exact[-1, 1]) - 1) < (20.0 if method in (*GAUSS, "trapezoid") else 1.0)


def jump(t, y):
    """A field with a jump at t = 1/2. Its value at t = 1/2 itself is far from both sides."""
    slope = torch.where(t < 0.5, 1.0, 3.0)
    return torch.where(t == 0.5, 1000.0, slope) * torch.ones_like(y)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backwards", [False, True])
def test_perturb_never_evaluates_on_a_grid_point(method, backwards):
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    options = dict(perturb=True)
    ys = odeint(jump, torch.zeros(1, dtype=F64), t.flip(0) if backwards else t, method=method, options=options)
    assert ys[:, 0].tolist() == pytest.approx([0.0, -1.5, -2.0] if backwards else [0.0, 0.5, 2.0], abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_between_the_steps_lie_on_chords_or_on_the_polynomial_of_the_stages(method):
    t, errors = linspace(0.0, 1.0, 38), {}
    for interp in ("linear", "cubic"):
        for h in (1 / 8, 1 / 16):
            with torch.no_grad():
                ys = odeint(lambda t, y: y * torch.cos(t), torch.ones(1, dtype=F64), t, method=method,
                            options=dict(step_size=h, interp=interp))  # fmt: skip
            errors[interp, h] = float((ys[:, 0] - torch.exp(torch.sin(t))).abs().max())
    order, dense = order_of(method), IMPLICIT_TABLEAUS[method].dense.order
    for interp, expected in (("linear", min(order, 2)), ("cubic", min(order, dense + 1))):
        assert math.log2(errors[interp, 1 / 8] / errors[interp, 1 / 16]) > expected - 2 * SLOPE


def test_options_of_these_methods_are_checked_and_named():
    y0 = torch.ones(1, dtype=F64)
    for wrong in (0, 2.5, "many"):
        with pytest.raises(ValueError, match=r'options\["max_iters"\]'):
            odeint(lambda t, y: -y, y0, T, method="gl4", options=dict(max_iters=wrong))
    with pytest.raises(ValueError, match="newton_tol"):
        odeint(lambda t, y: -y, y0, T, method="gl4", options=dict(newton_tol=2.0))
    with pytest.warns(UserWarning, match="jac belongs to the implicit methods"):
        odeint(lambda t, y: -y, y0, T, method="rk4", options=dict(jac=lambda t, y: -torch.eye(1)))
    with pytest.warns(UserWarning, match="first_step belongs to the adaptive methods"):
        odeint(lambda t, y: -y, y0, T, method="gl4", options=dict(first_step=0.1))


@pytest.mark.parametrize("method", KINDS)
def test_an_empty_state_is_refused_in_words(method):
    with pytest.raises(ValueError, match=r"y0 has no elements.* method=\"rk4\""):
        odeint(lambda t, y: -y, torch.zeros(0, 2, dtype=F64), T, method=method)


@pytest.mark.parametrize("method", KINDS)
def test_a_given_jacobian_and_samples_apart_give_the_same_solution(method):
    rates = torch.tensor([1.0, 50.0, 1e4], dtype=F64)
    y0 = torch.ones(3, 1, dtype=F64)
    options = dict(step_size=0.1, batch_dims=1)

    def field(t, y):
        return -rates[:, None] * (y - torch.cos(t))

    plain = solve(field, y0, T, method=method, options=options)
    given = solve(field, y0, T, method=method, options=dict(options, jac=lambda t, y: -rates[:, None, None]))
    whole = solve(field, y0, T, method=method, options=dict(step_size=0.1))
    assert torch.allclose(plain.ys, given.ys, rtol=1e-12) and torch.allclose(plain.ys, whole.ys, rtol=1e-9)
    stats = plain.stats
    assert stats.jacobians == stats.factorisations  # a linear field, and steps of 0.1 to rounding
    assert stats.newton_iterations == stats.linear_solves >= 10
