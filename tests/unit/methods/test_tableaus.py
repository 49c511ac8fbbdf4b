"""The rooted-tree conditions prove the order of every tableau and interpolant, in exact arithmetic.

Other tests measure the convergence of real solves. Here no other error can hide a wrong digit.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import KUTTA3
from rooted_trees import elementary_weights, trees

from node_cuda.methods.tableau import DenseOutput, Row, Tableau, rows
from node_cuda.methods.tableaus import TABLEAUS
from tools.continuous_extension import PLANS, extension

HALF = Fraction(1, 2)

# The allowed size of a residual. For rational numbers it is zero. Other coefficients are published, or printed by
# tools/continuous_extension.py, with a number of digits, and a residual is a sum of some ten of them.
ROUNDED = {
    "tsit5": 1e-34,  # 40 digits, of which the solved mid-point loses a few
    "dopri8": 1e-17,  # fractions that approximate irrational numbers to 18 digits
}
ROUNDED_MID = ROUNDED | {"dopri5": 1e-18, "bosh5": 1e-18}  # printed to about 20 digits
# Interpolants: the same, times weights of up to 1e2, and of up to 2e3 for dopri8.
ROUNDED_DENSE = {"dopri5": 1e-16, "bosh5": 1e-16, "tsit5": 1e-16, "dopri8": 1e-13}
# A residual above this is not zero in float64, for conditions that must fail. The smallest of them is 7e-8 (bosh5).
CLEARLY_NOT_ZERO = 1e-8

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
INTERPOLANTS = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name in ADAPTIVE
    for kind in ("dense", "accurate")
    if getattr(TABLEAUS[name], kind) is not None
]
MID_POINTS = [name for name in ADAPTIVE if TABLEAUS[name].b_mid is not None]


@cache
def elementary(tableau: Tableau, dense: DenseOutput | None, order: int, dtype: type = object) -> np.ndarray:
    """Return Phi_i(t) of the method's stages, and then of the interpolant's extra stages."""
    return elementary_weights((*tableau.a, *(dense.a if dense else ())), order, dtype)


def largest(misses: np.ndarray, order: int) -> list[float]:
    """Return max |misses| over the trees (columns) of each order 1 ... order."""
    orders = np.array([tree.order for tree in trees(order)])
    sizes = np.abs(misses).max(axis=0).astype(float)
    return [float(sizes[orders == k].max()) for k in range(1, order + 1)]


def residuals(weights: Row, phi: np.ndarray, order: int, x: Fraction = Fraction(1)) -> list[float]:
    """Return the largest |sum_i weights_i Phi_i(t) - x^|t| / gamma(t)| of each order 1 ... order."""
    targets = np.array([x**tree.order / Fraction(tree.density) for tree in trees(order)], dtype=object)
    return largest((phi @ np.array(weights, dtype=phi.dtype) - targets.astype(phi.dtype))[None], order)


def dense_residuals(tableau: Tableau, dense: DenseOutput, order: int, dtype: type = object) -> list[float]:
    """Return the same for an interpolant and all x: the coefficients of sum_i B_i(x) Phi_i(t) - x^|t| / gamma(t)."""
    phi = elementary(tableau, dense, order, dtype)
    misses = np.zeros((max(order, dense.degree), len(phi)), dtype=dtype)  # rows: powers of x, columns: trees
    misses[: dense.degree] = np.array(dense.weights, dtype=dtype).T @ phi.T
    for k, tree in enumerate(trees(order)):
        misses[tree.order - 1, k] -= Fraction(1, tree.density)
    return largest(misses, order)


def values_at(dense: DenseOutput, x: Fraction) -> Row:
    """Return B_i(x) of every stage."""
    return tuple(sum(weight * x**d for d, weight in enumerate(weights, 1)) for weights in dense.weights)


def attained(worst: list[float], bound: float) -> int:
    """Return the order up to which no residual is above the bound."""
    return next((i for i, residual in enumerate(worst) if residual > bound), len(worst))


def check_order(tableau: Tableau, weights: Row, order: int, bound: float, x: Fraction = Fraction(1)) -> None:
    """Check that weights have this order and no higher one."""
    worst = residuals(weights, elementary(tableau, None, order), order, x)
    assert attained(worst, bound) == order, worst
    beyond = residuals(weights, elementary(tableau, None, order + 1, float), order + 1, x)
    assert beyond[-1] > CLEARLY_NOT_ZERO, f"the order is higher than the {order} declared"


def test_there_are_as_many_rooted_trees_as_cayley_counted():
    orders = [tree.order for tree in trees(8)]
    assert [orders.count(order) for order in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]
    # Each tree of n vertices stands for n! / (gamma sigma) monotonic labellings, (n - 1)! in all.
    for order in range(1, 9):
        same = [Fraction(math.factorial(order), t.density * t.symmetry) for t in trees(8) if t.order == order]
        assert sum(same) == math.factorial(order - 1)


@pytest.mark.parametrize("name", TABLEAUS)
def test_every_method_has_the_order_it_declares_and_no_higher_one(name):
    tableau = TABLEAUS[name]
    check_order(tableau, tableau.b, tableau.order, ROUNDED.get(name, 0.0))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_every_embedded_row_has_the_order_it_declares_and_no_higher_one(name):
    tableau = TABLEAUS[name]
    check_order(tableau, tableau.b_hat, tableau.embedded_order, ROUNDED.get(name, 0.0))


@pytest.mark.parametrize("name", MID_POINTS)
def test_every_mid_point_has_the_order_it_declares_and_no_higher_one(name):
    tableau = TABLEAUS[name]
    check_order(tableau, tableau.b_mid, tableau.mid_order, ROUNDED_MID.get(name, 0.0), HALF)


@pytest.mark.parametrize("name, kind", INTERPOLANTS)
def test_every_interpolant_has_the_order_it_declares_and_no_higher_one(name, kind):
    tableau = TABLEAUS[name]
    dense = getattr(tableau, kind)
    worst = dense_residuals(tableau, dense, dense.order)
    assert attained(worst, ROUNDED_DENSE.get(name, 0.0)) == dense.order, worst
    beyond = dense_residuals(tableau, dense, dense.order + 1, float)
    assert beyond[-1] > CLEARLY_NOT_ZERO, f"the order is higher than the {dense.order} declared"


@pytest.mark.parametrize("name", ADAPTIVE)
def test_every_adaptive_method_has_an_interpolant_of_its_own_order(name):
    tableau = TABLEAUS[name]
    assert tableau.dense is not None
    best = tableau.accurate or tableau.dense
    assert best.order == tableau.order
    assert tableau.accurate is None or tableau.dense.order < tableau.order


@pytest.mark.parametrize("name, kind", INTERPOLANTS)
def test_every_interpolant_joins_the_ends_of_its_step_smoothly(name, kind):
    tableau = TABLEAUS[name]
    dense = getattr(tableau, kind)
    first = [1] + [0] * (tableau.stages + dense.extra - 1)
    last = [int(i == tableau.stages - 1) for i in range(tableau.stages + dense.extra)]
    slope_at_end = [sum(d * weight for d, weight in enumerate(weights, 1)) for weights in dense.weights]
    ends = [*tableau.b, *[0] * dense.extra]
    assert [weights[0] for weights in dense.weights] == first
    assert values_at(dense, Fraction(1)) == tuple(ends)
    if tableau.fsal:  # the next step starts with the slope with which this one ends
        assert slope_at_end == last


@pytest.mark.parametrize("name", ["adaptive_heun", "fehlberg2"])
@pytest.mark.parametrize("x", [Fraction(1, 3), Fraction(1)])
def test_the_order_is_two_if_a_first_stage_is_the_last_stage_of_the_step_before(name, x):
    """Two steps are one method of 2 s - 1 stages: the second step starts with the last stage of the first one."""
    tableau = TABLEAUS[name]
    s = tableau.stages

    def after_first(weights: Row) -> Row:
        carried = (*tableau.b[:-1], tableau.b[-1] + weights[0]) if weights else tableau.b
        return (*carried, *weights[1:])

    two_steps = (*tableau.a, *(after_first(tableau.a[i]) for i in range(1, s)))
    phi = elementary_weights(two_steps, 2)
    assert residuals(after_first(values_at(tableau.accurate, x)), phi, 2, 1 + x) == [0.0, 0.0]


@pytest.mark.parametrize("name", MID_POINTS)
def test_the_interpolant_through_a_mid_point_is_torchdiffeqs_quartic(name):
    tableau = TABLEAUS[name]
    for i, weights in enumerate(tableau.dense.weights):
        b, mid = tableau.b[i], tableau.b_mid[i]
        first, last = int(i == 0), int(i == tableau.stages - 1)
        assert weights == (
            first,
            -5 * b + 16 * mid - 4 * first + last,
            14 * b - 32 * mid + 5 * first - 3 * last,
            -8 * b + 16 * mid - 2 * first + 2 * last,
        )


def test_the_last_stage_is_carried_by_fsal_methods_and_two_more():
    fsal = {name for name, tableau in TABLEAUS.items() if tableau.fsal}
    carried = {name for name, tableau in TABLEAUS.items() if tableau.carry_last_stage}
    assert fsal == {"bosh3", "dopri5", "tsit5", "bosh5", "dopri8"}
    assert carried == fsal | {"adaptive_heun", "fehlberg2"}


@pytest.mark.parametrize("name", ["adaptive_heun", "fehlberg2", "bosh3", "dopri5", "dopri8"])
def test_adaptive_rows_are_torchdiffeqs_to_the_last_bit(name):
    theirs = pytest.importorskip("torchdiffeq._impl.odeint").SOLVERS[name]
    tableau = TABLEAUS[name]

    def close(ours, tensor, ulps: int = 1, scale=None) -> bool:
        ours, numbers = np.array(ours, dtype=float), tensor.numpy()
        unit = np.spacing(np.abs(numbers if scale is None else np.array(scale, dtype=float)))
        return bool(np.all(np.abs(ours - numbers) <= ulps * unit))

    assert tableau.order == theirs.order
    assert close(tableau.c[1:], theirs.tableau.alpha)
    for ours, numbers in zip(tableau.a[1:], theirs.tableau.beta, strict=True):
        assert close(ours, numbers)
    assert close(tableau.b, theirs.tableau.c_sol)
    # torchdiffeq subtracts in floating point, this package exactly: the difference is a rounding of the larger term.
    larger = np.maximum(np.abs(np.array(tableau.b, float)), np.abs(np.array(tableau.b_hat, float)))
    assert close(tableau.b_err, theirs.tableau.c_error, scale=larger)
    # For dopri8, torchdiffeq evaluates polynomials in floating point, with terms of up to 20.
    assert close(tableau.b_mid, theirs.mid, scale=np.full(tableau.stages, 20.0) if name == "dopri8" else None)


@pytest.mark.parametrize("name", [name for name, tableau in TABLEAUS.items() if not tableau.adaptive])
def test_a_step_on_a_fixed_grid_is_torchdiffeqs(name, torchdiffeq):
    def func(t, y):
        return torch.sin(3 * t) * y + t

    tableau, h, y0 = TABLEAUS[name], 0.7, torch.tensor([1.3], dtype=torch.float64)
    k: list[torch.Tensor] = []
    for node, numbers in zip(tableau.nodes, tableau.rows, strict=True):
        k.append(func(torch.tensor(node * h, dtype=torch.float64), y0 + h * sum(a * k[j] for j, a in numbers)))
    y1 = y0 + h * sum(b * k[i] for i, b in tableau.b_row)
    theirs = torchdiffeq.odeint(func, y0, torch.tensor([0.0, h], dtype=torch.float64), method=name)[-1]
    torch.testing.assert_close(y1, theirs, rtol=1e-15, atol=0)


def altered(numbers: Row, i: int, by: Fraction, j: int | None = None) -> Row:
    """Return the numbers with numbers_i + by and numbers_j - by."""
    changed = list(numbers)
    changed[i] += by
    if j is not None:
        changed[j] -= by
    return tuple(changed)


@pytest.mark.parametrize("name", TABLEAUS)
def test_a_misprint_in_any_coefficient_is_refused(name):
    """The ninth digit of one number is changed, so that its sum is wrong."""
    tableau, slip = TABLEAUS[name], Fraction(1, 10**9)
    for field in ("c", "b", "b_hat", "b_mid"):
        numbers = getattr(tableau, field) or ()
        for i in range(len(numbers)):
            with pytest.raises(ValueError, match=r"the sum of .* is .*, but must be .*; look for a misprint"):
                replace(tableau, **{field: altered(numbers, i, slip)}, **underived(tableau))
    for stage, numbers in enumerate(tableau.a):
        for j in range(len(numbers)):
            a = list(tableau.a)
            a[stage] = altered(numbers, j, slip)
            with pytest.raises(ValueError, match="look for a misprint"):
                replace(tableau, a=tuple(a), **underived(tableau))


def underived(tableau: Tableau) -> dict[str, None]:
    """Return the arguments without the derived interpolant, for a new tableau."""
    return {} if tableau.b_mid is None else {"dense": None}


@pytest.mark.parametrize("name", [name for name, tableau in TABLEAUS.items() if tableau.order >= 3])
def test_two_misprints_that_keep_the_sums_lower_an_order_or_break_fsal(name):
    tableau, slip = TABLEAUS[name], Fraction(1, 10**5)
    bound = 1e-13  # rounding of the float64 evaluation here; dopri8's rows have entries of up to 16

    def signature(changed: Tableau) -> tuple[object, ...]:
        phi = elementary_weights(changed.a, changed.order, float)
        found = [attained(residuals(changed.b, phi, changed.order), bound)]
        if changed.b_hat is not None:
            found.append(attained(residuals(changed.b_hat, phi, changed.order), bound))
        return (*found, changed.fsal)

    healthy = signature(tableau)
    assert healthy[0] == tableau.order
    fields = ["b"] if tableau.b_hat is None else ["b", "b_hat"]
    mutants = [
        replace(tableau, **{field: altered(getattr(tableau, field), i, slip, i - 1)}, accurate=None, b_mid=None,
                mid_order=None, dense=None)
        for field in fields for i in range(tableau.stages)
    ]  # fmt: skip
    for stage, numbers in enumerate(tableau.a):
        for j in range(len(numbers) if len(numbers) > 1 else 0):
            a = list(tableau.a)
            a[stage] = altered(numbers, j, slip, j - 1)
            mutants.append(replace(tableau, a=tuple(a), accurate=None, b_mid=None, mid_order=None, dense=None))
    for mutant in mutants:
        assert signature(mutant) != healthy


@pytest.mark.parametrize("name", ["bosh5", "dopri5", "tsit5", "dopri8"])
def test_a_misprint_in_an_extra_stage_lowers_the_order_of_the_interpolant(name):
    tableau, slip = TABLEAUS[name], Fraction(1, 10**5)
    dense, bound = tableau.accurate, 1e-9  # rounding of the float64 evaluation, with weights of up to 2e3
    assert attained(dense_residuals(tableau, dense, dense.order, float), bound) == dense.order
    for stage, numbers in enumerate(dense.a):
        for j in range(len(numbers)):
            a = list(dense.a)
            a[stage] = altered(numbers, j, slip, 0 if j else -1)
            mutant = replace(dense, a=tuple(a))
            assert attained(dense_residuals(tableau, mutant, dense.order, float), bound) < dense.order, (stage, j)


@pytest.mark.parametrize("name", ["bosh5", "dopri5", "tsit5"])  # dopri8 takes ten seconds
def test_the_extra_stages_are_those_that_the_script_prints(name):
    tableau = TABLEAUS[name]
    script = extension(tableau, PLANS[name], exact=True)
    assert script.c == tableau.accurate.c
    for numbers, printed in zip(script.a, tableau.accurate.a, strict=True):
        assert [float(number) for number in numbers] == pytest.approx([float(number) for number in printed], abs=1e-15)


def test_adding_a_method_is_one_entry():
    dense = DenseOutput(order=2, weights=rows("1 -3/2 2/3", "0 2 -4/3", "0 -1/2 2/3"))
    kutta = replace(KUTTA3, dense=dense)
    check_order(kutta, kutta.b, 3, bound=0.0)
    check_order(kutta, kutta.b_hat, 2, bound=0.0)
    assert attained(dense_residuals(kutta, kutta.dense, 3), 0.0) == kutta.dense.order
    assert (kutta.stages, kutta.fsal, kutta.adaptive, kutta.err_row) == (
        3,
        False,
        True,
        ((0, 1 / 6), (1, -1 / 3), (2, 1 / 6)),
    )


def test_every_row_and_interpolant_fits_what_the_kernels_can_take_at_once():
    """The limits are MAX_TERMS and MAX_DEGREE of csrc/launchers.h. Above them a solve would not use the kernels."""
    text = (Path(__file__).parents[3] / "csrc" / "launchers.h").read_text()
    terms, degree = (int(re.search(rf"{name} = (\d+)", text)[1]) for name in ("MAX_TERMS", "MAX_DEGREE"))
    for tableau in TABLEAUS.values():
        finish = {j for j, _ in (*tableau.b_row, *(tableau.err_row or ()))}
        dense = [d for d in (tableau.dense, tableau.accurate) if d is not None]
        rows = [*tableau.rows, *(row for d in dense for row in d.rows), *(d.weight_rows for d in dense)]
        assert max(map(len, (finish, *rows))) <= terms, tableau.name
        assert all(d.degree <= degree for d in dense), tableau.name
