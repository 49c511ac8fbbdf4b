"""The order conditions of Runge-Kutta methods, from rooted trees (Hairer, Norsett and Wanner I, II.2 and II.5).

Weights w have order p if sum_i w_i Phi_i(t) = 1 / gamma(t) for all trees t of up to p vertices. The polynomials B_i(x)
of an interpolant have order p if sum_i B_i(x) Phi_i(t) = x^|t| / gamma(t) for all x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

ROUNDED = 1e-10
"""The largest residual of an order condition that the rounding of printed coefficients explains."""


class Tree(NamedTuple):
    """A root with subtrees, each given by its index in `trees`; density is gamma."""

    vertices: int
    density: int
    children: tuple[int, ...]


@cache
def trees(most: int) -> tuple[Tree, ...]:
    """Return all rooted trees of up to this number of vertices, smaller trees first."""
    if most == 0:
        return ()
    smaller = trees(most - 1)
    grown = (
        Tree(most, most * prod(smaller[i].density for i in children), children)
        for children in _forests(smaller, most - 1, 0)
    )
    return (*smaller, *grown)


def _forests(smaller: Sequence[Tree], vertices: int, start: int) -> Iterator[tuple[int, ...]]:
    """Return all multisets of trees from this index on that have this number of vertices in total."""
    if vertices == 0:
        yield ()
        return
    for i in range(start, len(smaller)):
        if smaller[i].vertices > vertices:
            return
        for rest in _forests(smaller, vertices - smaller[i].vertices, i):
            yield (i, *rest)


def attained(a: Sequence[Sequence[Any]], weights: Sequence[Sequence[Any]], order: int) -> int:
    """Return the order, at most `order`, of an interpolant B_i(x) = sum_d weights[i][d - 1] x^d over the stages of a.

    For the weights b_i of the end of a step pass `weights` = [(b_i,)]; they are checked at x = 1.
    """
    rows = [[float(x) for x in row] for row in a]
    polynomials = [[float(x) for x in row] for row in weights]
    degree = len(polynomials[0])
    phi: list[list[float]] = []
    below: list[list[float]] = []  # sum_j a_ij Phi_j(t)
    for tree in trees(order):
        phi.append([prod(below[child][i] for child in tree.children) for i in range(len(rows))])
        below.append([sum(x * y for x, y in zip(row, phi[-1], strict=False)) for row in rows])
        for d in range(1, max(degree, tree.vertices) + 1):
            found = sum(row[d - 1] * x for row, x in zip(polynomials, phi[-1], strict=True)) if d <= degree else 0.0
            wanted = 1.0 / tree.density if d == tree.vertices or degree == 1 else 0.0
            if abs(found - wanted) > ROUNDED and (degree > 1 or d == 1):
                return tree.vertices - 1
    return order
