"""Implicit methods as data: the types `Dirk`, `FullyImplicit` and `Rosenbrock`.

This module holds coefficients and what follows from them. It uses no tensors or steps. The tests verify the order
conditions, the stability functions, and A- and L-stability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

from node_cuda.methods.tableau import DenseOutput, Number, Row, SparseRow, hermite, require, require_sum, sparse

ON_A_NODE = 1e-12
"""A sum of published decimals is 0 or 1 to this."""


@dataclass(frozen=True)
class Dirk:
    """A diagonally implicit Runge-Kutta method, stiffly accurate.

    k_i = f(t_n + c_i h, y_n + h sum_{j<i} a_ij k_j + h gamma k_i), and y_n+1 is the argument of the last stage. With
    `explicit_first` the first stage is k_1 = f(t_n, y_n).

    name                  the key in `IMPLICIT_TABLEAUS` and the user's `method=`
    order                 of y_n+1
    gamma, a              the diagonal of the implicit stages, and the entries before it: a[i] has i entries
    source                paper, equation or page
    b_hat, embedded_order weights of the embedded solution, and its order; None on fixed grids
    b_mid                 weights of a solution at t_n + h / 2 of order 4, through which the dense output passes
    defaults              options of step control that differ from those of `ImplicitOptions`, by measurement
    """

    name: str
    order: int
    gamma: Number
    a: tuple[Row, ...]
    source: str
    b_hat: Row | None = None
    embedded_order: int | None = None
    b_mid: Row | None = None
    explicit_first: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fsal: ClassVar[bool] = False  # the last stage is the field at y_n+1 to the tolerance of Newton's iterations only

    def __post_init__(self) -> None:
        for i, numbers in enumerate(self.a):
            require(len(numbers) == i, f"{self.name}: len(a[{i}])", len(numbers), f"{i}, one for each stage before it")
        require_sum(f"{self.name}: b", self.b, 1)
        if self.b_hat is not None:
            require(len(self.b_hat) == self.stages, f"{self.name}: len(b_hat)", len(self.b_hat), str(self.stages))
            require_sum(f"{self.name}: b_hat", self.b_hat, 1)

    @cached_property
    def stages(self) -> int:
        """Number of stages, including the first one, which the step before made."""
        return len(self.a)

    @cached_property
    def adaptive(self) -> bool:
        """The method has an embedded solution, from which the error is estimated."""
        return self.b_hat is not None

    @cached_property
    def carry_last_stage(self) -> bool:
        """The last stage of a step is the first stage of the next one."""
        return self.explicit_first

    @cached_property
    def diagonal(self) -> Row:
        """a_ii of each stage."""
        first = Fraction(0) if self.explicit_first else self.gamma
        return (first, *[self.gamma] * (self.stages - 1))

    @cached_property
    def b(self) -> Row:
        """Weights of y_n+1: those of the last stage's argument."""
        return (*self.a[-1], self.gamma)

    @cached_property
    def c(self) -> Row:
        """The sums of the rows."""
        return tuple(sum(row, Fraction(0)) + end for row, end in zip(self.a, self.diagonal, strict=True))

    @cached_property
    def nodes(self) -> tuple[float, ...]:
        """c as floats."""
        return tuple(map(_node, self.c))

    @cached_property
    def rows(self) -> tuple[SparseRow, ...]:
        """Nonzero entries (j, a_ij), one row for each stage, without the diagonal."""
        return tuple(sparse(row) for row in self.a)

    @cached_property
    def full_rows(self) -> tuple[SparseRow, ...]:
        """The same with the diagonal."""
        return tuple(sparse((*row, end)) for row, end in zip(self.a, self.diagonal, strict=True))

    @cached_property
    def b_row(self) -> SparseRow:
        """Nonzero entries (i, b_i)."""
        return sparse(self.b)

    @cached_property
    def err_row(self) -> SparseRow | None:
        """Nonzero entries (i, b_i - b_hat_i); None for a method without an embedded solution."""
        if self.b_hat is None:
            return None
        return sparse(b - b_hat for b, b_hat in zip(self.b, self.b_hat, strict=True))

    @cached_property
    def filtered(self) -> bool:
        """The error estimate of an infinitely stiff component is not small by itself, because the embedded solution is
        not the argument of a stage. It is then multiplied by (I - h gamma J)^-1 (Hosea and Shampine 1996)."""
        padding = (Fraction(0),) * (self.stages - 1)
        return self.b_hat not in [(*row, self.gamma, *padding[len(row) :]) for row in self.a]

    @cached_property
    def guesses(self) -> tuple[SparseRow, ...]:
        """For each stage the weights of the earlier k_j in the guess of k_i: a stage at the same time, or else the
        polynomial through the first three of them."""
        found: list[SparseRow] = [()]
        for i in range(1, self.stages):
            same = [j for j in range(i) if self.nodes[j] == self.nodes[i]]
            found.append(((same[-1], 1.0),) if same else lagrange(self.nodes[: min(i, 3)], self.nodes[i]))
        return tuple(found)

    @cached_property
    def dense(self) -> DenseOutput:
        """The polynomial through both ends of the step with the slopes there, which are stages, and through the middle
        where that is known. If the first stage is implicit: the polynomial whose slopes are the stages."""
        if not self.explicit_first:
            return _of_slopes(self.c)
        return hermite(min(3 if self.b_mid is None else 4, self.order), self.b, b_mid=self.b_mid)


@dataclass(frozen=True)
class FullyImplicit:
    """An implicit Runge-Kutta method whose stages all depend on each other, for fixed grids.

    k_i = f(t_n + c_i h, y_n + h sum_j a_ij k_j),  y_n+1 = y_n + h sum_i b_i k_i.

    name, order, source   as of `Dirk`
    a, b                  coefficients; each row of a has an entry for every stage
    """

    name: str
    order: int
    a: tuple[Row, ...]
    b: Row
    source: str
    defaults: ClassVar[Mapping[str, Any]] = {}
    adaptive: ClassVar[bool] = False
    carry_last_stage: ClassVar[bool] = False
    fsal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for i, numbers in enumerate(self.a):
            require(len(numbers) == self.stages, f"{self.name}: len(a[{i}])", len(numbers), str(self.stages))
        require(len(self.b) == self.stages, f"{self.name}: len(b)", len(self.b), f"{self.stages}, one a stage")
        require_sum(f"{self.name}: b", self.b, 1)

    @cached_property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.a)

    @cached_property
    def c(self) -> Row:
        """The sums of the rows."""
        return tuple(sum(row, Fraction(0)) for row in self.a)

    @cached_property
    def nodes(self) -> tuple[float, ...]:
        """c as floats."""
        return tuple(map(_node, self.c))

    @cached_property
    def full_rows(self) -> tuple[SparseRow, ...]:
        """Nonzero entries (j, a_ij), one row for each stage."""
        return tuple(sparse(row) for row in self.a)

    @cached_property
    def b_row(self) -> SparseRow:
        """Nonzero entries (i, b_i)."""
        return sparse(self.b)

    @cached_property
    def dense(self) -> DenseOutput:
        """The collocation polynomial: its slopes at the nodes are the stages."""
        return _of_slopes(self.c)


@dataclass(frozen=True)
class Rosenbrock:
    """A Rosenbrock method: a linear system for each stage with one matrix, W = I - h gamma J, J = df/dy(t_n, y_n).

    W v_i = gamma (f(t_n + c_i h, y_n + h sum_{j<i} a_ij v_j) + sum_{j<i} c_ij v_j + h d_i df/dt(t_n, y_n)),
    y_n+1 = y_n + h sum_i m_i v_i, and the error is h sum_i e_i v_i. This is Hairer and Wanner II, IV.7, (7.25), with
    u_i = h v_i. The c_i and d_i follow from the rest: they are sums of the rows of alpha and Gamma.

    name, order, source, defaults  as of `Dirk`
    gamma, a, c, m, e    coefficients; row i of a and of c has i entries
    embedded_order       of y_n+1 - h sum_i e_i v_i
    dense, dense_order   y(t_n + x h) = y_n + h sum_i (m_i x + sum_d dense[d - 1][i] (x^d - x^(d+1))) v_i, and its order
    """

    name: str
    order: int
    gamma: Number
    a: tuple[Row, ...]
    c: tuple[Row, ...]
    m: Row
    e: Row
    embedded_order: int
    dense: tuple[Row, ...]
    dense_order: int
    source: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    adaptive: ClassVar[bool] = True
    carry_last_stage: ClassVar[bool] = False
    fsal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, rows in (("a", self.a), ("c", self.c)):
            for i, numbers in enumerate(rows):
                require(len(numbers) == i, f"{self.name}: len({name}[{i}])", len(numbers), str(i))
        for name, row in (("m", self.m), ("e", self.e), *((f"dense[{d}]", row) for d, row in enumerate(self.dense))):
            require(len(row) == self.stages, f"{self.name}: len({name})", len(row), f"{self.stages}, one a stage")

    @cached_property
    def stages(self) -> int:
        """Number of stages, which is that of the evaluations and of the linear solves."""
        return len(self.a)

    @cached_property
    def d(self) -> Row:
        """The sums of the rows of Gamma = (I / gamma - c)^-1."""
        sums: list[Number] = []
        for row in self.c:
            sums.append(self.gamma * (1 + sum((x * y for x, y in zip(row, sums, strict=True)), Fraction(0))))
        return tuple(sums)

    @cached_property
    def nodes(self) -> tuple[float, ...]:
        """c_i as floats: the sums of the rows of alpha = a Gamma."""
        return tuple(_node(sum((x * y for x, y in zip(row, self.d, strict=False)), Fraction(0))) for row in self.a)

    @cached_property
    def rows(self) -> tuple[SparseRow, ...]:
        """Nonzero entries (j, a_ij), one row for each stage."""
        return tuple(sparse(row) for row in self.a)

    @cached_property
    def couplings(self) -> tuple[SparseRow, ...]:
        """Nonzero entries (j, c_ij), one row for each stage."""
        return tuple(sparse(row) for row in self.c)

    @cached_property
    def slopes(self) -> tuple[float, ...]:
        """d_i as floats; 0 if the sum of the decimals vanishes."""
        return tuple(_node(d) for d in self.d)

    @cached_property
    def b_row(self) -> SparseRow:
        """Nonzero entries (i, m_i)."""
        return sparse(self.m)

    @cached_property
    def err_row(self) -> SparseRow:
        """Nonzero entries (i, e_i)."""
        return sparse(self.e)

    @cached_property
    def weights(self) -> tuple[Row, ...]:
        """The weights of x, x^2, ... in the polynomial of each stage of the dense output."""
        found = []
        for i, m in enumerate(self.m):
            steps = [row[i] for row in self.dense]
            found.append((m + steps[0], *(b - a for a, b in pairwise(steps)), -steps[-1]))
        return tuple(found)


Implicit = Dirk | FullyImplicit | Rosenbrock


def weight_rows(tableau: Implicit) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """Return (i, weights of x, x^2, ...) of the dense output, for the stages with a nonzero polynomial."""
    if isinstance(tableau, Rosenbrock):
        return tuple((i, tuple(map(float, row))) for i, row in enumerate(tableau.weights) if any(row))
    return tableau.dense.weight_rows


def slope_row(tableau: Implicit, x: float) -> SparseRow:
    """Return (i, weight) of dy/dt = sum_i weight k_i at t_n + x h, of the dense output. At a node it is one stage."""
    row = [
        (i, sum(d * weight * x ** (d - 1) for d, weight in enumerate(weights, 1)))
        for i, weights in weight_rows(tableau)
    ]
    return tuple((i, weight) for i, weight in row if abs(weight) > ON_A_NODE)


def order_of_error(tableau: Dirk | Rosenbrock) -> int:
    """Return the power of h with which the error estimate of an adaptive method goes to 0."""
    assert tableau.embedded_order is not None
    return min(tableau.order, tableau.embedded_order) + 1


def _node(number: Number) -> float:
    value = float(number)
    return float(round(value)) if abs(value - round(value)) < ON_A_NODE else value


def lagrange(nodes: Sequence[float], at: float) -> SparseRow:
    """Return the weights of the values at these nodes in the value of their polynomial at another one."""
    row = []
    for j, node in enumerate(nodes):
        weight = 1.0
        for i, other in enumerate(nodes):
            if i != j:
                weight *= (at - other) / (node - other)
        row.append((j, weight))
    return tuple(row)


def _of_slopes(c: Row) -> DenseOutput:
    """Return the polynomial through y_n whose slopes at the nodes c, which all differ, are the stages."""
    weights = []
    for i, node in enumerate(c):
        basis: list[Number] = [Fraction(1)]  # of x^0, x^1, ...: prod_j (x - c_j) / (c_i - c_j)
        for j, other in enumerate(c):
            if j != i:
                shifted, scaled = [Fraction(0), *basis], [*(-other * w for w in basis), Fraction(0)]
                basis = [(x + y) / (node - other) for x, y in zip(shifted, scaled, strict=True)]
        weights.append(tuple(w / d for d, w in enumerate(basis, 1)))
    return DenseOutput(order=len(c), weights=tuple(weights))
