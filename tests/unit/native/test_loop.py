"""The traced loop: its scheme, its polynomial, and its record of steps."""

from __future__ import annotations

import pytest
import torch
from native import Timed, start
from problems import F64, linspace

from node_cuda import TABLEAUS, solve
from node_cuda.methods.registry import lookup
from node_cuda.native.cache import NativeCache
from node_cuda.native.forward import begin, compiled_or_why
from node_cuda.native.forward import solve as run
from node_cuda.native.loop import extra_evaluations, polynomial, scheme_of
from node_cuda.problem.problem import make_problem
from node_cuda.solution import Stats

T = linspace(0.0, 1.0, 3)


@pytest.mark.parametrize("name", [name for name, tableau in TABLEAUS.items() if tableau.adaptive])
def test_the_scheme_of_an_adaptive_method_has_the_weights_of_its_tableau(name):
    scheme = scheme_of(lookup(name, dict(dense="accurate")))
    tableau = TABLEAUS[name]
    assert scheme.adaptive and scheme.carries and scheme.keeps_k1 == (not tableau.fsal)
    assert sum(e for _, e in scheme.b_err) == pytest.approx(0.0, abs=1e-14) and 0.0 not in dict(scheme.b_err).values()
    assert extra_evaluations(scheme) == tableau.accurate.extra


def test_the_scheme_of_a_grid_asks_for_slopes_only_where_outputs_lie_between_points():
    for options, cubic in (
        (dict(interp="cubic"), False),  # the grid is t
        (dict(interp="linear", step_size=0.1), False),
        (dict(interp="cubic", step_size=0.1), True),
        (dict(interp="cubic", grid_constructor=lambda func, y0, t: t), True),
        (dict(interp="cubic", perturb=True), True),
    ):
        scheme = scheme_of(lookup("rk4", options))
        assert scheme.hermite == cubic and extra_evaluations(scheme) == cubic
        assert not scheme.carries and not scheme.keeps_k1


def test_a_polynomial_without_a_constant():
    x = linspace(-1.0, 2.0, 7)
    assert torch.allclose(polynomial((2.0, -1.0, 0.5), x), 2 * x - x**2 + 0.5 * x**3, rtol=1e-14)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("method", ["bosh3", "adaptive_heun", "rk4"])
def test_the_record_of_steps_holds_each_accepted_step_once(method):
    """bosh3 is FSAL; adaptive_heun is not, so that its k1 is recorded too. Each call records at most four steps."""
    field, tols = Timed(), dict(rtol=1e-3, atol=1e-3)
    adaptive = TABLEAUS[method].adaptive
    options = dict(first_step=0.7) if adaptive else dict(step_size=0.15)
    chosen = lookup(method, dict(options, compile=NativeCache(required=True)))
    problem, stats = make_problem(field, start(), T, 1e-3, 1e-3, None, clip=False, endless=False), Stats()
    with torch.no_grad():
        begun = begin(problem, chosen)
        made, seen = compiled_or_why(problem, chosen, begun, None, steps=4)
        segments = []
        run(made, problem, chosen, stats, seen, begun, segments.append)
        expected = solve(field, start(), T, method=method, options=dict(options, record_steps=True), **tols)
    assert (stats.accepted, stats.rejected) == (expected.stats.accepted, expected.stats.rejected)
    assert len(segments) > 1 and sum(s.steps for s in segments) == stats.accepted
    assert all(1 <= s.steps <= 4 for s in segments)
    y0, times = (torch.cat([s.tape[i][: s.steps] for s in segments]) for i in range(2))
    steps = torch.tensor(expected.stats.step_times, dtype=F64)
    assert torch.allclose(times[:, 0], steps[:-1], rtol=1e-9) and torch.allclose(times[:, 2], steps[1:], rtol=1e-9)
    assert torch.allclose(times[:, 1], steps.diff(), rtol=1e-9)
    assert torch.equal(y0[0], start()) and torch.equal(times[1:, 0], times[:-1, 2])
    if made.scheme.keeps_k1:
        k1 = torch.cat([s.tape[2][: s.steps] for s in segments])
        ends = y0 + times[:, 1, None, None] * k1  # the last stage is the first of the next step
        last = torch.stack([field(t, y) for t, y in zip(times[:, 2], ends, strict=True)]).detach()
        assert torch.allclose(k1[1:], last[:-1], rtol=1e-12)
