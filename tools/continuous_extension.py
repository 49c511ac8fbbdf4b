"""Prints the extra stages in `node_cuda/methods/tableaus.py`: `python tools/continuous_extension.py dopri8`.

An interpolant of a method's own order p is the polynomial of degree p through both ends of the step with their slopes
and the slopes of p - 3 extra stages inside (`hermite`). A slope has to be right to order p - 1, so its stage y(t + c h)
must be, and the stages of the method itself reach less. Hence bootstrapping (Enright, Jackson, Norsett & Thomsen,
ACM TOMS 12 (1986) 193): the row a of a stage at node c is of order q if

    sum_j a_j Phi_j(t) = c^|t| / gamma(t)     for all rooted trees t with up to q vertices,

linear equations that can be solved for any c up to some q; a few stages of order q lift that to q + 1, and so on.
What the equations leave open in a row goes into the least error of the next order.

`python tools/continuous_extension.py dopri8 --search 60` looks for good nodes for 60 seconds.
"""

from __future__ import annotations

import argparse
import random
import sys
import textwrap
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from rooted_trees import elementary_weights, trees  # noqa: E402

from node_cuda.methods.tableau import DenseOutput, Row, Tableau, hermite  # noqa: E402
from node_cuda.methods.tableaus import TABLEAUS  # noqa: E402


class Plan(NamedTuple):
    """The extra stages: their orders, and their nodes in hundredths (found by --search)."""

    orders: tuple[int, ...]
    nodes: tuple[int, ...]


PLANS = {
    "bosh5": Plan((4, 4), (50, 18)),
    "dopri5": Plan((4, 4), (8, 42)),
    "tsit5": Plan((4, 4), (47, 15)),
    "dopri8": Plan((5, 6, 6, 6, 7, 7, 7, 7, 7), (41, 51, 5, 71, 62, 18, 72, 38, 5)),
}
DAMPING = 1e-4  # keeps the entries of a row modest where the error of the next order hardly depends on them
RANK = 1e-9  # smaller singular values, relative to the largest, are rounding: dopri8's coefficients have 18 digits
DIGITS = 20  # printed; a few more than a double holds


def stage_row(a: list[Row], order: int, node: Fraction, exact: bool) -> Row:
    """The row of a stage at this node, of this order, with the least error of the next."""
    orders = np.array([tree.order for tree in trees(order + 1)])
    gamma = np.array([tree.density for tree in trees(order + 1)], dtype=object)
    symmetry = np.array([tree.symmetry for tree in trees(order + 1)])
    solved = orders <= order
    scale = gamma if exact else gamma.astype(float)
    phi = elementary_weights(a, order + 1, object if exact else float) * scale[:, None]  # entries of size c^|t|
    target = np.array([node**k for k in orders.tolist()], dtype=object)

    matrix, right = phi.astype(float), target.astype(float)
    left, values, basis = np.linalg.svd(matrix[solved])
    rank = int(np.sum(values > RANK * values[0]))
    inverse = basis[:rank].T / values[:rank] @ left[:, :rank].T
    numbers, free = inverse @ right[solved], basis[rank:].T
    weight = 1 / (gamma * symmetry)[~solved].astype(float)
    error = weight[:, None] * matrix[~solved]
    numbers = (
        numbers
        + free
        @ np.linalg.lstsq(
            np.vstack([error @ free, DAMPING * free]),
            np.concatenate([weight * right[~solved] - error @ numbers, -DAMPING * numbers]),
            rcond=None,
        )[0]
    )
    if not exact:
        return tuple(numbers)
    # Start from the digits that every machine finds alike and improve what is not zero by exact residuals.
    found = np.array([round(Fraction(number), 8) for number in numbers], dtype=object)
    inverse = np.linalg.pinv(np.where(found == 0, 0, matrix[solved]), rcond=RANK)
    for _ in range(3):
        residual = (target[solved] - phi[solved] @ found).astype(float)
        found = found + np.array([Fraction(number) for number in inverse @ residual], dtype=object)
    return tuple(round(number, DIGITS) for number in found)


def extension(tableau: Tableau, plan: Plan, exact: bool) -> DenseOutput:
    """The interpolant of the method's own order with these extra stages."""
    nodes = tuple(Fraction(node, 100) for node in plan.nodes)
    a: list[Row] = list(tableau.a)
    for order, node in zip(plan.orders, nodes, strict=True):
        a.append(stage_row(a, order, node, exact))
    return hermite(tableau.order, tableau.b, c=nodes, a=tuple(a[tableau.stages :]), slopes=tableau.order - 3)


def leading_error(tableau: Tableau, dense: DenseOutput) -> np.ndarray:
    """Norm of the error coefficients of order p + 1 at x = 0.05, 0.1, ..., 1 (the last is the method's own)."""
    order = tableau.order + 1
    phi = elementary_weights((*tableau.a, *dense.a), order, float)
    x = np.linspace(0, 1, 21)[1:]
    weights = np.array(dense.weights, dtype=float) @ x ** np.arange(1, dense.degree + 1)[:, None]
    square = sum(
        ((numbers @ weights - x**order / tree.density) / tree.symmetry) ** 2
        for tree, numbers in zip(trees(order), phi, strict=True)
        if tree.order == order
    )
    return np.sqrt(square)


def quality(tableau: Tableau, plan: Plan) -> float:
    """Small is good: the largest error inside the step against the one at its end, and the size of the coefficients."""
    try:
        dense = extension(tableau, plan, exact=False)
    except ValueError:  # nodes that determine no polynomial
        return np.inf
    error = leading_error(tableau, dense)
    largest = max(abs(float(number)) for numbers in (*dense.weights, *dense.a) for number in numbers)
    return float(np.log10(error.max() / error[-1]) + 0.2 * np.log10(largest))


def search(tableau: Tableau, plan: Plan, seconds: float) -> Plan:
    """Better nodes: random ones for half of the time, then single changes to the best."""
    chance, end = random.Random(0), time.monotonic() + seconds
    best, best_quality = plan, quality(tableau, plan)
    while (left := end - time.monotonic()) > 0:
        nodes = [chance.randint(5, 95) for _ in plan.nodes]
        if left < seconds / 2:
            nodes = list(best.nodes)
            nodes[chance.randrange(len(nodes))] += chance.choice((-5, -2, -1, 1, 2, 5))
        trial = plan._replace(nodes=tuple(min(95, max(5, node)) for node in nodes))
        if (value := quality(tableau, trial)) < best_quality:
            best, best_quality = trial, value
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=PLANS)
    parser.add_argument("--search", type=float, metavar="SECONDS", help="look for nodes first")
    arguments = parser.parse_args()
    tableau, plan = TABLEAUS[arguments.method], PLANS[arguments.method]
    if arguments.search:
        plan = search(tableau, plan, arguments.search)
        print(f"# nodes in hundredths: {plan.nodes}")
    dense = extension(tableau, plan, exact=True)
    error = leading_error(tableau, dense)
    print(f"# error of order {tableau.order + 1}: at most {error.max():.3g} inside a step, {error[-1]:.3g} at its end")
    print(f"# largest weight {max(abs(float(w)) for weights in dense.weights for w in weights):.3g}")
    for numbers in dense.a:
        text = " ".join(decimal(Fraction(number)) for number in numbers)
        lines = [f"{'' if i == 0 else ' '}{line}" for i, line in enumerate(textwrap.wrap(text, 92))]
        print(*(f'            "{line}"' for line in lines), sep="\n", end=",\n")


def decimal(number: Fraction) -> str:
    """All digits of a number that was rounded to DIGITS."""
    digits = f"{abs(int(number * 10**DIGITS)):0{DIGITS + 1}d}"
    return ("-" if number < 0 else "") + f"{digits[:-DIGITS]}.{digits[-DIGITS:]}".rstrip("0").rstrip(".")


if __name__ == "__main__":
    main()
