"""The order conditions of Runge-Kutta methods, from rooted trees (Hairer, Norsett & Wanner I, sec. II.2 and II.5).

A method with nodes c_i = sum_j a_ij is of order p if sum_i b_i Phi_i(t) = 1 / gamma(t) for all trees t with up to p
vertices; a continuous one, with weights B_i(x), if sum_i B_i(x) Phi_i(t) = x^|t| / gamma(t).
Works in whatever arithmetic the coefficients are in: Fractions, floats, mpmath.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from math import prod
from typing import Any, NamedTuple

class Tree(NamedTuple):
    """A root and the trees that hang on it, each by its position in `trees()`."""

    order: int  # number of vertices
    density: int  # gamma
    children: tuple[int, ...]


@cache
def trees(max_order: int) -> tuple[Tree, ...]:
    """All rooted trees with up to max_order vertices, small ones first: 1, 1, 2, 4, 9, 20, 48, 115 of orders 1 ... 8."""
    if max_order == 0:
        return ()
    smaller = trees(max_order - 1)
    grown = (
        Tree(max_order, max_order * prod(smaller[i].density for i in children), children)
        for children in _forests(smaller, max_order - 1, start=0)
    )
    return (*smaller, *grown)


def _forests(smaller: Sequence[Tree], vertices: int, start: int) -> Iterator[tuple[int, ...]]:
    """All multisets of trees, from position `start` on, that have so many vertices together."""
    if vertices == 0:
        yield ()
    for i in range(start, len(smaller)):
        if smaller[i].order > vertices:
            return
        for rest in _forests(smaller, vertices - smaller[i].order, i):
            yield (i, *rest)


def elementary_weights(a: Sequence[Sequence[Any]], max_order: int) -> list[list[Any]]:
    """Phi_i(t): a row for each tree of `trees(max_order)`, an entry for each stage (row of a)."""
    found: list[list[Any]] = []
    below: list[list[Any]] = []  # sum_j a_ij Phi_j(t) for the trees found so far
    for tree in trees(max_order):
        phi = [prod((below[child][i] for child in tree.children), start=Fraction(1)) for i in range(len(a))]
        found.append(phi)
        if tree.order < max_order:
            below.append([dot(numbers, phi) for numbers in a])
    return found


def dot(numbers: Sequence[Any], phi: Sequence[Any]) -> Any:
    """sum_j numbers_j phi_j over the entries that numbers has."""
    return sum((number * weight for number, weight in zip(numbers, phi) if number and weight), Fraction(0))  # noqa: B905
