"""Explicit Runge-Kutta methods as data: the types `Tableau` and `DenseOutput`.

This module holds coefficients, what follows from them, and the checks that need no order theory (shapes, row sums). It
uses no tensors, steps or step control. The tests verify the order conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

Number = Fraction | float
Row = tuple[Number, ...]
SparseRow = tuple[tuple[int, float], ...]

# Sums that must hold exactly are checked to this bound. Rationals give zero; published decimals and the rounded
# fractions of dopri8 give about 1e-16; a misprint gives more.
SUM_TOLERANCE = 1e-12


def row(text: str) -> tuple[Fraction, ...]:
    """Return exact fractions from a text like "0 1/2 -0.161"; a decimal means exactly the printed number."""
    return tuple(Fraction(word) for word in text.split())


def rows(*texts: str) -> tuple[tuple[Fraction, ...], ...]:
    """Return one `row` for each text; the first row of an explicit method is the empty text."""
    return tuple(row(text) for text in texts)


def sparse(numbers: Iterable[Number]) -> SparseRow:
    """Return (j, float(number_j)) for the nonzero numbers. Zero coefficients are never read, because 0 * inf is NaN."""
    return tuple((j, float(number)) for j, number in enumerate(numbers) if number != 0)


@dataclass(frozen=True)
class DenseOutput:
    """A polynomial through a step: y(t_n + x h) = y_n + h sum_i B_i(x) k_i, 0 <= x <= 1.

    B_i(x) = sum_d weights[i][d - 1] x^d. The sum runs over the method's stages and then over the extra stages, which
    are evaluated only in steps with an output.

      order    the continuous order conditions hold to this order: y(t_n + x h) + O(h^(order + 1)) in every step.
               (Outputs then have the global order min(method's order, order + 1).)
      weights  one row for each stage: the coefficients of x, x^2, ..., x^degree
      c, a     nodes and rows of the extra stages; a row has an entry for each earlier stage
    """

    order: int
    weights: tuple[Row, ...]
    c: Row = ()
    a: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        require(self.order >= 1, "order", self.order, "at least 1")
        require(bool(self.weights) and bool(self.weights[0]), "weights", self.weights, "a row a stage")
        for i, weights in enumerate(self.weights):
            require(len(weights) == self.degree, f"len(weights[{i}])", len(weights), f"{self.degree}, as in row 0")
        for d in range(self.degree):
            require_sum(f"weights of x^{d + 1}", (weights[d] for weights in self.weights), 1 if d == 0 else 0)
        require(len(self.c) == len(self.a), "len(c)", len(self.c), f"{len(self.a)}, as many as rows in a")
        _check_rows(self.c, self.a, first=len(self.weights) - self.extra)

    @cached_property
    def extra(self) -> int:
        """Number of stages that the interpolant adds to those of the method."""
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
        """Nonzero entries (j, a_ij) of the rows of the extra stages."""
        return tuple(sparse(numbers) for numbers in self.a)

    @cached_property
    def weight_rows(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """(i, weights[i] as floats) for the stages with a nonzero polynomial."""
        return tuple((i, tuple(map(float, weights))) for i, weights in enumerate(self.weights) if any(weights))

    @cached_property
    def slope_rows(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """The coefficients of the derivatives by x, the highest power of x first."""
        return tuple((i, tuple(d * w for d, w in enumerate(row, 1))[::-1]) for i, row in self.weight_rows)


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method.

    z_i = y_n + h sum_j a_ij k_j,  k_i = f(t_n + c_i h, z_i),  y_n+1 = y_n + h sum_i b_i k_i.

      name              the key in `TABLEAUS` and the user's `method=`
      order             the order of b, which defines the solution that is propagated
      c, a, b           nodes, rows (a[0] is empty, a[i] has i entries) and weights
      source            paper, equation or page
      b_hat             weights of the embedded solution, of order `embedded_order`; None on fixed grids
      b_mid, mid_order  weights and order of a solution at t_n + h / 2, through which the default interpolant passes
      dense             default interpolant; derived from `b_mid` if that is given; None: the step loop has one
      accurate          an interpolant of the method's order, if the order of the default one is lower
      carry_last_stage  the last stage of a step is used as the first stage of the next step. This is exact for FSAL
                        methods. For other methods it changes the method, so it is stated and not derived.
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
                object.__setattr__(self, "dense", hermite(order, self.b, b_mid=self.b_mid))
            for dense in (self.dense, self.accurate):
                self._check_dense(dense)
        except ValueError as mistake:
            raise ValueError(f"tableau {self.name!r}: {mistake}") from None

    def _check(self) -> None:
        require(self.order >= 1, "order", self.order, "at least 1")
        require(len(self.c) == len(self.a) > 0, "len(c)", len(self.c), "as many as rows in a, and at least 1")
        _check_rows(self.c, self.a, first=0)
        for name, order_name, total in (("b", "order", 1), ("b_hat", "embedded_order", 1), ("b_mid", "mid_order", 0.5)):
            weights, order = getattr(self, name), getattr(self, order_name)
            require((weights is None) == (order is None), order_name, order, f"given exactly where {name} is")
            if weights is not None:
                require(len(weights) == self.stages, f"len({name})", len(weights), f"{self.stages}, one a stage")
                require_sum(name, weights, total)
        require(self.b_mid is None or self.dense is None, "dense", self.dense, "None: it is derived from b_mid")
        may_carry = self.c[-1] == 1 or not self.carry_last_stage
        require(may_carry, "carry_last_stage", True, "False, as the last node is not 1")

    def _check_dense(self, dense: DenseOutput | None) -> None:
        if dense is None:
            return
        stages = len(dense.weights) - dense.extra
        require(stages == self.stages, "rows of an interpolant for the method's stages", stages, str(self.stages))
        ends = (*self.b, *(0 for _ in range(dense.extra)))
        for i, (weights, end) in enumerate(zip(dense.weights, ends, strict=True)):
            require_sum(f"row {i} of an interpolant's weights", weights, end)

    @cached_property
    def stages(self) -> int:
        """Number of stages, including the one that only the next step uses."""
        return len(self.c)

    @cached_property
    def adaptive(self) -> bool:
        """The method has an embedded solution, from which the error is estimated."""
        return self.b_hat is not None

    @cached_property
    def fsal(self) -> bool:
        """The last stage is f(t_n+1, y_n+1), so that the next step may use it as its first stage."""
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
        """Nonzero entries (j, a_ij), one row for each stage."""
        return tuple(sparse(numbers) for numbers in self.a)

    @cached_property
    def stability_boundary(self) -> float:
        """The x > 0 at which |R(-x)|, R the stability function of an explicit method, becomes larger than 1."""
        coefficients, powers = [1.0], [1.0] * self.stages
        for _ in range(self.stages):
            coefficients.append(sum(float(b) * x for b, x in zip(self.b, powers, strict=True)))
            powers = [sum(float(a) * x for a, x in zip(row, powers, strict=False)) for row in self.a]
        x = 0.0
        while abs(sum(c * (-x) ** i for i, c in enumerate(coefficients))) <= 1.0 + 1e-9:
            x += 1e-3
        return x

    @cached_property
    def stages_at_end(self) -> tuple[int, int, SparseRow] | None:
        """The last two stages i < j at the end of a step, and the row a_j - a_i; None if there is one at most."""
        ends = [i for i, node in enumerate(self.nodes) if node == 1.0]
        if len(ends) < 2:
            return None
        i, j = ends[-2:]
        shorter = (*self.a[i], *[0] * (len(self.a[j]) - len(self.a[i])))
        return i, j, sparse([x - y for x, y in zip(self.a[j], shorter, strict=True)])

    @cached_property
    def reads_last_stage_only(self) -> bool:
        """Each sum has the stage before it alone (euler, midpoint): no stage is read after the next one begins."""
        read = [[j for j, _ in row] for row in (*self.rows[1:], self.b_row)]
        return read == [[i] for i in range(self.stages)]

    @cached_property
    def longest_sum(self) -> int:
        """The largest number of stages in the sum of one stage, or of y1."""
        return max(map(len, (*self.rows, self.b_row)))

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """b as floats."""
        return tuple(float(b) for b in self.b)

    @cached_property
    def b_row(self) -> SparseRow:
        """Nonzero entries (i, b_i)."""
        return sparse(self.b)

    @cached_property
    def err_row(self) -> SparseRow | None:
        """Nonzero entries (i, b_i - b_hat_i); None for a method without an embedded solution."""
        return None if self.b_err is None else sparse(self.b_err)


def hermite(
    order: int, b: Row, *, b_mid: Row | None = None, c: Row = (), a: tuple[Row, ...] = (), slopes: int = 0
) -> DenseOutput:
    """Return the polynomial of least degree through y0 and y1 with the slopes k_first at 0 and k_last at 1.

    With b_mid it also passes through y0 + h sum_i b_mid_i k_i at 1/2: this is the quartic of torchdiffeq. With extra
    stages (c, a) it also has the slopes of the last `slopes` of them at their nodes; the extra stages before those are
    only needed to compute them.

    Its order is the least of the polynomial's degree, the orders of b and b_mid, and one more than the order of the
    rows that give the slopes.
    """
    stages, padding = len(b) + len(c), (Fraction(0),) * len(c)
    values = [(Fraction(1), (*b, *padding))]
    if b_mid is not None:
        values.append((Fraction(1, 2), (*b_mid, *padding)))
    slope_at = [(Fraction(0), _unit(stages, 0)), (Fraction(1), _unit(stages, len(b) - 1))]
    slope_at += [(Fraction(c[e]), _unit(stages, len(b) + e)) for e in range(len(c) - slopes, len(c))]
    degree = len(values) + len(slope_at)
    # For each stage B_i is the polynomial with B_i(0) = 0 that has the entries of the stage as values and slopes.
    conditions = [[x**d for d in range(1, degree + 1)] for x, _ in values]
    conditions += [[d * x ** (d - 1) for d in range(1, degree + 1)] for x, _ in slope_at]
    weights = _solve(conditions, [taken for _, taken in (*values, *slope_at)])
    return DenseOutput(order=order, weights=tuple(zip(*weights, strict=True)), c=c, a=a)


def _solve(matrix: Sequence[Sequence[Fraction]], right: Sequence[Row]) -> list[list[Number]]:
    """Return matrix^-1 right by elimination, in the arithmetic of the entries."""
    size = len(matrix)
    table: list[list[Number]] = [[*numbers, *targets] for numbers, targets in zip(matrix, right, strict=True)]
    for i in range(size):
        pivot = next((j for j in range(i, size) if table[j][i] != 0), None)
        if pivot is None:
            raise ValueError("these values and slopes do not determine a polynomial; move a node.")
        table[i], table[pivot] = table[pivot], table[i]
        table[i] = [number / table[i][i] for number in table[i]]
        for j in range(size):
            if j != i and (factor := table[j][i]):
                table[j] = [number - factor * top for number, top in zip(table[j], table[i], strict=True)]
    return [numbers[size:] for numbers in table]


def _unit(length: int, index: int) -> Row:
    numbers = [Fraction(0)] * length
    numbers[index] = Fraction(1)
    return tuple(numbers)


def _check_rows(c: Row, a: Sequence[Row], first: int) -> None:
    """Check that row i of a has first + i entries, and that they add up to c_i."""
    for i, (node, numbers) in enumerate(zip(c, a, strict=True)):
        require(len(numbers) == first + i, f"len(a[{i}])", len(numbers), f"{first + i}, one for each stage before it")
        require_sum(f"a[{i}]", numbers, node)


def require_sum(name: str, numbers: Iterable[Number], total: Number) -> None:
    """Raise ValueError, with a sentence, where numbers do not add up to what they must."""
    value = sum(numbers, Fraction(0))
    close = abs(value - total) <= SUM_TOLERANCE
    require(close, f"the sum of {name}", float(value), f"{float(total)} (to {SUM_TOLERANCE:g}); look for a misprint")


def require(holds: bool, name: str, got: object, need: str) -> None:
    """Raise ValueError, with a sentence, where a coefficient cannot be."""
    if not holds:
        raise ValueError(f"{name} is {got}, but must be {need}.")
