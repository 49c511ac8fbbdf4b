"""A stiff field is found by the steps that an explicit method takes through it, and others are left alone."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from problems import F64, linspace

from node_cuda import TABLEAUS, StiffnessWarning, odeint, solve
from node_cuda.loop.stiffness import EVERY, StiffnessTest

Y = torch.tensor([2.0, 0.0], dtype=F64)


def van_der_pol(mu):
    return lambda t, y: torch.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


@pytest.fixture(autouse=True)
def not_warned(monkeypatch):
    monkeypatch.setattr(StiffnessTest, "warned", False)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8"])
def test_a_stiff_field_is_warned_of_once_with_the_method_to_take(method):
    t = linspace(0.0, 3.0 if method == "tsit5" else 1.0, 2)  # whose steps are at the boundary less often
    with torch.no_grad(), pytest.warns(StiffnessWarning) as caught:
        stats = solve(van_der_pol(200.0), Y, t, method=method, rtol=1e-3, atol=1e-5).stats
        odeint(van_der_pol(200.0), Y, t, method=method, rtol=1e-3, atol=1e-5)
    (warning,) = caught
    message = str(warning.message)
    assert "rodas5p" in message and stats.stiff_steps >= 15
    product = float(re.search(r"h \|lambda\| = ([\d.]+)", message)[1])
    assert product == pytest.approx(TABLEAUS[method].stability_boundary, rel=0.4)
    assert warning.filename == __file__


def test_a_field_that_is_not_stiff_is_never_suspected_and_costs_one_read_in_fifty_steps():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = solve(van_der_pol(2.0), Y, linspace(0.0, 30.0, 2), rtol=1e-6, atol=1e-8).stats
    assert stats.accepted > 5 * EVERY and stats.stiff_steps <= 1
    looks = stats.host_reads - (stats.accepted + stats.rejected)
    assert looks <= 10 + 8 * (stats.accepted // EVERY)


def test_the_boundary_is_that_of_the_stability_function():
    assert TABLEAUS["dopri5"].stability_boundary == pytest.approx(3.307, abs=2e-3)  # Hairer and Wanner II, IV.2
    for name in ("dopri5", "tsit5"):  # y' = lambda y grows beyond it, and not before
        for factor, grows in ((0.97, False), (1.05, True)):
            h = 0.1
            rate = -factor * TABLEAUS[name].stability_boundary / h
            options = dict(first_step=h, min_step=h, max_step=h)
            y = odeint(lambda t, y, rate=rate: rate * y, torch.ones(1, dtype=F64), linspace(0.0, 4.0, 2), method=name,
                       options=options, rtol=1.0)  # fmt: skip
            assert (abs(float(y[-1])) > 1.0) is grows


def test_an_implicit_method_is_not_told_to_use_another():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solve(van_der_pol(200.0), Y, linspace(0.0, 3.0, 2), method="rodas5p", rtol=1e-3).stats.stiff_steps == 0
