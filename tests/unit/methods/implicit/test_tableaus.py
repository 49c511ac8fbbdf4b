"""Orders of the implicit methods by the rooted-tree conditions, and their stability from the tableaus."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from rooted_trees import elementary_weights, rosenbrock_weights, trees

from node_cuda.methods.implicit.tableau import Dirk, FullyImplicit, Implicit, Rosenbrock, order_of_error, slope_row
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS

# What the published digits leave of a condition: rodas5p has 16 digits, with entries of up to 166 in c and 80 in the
# dense output; kvaerno5 17 digits; the others are computed to 38.
ROUNDED = dict.fromkeys(IMPLICIT_TABLEAUS, 1e-30) | {"rodas5p": 1e-13, "kvaerno5": 1e-15}
CLEARLY_NOT_ZERO = 1e-6
NAMES = list(IMPLICIT_TABLEAUS)
ADAPTIVE = [name for name, tableau in IMPLICIT_TABLEAUS.items() if tableau.adaptive]
ESDIRK = [name for name, tableau in IMPLICIT_TABLEAUS.items() if isinstance(tableau, Dirk) and tableau.explicit_first]
AT_INFINITY = {"implicit_midpoint": -1, "trapezoid": -1, "gl4": 1, "gl6": -1}
"""R(infinity) of the methods that are not L-stable."""


class Classical:
    """alpha, beta and the weights of a method as the order conditions take them, in exact arithmetic."""

    def __init__(self, tableau: Implicit) -> None:
        if not isinstance(tableau, Rosenbrock):
            whole = isinstance(tableau, FullyImplicit)
            rows = tableau.a if whole else [[*row, a] for row, a in zip(tableau.a, tableau.diagonal, strict=True)]
            self.alpha = self.beta = square(rows)
            self.b = vector(tableau.b)
            self.b_hat = vector(tableau.b_hat) if tableau.adaptive else None
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


@pytest.mark.parametrize("name, what", [*((name, "b") for name in NAMES), *((name, "b_hat") for name in ADAPTIVE)])
def test_a_method_and_its_embedded_one_are_of_the_orders_that_are_stated_and_of_no_higher(name, what):
    tableau, method = IMPLICIT_TABLEAUS[name], Classical(IMPLICIT_TABLEAUS[name])
    order = tableau.order if what == "b" else tableau.embedded_order
    worst = misses(method, getattr(method, what), order + 1)
    assert attained(worst, ROUNDED[name]) == order, worst
    assert worst[-1] > CLEARLY_NOT_ZERO


@pytest.mark.parametrize("name", NAMES)
def test_dense_output_is_of_the_order_that_is_stated_and_ends_at_y1(name):
    tableau, method = IMPLICIT_TABLEAUS[name], Classical(IMPLICIT_TABLEAUS[name])
    order = tableau.dense_order if isinstance(tableau, Rosenbrock) else tableau.dense.order
    worst = dense_misses(method, order + 1)
    assert attained(worst, 1e-11 if name == "rodas5p" else 10 * ROUNDED[name]) == order, worst
    # The collocation polynomial of s stages has order s, and Gauss and Radau have orders 2 s and 2 s - 1.
    assert order == tableau.stages if isinstance(tableau, FullyImplicit) else order >= tableau.order - 1
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
                found = [attained(misses(method, method.b, tableau.order), 1e-12)]
                if tableau.adaptive:
                    found.append(attained(misses(method, method.b_hat, tableau.embedded_order), 1e-12))
                assert found < [tableau.order, *([tableau.embedded_order] if tableau.adaptive else [])], (field, i, j)


def test_the_gamma_of_kvaerno3_is_the_root_that_makes_it_l_stable():
    g = IMPLICIT_TABLEAUS["kvaerno3"].gamma
    assert abs(6 * g**3 - 18 * g**2 + 9 * g - 1) < 1e-36


@pytest.mark.parametrize("name", ESDIRK)
def test_the_stages_of_a_method_with_an_explicit_first_one_are_of_order_two(name):
    """Each stage's argument: sum_j a_ij c_j = c_i^2 / 2, which a stiff problem needs."""
    a = Classical(IMPLICIT_TABLEAUS[name]).beta
    c = a.sum(axis=1)
    assert np.abs((a @ c - c**2 / 2).astype(float)).max() < 1e-14


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(IMPLICIT_TABLEAUS[name], FullyImplicit)])
def test_the_slopes_of_a_collocation_polynomial_at_the_nodes_are_the_stages(name):
    """So that it solves the equation at each node, whatever the stiffness there: p'(c_j) = k_j."""
    tableau = IMPLICIT_TABLEAUS[name]
    for i, weights in enumerate(tableau.dense.weights):
        for j, node in enumerate(tableau.c):
            slope = sum((d * w * node ** (d - 1) for d, w in enumerate(weights, 1)), Fraction(0))
            assert abs(slope - int(i == j)) < 1e-30


# ------------------------------------------------------------------ stability
def stability(name: str) -> tuple[list[Fraction], list[Fraction]]:
    """P and Q of R = P / Q: Q = det(I - z beta), and P is the series of 1 + z b^T (I - z beta)^-1 1 times Q."""
    tableau, method = IMPLICIT_TABLEAUS[name], Classical(IMPLICIT_TABLEAUS[name])
    s = tableau.stages
    series, ones = [Fraction(1)], vector([1] * s)
    for _ in range(s):
        series.append(method.b @ ones)
        ones = method.beta @ ones
    q, m = [Fraction(1)], square([[0] * s] * s)
    for k in range(1, s + 1):  # Faddeev and LeVerrier
        m = method.beta @ m + q[-1] * square([[int(i == j) for j in range(s)] for i in range(s)])
        q.append(-(method.beta @ m).trace() / k)
    p = [sum((q[j] * series[k - j] for j in range(k + 1)), Fraction(0)) for k in range(s + 1)]
    return p, q


def at(p: list[Fraction], z: Fraction) -> Fraction:
    return sum((c * z**k for k, c in enumerate(p)), Fraction(0))


def on_the_axis(p: list[Fraction], y: Fraction) -> Fraction:
    """|P(iy)|^2."""
    real = sum(((-1) ** (k // 2) * c * y**k for k, c in enumerate(p) if k % 2 == 0), Fraction(0))
    imaginary = sum(((-1) ** (k // 2) * c * y**k for k, c in enumerate(p) if k % 2), Fraction(0))
    return real**2 + imaginary**2


@pytest.mark.parametrize("name", NAMES)
def test_every_implicit_method_is_a_stable(name):
    """|R(iy)| <= 1, and all its poles lie on the right: so |R| <= 1 on the left half plane."""
    p, q = stability(name)
    poles = np.roots([float(x) for x in reversed(q)])  # of the powers from the highest to the lowest
    assert (poles.real > 0.1).all()
    for y in (Fraction(10) ** k * m / 8 for k in range(-2, 5) for m in range(8, 80, 3)):
        assert on_the_axis(p, y) <= on_the_axis(q, y) * (1 + Fraction(1, 10**13)), float(y)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in AT_INFINITY])
def test_the_methods_for_stiff_fields_are_l_stable(name):
    """R(z) goes to 0: the numerator's highest power vanishes, but for the rounding of the published digits."""
    p, q = stability(name)
    n = max(k for k, x in enumerate(q) if abs(x) > 1e-30)
    assert all(abs(x) < 1e-30 for x in p[n + 1 :])
    assert abs(p[n] / q[n]) < 1e-9
    z = Fraction(-(10**8))
    assert abs(float(at(p, z) / at(q, z))) < 1e-6


@pytest.mark.parametrize("name", AT_INFINITY)
def test_the_other_methods_neither_damp_nor_amplify_what_is_infinitely_stiff(name):
    p, q = stability(name)
    n = max(k for k, x in enumerate(q) if abs(x) > 1e-30)
    assert abs(p[n] / q[n] - AT_INFINITY[name]) < 1e-30
    if name != "trapezoid":  # of Gauss all of the imaginary axis: the methods keep quadratic invariants
        assert all(abs(on_the_axis(p, y) / on_the_axis(q, y) - 1) < 1e-30 for y in (Fraction(1, 3), Fraction(70)))


def test_the_error_of_a_step_is_of_the_power_of_the_lower_order():
    assert {name: order_of_error(IMPLICIT_TABLEAUS[name]) for name in ADAPTIVE} == {
        "rodas5p": 5,
        "kvaerno3": 3,
        "kvaerno5": 5,
        "trbdf2_adaptive": 3,
    }


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(IMPLICIT_TABLEAUS[name], Dirk)])
def test_the_slope_at_the_end_of_a_step_is_the_last_stage_alone(name):
    """Weights that are rounding errors would be divided by."""
    ((stage, weight),) = slope_row(IMPLICIT_TABLEAUS[name], 1.0)
    assert stage == IMPLICIT_TABLEAUS[name].stages - 1 and weight == pytest.approx(1.0, abs=1e-12)
