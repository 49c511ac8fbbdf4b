"""The properties that a tableau derives from its coefficients, and the tableaus that it refuses."""

from __future__ import annotations

import pytest

from node_cuda.methods.tableau import DenseOutput, Tableau, hermite, row, rows
from node_cuda.methods.tableaus import TABLEAUS


def test_properties_that_follow_from_the_coefficients_are_derived():
    tableau = TABLEAUS["bosh3"]
    assert (tableau.stages, tableau.adaptive, tableau.nodes) == (4, True, (0.0, 0.5, 0.75, 1.0))
    assert tableau.b_err == row("-5/72 1/12 1/9 -1/8")
    assert tableau.err_row == ((0, -5 / 72), (1, 1 / 12), (2, 1 / 9), (3, -1 / 8))
    assert tableau.b_row == ((0, 2 / 9), (1, 1 / 3), (2, 4 / 9))
    assert tableau.rows == ((), ((0, 0.5),), ((1, 0.75),), ((0, 2 / 9), (1, 1 / 3), (2, 4 / 9)))
    assert (TABLEAUS["euler"].adaptive, TABLEAUS["euler"].b_err, TABLEAUS["euler"].err_row) == (False, None, None)


@pytest.mark.parametrize("name", TABLEAUS)
def test_the_step_loop_reads_plain_floats_and_no_zeros(name):
    tableau = TABLEAUS[name]
    views = [*tableau.rows, tableau.b_row, tableau.err_row or ()]
    for dense in (tableau.dense, tableau.accurate):
        views += dense.rows if dense else []
        weights = dense.weight_rows if dense else ()
        assert all(type(weight) is float for _, numbers in weights for weight in numbers)
        assert all(any(numbers) for _, numbers in weights)
    assert all(type(j) is int and type(number) is float and number != 0 for view in views for j, number in view)
    assert all(type(node) is float for node in tableau.nodes)


MISTAKES = {
    "a row too short": dict(a=rows("", "1/2", "2")),
    "as many nodes": dict(c=row("0 1/2")),
    "a weight too few": dict(b=row("1/2 1/2")),
    "an order for the embedded row": dict(b_hat=row("0 1 0")),
    "carrying a stage inside": dict(c=row("0 1/2 1/2"), a=rows("", "1/2", "-1 3/2"), carry_last_stage=True),
    "an interpolant for another method": dict(dense=hermite(3, row("1/2 1/2"))),
    "an interpolant that misses the end": dict(dense=hermite(3, row("1/3 1/3 1/3"))),
    "an order": dict(order=0),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_for_an_invalid_tableau_says_what_is_wrong(mistake):
    fields = dict(name="mine", order=3, c=row("0 1/2 1"), a=rows("", "1/2", "-1 2"), b=row("1/6 2/3 1/6"), source="")
    Tableau(**fields)
    with pytest.raises(ValueError, match=r"^tableau 'mine': .* is .*, but must be .*\.$"):
        Tableau(**fields | MISTAKES[mistake])


def test_the_error_for_an_invalid_interpolant_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"len\(weights\[1\]\) is 1, but must be 2"):
        DenseOutput(order=1, weights=(row("1 -1/2"), row("0")))
    with pytest.raises(ValueError, match=r"the sum of weights of x\^2 is 0.5, but must be 0"):
        DenseOutput(order=1, weights=rows("1 0", "0 1/2"))
    with pytest.raises(ValueError, match="do not determine a polynomial; move a node"):
        hermite(5, row("1/2 1/2"), c=row("0.3 0.3"), a=rows("0.3 0", "0.3 0 0"), slopes=2)
