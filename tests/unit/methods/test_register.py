"""`register_method`: a user's tableau becomes a method, or the message says what is wrong with it."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from problems import KUTTA3
from rooted_trees import trees as independent_trees

from node_cuda import TABLEAUS, InvalidInput, InvalidType, odeint, odeint_adjoint, register_method, solve
from node_cuda.methods.order_conditions import attained, trees
from node_cuda.methods.tableau import DenseOutput, Tableau, row, rows

F64 = torch.float64
RALSTON = Tableau("any", order=2, c=row("0 2/3"), a=rows("", "2/3"), b=row("1/4 3/4"), source="Ralston 1962")


@pytest.fixture
def registered():
    """Remove the registered names after the test."""
    before = set(TABLEAUS)
    yield
    for name in set(TABLEAUS) - before:
        del TABLEAUS[name]


def decay(t, y):
    return -y * (1 + t)


def test_a_method_that_is_not_fsal_solves_and_differentiates_in_every_mode(registered):
    register_method("kutta3", KUTTA3)
    a = torch.tensor(1.0, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    for gradient in ("backprop", "adjoint", "discrete"):
        y0 = torch.ones(2, dtype=F64, requires_grad=True)
        ys = solve(
            lambda t, y: -a * y * (1 + t), y0, t, method="kutta3", rtol=1e-7, atol=1e-9, gradient=gradient,
            adjoint_params=(a,),
        ).ys  # fmt: skip
        (found,) = torch.autograd.grad(ys[-1].sum(), a)
        # y = exp(-a (t + t^2 / 2)); errors of a third-order method at these tolerances.
        assert ys[1].detach() == pytest.approx(torch.full((2,), math.exp(-0.345), dtype=F64), abs=1e-6)
        assert float(found) == pytest.approx(-3.0 * math.exp(-1.5), abs=1e-6)


def test_accepted_and_rejected_steps_of_a_registered_method_cost_three_evaluations(registered):
    register_method("kutta3", KUTTA3)
    calls = []

    def counted(t, y):
        calls.append(t)
        return decay(t, y)

    stats = solve(
        counted, torch.ones(1), torch.tensor([0.0, 1.0]), method="kutta3", options=dict(first_step=1e-3)
    ).stats
    assert stats.nfe == len(calls) == 1 + 3 * (stats.accepted + stats.rejected)


def test_a_fixed_grid_takes_the_method_without_changes(registered):
    register_method("ralston", RALSTON)
    t = torch.linspace(0.0, 1.0, 33, dtype=F64)
    errors = [
        abs(float(odeint(decay, torch.ones(1, dtype=F64), t[::every], method="ralston")[-1]) - math.exp(-1.5))
        for every in (2, 1)
    ]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)  # second order
    assert TABLEAUS["ralston"].stages == 2


def test_the_default_interpolant_is_of_third_order(registered):
    register_method("kutta3", KUTTA3)
    dense = TABLEAUS["kutta3"].dense
    assert attained((*TABLEAUS["kutta3"].a, *dense.a), dense.weights, 4) == 3


def test_an_interpolant_of_the_users_is_kept(registered):
    given = DenseOutput(order=2, weights=rows("1 -3/2 2/3", "0 2 -4/3", "0 -1/2 2/3"))
    register_method("kutta3", replace(KUTTA3, dense=given))
    assert TABLEAUS["kutta3"].dense.weights == (*given.weights, (0, 0, 0))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(order=4), "b is stated to have order 4, but it meets the order conditions of order 3"),
        (dict(embedded_order=3), "b_hat is stated to have order 3, but it meets .* of order 2 only"),
        (dict(a=rows("", "1/2", "0 1")), "b is stated to have order 3, but it meets .* of order 2 only"),
        (dict(dense=DenseOutput(3, rows("1 -3/2 2/3", "0 2 -4/3", "0 -1/2 2/3"))), "dense is stated to have order 3"),
        (dict(carry_last_stage=True), "carry_last_stage is set, but the last stage is not"),
    ],
)
def test_a_tableau_that_misses_its_stated_order_is_refused(change, words):
    with pytest.raises(InvalidInput, match=f"method 'mine': {words}"):
        register_method("mine", replace(KUTTA3, **change))
    assert "mine" not in TABLEAUS


def test_an_existing_name_and_an_object_that_is_no_tableau_are_refused():
    for name in ("dopri5", "scipy_solver", "explicit_adams", "gl4"):
        with pytest.raises(InvalidInput, match=f"the method '{name}' exists already"):
            register_method(name, KUTTA3)
    with pytest.raises(InvalidType, match=r"tableau must be a .*Tableau; got a dict"):
        register_method("mine", {})
    with pytest.raises(InvalidType, match="name must be a word"):
        register_method(3, KUTTA3)
    with pytest.raises(ValueError, match='Invalid method "mine"'):
        odeint_adjoint(decay, torch.ones(1), torch.tensor([0.0, 1.0]), method="mine", adjoint_params=())


def test_the_trees_are_those_of_the_tests():
    assert [(tree.vertices, tree.density) for tree in trees(7)] == [(t.order, t.density) for t in independent_trees(7)]


@pytest.mark.parametrize("name", [name for name in TABLEAUS if name != "dopri8"])
def test_the_methods_of_the_package_meet_the_conditions_and_no_higher_ones(name):
    tableau = TABLEAUS[name]
    assert attained(tableau.a, [(b,) for b in tableau.b], tableau.order + 1) == tableau.order
    for dense in (tableau.dense, tableau.accurate):
        if dense is not None:
            assert attained((*tableau.a, *dense.a), dense.weights, dense.order + 1) == dense.order


def test_exact_numbers_stay_exact(registered):
    register_method("kutta3", KUTTA3)
    assert all(isinstance(x, (int, Fraction)) for x in TABLEAUS["kutta3"].b)


def test_a_name_that_is_registered_anew_is_the_new_method(registered):
    def solved():
        return odeint(decay, torch.ones(1, dtype=F64), torch.tensor([0.0, 0.5], dtype=F64), method="anew")

    register_method("anew", RALSTON)
    first = solved()
    del TABLEAUS["anew"]
    register_method("anew", replace(RALSTON, c=row("0 1"), a=rows("", "1"), b=row("1/2 1/2")))
    assert not torch.equal(solved(), first)
