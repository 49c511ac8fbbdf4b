"""Explicit Runge-Kutta methods as data: the types `Tableau` and `DenseOutput`.

Knows: coefficients, what follows from them, and the checks that need no order theory (shapes, row sums).
Knows nothing of tensors, steps or step control. The order conditions are proved in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Union

Number = Union[Fraction, float]  # noqa: UP007 (evaluated at run time; mypy and sphinx read it on 3.10 too)
Row = tuple[Number, ...]
SparseRow = tuple[tuple[int, float], ...]

# Sums that must hold exactly are checked to this bound: rationals meet it with zero, published decimals
# and dopri8's rounded fractions with about 1e-16, a slip of the pen does not.
SUM_TOLERANCE = 1e-12


def row(text: str) -> tuple[Fraction, ...]:
    """ "0 1/2 -0.161" -> exact fractions; a decimal stands for exactly the number printed."""
    return tuple(Fraction(word) for word in text.split())


def rows(*texts: str) -> tuple[tuple[Fraction, ...], ...]:
    """One `row` a text; the first row of an explicit method is the empty text."""
    return tuple(row(text) for text in texts)


def sparse(numbers: Iterable[Number]) -> SparseRow:
    """(j, float(number_j)) for the numbers that are not zero: a zero coefficient is never read (0 * inf is NaN)."""
    return tuple((j, float(number)) for j, number in enumerate(numbers) if number != 0)


@dataclass(frozen=True)
class DenseOutput:
    """A polynomial through a step: y(t_n + x h) = y_n + h sum_i B_i(x) k_i, 0 <= x <= 1.

    B_i(x) = sum_d weights[i][d - 1] x^d. The sum runs over the method's stages and then over the extra ones,
    which are evaluated only in steps that hold an output.

    order    the continuous order conditions hold to this order: y(t_n + x h) + O(h^(order + 1)) in every step.
             (Outputs are then of global order min(method's order, order + 1).)
    weights  a row a stage: the coefficients of x, x^2, ..., x^degree
    c, a     nodes and rows of the extra stages; a row reaches over all stages before it
    """

    order: int
    weights: tuple[Row, ...]
    c: Row = ()
    a: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        _require(self.order >= 1, "order", self.order, "at least 1")
        _require(bool(self.weights) and bool(self.weights[0]), "weights", self.weights, "a row a stage")
        for i, weights in enumerate(self.weights):
            _require(len(weights) == self.degree, f"len(weights[{i}])", len(weights), f"{self.degree}, as in row 0")
        for d in range(self.degree):
            _require_sum(f"weights of x^{d + 1}", (weights[d] for weights in self.weights), 1 if d == 0 else 0)
        _require(len(self.c) == len(self.a), "len(c)", len(self.c), f"{len(self.a)}, as many as rows in a")
        _check_rows(self.c, self.a, first=len(self.weights) - self.extra)

    @cached_property
    def extra(self) -> int:
        """Number of stages beyond the method's own."""
        return len(self.c)

    @cached_property
    def degree(self) -> int:
        """Degree of the polynomials B_i."""
        return len(self.weights[0])

    @cached_property
    def nodes(self) -> tuple[float, ...]:
        """c as floats."""
        return tuple(float(node) for node in self.c)

    @cached_property
    def rows(self) -> tuple[SparseRow, ...]:
        """Non-zero entries (j, a_ij) of the rows of the extra stages."""
        return tuple(sparse(numbers) for numbers in self.a)

    @cached_property
    def weight_rows(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """(i, weights[i] as floats) for the stages whose polynomial is not zero."""
        return tuple((i, tuple(map(float, weights))) for i, weights in enumerate(self.weights) if any(weights))

    def at(self, x: Number) -> Row:
        """B_i(x) of every stage, exact where weights and x are."""
        values = []
        for weights in self.weights:
            value: Number = Fraction(0)
            for weight in reversed(weights):
                value = (value + weight) * x
            values.append(value)
        return tuple(values)


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: z_i = y_n + h sum_j a_ij k_j, k_i = f(t_n + c_i h, z_i), y_n+1 = y_n + h sum_i b_i k_i.

    name              the key in `TABLEAUS` and the user's `method=`
    order             of b, the solution that is propagated
    c, a, b           nodes, rows (a[0] is empty, a[i] has i entries) and weights
    source            paper, equation or page
    b_hat             weights of the embedded solution, of order `embedded_order`; None on fixed grids
    b_mid, mid_order  weights of a solution at t_n + h / 2, from which torchdiffeq builds its interpolant, and its order
    dense             default interpolant; derived from `b_mid` where that is given; None: the step loop has its own
    accurate          an interpolant of the method's own order, where the default's is lower
    carry_last_stage  the step's last stage is taken as the next step's first. Exact for FSAL methods; for others a
                      choice that changes the method, so it is written and not derived.
    """

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    b: Row
    source: str
    b_hat: Row | None = None
    embedded_order: int | None = None
    b_mid: Row | None = None
    mid_order: int | None = None
    dense: DenseOutput | None = None
    accurate: DenseOutput | None = None
    carry_last_stage: bool = False

    def __post_init__(self) -> None:
        try:
            self._check()
            if self.b_mid is not None and self.mid_order is not None:
                order = min(4, self.mid_order, self.order)
                object.__setattr__(self, "dense", quartic(self.b, self.b_mid, order))
            for dense in (self.dense, self.accurate):
                self._check_dense(dense)
        except ValueError as mistake:
            raise ValueError(f"tableau {self.name!r}: {mistake}") from None

    def _check(self) -> None:
        _require(self.order >= 1, "order", self.order, "at least 1")
        _require(len(self.c) == len(self.a), "len(c)", len(self.c), f"{len(self.a)}, as many as rows in a")
        _check_rows(self.c, self.a, first=0)
        for name, order_name, total in (("b", "order", 1), ("b_hat", "embedded_order", 1), ("b_mid", "mid_order", 0.5)):
            weights, order = getattr(self, name), getattr(self, order_name)
            _require((weights is None) == (order is None), order_name, order, f"given exactly where {name} is")
            if weights is not None:
                _require(len(weights) == self.stages, f"len({name})", len(weights), f"{self.stages}, one a stage")
                _require_sum(name, weights, total)
        _require(self.b_mid is None or self.dense is None, "dense", self.dense, "None: it is derived from b_mid")
        ends_at_one = self.c[-1] == 1
        _require(ends_at_one or not self.carry_last_stage, "carry_last_stage", True, "False, as the last node is not 1")

    def _check_dense(self, dense: DenseOutput | None) -> None:
        if dense is None:
            return
        stages = len(dense.weights) - dense.extra
        _require(stages == self.stages, "rows of an interpolant for the method's stages", stages, str(self.stages))
        ends = (*self.b, *(0 for _ in range(dense.extra)))
        for i, (weights, end) in enumerate(zip(dense.weights, ends, strict=True)):
            _require_sum(f"row {i} of an interpolant's weights", weights, end)

    @cached_property
    def stages(self) -> int:
        """Number of stages, the one that only the next step uses included."""
        return len(self.b)

    @cached_property
    def adaptive(self) -> bool:
        """There is an embedded solution to estimate the error with."""
        return self.b_hat is not None

    @cached_property
    def fsal(self) -> bool:
        """The last stage is f(t_n+1, y_n+1), so the next step may take it as its first."""
        return self.stages > 1 and self.c[-1] == 1 and self.b[-1] == 0 and self.a[-1] == self.b[:-1]

    @cached_property
    def b_err(self) -> Row | None:
        """Weights of the error estimate, b - b_hat."""
        if self.b_hat is None:
            return None
        return tuple(b - b_hat for b, b_hat in zip(self.b, self.b_hat, strict=True))

    @cached_property
    def nodes(self) -> tuple[float, ...]:
        """c as floats."""
        return tuple(float(node) for node in self.c)

    @cached_property
    def rows(self) -> tuple[SparseRow, ...]:
        """Non-zero entries (j, a_ij), a row a stage."""
        return tuple(sparse(numbers) for numbers in self.a)

    @cached_property
    def b_row(self) -> SparseRow:
        """Non-zero entries (i, b_i)."""
        return sparse(self.b)

    @cached_property
    def err_row(self) -> SparseRow | None:
        """Non-zero entries (i, b_i - b_hat_i), None for a method without an embedded solution."""
        return None if self.b_err is None else sparse(self.b_err)


def quartic(b: Row, b_mid: Row, order: int) -> DenseOutput:
    """The quartic through y0, y1 and y_mid with the slopes k_first at 0 and k_last at 1, torchdiffeq's interpolant.

    order: the least of 4, the order of b and that of b_mid.
    """
    first, last = _unit(len(b), 0), _unit(len(b), -1)
    parts = ((b, "0 -5 14 -8"), (b_mid, "0 16 -32 16"), (first, "1 -4 5 -2"), (last, "0 1 -3 2"))
    return _blend(order, parts)


def cubic_hermite(b: Row, order: int) -> DenseOutput:
    """The cubic through y0 and y1 with the slopes k_first at 0 and k_last at 1.

    order: the lesser of 3 and the order of b, for an FSAL method.
    """
    first, last = _unit(len(b), 0), _unit(len(b), -1)
    return _blend(order, ((b, "0 3 -2"), (first, "1 -2 1"), (last, "0 -1 1")))


def _blend(order: int, parts: Sequence[tuple[Row, str]]) -> DenseOutput:
    """B_i(x) = sum over parts of numbers_i p(x), p given by its coefficients of x, x^2, ..."""
    polynomials = [(numbers, row(coefficients)) for numbers, coefficients in parts]
    stages, degree = len(polynomials[0][0]), len(polynomials[0][1])
    weights = tuple(
        tuple(sum((numbers[i] * p[d] for numbers, p in polynomials), Fraction(0)) for d in range(degree))
        for i in range(stages)
    )
    return DenseOutput(order=order, weights=weights)


def _unit(length: int, index: int) -> Row:
    numbers = [Fraction(0)] * length
    numbers[index] = Fraction(1)
    return tuple(numbers)


def _check_rows(c: Row, a: Sequence[Row], first: int) -> None:
    """Row i of a has first + i entries, which add up to c_i."""
    for i, (node, numbers) in enumerate(zip(c, a, strict=True)):
        _require(len(numbers) == first + i, f"len(a[{i}])", len(numbers), f"{first + i}, one for each stage before it")
        _require_sum(f"a[{i}]", numbers, node)


def _require_sum(name: str, numbers: Iterable[Number], total: Number) -> None:
    value = sum(numbers, Fraction(0))
    close = abs(value - total) <= SUM_TOLERANCE
    _require(close, f"the sum of {name}", float(value), f"{float(total)} (to {SUM_TOLERANCE:g}); look for a misprint")


def _require(holds: bool, name: str, got: object, need: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {got}, but must be {need}.")
