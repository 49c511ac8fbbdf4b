"""Implicit methods as data: the types `Esdirk` and `Rosenbrock`.

Knows: coefficients, and what follows from them. Knows nothing of tensors or steps. The order conditions, the stability
functions and A- and L-stability are proved in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

from node_cuda.methods.tableau import DenseOutput, Number, Row, SparseRow, hermite, require, require_sum, sparse

ON_A_NODE = 1e-12
"""A node that is a sum of published decimals is 0 or 1 to this."""


@dataclass(frozen=True)
class Esdirk:
    """A diagonally implicit Runge-Kutta method with an explicit first stage, stiffly accurate.

    k_1 = f(t_n, y_n),  k_i = f(t_n + c_i h, y_n + h sum_{j<i} a_ij k_j + h gamma k_i),  y_n+1 is the argument of k_s.

    name                  the key in `IMPLICIT` and the user's `method=`
    order                 of y_n+1
    gamma, a              the diagonal of all stages but the first, and what is left of it: a[i] has i entries
    b_hat, embedded_order weights of the embedded solution, and its order
    source                paper, equation or page
    b_mid                 weights of a solution at t_n + h / 2 of order 4, through which the dense output passes
    """

    name: str
    order: int
    gamma: Number
    a: tuple[Row, ...]
    b_hat: Row
    embedded_order: int
    source: str
    b_mid: Row | None = None
    adaptive: ClassVar[bool] = True
    carry_last_stage: ClassVar[bool] = True
    fsal: ClassVar[bool] = False  # the last stage is the field at y_n+1 to the tolerance of Newton's iterations only

    def __post_init__(self) -> None:
        for i, numbers in enumerate(self.a):
            require(len(numbers) == i, f"{self.name}: len(a[{i}])", len(numbers), f"{i}, one for each stage before it")
        require_sum(f"{self.name}: b", self.b, 1)
        require(len(self.b_hat) == self.stages, f"{self.name}: len(b_hat)", len(self.b_hat), str(self.stages))
        require_sum(f"{self.name}: b_hat", self.b_hat, 1)

    @cached_property
    def stages(self) -> int:
        """Number of stages, the first one, which the step before made, included."""
        return len(self.a)

    @cached_property
    def b(self) -> Row:
        """Weights of y_n+1: those of the last stage's argument."""
        return (*self.a[-1], self.gamma)

    @cached_property
    def nodes(self) -> tuple[float, ...]:
        """c as floats: sums of the rows."""
        return tuple(_node(sum(row, Fraction(0)) + (self.gamma if row else 0)) for row in self.a)

    @cached_property
    def rows(self) -> tuple[SparseRow, ...]:
        """Non-zero entries (j, a_ij), a row a stage, without the diagonal."""
        return tuple(sparse(row) for row in self.a)

    @cached_property
    def b_row(self) -> SparseRow:
        """Non-zero entries (i, b_i)."""
        return sparse(self.b)

    @cached_property
    def err_row(self) -> SparseRow:
        """Non-zero entries (i, b_i - b_hat_i)."""
        return sparse(b - b_hat for b, b_hat in zip(self.b, self.b_hat, strict=True))

    @cached_property
    def filtered(self) -> bool:
        """The error estimate of an infinitely stiff component is not small by itself: the embedded solution is none of
        the stages' arguments. It is then multiplied by (I - h gamma J)^-1 (Hosea and Shampine 1996)."""
        padding = (Fraction(0),) * (self.stages - 1)
        return self.b_hat not in [(*row, self.gamma, *padding[len(row) :]) for row in self.a]

    @cached_property
    def guesses(self) -> tuple[SparseRow, ...]:
        """For each stage the weights of the earlier k_j that k_i is guessed by: a stage at the same time, or else the
        polynomial through the first three of them."""
        found: list[SparseRow] = [()]
        for i in range(1, self.stages):
            same = [j for j in range(i) if self.nodes[j] == self.nodes[i]]
            found.append(((same[-1], 1.0),) if same else _lagrange(self.nodes[: min(i, 3)], self.nodes[i]))
        return tuple(found)

    @cached_property
    def dense(self) -> DenseOutput:
        """The polynomial through both ends of the step with the slopes there, which are stages, and through the
        middle where that is known."""
        return hermite(min(3 if self.b_mid is None else 4, self.order), self.b, b_mid=self.b_mid)


@dataclass(frozen=True)
class Rosenbrock:
    """A Rosenbrock method: a linear system for each stage, with one matrix, W = I - h gamma J, J = df/dy(t_n, y_n).

    W v_i = gamma (f(t_n + c_i h, y_n + h sum_{j<i} a_ij v_j) + sum_{j<i} c_ij v_j + h d_i df/dt(t_n, y_n)),
    y_n+1 = y_n + h sum_i m_i v_i, and the error is h sum_i e_i v_i. This is Hairer and Wanner II, IV.7, (7.25), with
    u_i = h v_i. c_i and d_i follow from the rest: they are sums of rows of alpha and Gamma.

    name, order, source  as of `Esdirk`
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
        """Number of stages: of evaluations, and of solutions of the linear system."""
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
        """c_i: the sums of the rows of alpha = a Gamma."""
        return tuple(_node(sum((x * y for x, y in zip(row, self.d, strict=False)), Fraction(0))) for row in self.a)

    @cached_property
    def rows(self) -> tuple[SparseRow, ...]:
        """Non-zero entries (j, a_ij), a row a stage."""
        return tuple(sparse(row) for row in self.a)

    @cached_property
    def couplings(self) -> tuple[SparseRow, ...]:
        """Non-zero entries (j, c_ij), a row a stage."""
        return tuple(sparse(row) for row in self.c)

    @cached_property
    def slopes(self) -> tuple[float, ...]:
        """d_i as floats; zero where it is a sum of decimals that vanishes."""
        return tuple(_node(d) for d in self.d)

    @cached_property
    def b_row(self) -> SparseRow:
        """Non-zero entries (i, m_i)."""
        return sparse(self.m)

    @cached_property
    def err_row(self) -> SparseRow:
        """Non-zero entries (i, e_i)."""
        return sparse(self.e)

    @cached_property
    def weights(self) -> tuple[Row, ...]:
        """For each stage the weights of x, x^2, ... of its polynomial in the dense output."""
        found = []
        for i, m in enumerate(self.m):
            steps = [row[i] for row in self.dense]
            found.append((m + steps[0], *(b - a for a, b in pairwise(steps)), -steps[-1]))
        return tuple(found)


Implicit = Esdirk | Rosenbrock


def weight_rows(tableau: Implicit) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """(i, weights of x, x^2, ...) of the dense output, for the stages whose polynomial is not zero."""
    if isinstance(tableau, Esdirk):
        return tableau.dense.weight_rows
    return tuple((i, tuple(map(float, row))) for i, row in enumerate(tableau.weights) if any(row))


def slope_row(tableau: Implicit, x: float) -> SparseRow:
    """(i, weight) of dy/dt = sum_i weight k_i at t_n + x h, of the dense output."""
    return tuple(
        (i, sum(d * weight * x ** (d - 1) for d, weight in enumerate(weights, 1)))
        for i, weights in weight_rows(tableau)
    )


def order_of_error(tableau: Implicit) -> int:
    """The power of h that the error estimate of a step goes with."""
    return min(tableau.order, tableau.embedded_order) + 1


def _node(number: Number) -> float:
    value = float(number)
    return float(round(value)) if abs(value - round(value)) < ON_A_NODE else value


def _lagrange(nodes: tuple[float, ...], at: float) -> SparseRow:
    """The weights of values at these nodes in their polynomial at another one."""
    row = []
    for j, node in enumerate(nodes):
        weight = 1.0
        for other in nodes[:j] + nodes[j + 1 :]:
            weight *= (at - other) / (node - other)
        row.append((j, weight))
    return tuple(row)
