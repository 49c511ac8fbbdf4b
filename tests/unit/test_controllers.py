"""The PID controllers of the step size."""

from __future__ import annotations

import pytest
from problems import BY_NAME, relative_difference
from timed import steps
from tolerances import GLOBAL_ERROR_OVER_RTOL

from node_cuda import odeint


@pytest.mark.parametrize("option", [dict(safety=0.5), dict(ifactor=1.5), dict(dfactor=0.9)], ids=str)
def test_a_more_careful_controller_takes_no_fewer_steps(option):
    _, plain = steps()
    _, careful = steps(**option)
    assert careful.stats.accepted + careful.stats.rejected >= plain.stats.accepted


@pytest.mark.parametrize("controller", ["I", "PI", "PID"])
@pytest.mark.parametrize("name", ["linear", "stiffish", "reversed", "tuple", "complex"])
def test_every_controller_reaches_the_tolerance(controller, name):
    problem = BY_NAME[name]
    ys = odeint(problem.make(), problem.y0, problem.t, rtol=1e-6, atol=1e-8, options=dict(controller=controller))
    fine = odeint(problem.make(), problem.y0, problem.t, rtol=1e-9, atol=1e-11)
    assert relative_difference(ys, fine) <= GLOBAL_ERROR_OVER_RTOL * 1e-6


def test_an_unknown_controller_is_a_value_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="PID"):
        steps(controller="PIDD")
