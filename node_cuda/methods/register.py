"""`register_method`: adds an explicit Runge-Kutta method of the user, given by its tableau."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS
from node_cuda.methods.order_conditions import attained
from node_cuda.methods.registry import ADAMS, SCIPY
from node_cuda.methods.tableau import DenseOutput, Tableau, hermite
from node_cuda.methods.tableaus import TABLEAUS
from node_cuda.status import InvalidInput, InvalidType


def register_method(name: str, tableau: Tableau) -> None:
    """Register a tableau as a method: `odeint(..., method=name)` then accepts it, in every gradient mode.

    name: a name that no method has yet. tableau: a `node_cuda.methods.tableau.Tableau`. With `b_hat` the method is
    adaptive, else it steps on fixed grids. If the last stage of an adaptive method is not f(t_n+1, y_n+1) (FSAL), this
    stage is added; it costs one evaluation in a rejected step and none in an accepted one. If the tableau has no
    interpolant (`dense`), the cubic through both ends of a step with the slopes there is used.

    Raises InvalidType if tableau is not a Tableau. Raises InvalidInput if the name is taken, if the order conditions of
    b, b_hat or an interpolant do not hold to the order that the tableau states, or if `carry_last_stage` is set for a
    method that is not FSAL, because that would change the method. Source of the conditions: Hairer, Norsett and Wanner,
    Solving ODEs I, II.2.
    """
    if not (isinstance(name, str) and name):
        raise InvalidType(f'name must be a word, such as "mine"; got {name!r}.')
    if name in (*TABLEAUS, *ADAMS, *IMPLICIT_TABLEAUS, SCIPY):
        raise InvalidInput(f"the method {name!r} exists already. Choose another name.")
    if not isinstance(tableau, Tableau):
        raise InvalidType(
            f"tableau must be a node_cuda.methods.tableau.Tableau; got a {type(tableau).__name__}. Make one: "
            "Tableau(name, order=..., c=..., a=..., b=..., source=...)."
        )
    _check_orders(name, tableau)
    if tableau.carry_last_stage and not tableau.fsal:
        raise InvalidInput(
            f"method {name!r}: carry_last_stage is set, but the last stage is not f(t_n+1, y_n+1): it would change the "
            "method. Leave it out; the stage is then added."
        )
    TABLEAUS[name] = replace(_ready(tableau), name=name)


def _ready(tableau: Tableau) -> Tableau:
    """Return the tableau in the form that the step loop needs: an adaptive one is FSAL and has an interpolant."""
    b_hat = tableau.b_hat
    if b_hat is None:
        return tableau
    if tableau.b_mid is not None:  # `dense` was derived from it already
        tableau = replace(tableau, b_mid=None, mid_order=None)
    if not tableau.fsal:
        tableau = replace(
            tableau,
            c=(*tableau.c, Fraction(1)),
            a=(*tableau.a, tableau.b),
            b=(*tableau.b, Fraction(0)),
            b_hat=(*b_hat, Fraction(0)),
            dense=_with_a_stage(tableau.dense, tableau.stages),
            accurate=_with_a_stage(tableau.accurate, tableau.stages),
        )
    dense = tableau.dense or tableau.accurate or hermite(min(3, tableau.order), tableau.b)
    return replace(tableau, dense=dense, carry_last_stage=True)


def _with_a_stage(dense: DenseOutput | None, stages: int) -> DenseOutput | None:
    """Return the interpolant for the same method with one more stage, which the interpolant does not use."""
    if dense is None:
        return None
    nothing = (Fraction(0),) * dense.degree
    weights = (*dense.weights[:stages], nothing, *dense.weights[stages:])
    a = tuple((*row[:stages], Fraction(0), *row[stages:]) for row in dense.a)
    return replace(dense, weights=weights, a=a)


def _check_orders(name: str, tableau: Tableau) -> None:
    stated: list[tuple[str, Any, Any, int | None]] = [
        ("b", tableau.a, [(x,) for x in tableau.b], tableau.order),
        ("b_hat", tableau.a, [(x,) for x in tableau.b_hat or ()], tableau.embedded_order),
    ]
    for kind in ("dense", "accurate"):
        dense: DenseOutput | None = getattr(tableau, kind)
        if dense is not None:
            stated.append((kind, (*tableau.a, *dense.a), dense.weights, dense.order))
    for what, a, weights, order in stated:
        if order is not None and (found := attained(a, weights, order)) < order:
            raise InvalidInput(
                f"method {name!r}: {what} is stated to have order {order}, but it meets the order conditions of "
                f"order {found} only. Look for a misprint, or state the order {found}."
            )
