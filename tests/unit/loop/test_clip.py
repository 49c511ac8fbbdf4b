"""options=dict(clip=True): func is evaluated at no time outside [t[0], t[-1]], and the last step ends at t[-1]."""

from __future__ import annotations

import math

import pytest
import torch
from problems import F64
from torch import nn

import node_cuda
from node_cuda import TABLEAUS, odeint, odeint_adjoint, odeint_dense, odeint_event, solve

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
CLIP = dict(clip=True)


class Table(nn.Module):
    """The field y' = -rate y, which is only known between two times, like a table of inputs."""

    def __init__(self, low, high, rate=1.0, dtype=F64):
        super().__init__()
        self.low, self.high = low, high
        self.rate = nn.Parameter(torch.tensor(rate, dtype=dtype))
        self.asked = []

    def forward(self, t, y):
        self.asked.append(at := float(t.detach()))
        if not self.low <= at <= self.high:
            raise ValueError(f"no data at t = {at!r}")
        return -self.rate * y


def times(low, high, *, reverse=False, dtype=F64):
    t = torch.tensor([low, high], dtype=dtype)
    return t.flip(0) if reverse else t


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", [*ADAPTIVE, "scipy_solver"])
def test_no_method_evaluates_outside_and_the_last_step_ends_at_the_last_time(method, reverse):
    func = Table(0.0, 1.0)
    options = dict(CLIP, record_steps=True)
    with torch.no_grad():
        solution = solve(
            func, torch.ones(1, dtype=F64), times(0.0, 1.0, reverse=reverse), rtol=1e-6, atol=1e-6, method=method,
            options=options,
        )  # fmt: skip
    assert solution.stats.step_times[-1] == float(not reverse)
    limit = 5e-3 if method == "fehlberg2" else 1e-4  # the error estimate of this method's carried stage is poor
    assert float(solution.ys[-1]) == pytest.approx(math.exp(1.0 if reverse else -1.0), rel=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
def test_times_are_rounded_inwards_to_the_dtype_of_the_state(dtype, reverse):
    """0.1 and 0.7 are rounded up or down, and func compares them with the doubles."""
    func = Table(0.1, 0.7, dtype=dtype)
    with torch.no_grad():
        y = odeint(
            func, torch.ones(1, dtype=dtype), times(0.1, 0.7, reverse=reverse), rtol=1e-3, atol=1e-3, options=CLIP
        )
    assert float(y[-1]) == pytest.approx(math.exp(0.6 if reverse else -0.6), rel=1e-2)


@pytest.mark.parametrize("path", ["reference", pytest.param("fused", marks=pytest.mark.compiler)])
def test_the_probe_of_the_first_step_stays_inside_too(path, request):
    """Without clip it would be at t = 10, because the field is slow and the interval is short."""
    if path == "fused":
        request.getfixturevalue("shim")
    func = Table(0.0, 1e-3, rate=1e-3)
    with torch.no_grad(), node_cuda.backend(path):
        y = odeint(func, torch.ones(1, dtype=F64), times(0.0, 1e-3), rtol=1e-6, atol=1e-6, options=CLIP)
    assert float(y[-1]) == pytest.approx(1.0 - 1e-6, abs=1e-12)
    assert max(func.asked) == 1e-3


@pytest.mark.parametrize("gradient", ["backprop", "adjoint", "discrete"])
@pytest.mark.parametrize("dense", ["default", "accurate"])
def test_gradients_evaluate_inside_too(gradient, dense):
    func, t = Table(0.0, 1.0), torch.linspace(0.0, 1.0, 4, dtype=F64, requires_grad=True)
    y0 = torch.ones(1, dtype=F64, requires_grad=True)
    solution = solve(func, y0, t, rtol=1e-8, atol=1e-8, options=dict(CLIP, dense=dense), gradient=gradient)
    found = torch.autograd.grad(solution.ys[-1], (y0, t, func.rate))
    e = math.exp(-1.0)
    for g, right in zip(found, ([e], [e, 0.0, 0.0, -e], -e), strict=True):
        torch.testing.assert_close(g, torch.tensor(right, dtype=F64), rtol=0, atol=1e-5)


def test_clip_does_not_change_jumps_and_step_times():
    func = Table(0.0, 1.0)
    options = dict(CLIP, step_t=[0.3, 1.0], jump_t=[0.5], record_steps=True)
    with torch.no_grad():
        solution = solve(func, torch.ones(1, dtype=F64), times(0.0, 1.0), rtol=1e-4, atol=1e-4, options=options)
    assert {0.3, 0.5, 1.0} <= set(solution.stats.step_times)


def test_dense_output_evaluates_inside():
    y = odeint_dense(Table(0.0, 1.0), torch.ones(1, dtype=F64), 0.0, 1.0, rtol=1e-6, atol=1e-6, options=CLIP)
    assert float(y(0.37).detach()) == pytest.approx(math.exp(-0.37), abs=1e-5)


def test_clip_does_not_limit_a_solve_to_an_event():
    with pytest.raises(ValueError, match="t\\[1\\] only gives the direction of time"):
        odeint_event(
            Table(0.0, 1.0), torch.ones(1, dtype=F64), torch.tensor(0.0), event_fn=lambda t, y: y - 0.5, options=CLIP
        )


@pytest.mark.parametrize("value", ["no", (0.0, 1.0), torch.tensor([0.0, 1.0])])
def test_a_clip_that_is_not_a_bool_is_refused(value):
    with pytest.raises(TypeError, match="must be True or False"):
        odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), options=dict(clip=value))


def test_clip_does_not_change_a_fixed_grid():
    def run(options):
        return odeint(lambda t, y: -t * y, torch.ones(1), torch.tensor([0.1, 0.7]), method="rk4", options=options)

    assert torch.equal(run(dict(step_size=0.2, clip=True)), run(dict(step_size=0.2)))


def test_a_dtype_with_no_time_inside_gives_an_error():
    with pytest.raises(ValueError, match="Use a wider state"):
        odeint(lambda t, y: -y, torch.ones(1, dtype=torch.bfloat16), times(1.001, 1.002), options=CLIP)


def test_clip_with_cuda_graph_uses_the_host_loop_and_gives_the_reason(eager):
    with node_cuda.backend("fused"), torch.no_grad():
        options = dict(CLIP, cuda_graph=True)
        solution = solve(Table(0.0, 1.0), torch.ones(1, dtype=F64), times(0.0, 1.0), rtol=1e-4, options=options)
    assert "clip=True" in solution.stats.why and solution.stats.loop == "host"


def test_the_backward_solve_alone_may_be_clipped_by_its_forward_options():
    func, y0 = Table(0.0, 1.0), torch.ones(1, dtype=F64, requires_grad=True)
    y = odeint_adjoint(func, y0, times(0.0, 1.0), rtol=1e-8, atol=1e-8, options=CLIP, adjoint_options={})[-1]
    (g,) = torch.autograd.grad(y, y0)
    assert float(g) == pytest.approx(math.exp(-1.0), abs=1e-6)
