"""Prints the `accurate` interpolants of `node_cuda/tableaus.py`: `python tools/continuous_extension.py dopri8`.

The method is bootstrapping (Enright, Jackson, Norsett & Thomsen, ACM TOMS 12 (1986) 193). The row a of a stage at
node c and the weights B(x) of an interpolant obey linear conditions, one for each rooted tree t of up to q vertices:

    sum_j a_j Phi_j(t) = c^|t| / gamma(t)          sum_i B_i(x) Phi_i(t) = x^|t| / gamma(t)

The stages at hand meet them to some order q below the method's own at any x. An extra stage of order q is as good as
a slope of the solution, to that order, and enough of them lift q by one; this is repeated until q is the method's
order. What the conditions leave open in a row goes into the least error of the next order. At the end nothing is left
open: the weights are unique, so they meet the step ends (B(1) = b) and their slopes without being told to.

`python tools/continuous_extension.py dopri8 --search 60` looks for nodes for 60 seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from rooted_trees import elementary_weights, trees  # noqa: E402

from node_cuda.tableaus import TABLEAUS  # noqa: E402


class Plan(NamedTuple):
    """Orders and nodes of the extra stages. The nodes come from --search, rounded."""

    orders: tuple[int, ...]
    nodes: tuple[str, ...]


PLANS = {
    "bosh5": Plan((4,), ("0.5",)),
    "dopri5": Plan((4, 4), ("0.29", "0.63")),
    "tsit5": Plan((4, 4), ("0.13", "0.43")),
    "dopri8": Plan(
        (5, 6, 6, 6, 7, 7, 7, 7, 7), ("0.41", "0.51", "0.05", "0.71", "0.62", "0.18", "0.72", "0.38", "0.05")
    ),
}
DAMPING = 1e-4  # keeps the entries of a row modest where the error of the next order hardly depends on them
RANK = 1e-9  # singular values below this part of the largest are rounding (dopri8's own coefficients are rounded)
DIGITS = 20  # printed


class Conditions:
    """The order conditions of orders 1 ... order on the weights of stages with the rows a, times gamma(t).

    exact: in Fractions, to be solved to all digits; otherwise in float64, for a quick look.
    """

    def __init__(self, a: Sequence[Sequence[Any]], order: int, exact: bool) -> None:
        self.exact = exact
        self.orders = np.array([tree.order for tree in trees(order)])
        gamma = np.array([tree.density for tree in trees(order)], dtype=object if exact else float)
        phi = np.array(elementary_weights(a, order), dtype=object if exact else float)
        self.matrix = phi * gamma[:, None]
        self.floats = self.matrix.astype(float)
        self.errors = np.array([1.0 / (tree.density * tree.symmetry) for tree in trees(order)])

    def targets(self, x: Any) -> np.ndarray:
        """Right hand sides: x^|t|."""
        return np.array([x**order for order in self.orders.tolist()], dtype=self.matrix.dtype)

    def
