"""Orders of the implicit methods by the rooted-tree conditions, and their stability from the tableaus."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from rooted_trees import elementary_weights, rosenbrock_weights, trees

from node_cuda.methods.implicit.tableau import Esdirk, Implicit, Rosenbrock, order_of_error
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS

# What the published digits leave of a condition: rodas5p has 16 digits, with entries of up to 166 in c and 80 in the
# dense output; kvaerno5 17 digits; the other two are computed to 38.
ROUNDED = {"rodas5p": 1e-13, "kvaerno5": 1e-15, "kvaerno3": 1e-30, "trbdf2_adaptive": 1e-30}
CLEARLY_NOT_ZERO = 1e-6
NAMES = list(IMPLICIT_TABLEAUS)
ESDIRK = [name for name, tableau in IMPLICIT_TABLEAUS.items() if isinstance(tableau, Esdirk)]


class Classical:
    """alpha, beta and the weights of a method as the order conditions take them, in exact arithmetic."""

    def __init__(self, tableau: Implicit) -> None:
        s = tableau.stages
        if isinstance(tableau, Esdirk):
            rows = [[*row, tableau.gamma if i else 0] for i, row in enumerate(tableau.a)]
            self.alpha = self.beta = square(rows)
            to_b = square([[int(i == j) for j in range(s)] for i in range(s)])
            self.b, self.b_hat = vector(tableau.b), vector(tableau.b_hat)
            self.dense = square_of([list(row) for row in tableau.dense.weights]).T
        else:
            gamma_inverse = square([[*(-x for x in row), 1 / tableau.gamma] for row in tableau.c])
            to_b = inverse(gamma_inverse)
            self.alpha = square(tableau.a) @ to_b
            self.beta = self.alpha + to_b
            self.b = vector(tableau.m) @ to_b
            self.b_hat = self.b - vector(tableau.e) @ to_b
            self.dense = square_of([list(row) for row in tableau.weights]).T @ to_b
        self.is_rosenbrock = isinstance(tableau, Rosenbrock)

    def phi(self, order: int) -> np.ndarray:
        if self.is_rosenbrock:
            return rosenbrock_weights(self.alpha, self.beta, order)
        return elementary_weights(self.beta, order)


def vector(numbers: Any) -> np.ndarray:
    return np.array([Fraction(x) for x in numbers], dtype=object)


def square(rows: Any) -> np.ndarray:
    return square_of([[*row, *[0] * (len(rows) - len(row))] for row in rows])


def square_of(rows: Any) -> np.ndarray:
    return np.array([[Fraction(x) for x in row] for row in rows], dtype=object)


def inverse(lower: np.ndarray) -> np.ndarray:
    """Of a lower triangle, by forward substitution."""
    size = len(lower)
    found = square([[0] * size for _ in range(size)])
    for j in range(size):
        for i in range(j, size):
            found[i, j] = (int(i == j) - lower[i, :i] @ found[:i, j]) / lower[i, i] if i else 1 / lower[0, 0]
    return found


def misses(method: Classical, weights: np.ndarray, order: int) -> list[float]:
    """The largest |sum_i w_i Phi_i(t) - 1 / gamma(t)| over the trees of each order."""
    off = method.phi(order) @ weights - vector(Fraction(1, tree.density) for tree in trees(order))
    return by_order(np.abs(off), order)


def dense_misses(method: Classical, order: int) -> list[float]:
    """The same of the dense output, for every power of x."""
    degree = len(method.dense)
    off = np.array([[Fraction(0)] * len(trees(order)) for _ in range(max(order, degree))], dtype=object)
    off[:degree] = method.dense @ method.phi(order).T
    for k, tree in enumerate(trees(order)):
        off[tree.order - 1, k] -= Fraction(1, tree.density)
    return by_order(np.abs(off).max(axis=0), order)


def by_order(sizes: np.ndarray, order: int) -> list[float]:
    return [
        float(max(s for s, t in zip(sizes, trees(order), strict=True) if t.order == k)) for k in range(1, order + 1)
    ]


def attained(worst: list[float], bound: float) -> int:
    return next((i for i, miss in enumerate(worst) if miss > bound), len(worst))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["b", "b_hat"])
def test_a_method_and_its_embedded_one_are_of_the_orders_that_are_stated_and_of_no_higher(name, what):
    tableau, method = IMPLICIT_TABLEAUS[name], Classical(IMPLICIT_TABLEAUS[name])
    order = tableau.order if what == "b" else tableau.embedded_order
    worst = misses(method, getattr(method, what), order + 1)
    assert attained(worst, ROUNDED[name]) == order, worst
    assert worst[-1] > CLEARLY_NOT_ZERO


@pytest.mark.parametrize("name", NAMES)
def test_dense_output_is_of_the_order_that_is_stated_and_ends_at_y1(name):
    tableau, method = IMPLICIT_TABLEAUS[name], Classical(IMPLICIT_TABLEAUS[name])
    order = tableau.dense.order if isinstance(tableau, Esdirk) else tableau.dense_order
    worst = dense_misses(method, order + 1)
    assert attained(worst, 1e-11 if name == "rodas5p" else 10 * ROUNDED[name]) == order, worst
    assert order >= tableau.order - 1
    assert np.abs((method.dense.sum(axis=0) - method.b).astype(float)).max() < 1e-14


def test_the_middle_of_kvaerno5_is_bounded_where_a_component_is_infinitely_stiff():
    """1 + z b_mid^T (I - z a)^-1 1 for z -> -infinity: the hermite cubic alone goes with z."""
    tableau, method = IMPLICIT_TABLEAUS["kvaerno5"], Classical(IMPLICIT_TABLEAUS["kvaerno5"])
    z, a, b = -1e8, method.alpha.astype(float), np.array([float(x) for x in tableau.b_mid])
    assert abs(1 + z * b @ np.linalg.solve(np.eye(7) - z * a, np.ones(7))) < 1


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_any_coefficient_lowers_an_order(name):
    """A slip in the ninth digit, in each row of a and, for rodas5p, of c."""
    tableau, slip = IMPLICIT_TABLEAUS[name], Fraction(1, 10**8)
    for field in ("a", "c") if name == "rodas5p" else ("a",):
        for i, row in enumerate(getattr(tableau, field)):
            for j in range(len(row) - 1):
                rows = list(getattr(tableau, field))
                rows[i] = tuple(x + slip * ((k == j) - (k == j + 1)) for k, x in enumerate(row))
                method = Classical(replace(tableau, **{field: tuple(rows)}))
                found = (
                    attained(misses(method, method.b, tableau.order), 1e-12),
                    attained(misses(method, method.b_hat, tableau.embedded_order), 1e-12),
                )
                assert found < (tableau.order, tableau.embedded_order), (field, i, j)


def test_the_gamma_of_kvaerno3_is_the_root_that_makes_it_l_stable():
    g = IMPLICIT_TABLEAUS["kvaerno3"].gamma
    assert abs(6 * g**3 - 18 * g**2 + 9 * g - 1) < 1e-36


@pytest.mark.parametrize("name", ESDIRK)
def test_the_stages_of_an_esdirk_method_are_of_order_two(name):
    """Each stage's argument: sum_j a_ij c_j = c_i^2 / 2, which a stiff problem needs."""
    a = Classical(IMPLICIT_TABLEAUS[name]).beta
    c = a.sum(axis=1)
    assert np.abs((a @ c - c**2 / 2).astype(float)).max() < 1e-14


# ------------------------------------------------------------------ stability
def numerator(name: str) -> list[Fraction]:
    """P of R(z) = P(z) / (1 - gamma z)^n: the series of 1 + z b^T (I - z beta)^-1 1 times the denominator."""
    tableau, method = IMPLICIT_TABLEAUS[name], Classical(IMPLICIT_TABLEAUS[name])
    n = tableau.stages - isinstance(tableau, Esdirk)
    series, ones = [Fraction(1)], vector([1] * tableau.stages)
    for _ in range(tableau.stages):
        series.append(method.b @ ones)
        ones = method.beta @ ones
    p = [Fraction(0)] * (tableau.stages + 1)
    for j, x in enumerate(binomial(-Fraction(tableau.gamma), n)):
        for k in range(len(p) - j):
            p[j + k] += x * series[k]
    return p


def binomial(x: Fraction, n: int) -> list[Fraction]:
    """The coefficients of (1 + x z)^n."""
    row = [Fraction(1)]
    for k in range(n):
        row.append(row[-1] * x * (n - k) / (k + 1))
    return row


def on_the_axis(p: list[Fraction], y: Fraction) -> Fraction:
    """|P(iy)|^2."""
    real = sum(((-1) ** (k // 2) * c * y**k for k, c in enumerate(p) if k % 2 == 0), Fraction(0))
    imaginary = sum(((-1) ** (k // 2) * c * y**k for k, c in enumerate(p) if k % 2), Fraction(0))
    return real**2 + imaginary**2


@pytest.mark.parametrize("name", NAMES)
def test_every_implicit_method_is_a_stable(name):
    """|R(iy)| <= 1, and its only pole, 1 / gamma, lies on the right: so |R| <= 1 on the left half plane."""
    tableau, p = IMPLICIT_TABLEAUS[name], numerator(name)
    n = tableau.stages - isinstance(tableau, Esdirk)
    assert tableau.gamma > 0
    for y in (Fraction(10) ** k * m / 8 for k in range(-2, 5) for m in range(8, 80, 3)):
        q = (1 + (Fraction(tableau.gamma) * y) ** 2) ** n
        assert on_the_axis(p, y) <= q * (1 + Fraction(1, 10**13)), float(y)


@pytest.mark.parametrize("name", NAMES)
def test_every_implicit_method_is_l_stable(name):
    """R(z) goes to 0: the numerator's highest power vanishes, but for the rounding of the published digits."""
    tableau, p = IMPLICIT_TABLEAUS[name], numerator(name)
    n = tableau.stages - isinstance(tableau, Esdirk)
    assert all(abs(x) < 1e-30 for x in p[n + 1 :])
    assert abs(p[n] / Fraction(tableau.gamma) ** n) < 1e-9
    z = Fraction(-(10**8))
    assert abs(float(sum(c * z**k for k, c in enumerate(p)) / (1 - Fraction(tableau.gamma) * z) ** n)) < 1e-6


def test_the_error_of_a_step_is_of_the_power_of_the_lower_order():
    assert {name: order_of_error(tableau) for name, tableau in IMPLICIT_TABLEAUS.items()} == {
        "rodas5p": 5,
        "kvaerno3": 3,
        "kvaerno5": 5,
        "trbdf2_adaptive": 3,
    }
