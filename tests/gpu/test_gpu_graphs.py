"""Solves that a GPU repeats from a captured step: they have the bits of the host loop, and leave no state.

The fields have no matrix product, as in test_gpu.py, so that bits can be compared. A failed capture, a capture by the
user and the profiler may leave state in a process. So these tests run in a separate process (`apart`), and the last
tests read its results.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import F64, linspace
from shim.pretend_gpu import CUDA
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from waves import TIMES, Wave, assert_near, same_bits, state, weighted

import node_cuda
from node_cuda import TABLEAUS, NeuralODE, Solution, SolveError, Stats, Status, odeint, solve
from node_cuda.cuda_graphs.cache import GraphCache

pytestmark = [
    pytest.mark.gpu,
    # torch warns of this when the mode is first used.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

TIERS = ("while", "batches")
each_tier = pytest.mark.parametrize("tier", TIERS)
LOOSE: dict[str, Any] = dict(rtol=1e-4, atol=1e-4)
GRID: dict[str, Any] = dict(step_size=0.13)
# The start of the reasons on a machine without WHILE nodes: an older torch, driver or toolkit.
NO_WHILE = ("this version of torch", "a loop on the GPU needs")
ROOT = Path(__file__).resolve().parents[2]


class Kicked(Wave):
    """The wave turns at t = 0.4."""

    def forward(self, t, y):
        return super().forward(t, y) * torch.where(t < 0.4, 1.0, -1.0)


class Changing(Wave):
    """Has a tensor that is neither parameter nor buffer, and is slower in training mode."""

    def __init__(self):
        super().__init__()
        self.gain = torch.full((8,), 1.25, dtype=F64, device=CUDA)

    def forward(self, t, y):
        return super().forward(t, y) * self.gain * (0.5 if self.training else 1.0)


class Reading(Wave):
    """Reads a number back in every evaluation."""

    def forward(self, t, y):
        return super().forward(t, y) * (1.0 + abs(y.sum().item()))


class Noisy(Wave):
    """Draws a random number in every evaluation."""

    def forward(self, t, y):
        return super().forward(t, y) * (1.0 + 0.01 * torch.rand((), device=y.device))


class Branching(Wave):
    """Its Python code depends on its data."""

    def forward(self, t, y):
        return super().forward(t, y) * (1.0 if y.sum() > 0 else -1.0)


class Selecting(Wave):
    """The shape of its intermediate tensors depends on its data."""

    def forward(self, t, y):
        return super().forward(t, y) * (1.0 + y[y > 0].square().mean())


class Waiting(Wave):
    """Waits for the device in every evaluation without an operation on a tensor, so that only the capture finds it."""

    def forward(self, t, y):
        torch.cuda.current_stream().synchronize()
        return super().forward(t, y)


class Dropping(Wave):
    """Draws random numbers in training mode."""

    def forward(self, t, y):
        return super().forward(t, y) * nn.functional.dropout(torch.ones_like(y), 0.1, self.training)


@pytest.fixture(autouse=True)
def by_the_kernels() -> Iterator[None]:
    with node_cuda.backend("fused"):
        yield


def lacks_while(stats: Stats) -> bool:
    """Return whether this machine has no WHILE nodes and reports this."""
    return stats.loop == "batches" and stats.why is not None and stats.why.startswith(NO_WHILE)


def require(stats: Stats, tier: str) -> None:
    """Check that the steps were repeated in this way; skip if the machine cannot do this."""
    if tier == "while" and lacks_while(stats):
        pytest.skip(str(stats.why))
    assert stats.loop == tier, stats.why


def captured(func: Any, y0: Any, t: Tensor, tier: str | GraphCache, options: Any = None, **solver: Any) -> Solution:
    """Return the options of a captured solve: by a tier, for this solve alone, or with graphs that are kept."""
    graphs = GraphCache(tier) if isinstance(tier, str) else tier
    solution = solve(func, y0, t, options={**(options or {}), "cuda_graph": graphs}, **{**LOOSE, **solver})
    assert graphs.tier is not None
    require(solution.stats, graphs.tier)
    return solution


def by_the_host(func: Any, y0: Any, t: Tensor, options: Any = None, **solver: Any) -> Solution:
    return solve(func, y0, t, options=options, **{**LOOSE, **solver})


def cost(solution: Solution) -> tuple[int, ...]:
    return solution.stats.accepted, solution.stats.rejected, solution.stats.nfe


# ------------------------------------------------------------------ solves
@each_tier
@pytest.mark.parametrize("method", TABLEAUS)
@torch.no_grad()
def test_every_explicit_method_has_the_bits_of_the_host_loop(method, tier):
    func, y0 = Wave().to(CUDA), state().to(CUDA)
    options = {} if TABLEAUS[method].adaptive else GRID
    host = by_the_host(func, y0, TIMES, options, method=method)
    device = captured(func, y0, TIMES, tier, options, method=method)
    assert torch.equal(device.ys, host.ys)
    assert cost(device) == cost(host)


CASES: dict[str, dict[str, Any]] = {
    "200 outputs": dict(t=linspace(0.0, 1.0, 200)),
    "many outputs in a step": dict(t=torch.cat([linspace(0.0, 0.01, 20), linspace(0.9, 2.0, 3)])),
    "backwards": dict(t=linspace(1.0, -1.0, 5)),
    "accurate outputs": dict(method="dopri8", options=dict(dense="accurate")),
    "rejected steps": dict(options=dict(first_step=2.0)),
    "PID": dict(options=dict(controller="PID")),
    "jump_t": dict(func=Kicked, options=dict(jump_t=[0.4])),
    "jump_t backwards": dict(func=Kicked, t=linspace(1.0, 0.0, 4), options=dict(jump_t=[0.7, 0.4])),
    "step_t": dict(options=dict(step_t=[0.35, 0.36])),
    "tolerances that are tensors": dict(rtol=torch.full((8,), 1e-4, dtype=F64), atol=torch.full((8,), 1e-5, dtype=F64)),
    "rk4, cubic outputs": dict(method="rk4", t=linspace(0.0, 1.0, 9), options=dict(**GRID, interp="cubic")),
    "rk4, perturbed, backwards": dict(method="rk4", t=linspace(1.0, 0.0, 4), options=dict(**GRID, perturb=True)),
    "float32": dict(dtype=torch.float32),
    "bfloat16": dict(dtype=torch.bfloat16, rtol=1e-2, atol=1e-2),
    "complex": dict(dtype=torch.complex128),
}


@each_tier
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_options_and_states_of_all_kinds_have_the_bits_of_the_host_loop(case, tier):
    given = {"t": TIMES, "func": Wave, "dtype": F64, **CASES[case]}
    t, make, dtype, options = given.pop("t"), given.pop("func"), given.pop("dtype"), given.pop("options", None)
    func = make().to(CUDA, dtype.to_real())
    y0 = state().to(CUDA, dtype)
    given = {name: x.to(CUDA) if isinstance(x, Tensor) else x for name, x in given.items()}
    host = by_the_host(func, y0, t, options, **given)
    device = captured(func, y0, t, tier, options, **given)
    assert torch.equal(device.ys, host.ys) and bool(device.ys.isfinite().all())
    assert cost(device)[:2] == cost(host)[:2]


@each_tier
@torch.no_grad()
def test_a_tuple_of_states_has_the_bits_of_the_host_loop(tier):
    def pendulum(t, state):
        angle, speed = state
        return speed, -torch.sin(angle) - 0.1 * speed.sum() * torch.ones_like(angle)

    y0 = (state(3, 5).to(CUDA), state(3, 5).add(0.1).to(CUDA))
    assert same_bits(captured(pendulum, y0, TIMES, tier).ys, by_the_host(pendulum, y0, TIMES).ys)


@each_tier
@torch.no_grad()
def test_a_captured_step_is_reused_for_other_states_and_times_but_not_for_other_shapes(tier):
    func, kept = Wave().to(CUDA), GraphCache(tier)
    small, large = state(3).to(CUDA), state(5000).to(CUDA)
    for y0, t, count in (
        (small, TIMES, 1),
        (2 * small, TIMES, 1),
        (small, 0.5 * TIMES, 1),
        (small, TIMES.to(CUDA), 1),
        (large, TIMES, 2),
        (small, linspace(0.0, 1.0, 7), 3),
        (small, TIMES, 3),
    ):
        assert torch.equal(captured(func, y0, t, kept).ys, by_the_host(func, y0, t).ys)
        assert kept.count == count


@torch.no_grad()
def test_compile_and_the_option_choose_a_tier():
    def field(t, y):
        return -y * torch.cos(t)

    y0 = state().to(CUDA)
    compiled = node_cuda.compile(field, method="bosh3", **LOOSE)
    for found in (compiled(y0, TIMES), solve(field, y0, TIMES, method="bosh3", options=dict(cuda_graph=True), **LOOSE)):
        assert found.stats.loop in TIERS, found.stats.why
        assert torch.equal(found.ys, by_the_host(field, y0, TIMES, method="bosh3").ys)


# ------------------------------------------------------------------ failures
FAILURES: dict[Status, tuple[Callable[..., Tensor], float, dict[str, Any]]] = {
    Status.MAX_STEPS: (lambda t, y: -y, 1.0, dict(max_num_steps=2, first_step=0.01, max_step=0.01)),
    Status.NON_FINITE: (lambda t, y: y, float("nan"), dict(first_step=0.1)),
    Status.STEP_UNDERFLOW: (lambda t, y: y * y, 1.0, {}),  # a pole at t = 1
}
each_failure = pytest.mark.parametrize("status", FAILURES, ids=lambda status: status.name)


@each_tier
@each_failure
@torch.no_grad()
def test_a_failed_solve_raises_the_error_of_the_host_loop_and_does_not_change_the_next_solve(status, tier):
    func, start, options = FAILURES[status]
    y0, t, kept = torch.full((10,), start, dtype=F64, device=CUDA), linspace(0.0, 2.0, 5), GraphCache(tier)
    with pytest.raises(SolveError) as by_host:
        by_the_host(func, y0, t, options)
    with pytest.raises(SolveError) as by_device:
        captured(func, y0, t, kept, options)
    host, device = by_host.value, by_device.value
    require(device.stats, tier)
    assert (device.status, device.t) == (host.status, host.t) == (status, host.t)
    assert (device.stats.accepted, device.stats.rejected) == (host.stats.accepted, host.stats.rejected)
    partial = captured(func, y0, t, kept, {**options, "throw": False})
    expected = by_the_host(func, y0, t, {**options, "throw": False})
    assert partial.status is expected.status is status
    assert torch.equal(partial.ys.isnan(), expected.ys.isnan())
    good = torch.full_like(y0, 1e-3), linspace(0.0, 0.01, 5)
    assert torch.equal(captured(func, *good, kept, options).ys, by_the_host(func, *good, options).ys)
    assert kept.count == 1


@each_tier
@torch.no_grad()
def test_the_status_reports_a_grid_that_overflows(tier):
    def func(t, y):
        return y * y

    y0, t, options = torch.full((10,), 1e3, device=CUDA), linspace(0.0, 9.0, 3), dict(step_size=1.0)
    host = by_the_host(func, y0, t, options, method="rk4")
    device = captured(func, y0, t, tier, options, method="rk4")
    assert device.status is host.status is Status.NON_FINITE
    assert torch.equal(device.ys.isfinite(), host.ys.isfinite())


@each_tier
@torch.no_grad()
def test_check_reads_the_status_of_a_deferred_solve(tier):
    func, y0 = Wave().to(CUDA), state().to(CUDA)
    host = by_the_host(func, y0, TIMES)
    device = captured(func, y0, TIMES, tier, dict(throw="deferred"))
    assert device.status is Status.PENDING
    assert device.check() is device and device.status is Status.SUCCESS
    assert torch.equal(device.ys, host.ys)
    assert cost(device) == cost(host)


@each_tier
@each_failure
@torch.no_grad()
def test_a_failed_deferred_solve_returns_nan_and_check_raises(status, tier):
    func, start, options = FAILURES[status]
    y0, t = torch.full((10,), start, dtype=F64, device=CUDA), linspace(0.0, 2.0, 5)
    device = captured(func, y0, t, tier, {**options, "throw": "deferred"})
    assert bool(device.ys[-1].isnan().all())
    with pytest.raises(SolveError) as failure:
        device.check()
    assert failure.value.status is device.status is status


@each_tier
@torch.no_grad()
def test_each_of_several_deferred_solves_reports_its_status(tier):
    """They share their memory, and the last one overwrites the data of the others."""

    def func(t, y):
        return y * y

    kept, t = GraphCache(tier), linspace(0.0, 2.0, 3)
    starts = [torch.full((10,), start, dtype=F64, device=CUDA) for start in (0.1, 1.0, 0.2)]
    found = [captured(func, y0, t, kept, dict(throw="deferred")) for y0 in starts]
    for solution, y0 in zip(found, starts, strict=True):
        expected = by_the_host(func, y0, t, dict(throw=False))
        torch.testing.assert_close(solution.ys, expected.ys, rtol=0.0, atol=0.0, equal_nan=True)
        with contextlib.suppress(SolveError):
            solution.check()
        assert solution.status is expected.status
        assert (solution.stats.accepted, solution.stats.rejected) == cost(expected)[:2]


def test_a_deferred_solve_and_its_backward_pass_never_synchronise():
    """torch's own mode finds no synchronisation; one of the last tests asks the profiler."""
    net = NeuralODE(Wave(), gradient="adjoint", options=dict(cuda_graph=True, throw="deferred"), **LOOSE).to(CUDA)
    y0 = state().to(CUDA).requires_grad_()

    def step():
        weighted(net(y0, TIMES)).backward()

    for _ in range(2):
        step()
    assert net.stats is not None
    require(net.stats, "while")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert net.stats.loop_backward == "while", net.stats.why_backward


# ------------------------------------------------------------------ what a captured solve depends on
@torch.no_grad()
def test_a_field_that_draws_random_numbers_runs_on_the_host():
    func, y0, kept = Noisy().to(CUDA), state().to(CUDA), GraphCache()

    def drawn(options: Any) -> Solution:
        torch.manual_seed(1)
        return solve(func, y0, TIMES, method="rk4", options={**GRID, **options})

    drawn(dict(cuda_graph=kept))  # the solver tries to capture it, which also draws numbers
    device, host = drawn(dict(cuda_graph=kept)), drawn({})
    assert torch.equal(device.ys, host.ys)
    assert device.stats.loop == "host" and "draws random numbers" in str(device.stats.why)


@pytest.mark.parametrize("make, why", [(Reading, "a number"), (Branching, "a number"), (Selecting, "a mask selects")])
@torch.no_grad()
def test_a_field_that_waits_for_the_device_runs_on_the_host_and_is_not_captured_again(make, why):
    func, y0, kept = make().to(CUDA), state().to(CUDA), GraphCache()
    host = by_the_host(func, y0, TIMES)
    for _ in range(2):
        device = solve(func, y0, TIMES, options=dict(cuda_graph=kept), **LOOSE)
        assert device.stats.loop == "host" and why in str(device.stats.why)
        assert torch.equal(device.ys, host.ys)
        assert kept.count == 1


@torch.no_grad()
def test_dropout_runs_on_the_host_in_training_and_is_captured_in_evaluation():
    func, y0, kept = Dropping().to(CUDA), state().to(CUDA), GraphCache()
    for training in (True, False, True):
        func.train(training)
        device = solve(func, y0, TIMES, method="rk4", options={**GRID, "cuda_graph": kept})
        assert (device.stats.loop == "host") is training, device.stats.why
        if not training:
            assert torch.equal(device.ys, by_the_host(func, y0, TIMES, GRID, method="rk4").ys)
    assert kept.count == 2


@torch.no_grad()
def test_a_step_captured_in_inference_mode_is_reused_outside_of_it():
    func, y0, kept = Wave().to(CUDA), state().to(CUDA), GraphCache()
    expected = by_the_host(func, y0, TIMES).ys
    with torch.inference_mode():
        inside = solve(func, y0, TIMES, options=dict(cuda_graph=kept), **LOOSE)
        assert inside.stats.loop in TIERS, inside.stats.why
    for scope in (torch.no_grad, torch.inference_mode):
        with scope():
            found = solve(func, y0, TIMES, options=dict(cuda_graph=kept), **LOOSE).ys
        assert torch.equal(found, expected)
    assert torch.equal(inside.ys, expected) and kept.count == 1


@each_tier
@torch.no_grad()
def test_a_captured_solve_works_after_other_graphs_and_workspaces_are_freed(tier):
    """cuBLAS computes in memory that torch keeps for a stream, and that torch frees with any graph that was captured
    there (pytorch issue 193402). Sums in another order differ by little more than rounding."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.linspace(-1.0, 1.0, 64 * 64, dtype=F64).reshape(64, 64).sin() / 8)

        def forward(self, t, y):
            return torch.tanh(y @ self.w)

    func, y0, kept = Product().to(CUDA), state(2048, 64).to(CUDA), GraphCache(tier)
    expected = by_the_host(func, y0, TIMES).ys
    captured(func, y0, TIMES, kept)
    for rows in (16, 512):  # other graphs are made and freed
        other = Product().to(CUDA)
        captured(other, state(rows, 64).to(CUDA), TIMES, tier)
        del other
        gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    held = [torch.full((2**20,), 0.5, dtype=F64, device=CUDA) for _ in range(16)]  # the freed memory is used again
    for _ in range(2):
        torch.testing.assert_close(captured(func, y0, TIMES, kept).ys, expected, rtol=0.0, atol=1e-9)
    assert all(bool((x == 0.5).all()) for x in held)


@each_tier
@torch.no_grad()
def test_a_change_of_the_tensors_of_a_field_is_noticed(tier):
    """A change in place reuses the graph; any other change captures a new one."""
    func, y0, kept = Changing().to(CUDA), state().to(CUDA), GraphCache(tier)
    changes: tuple[tuple[Callable[[], Any], int], ...] = (
        (lambda: None, 1),
        (lambda: func.w.mul_(1.5), 1),
        (lambda: setattr(func, "w", nn.Parameter(0.75 * func.w)), 2),
        (lambda: func.eval(), 3),
        (lambda: setattr(func, "gain", 2.0 * func.gain), 4),
        (lambda: func.gain.mul_(0.25), 4),
    )
    before = None
    for change, count in changes:
        change()
        expected = by_the_host(func, y0, TIMES).ys
        assert before is None or not torch.equal(expected, before), "the change makes no difference"
        for _ in range(2):
            assert torch.equal(captured(func, y0, TIMES, kept).ys, expected)
        assert kept.count == count
        before = expected


@each_tier
@torch.no_grad()
def test_autocast_uses_the_mode_of_the_solve_and_the_current_weights(tier):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, t, y):
            return torch.tanh(self.linear(y)).float()

    func, y0, kept = Linear().to(CUDA), state(dtype=torch.float32).to(CUDA), GraphCache(tier)
    solver: dict[str, Any] = dict(method="rk4", options=GRID)
    plain = by_the_host(func, y0, TIMES, **solver).ys
    for _ in range(2):
        with torch.autocast(CUDA.type, torch.bfloat16):
            host = by_the_host(func, y0, TIMES, **solver).ys
            device = captured(func, y0, TIMES, kept, **solver).ys
        # A matrix product may use another algorithm during a capture; its bfloat16 has 8 bits.
        torch.testing.assert_close(device, host, rtol=0.0, atol=1e-2)
        assert not torch.equal(device, plain)
        func.linear.weight.mul_(3.0)
    assert kept.count == 1
    outside = captured(func, y0, TIMES, kept, **solver).ys
    torch.testing.assert_close(outside, by_the_host(func, y0, TIMES, **solver).ys, rtol=0.0, atol=1e-5)
    assert kept.count == 2


# ------------------------------------------------------------------ streams
@each_tier
@torch.no_grad()
def test_a_captured_solve_waits_for_earlier_work_on_its_stream(tier):
    func, stream, kept = Wave().to(CUDA), torch.cuda.Stream(), GraphCache(tier)
    y0, late = state().to(CUDA), torch.zeros_like(state(), device=CUDA)
    expected = captured(func, y0, TIMES, kept).ys
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
        late.copy_(y0)
        actual = captured(func, late, TIMES, kept).ys
    stream.synchronize()
    assert torch.equal(actual, expected)


@each_tier
@torch.no_grad()
def test_solves_on_two_streams_one_after_another_do_not_disturb_each_other(tier):
    """They share memory. The second must wait for the first, which sleeps, and whose status is not read."""
    func, kept, options = Wave().to(CUDA), GraphCache(tier), dict(throw="deferred")
    starts = [state().to(CUDA), 2 * state().to(CUDA)]
    expected = [by_the_host(func, y0, TIMES).ys for y0 in starts]
    captured(func, starts[0], TIMES, kept, options)
    torch.cuda.synchronize()
    for streams in ([torch.cuda.Stream(), torch.cuda.Stream()], [torch.cuda.Stream(), torch.cuda.default_stream()]):
        found = []
        for stream, y0, sleep in zip(streams, starts, (20_000_000, 0), strict=True):
            with torch.cuda.stream(stream):
                if sleep:
                    torch.cuda._sleep(sleep)
                found.append(captured(func, y0, TIMES, kept, options).ys)
        torch.cuda.synchronize()
        assert same_bits(tuple(found), tuple(expected))
    assert kept.count == 1


def test_a_training_step_on_another_stream_has_the_gradients_of_the_default_one():
    net, y0 = NeuralODE(Wave(), gradient="adjoint", options=dict(cuda_graph=True), **LOOSE).to(CUDA), state().to(CUDA)

    def gradient() -> Tensor:
        net.zero_grad()
        weighted(net(y0, TIMES)).backward()
        return net.func.w.grad.clone()

    expected = gradient()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        actual = gradient()
    stream.synchronize()
    assert torch.equal(actual, expected)


# ------------------------------------------------------------------ gradients
def differentiated(
    func: nn.Module, y0: Tensor, t: Tensor, options: Any, **solver: Any
) -> tuple[Stats, tuple[Tensor, ...]]:
    """Return the statistics, and y with its gradients for y0, for t if it requires one, and for the parameters."""
    y0, t = y0.clone().requires_grad_(), t.clone().requires_grad_(t.requires_grad)
    solution = solve(func, y0, t, options=options, **{**LOOSE, **solver})
    wanted = [x for x in (y0, t, *func.parameters()) if x.requires_grad]
    return solution.stats, (solution.ys.detach(), *torch.autograd.grad(weighted(solution.ys), wanted))


def agree(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], gradient: str) -> None:
    """Check that the gradients agree with the host loop: to the bit for the adjoint, up to rounding for the discrete
    adjoint.

    The discrete adjoint uses the same steps, but adds the stages of a step in another order.
    """
    if gradient == "adjoint":
        assert same_bits(actual, expected)
    assert_near(actual, expected)


MODES: dict[str, dict[str, Any]] = {
    "adjoint": dict(gradient="adjoint"),
    "adjoint, bosh3": dict(gradient="adjoint", method="bosh3"),
    "adjoint, rk4": dict(gradient="adjoint", method="rk4"),
    "discrete": dict(gradient="discrete"),
    "discrete, 2 checkpoints": dict(gradient="discrete", checkpoints=2),
    "discrete, rk4": dict(gradient="discrete", method="rk4"),
}


@each_tier
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wants_t", [False, True], ids=["not of t", "of t"])
def test_gradients_agree_with_the_host_loop(mode, tier, wants_t):
    func, y0, t = Wave().to(CUDA), state().to(CUDA), TIMES.clone().requires_grad_(wants_t)
    given = MODES[mode]
    method = given.get("method")
    options = GRID if method == "rk4" else {}
    host, expected = differentiated(func, y0, t, options, **given)
    kept = {**options, "cuda_graph": GraphCache(tier)}
    for scale in (1.0, 0.5, 1.0):  # the captured graphs are reused
        stats, actual = differentiated(func, scale * y0, t, kept, **given)
    if tier == "while" and lacks_while(stats):
        pytest.skip(str(stats.why))
    agree(actual, expected, given["gradient"])
    assert (stats.accepted, stats.nfe_backward > 0) == (host.accepted, True)
    if "checkpoints" in given:
        assert stats.loop_backward == "host" and "gives 2 states" in str(stats.why_backward)
    elif not (wants_t and method == "rk4" and given["gradient"] == "discrete"):  # the host computes dL/dt of a grid
        assert stats.loop_backward == tier, stats.why_backward


@each_tier
@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
def test_gradients_of_a_tuple_and_of_many_outputs_agree_with_the_host_loop(gradient, tier):
    class Pair(Wave):
        def forward(self, t, state):
            a, b = state
            return super().forward(t, b), -self.w * a

    func, t = Pair().to(CUDA), linspace(0.0, 1.0, 30)
    found = []
    for options in ({}, dict(cuda_graph=GraphCache(tier))):
        y0 = (state(7).to(CUDA).requires_grad_(), state(7).add(0.5).to(CUDA).requires_grad_())
        ys = solve(func, y0, t, options=options, gradient=gradient, **LOOSE).ys
        loss = weighted(ys[0]) + weighted(ys[1].square())
        found.append(torch.autograd.grad(loss, (*y0, *func.parameters())))
    agree(*found, gradient)


@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
def test_twenty_steps_of_adam_give_the_losses_of_the_host_loop(gradient):
    """The optimizer writes into the parameters, and nothing is captured again. In float64: a rounding difference in a
    discrete gradient may turn an accepted step into a rejected one, which changes a loss by rtol."""
    y0 = state().to(CUDA)
    with torch.no_grad():
        other = Wave().to(CUDA)
        other.w.mul_(1.3)
        target = odeint(other, y0, TIMES, **LOOSE)[-1]

    kept, counts = GraphCache(), []

    def losses(options: Any) -> list[float]:
        net = NeuralODE(Wave(), gradient=gradient, options=options, **LOOSE).to(CUDA)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
        found = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (net(y0, TIMES)[-1] - target).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
            counts.append(kept.count)
        return found

    actual = losses(dict(cuda_graph=kept))
    assert counts[0] == counts[-1] > 0
    expected = losses({})
    assert actual == (expected if gradient == "adjoint" else pytest.approx(expected, rel=1e-6))
    assert actual[-1] < 0.5 * actual[0]


# ------------------------------------------------------------------ memory
def held() -> tuple[int, int]:
    """Return the allocated and the reserved bytes, without memory that is free for reuse."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def compiled_owner() -> Callable[[Tensor], Any]:
    compiled = node_cuda.compile(Wave(64).to(CUDA), options=dict(throw="deferred"), **LOOSE)
    return torch.no_grad()(lambda y0: compiled(y0, TIMES).check())


def layer_owner(gradient: str) -> Callable[[Tensor], Any]:
    net = NeuralODE(Wave(64), gradient=gradient, options=dict(cuda_graph=True), **LOOSE).to(CUDA)

    def step(y0: Tensor) -> None:
        net.zero_grad()
        weighted(net(y0, TIMES)).backward()

    return step


def function_owner() -> Callable[[Tensor], Any]:
    func = Wave(64).to(CUDA)
    return torch.no_grad()(lambda y0: odeint(func, y0, TIMES, options=dict(cuda_graph=True), **LOOSE))


OWNERS: dict[str, Callable[[], Callable[[Tensor], Any]]] = {
    "compile": compiled_owner,
    "NeuralODE": lambda: layer_owner("adjoint"),
    "NeuralODE, discrete": lambda: layer_owner("discrete"),
    "the field itself": function_owner,
}


@pytest.mark.parametrize("owner", OWNERS)
def test_memory_does_not_grow_over_fifty_solves_and_is_freed_with_its_owner(owner):
    y0 = state(1000, 64).to(CUDA)  # half a MiB
    run = OWNERS[owner]()
    run(y0)
    del run  # objects that a process makes only once exist by now
    before = held()
    run = OWNERS[owner]()
    for _ in range(3):
        run(y0)
    few = held()
    for _ in range(50):
        run(y0)
    many = held()
    assert many == few
    assert few[1] > before[1], "nothing was captured"
    del run
    assert held() == before


@each_tier
@torch.no_grad()
def test_the_memory_of_a_captured_solve_does_not_depend_on_the_number_of_steps(tier):
    func, y0 = Wave(64).to(CUDA), state(1000, 64).to(CUDA)

    def taken(steps: int) -> int:
        before, kept = held(), GraphCache(tier)
        options = dict(first_step=1 / steps, max_step=1 / steps)
        stats = captured(func, y0, linspace(0.0, 1.0, 2), kept, options, rtol=1e3, atol=1e3).stats
        assert stats.accepted == steps
        return held()[1] - before[1]

    taken(8)
    assert 0 < taken(1024) <= taken(8)


# ------------------------------------------------------------------ processes
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.filterwarnings("ignore")  # warnings of torch, which differ between versions
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_distributed_data_parallel_gives_the_gradients_of_the_layer_alone(backend, tmp_path):
    """One process. The watchdog of nccl queries events while the step is captured."""
    if not getattr(dist, f"is_{backend}_available")():
        pytest.skip(f"torch was built without {backend}")

    def gradients(options: Any, wrap: Callable[[nn.Module], nn.Module]) -> list[Tensor]:
        net = wrap(NeuralODE(Wave(), gradient="adjoint", options=options, **LOOSE).to(CUDA))
        found = []
        for scale in (1.0, 0.5, 0.25):
            net.zero_grad()
            weighted(net(scale * state().to(CUDA), TIMES)).backward()
            found += [p.grad.clone() for p in net.parameters() if p.grad is not None]
        return found

    expected = gradients({}, lambda net: net)
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        kept = GraphCache()
        actual = gradients(dict(cuda_graph=kept), nn.parallel.DistributedDataParallel)
        torch.cuda.synchronize()
    finally:
        dist.destroy_process_group()
    assert len(actual) == 3 and kept.count > 0
    assert same_bits(tuple(actual), tuple(expected))


# ------------------------------------------------------------------ in a separate process
def a_failed_capture() -> dict[str, Any]:
    """Solve with a field that makes the capture fail, and report the state that this leaves."""
    func, y0, kept = Waiting().to(CUDA), state().to(CUDA), GraphCache()
    with torch.no_grad():
        found = [solve(func, y0, TIMES, options=dict(cuda_graph=kept), **LOOSE) for _ in range(2)]
        host = by_the_host(func, y0, TIMES)
        stream = torch.cuda.current_stream() == torch.cuda.default_stream()
        drawn = bool((torch.rand(1000, device=CUDA).std() > 0.1).item())
        wave = Wave().to(CUDA)
        after = solve(wave, y0, TIMES, options=dict(cuda_graph=True), **LOOSE)
        right = torch.equal(after.ys, by_the_host(wave, y0, TIMES).ys)
        # The allocator frees a tensor that another stream uses later, and waits with this while it believes that a
        # capture runs.
        side, before = torch.cuda.Stream(), torch.cuda.memory_allocated()
        used = torch.zeros(2**20, device=CUDA)
        used.record_stream(side)
        del used
        torch.cuda.synchronize()
        torch.zeros(8, device=CUDA)
        freed = torch.cuda.memory_allocated() <= before
    return {
        "loops": [solution.stats.loop for solution in found],
        "whys": [solution.stats.why for solution in found],
        "same bits": all(torch.equal(solution.ys, host.ys) for solution in found),
        "entries": kept.count,
        "afterwards": {
            "stream": stream,
            "random numbers": drawn,
            "loop": after.stats.loop,
            "right": right,
            "memory": freed,
        },
    }


def a_capture_of_the_user_s() -> dict[str, Any]:
    """Run solves and gradients inside a torch.cuda.graph, and report their errors and whether the capture goes on."""
    func, y0 = Wave().to(CUDA), state().to(CUDA)
    kept = dict(cuda_graph=GraphCache(), throw="deferred")
    outside = by_the_host(func, y0.clone().requires_grad_(), TIMES, gradient="adjoint").ys
    found = []
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        for call in (
            lambda: by_the_host(func, y0, TIMES),
            lambda: by_the_host(func, y0, TIMES.to(CUDA), GRID, method="rk4"),
            lambda: solve(func, y0, TIMES, options=kept),
            lambda: node_cuda.odeint_dense(func, y0, 0.0, 1.0),
            lambda: outside.sum().backward(),
        ):
            try:
                call()
            except node_cuda.Unsupported as why:
                found.append(str(why))
        torch.zeros(3, device=CUDA)
    return {"said": found}


def calls_of_a_deferred_step() -> dict[str, Any]:
    """Report the CUDA calls of a solve and its backward pass, as seen by the profiler.

    The profiler may crash: CUPTI did so once with such loops (pytorch issue 134308).
    """
    if ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        return {"skip": "torch.profiler cannot observe the GPU here"}
    net = NeuralODE(Wave(), gradient="adjoint", options=dict(cuda_graph=True, throw="deferred"), **LOOSE).to(CUDA)
    y0 = state().to(CUDA).requires_grad_()

    def step() -> None:
        weighted(net(y0, TIMES)).backward()

    for _ in range(3):
        step()
    assert net.stats is not None
    if lacks_while(net.stats):
        return {"skip": net.stats.why}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function("a deferred step"):
            step()
        torch.cuda.synchronize()
    folder = Path(os.environ["APART"])
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text(errors="replace"), strict=False)["traceEvents"]
    mark = next(e for e in events if e.get("name") == "a deferred step" and e.get("cat") == "user_annotation")
    begin, end = float(mark["ts"]), float(mark["ts"]) + float(mark["dur"])
    called = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and begin <= float(e["ts"]) <= end]
    if not called:
        return {"skip": "torch.profiler sees no calls here (CUPTI may be missing or forbidden)"}
    return {"calls": dict(Counter(re.sub(r"(_v\d+|_ptsz)+$", "", e["name"]) for e in called))}


APART = (a_failed_capture, a_capture_of_the_user_s, calls_of_a_deferred_step)


def main() -> None:
    """Print a line of JSON for each of APART, in a separate process that may crash."""
    for look in APART:
        try:
            with node_cuda.backend("fused"):
                found = look()
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps({"name": look.__name__, **found}), flush=True)
    os._exit(0)  # the state after a failed capture may keep the interpreter from ending


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> Callable[[Callable[[], Any]], dict[str, Any]]:
    """Return the result of one of APART. Skip if it says so, and fail if it did not finish."""
    folder = tmp_path_factory.mktemp("apart")
    paths = [*map(str, (ROOT, ROOT / "tests" / "support", ROOT / "tests" / "gpu")), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", "import test_gpu_graphs; test_gpu_graphs.main()"],
        env={**os.environ, "APART": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    found = {line.pop("name"): line for line in lines}

    def of(look: Callable[[], Any]) -> dict[str, Any]:
        result = found.get(look.__name__, {"error": f"the process ended with {done.returncode}:\n{done.stderr}"})
        if "skip" in result:
            pytest.skip(result["skip"])
        assert "error" not in result, result["error"]
        return result

    return of


def test_after_a_failed_capture_the_host_solves_and_no_state_remains(apart):
    found = apart(a_failed_capture)
    assert found["loops"] == ["host", "host"]
    assert all("could not be captured" in why for why in found["whys"]) and len(set(found["whys"])) == 1
    assert found["same bits"] and found["entries"] == 1
    afterwards = found["afterwards"]
    assert afterwards.pop("loop") in TIERS
    assert all(afterwards.values()), afterwards


def test_a_solve_inside_a_capture_of_the_user_is_refused_before_any_launch(apart):
    said = apart(a_capture_of_the_user_s)["said"]
    assert len(said) == 5 and all("solve outside the graph" in why for why in said)


def test_the_profiler_sees_no_synchronisation_in_a_deferred_step(apart):
    calls = apart(calls_of_a_deferred_step)["calls"]
    assert not [name for name in calls if "Synchronize" in name], calls
    assert calls["cudaGraphLaunch"] >= 2, calls  # forwards and backwards
