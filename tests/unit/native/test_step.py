"""The formulas of a traced step are those of the host."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import F64

from node_cuda.kernels import reference
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.reference import ControllerParams
from node_cuda.kernels.stage_times import Clock
from node_cuda.native.numbers import Point, Settings, settings_of_law
from node_cuda.native.step import Norm, beside, combine, cut, judge, largest, proposed, weighted
from node_cuda.status import Status


def tensors(numbers: Any) -> Any:
    """Return numbers as a loop sees them: reals as 0-d doubles, counts as 0-d integers."""
    return type(numbers)(*(torch.tensor(x, dtype=torch.int64 if isinstance(x, int) else F64) for x in numbers))


LAWS = [
    ControllerParams(
        exponents=(0.2, 0.0, 0.0), safety=0.9, ifactor=10.0, dfactor=0.2, keep=True, min_step=0.0, max_step=math.inf
    ),
    ControllerParams(
        exponents=(0.3, 0.1, -0.05), safety=0.8, ifactor=5.0, dfactor=0.3, keep=False, min_step=0.1, max_step=0.5
    ),
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("ratio", [0.0, 1e-9, 0.3, 0.999, 1.0, 1.5, 50.0, math.inf, math.nan])
@pytest.mark.parametrize("h", [0.05, 0.1, 0.3, 0.7])
def test_a_step_is_judged_as_on_the_host(law, ratio, h):
    expected = reference.step_control(law, h, ratio, (0.7, 0.4))
    point = tensors(Point(t=0.0, r0=0.7, r1=0.4))
    settings = tensors(Settings(1.0, 0.0, 0.0)._replace(**settings_of_law(law)))
    found = judge(settings, torch.tensor(h, dtype=F64), torch.tensor(ratio, dtype=F64), point)
    assert bool(found.accept) == expected.accept
    for mine, theirs in zip(found[1:], (expected.h_next, *expected.history), strict=True):
        assert math.isclose(float(mine), theirs, rel_tol=1e-15)


def test_sums_of_slopes_are_those_of_the_host():
    y0, k = torch.randn(7, dtype=F64), list(torch.randn(4, 7, dtype=F64))
    row = ((0, 0.3), (2, -1.7), (3, 0.01))
    h = torch.tensor(0.37, dtype=F64)
    assert torch.allclose(combine(y0, k, row, h), reference.combine(y0, k, row, 0.37), rtol=1e-15, atol=1e-15)
    assert combine(y0, k, (), h) is y0
    expected = sum(0.37 * e * k[j] for j, e in row)
    assert torch.allclose(weighted(k, row, h), expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("s", [0.0, 1.0, -0.7, 1e-30])
def test_the_times_beside_a_time_are_those_of_the_host(dtype, s):
    clock = Clock(1.0, dtype, torch.device("cpu"))
    at = torch.tensor(s, dtype=F64)
    assert float(beside(at, 1.0, dtype)) == clock.after(s) > s
    assert float(beside(at, -1.0, dtype)) == clock.before(s) < s


@pytest.mark.parametrize("sizes", [None, (2, 3, 1)])
@pytest.mark.parametrize("each", [False, True])
def test_the_norm_is_that_of_the_host(sizes, each):
    y, error = torch.randn(6, dtype=F64), torch.randn(6, dtype=F64)
    rtol: Any = torch.rand(6, dtype=F64) if each else 1e-3
    settings = tensors(Settings(1.0, 0.0 if each else rtol, 1e-4))
    norm, expected = Norm(rtol if each else None, None, sizes), ErrorNorm(rtol, 1e-4, sizes)
    scaled = error / norm.scale(settings, y.abs())
    assert torch.allclose(scaled, error / expected.scale(y.abs()), rtol=1e-15)
    assert math.isclose(float(norm(scaled)), expected(scaled), rel_tol=1e-14)


def test_the_largest_of_some_numbers_is_nan_if_one_is():
    nan, one, two = (torch.tensor(x, dtype=F64) for x in (math.nan, 1.0, 2.0))
    assert float(largest([one, two])) == 2.0
    assert all(math.isnan(float(largest(xs))) for xs in ([nan, one], [one, nan], [one, nan, two]))


STOPS = torch.tensor([0.5, 1.0, 2.0], dtype=F64)


@pytest.mark.parametrize(
    ("t", "h", "t1", "size"),
    [
        (0.0, 0.3, 0.3, 0.3),  # no stop in the way
        (0.0, 0.7, 0.5, 0.5),  # it ends at the stop
        (0.0, 0.5 - 1e-17, 0.5, 0.5),
        (0.5, 0.7, 1.0, 0.5),  # from one stop to the next
        (2.0, 0.7, 2.7, 0.7),  # after the last
    ],
)
def test_a_step_is_cut_to_end_at_a_stop(t, h, t1, size):
    found = cut(tensors(Point(t=t, proposal=h)), STOPS, None)
    assert (float(found.t1), float(found.h)) == (t1, size)


PROPOSALS = {
    "the next step": (dict(), True, 0, 1),
    "too small": (dict(t=1.0, proposal=1e-20), True, Status.STEP_UNDERFLOW, 0),
    "too small after a NaN": (dict(t=1.0, proposal=1e-20, finite=0), True, Status.NON_FINITE, 0),
    "too many": (dict(attempts=5), True, Status.MAX_STEPS, 5),
    "at the end": (dict(attempts=5), False, 0, 5),
    "failed before": (dict(status=Status.NON_FINITE.value), True, Status.NON_FINITE, 0),
}


@pytest.mark.parametrize("case", PROPOSALS)
def test_the_next_step_is_counted_or_ends_the_solve(case):
    point, active, status, attempts = PROPOSALS[case]
    settings = tensors(Settings(1.0, 0.0, 0.0, max_num_steps=5.0))
    found: Any = proposed(settings, tensors(Point(**{"t": 0.0, "proposal": 0.1, **point})), torch.tensor(active))
    assert (int(found.status), int(found.attempts)) == (getattr(status, "value", status), attempts)
