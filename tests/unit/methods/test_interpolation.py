"""Outputs between the steps, by the interpolant of the method."""

from __future__ import annotations

import math

import pytest
from problems import linspace, relative_difference
from timed import LOOSE, Y, exact, steps, timed
from tolerances import SLOPE

from node_cuda import TABLEAUS, odeint

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_accurate_dense_output_has_the_order_of_the_method_between_the_steps_too(name):
    order = TABLEAUS[name].order
    coarse = {2: 32, 3: 32, 5: 10}.get(order, 5)
    t = linspace(0.0, 2.0, 64)
    errors = []
    for n in (coarse, 2 * coarse):
        options = dict(first_step=2 / n, max_step=2 / n, dense="accurate")
        errors.append(relative_difference(odeint(timed, Y, t, method=name, options=options, **LOOSE), exact(t)))
    assert math.log2(errors[0] / errors[1]) >= order - 2 * SLOPE  # the outputs are at other places in the finer steps


def test_accurate_dense_output_costs_evaluations_only_in_steps_with_an_output():
    def nfe(t, **options):
        return steps(t=t, method="dopri8", first_step=0.1, max_step=0.1, **options, **LOOSE)[1].stats.nfe

    ends_only = nfe(linspace(0.0, 2.0, 2), dense="accurate") - nfe(linspace(0.0, 2.0, 2))
    everywhere = nfe(linspace(0.0, 2.0, 101), dense="accurate") - nfe(linspace(0.0, 2.0, 101))
    assert 0 <= ends_only < everywhere / 5


def test_the_accurate_dense_output_does_not_change_the_steps():
    t = linspace(0.0, 2.0, 21)
    assert steps(t=t, method="dopri8", dense="accurate")[0] == steps(t=t, method="dopri8")[0]
