"""The order conditions of Runge-Kutta methods, from rooted trees (Hairer, Norsett & Wanner I, sec. II.2 and II.5).

A method with nodes c_i = sum_j a_ij has order p if sum_i b_i Phi_i(t) = 1 / gamma(t) for all trees t with up to p
vertices. An interpolant with weights B_i(x) has order p if sum_i B_i(x) Phi_i(t) = x^|t| / gamma(t).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from math import factorial, prod
from typing import Any, NamedTuple

import numpy as np


class Tree(NamedTuple):
    """A root with subtrees, each given by its index in `trees()`."""

    order: int  # number of vertices
    density: int  # gamma
    symmetry: int  # sigma
    children: tuple[int, ...]


@cache
def trees(max_order: int) -> tuple[Tree, ...]:
    """Return all rooted trees with up to max_order vertices, smaller trees first (1, 1, 2, 4, 9, 20, 48, 115, ...)."""
    if max_order == 0:
        return ()
    smaller = trees(max_order - 1)
    grown = (
        Tree(
            order=max_order,
            density=max_order * prod(smaller[i].density for i in children),
            symmetry=prod(smaller[i].symmetry ** n * factorial(n) for i, n in Counter(children).items()),
            children=children,
        )
        for children in _forests(smaller, max_order - 1, start=0)
    )
    return (*smaller, *grown)


def _forests(smaller: Sequence[Tree], vertices: int, start: int) -> Iterator[tuple[int, ...]]:
    """Return all multisets of trees, from index `start` on, that have this number of vertices in total."""
    if vertices == 0:
        yield ()
    for i in range(start, len(smaller)):
        if smaller[i].order > vertices:
            return
        for rest in _forests(smaller, vertices - smaller[i].order, i):
            yield (i, *rest)


def elementary_weights(a: Sequence[Sequence[Any]], max_order: int, dtype: type = object) -> np.ndarray:
    """Return Phi_i(t): a row for each tree of `trees(max_order)`, a column for each stage (row of a).

    dtype: object for exact arithmetic (a holds Fractions), float for speed.
    """
    stages = len(a)
    square = np.array([[*numbers] + [0] * (stages - len(numbers)) for numbers in a], dtype=dtype)
    phi = np.ones((len(trees(max_order)), stages), dtype=dtype)
    below = np.empty_like(phi)  # sum_j a_ij Phi_j(t)
    for k, tree in enumerate(trees(max_order)):
        for child in tree.children:
            phi[k] = phi[k] * below[child]
        below[k] = square @ phi[k]
    return phi


def rosenbrock_weights(alpha: np.ndarray, beta: np.ndarray, max_order: int) -> np.ndarray:
    """The same of a Rosenbrock method with the exact Jacobian, beta = alpha + Gamma: below a vertex with one child
    stands beta, below one with several alpha (Hairer & Wanner II, IV.7, theorem 7.4)."""
    phi = np.ones((len(trees(max_order)), len(alpha)), dtype=alpha.dtype)
    for k, tree in enumerate(trees(max_order)):
        for child in tree.children:
            phi[k] = phi[k] * ((beta if len(tree.children) == 1 else alpha) @ phi[child])
    return phi
