"""The implicit methods on stiff problems, and what every one of them must do."""

from __future__ import annotations

import math

import pytest
import torch
from problems import F64, linspace, order_of
from stiff_cases import PROBLEMS, Robertson, robertson, solved
from tolerances import SLOPE

from node_cuda import SolveError, Status, odeint, odeint_adjoint, odeint_dense, odeint_event, solve
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS
from node_cuda.methods.registry import lookup

METHODS = [name for name, tableau in IMPLICIT_TABLEAUS.items() if tableau.adaptive]  # the others: test_grids.py
T = linspace(0.0, 1.0, 2)


# ------------------------------------------------------------------ right, and cheap
@pytest.mark.parametrize(
    "method, name, rtol, steps, evaluations",
    [
        # A bit above what was measured (docs/stiff.md), so that a change of the algorithm shows.
        ("rodas5p", "robertson", 1e-4, 150, 1200),
        ("rodas5p", "robertson", 1e-6, 310, 2500),
        ("rodas5p", "hires", 1e-4, 70, 700),
        ("rodas5p", "hires", 1e-6, 240, 1950),
        ("rodas5p", "van der pol", 1e-4, 220, 2250),
        ("kvaerno5", "robertson", 1e-4, 95, 1400),
        ("kvaerno5", "robertson", 1e-6, 210, 3100),
        ("kvaerno5", "hires", 1e-4, 65, 1200),
        ("kvaerno5", "hires", 1e-6, 170, 2500),
        ("kvaerno5", "van der pol", 1e-4, 220, 4300),
        ("kvaerno3", "robertson", 1e-4, 410, 2000),
        ("kvaerno3", "hires", 1e-4, 200, 1600),
    ],
)
def test_a_stiff_problem_is_solved_in_few_steps_and_evaluations(method, name, rtol, steps, evaluations):
    solution, error = solved(name, method, rtol)
    assert error <= (5 if method == "rodas5p" else 20)
    assert solution.stats.accepted <= steps and solution.stats.nfe <= evaluations


def test_a_method_has_its_own_defaults_of_step_control_and_the_users_options_win():
    assert lookup("kvaerno5", None).options.safety == 0.8 and lookup("rodas5p", None).options.controller == "I"
    assert lookup("kvaerno5", dict(safety=0.95)).options.safety == 0.95
    assert lookup("kvaerno3", None).options.safety == 0.9 and lookup("kvaerno3", None).options.controller == "stiff"


@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5"])
def test_forty_steps_do_where_an_explicit_method_has_hardly_begun_after_a_thousand(method):
    """Robertson's problem to t = 40: the stability of dopri5 allows steps of some 3.3 / 3e3 there."""
    t = torch.tensor([0.0, 40.0], dtype=F64)
    with torch.no_grad():
        stats = solve(robertson, torch.tensor([1.0, 0.0, 0.0], dtype=F64), t, method=method, rtol=1e-4, atol=1e-8).stats
        explicit = solve(
            robertson, torch.tensor([1.0, 0.0, 0.0], dtype=F64), t, rtol=1e-4, atol=1e-8,
            options=dict(max_num_steps=1000, throw=False),
        )  # fmt: skip
    assert explicit.status is Status.MAX_STEPS and float(explicit.t_reached) < 1.5
    assert stats.accepted < 40


@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5", "kvaerno3"])
def test_van_der_pols_oscillator_is_followed_at_eps_of_1e_12_from_a_small_first_step(method):
    """But for O(eps) the solution is that of y' = y / (1 - y^2): log y - y^2 / 2 = t + log 2 - 2."""

    def field(t, y):
        return torch.stack([y[1], ((1 - y[0] ** 2) * y[1] - y[0]) / 1e-12])

    with torch.no_grad():
        solution = solve(field, torch.tensor([2.0, 0.0], dtype=F64), linspace(0.0, 0.5, 2), method=method, rtol=1e-6,
                         atol=1e-6, options=dict(first_step=1e-14))  # fmt: skip
    y = float(solution.ys[-1, 0])
    assert math.log(y) - y**2 / 2 == pytest.approx(0.5 + math.log(2.0) - 2.0, abs=2e-5)
    assert float(solution.ys[-1, 1]) == pytest.approx(y / (1 - y**2), rel=2e-5)
    assert solution.stats.accepted < 200


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("outputs", [2, 101])
def test_a_non_autonomous_stiff_field_is_followed_in_few_steps_and_right_between_them(method, outputs):
    """Prothero and Robinson: y = sin t, with a component of -1e6. A method whose embedded error alone decided would be
    off by 4e-3 to 2 between the ends of its steps."""
    t = linspace(0.0, 10.0, outputs)

    def field(t, y):
        return -1e6 * (y - torch.sin(t)) + torch.cos(t)

    with torch.no_grad():
        solution = solve(field, torch.zeros(1, dtype=F64), t, method=method, rtol=1e-6, atol=1e-8)
    assert float((solution.ys[:, 0] - torch.sin(t)).abs().max()) < 5e-6
    assert solution.stats.accepted < (50 if outputs == 2 or method == "rodas5p" else 400)


@pytest.mark.parametrize("method", METHODS)
def test_every_implicit_method_converges_with_its_order(method):
    order = order_of(method)
    t, errors = linspace(0.0, 2.0, 3), []
    for h in (1 / 8, 1 / 16):
        options = dict(first_step=h, min_step=h, max_step=h, newton_tol=1e-9)
        with torch.no_grad():
            y = odeint(lambda t, y: y * torch.cos(t) - 0.1 * y**2, torch.ones(1, dtype=F64), t, method=method,
                       options=options, rtol=1e-6)  # fmt: skip
            exact = odeint(lambda t, y: y * torch.cos(t) - 0.1 * y**2, torch.ones(1, dtype=F64), t, rtol=1e-12,
                           atol=1e-13, method="dopri8", options=dict(dense="accurate"))  # fmt: skip
        errors.append(float((y - exact).abs().max()))
    assert math.log2(errors[0] / errors[1]) > order - SLOPE


# ------------------------------------------------------------------ states, times and options
@pytest.mark.parametrize("method", METHODS)
def test_states_of_complex_numbers_and_tuples_are_solved_in_both_directions(method):
    z0, t = torch.ones(2, dtype=torch.complex128), linspace(1.0, 0.0, 3)
    z = odeint(lambda t, y: 1j * y - 0.1 * y.conj(), z0, t, method=method, rtol=1e-5, atol=1e-7)
    right = odeint(lambda t, y: 1j * y - 0.1 * y.conj(), z0, t, rtol=1e-9, atol=1e-9)
    limit = 1e-3 if order_of(method) < 3 else 1e-4
    assert float((z - right).abs().max()) < limit
    start = torch.ones(2, dtype=F64), torch.zeros(2, 1, dtype=F64)
    a, b = odeint(lambda t, s: (s[1].sum(1), -s[0].reshape(2, 1)), start,
                  t, method=method, rtol=1e-5, atol=1e-7)  # fmt: skip
    assert a.shape == (3, 2) and b.shape == (3, 2, 1)
    assert torch.allclose(a[-1], torch.cos(torch.tensor(1.0, dtype=F64)).expand(2), atol=limit)


@pytest.mark.parametrize("method", METHODS)
def test_a_jump_an_event_and_a_clipped_end_are_met(method):
    y0 = torch.ones(2, dtype=F64)
    jump = odeint(lambda t, y: torch.where(t < 0.5, 1.0, -1.0) * torch.ones_like(y), y0, T, method=method,
                  options=dict(jump_t=torch.tensor([0.5])))  # fmt: skip
    assert torch.allclose(jump[-1], y0, atol=1e-9)
    clipped = odeint(lambda t, y: -y * torch.sqrt(1 - t), y0, T, method=method, rtol=1e-5, atol=1e-6,
                     options=dict(clip=True))  # fmt: skip
    assert torch.allclose(clipped[-1], y0 * math.exp(-2 / 3), atol=1e-4)  # the square root would be NaN beyond t = 1
    event_t, _ = odeint_event(lambda t, y: -1e4 * (y - torch.cos(t)), y0, T[0], event_fn=lambda t, y: y[0] - 0.5,
                              method=method, rtol=1e-6, atol=1e-8)  # fmt: skip
    assert float(event_t) == pytest.approx(math.acos(0.5), abs=2e-4)  # y = cos t + 1e-4 sin t


@pytest.mark.parametrize("method", METHODS)
def test_dense_output_of_a_stiff_solve_is_right_everywhere(method):
    solution = odeint_dense(lambda t, y: -1e5 * (y - torch.sin(t)) + torch.cos(t), torch.zeros(1, dtype=F64),
                            torch.tensor(0.0, dtype=F64), torch.tensor(3.0, dtype=F64), method=method, rtol=1e-5,
                            atol=1e-6)  # fmt: skip
    t = linspace(0.0, 3.0, 61)
    assert float((solution(t)[:, 0] - torch.sin(t)).abs().max()) < 5e-5


@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5"])
def test_a_batch_of_samples_has_a_jacobian_for_each(method):
    """The solutions of samples with other rates, each beside a component of another shape, and an integral for each."""
    rates = torch.tensor([[0.04, 1e4, 3e7], [0.1, 1e3, 1e6], [0.01, 3e4, 1e7]], dtype=F64)
    y0 = (torch.tensor([[1.0, 0.0, 0.0]], dtype=F64).expand(3, 3), torch.zeros(3, 1, 2, dtype=F64))
    func, t = Robertson(rates), torch.tensor([0.0, 1.0, 40.0], dtype=F64)
    arguments = dict(method=method, rtol=1e-6, atol=1e-10)
    with torch.no_grad():
        solution = solve(
            lambda t, s: (func(t, s[0]), torch.stack([s[0][:, :2]], 1)), y0, t, options=dict(batch_dims=1),
            integral=lambda t, y, dy: y[0][:, 0], **arguments,
        )  # fmt: skip
        for i in range(3):
            alone = odeint(Robertson(rates[i]), y0[0][i], t, **arguments)
            assert torch.allclose(solution.ys[0][:, i], alone, rtol=2e-5, atol=1e-9)
    assert solution.integral.shape == (3, 3) and solution.ys[1].shape == (3, 3, 1, 2)
    assert torch.allclose(solution.integral, solution.ys[1][:, :, 0, 0], rtol=1e-12)


@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5"])
def test_the_statistics_count_the_linear_algebra(method):
    stats = solved("robertson", method, 1e-4)[0].stats
    if (
        method == "rodas5p"
    ):  # the field, and the Jacobian once more at the start and in each step; one output's residual
        assert stats.jacobians == stats.accepted
        assert stats.factorisations == stats.accepted + stats.rejected
        assert stats.linear_solves == 8 * stats.factorisations
        assert stats.newton_iterations == stats.rejected_by_newton == 0
        assert stats.nfe == 1 + 1 + stats.jacobians + 7 * stats.factorisations + 1
    else:
        assert 0 < stats.jacobians < stats.accepted
        assert 6 * stats.accepted <= stats.newton_iterations == stats.linear_solves
        assert stats.nfe <= stats.newton_iterations + stats.jacobians + 5


# ------------------------------------------------------------------ failures
def test_equations_that_cannot_be_solved_are_a_status():
    """A field that is NaN beyond t = 0.5, with a Jacobian that is not."""
    y0 = torch.ones(1, dtype=F64)
    options = dict(jac=lambda t, y: -torch.ones(1, 1, dtype=F64), throw=False)

    def field(t, y):
        return torch.where(t > 0.5, torch.full_like(y, math.nan), -y)

    solution = solve(field, y0, T, method="kvaerno5", options=options)
    assert solution.status is Status.NOT_SOLVED
    assert float(solution.t_reached) == pytest.approx(0.5, abs=1e-6) and bool(solution.ys[-1].isnan())
    with pytest.raises(SolveError, match="rodas5p"):
        solution.check()


@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5"])
def test_a_jacobian_with_nan_says_so_and_where(method):
    with pytest.raises(SolveError, match=r"NON_FINITE at t = 0\. The Jacobian df/dy, autograd's, .* options=dict\(jac"):
        odeint(lambda t, y: torch.sqrt(y.abs()) - y, torch.zeros(2, dtype=F64), T, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_tolerance_that_single_precision_does_not_hold_is_warned_of(method):
    y0 = torch.ones(2)
    with pytest.warns(UserWarning, match=r"rtol = 1e-06 is less than torch.float32 holds"):
        odeint(lambda t, y: -y, y0, T.float(), method=method, rtol=1e-6)
    odeint(lambda t, y: -y, y0, T.float(), method=method, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:rtol = 1e-06 is less than torch.float32 holds")
def test_single_precision_is_off_on_a_long_interval_and_no_error_estimate_knows():
    problem = PROBLEMS["robertson"]
    t = torch.tensor([0.0, problem.t])
    with torch.no_grad():
        solution = solve(problem.field, torch.tensor(problem.start), t, method="kvaerno5", rtol=1e-6, atol=1e-12)
    assert solution.status is Status.SUCCESS
    assert abs(float(solution.ys[-1, 0]) / problem.end[0] - 1) > 2e-4  # two hundred times rtol


@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5"])
def test_transforms_of_the_steps_are_refused_and_those_of_the_solve_are_not(method):
    y0 = torch.ones(2, dtype=F64)
    with pytest.raises(ValueError, match="odeint_adjoint"):
        torch.func.grad(lambda y: odeint(lambda t, y: -(y**3), y, T, method=method)[-1].sum())(y0)
    found = torch.func.grad(
        lambda y: odeint_adjoint(
            lambda t, y: -(y**3), y, T, method=method, gradient="discrete", adjoint_params=(), rtol=1e-6
        )[-1].sum()
    )(y0)
    assert torch.allclose(found, torch.full_like(y0, 3**-1.5), rtol=1e-4)  # y = (1 / y0^2 + 2 t)^-1/2


def test_the_graph_of_a_solve_without_gradients_is_not_kept():
    """Autograd records by default; a Jacobian needs a graph, the solution does not."""
    problem = PROBLEMS["robertson"]
    for method in METHODS:
        ys = odeint(problem.field, torch.tensor(problem.start, dtype=F64), T, method=method, rtol=1e-3)
        assert not ys.requires_grad
