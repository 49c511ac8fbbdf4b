"""The device loop's state machine through the shim: whole solves against the host loop with the same kernels."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import F64, MLP, TimedLinear, linspace

from node_cuda import TABLEAUS, NeuralODE, SolveError, Status, graphs, solve

Y = torch.tensor([0.7, -0.4], dtype=F64)


CASES = {
    "outputs": {},
    "reversed": dict(t=linspace(0.0, -1.0, 4)),
    "jump": dict(options=dict(jump_t=[0.4])),
    "step_t": dict(options=dict(step_t=[0.35])),
    "first step": dict(options=dict(first_step=2.0)),
    "accurate": dict(options=dict(dense="accurate")),
    "PID": dict(options=dict(controller="PID")),
}


def both(func, y0, t, method, options=None, **more):
    host = solve(func, y0, t, method=method, options=options, **more)
    device = solve(func, y0, t, method=method, options={**(options or {}), "cuda_graph": True}, **more)
    return host, device


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", [m for m, x in TABLEAUS.items() if x.adaptive])
@torch.no_grad()
def test_the_device_loop_takes_the_steps_of_the_host_loop_to_the_bit(eager, method, case):
    given = {"t": linspace(0.0, 1.0, 7), **CASES[case]}
    host, device = both(TimedLinear(), Y, given["t"], method, given.get("options"), rtol=1e-4, atol=1e-4)
    assert (device.stats.loop, device.stats.why) == ("eager", None)
    assert torch.equal(device.ys, host.ys)
    assert (device.stats.accepted, device.stats.rejected) == (host.stats.accepted, host.stats.rejected)


@pytest.mark.parametrize(
    "options", [{}, dict(step_size=0.13), dict(step_size=0.13, interp="cubic"), dict(perturb=True)]
)
@pytest.mark.parametrize("method", [m for m, x in TABLEAUS.items() if not x.adaptive])
@torch.no_grad()
def test_fixed_grids_too(eager, method, options):
    host, device = both(TimedLinear(), Y, linspace(0.0, 1.0, 7), method, options)
    assert device.stats.loop == "eager"
    assert torch.equal(device.ys, host.ys)


@torch.no_grad()
def test_failures_are_those_of_the_host_loop(eager):
    for y0, options, status in (
        (Y, dict(max_num_steps=2), Status.MAX_STEPS),
        (torch.full((2,), torch.nan, dtype=F64), dict(first_step=0.1), Status.NON_FINITE),
    ):
        host, device = both(
            MLP(), y0, linspace(0.0, 9.0, 3), "dopri5", dict(throw=False, **options), rtol=1e-9, atol=1e-9
        )
        assert (host.status, device.status) == (status, status)
        assert torch.equal(device.ys.isnan(), host.ys.isnan())


def test_the_adjoint_solves_forwards_by_the_device(eager):
    func, y0 = MLP(), Y.clone().requires_grad_()
    found = []
    for flag in (False, True):
        s = solve(
            func,
            y0,
            linspace(0.0, 1.0, 4),
            gradient="adjoint",
            options=dict(cuda_graph=flag),
            adjoint_options=dict(cuda_graph=False),
        )
        found.append(torch.autograd.grad(s.ys.sum(), [y0, *func.parameters()]))
    assert s.stats.loop == "eager"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


BACKWARDS = {
    "dopri5": {},
    "bosh3": dict(jump_t=[0.4]),
    "adaptive_heun": {},
    "rk4": dict(step_size=0.13),
    "euler": dict(step_size=0.2, perturb=True),
}


@pytest.mark.parametrize("outputs", [2, 5])
@pytest.mark.parametrize("method", BACKWARDS)
def test_the_adjoint_solves_backwards_by_the_device_to_the_bit(eager, method, outputs):
    func, found, stats = MLP(), [], []
    options = BACKWARDS[method]
    for flag in (False, True):
        y0, t = Y.clone().requires_grad_(), linspace(0.0, 1.0, outputs).requires_grad_()
        s = solve(
            func, y0, t, method=method, gradient="adjoint", rtol=1e-4, atol=1e-4, options=dict(options, cuda_graph=flag)
        )
        weights = torch.arange(1, 1 + s.ys.numel(), dtype=F64).view_as(s.ys)
        found.append(torch.autograd.grad((weights * s.ys).sum(), [y0, t, *func.parameters()]))
        stats.append(s.stats)
    assert [s.loop_backward for s in stats] == ["host", "eager"], stats[1].why_backward
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    if method in ("dopri5", "adaptive_heun"):  # elsewhere f is evaluated beyond jumps, and for dL/dt
        assert stats[0].nfe_backward == stats[1].nfe_backward


def test_options_of_the_backward_solve_alone_leave_who_repeats_the_steps_as_it_is(eager):
    func, y0 = MLP(), Y.clone().requires_grad_()
    s = solve(
        func, y0, linspace(0.0, 1.0, 3), gradient="adjoint", options=dict(cuda_graph=True),
        adjoint_options=dict(norm="seminorm"),
    )  # fmt: skip
    s.ys.sum().backward()
    assert (s.stats.loop_backward, s.stats.why_backward) == ("eager", None)


@pytest.mark.parametrize("deferred", [False, True])
def test_a_backward_solve_that_fails_says_so_when_it_is_looked_at(eager, deferred):
    func, y0 = MLP(), Y.clone().requires_grad_()
    options = dict(cuda_graph=True, throw="deferred") if deferred else dict(cuda_graph=True)
    s = solve(
        func, y0, linspace(0.0, 1.0, 3), gradient="adjoint", options=options, adjoint_options=dict(max_num_steps=1)
    )
    if not deferred:
        with pytest.raises(SolveError, match="max_num_steps"):
            s.ys.sum().backward()
        return
    s.ys.sum().backward()
    assert y0.grad is not None and y0.grad.isnan().all() and all(p.grad.isnan().all() for p in func.parameters())
    with pytest.raises(SolveError, match="max_num_steps"):
        s.check()


def test_gradients_of_a_solve_are_not_written_by_the_next_one(eager):
    kept, func = graphs.Graphs(), MLP()
    found = []
    for scale in (1.0, 2.0):
        y0 = (scale * Y).requires_grad_()
        s = solve(func, y0, linspace(0.0, 1.0, 3), gradient="adjoint", options=dict(cuda_graph=kept))
        gradients = torch.autograd.grad(s.ys.sum(), [y0, *func.parameters()])
        found.append((gradients, [g.clone() for g in gradients]))
    assert kept.count == 2  # forwards and backwards
    assert all(torch.equal(a, b) for gradients, copies in found for a, b in zip(gradients, copies, strict=True))
    assert not torch.equal(found[0][0][0], found[1][0][0])


def test_threads_take_turns_in_the_memory_of_a_captured_solve(eager):
    class Slow(MLP):
        def forward(self, t, y):
            time.sleep(1e-4)  # another thread's turn
            return super().forward(t, y)

    func, kept, scales = Slow(), graphs.Graphs(), (1.0, 0.5, 2.0)

    def gradients(scale, gradient, flag):
        y0 = (scale * Y).requires_grad_()
        s = solve(
            func, y0, linspace(0.0, 1.0, 3), gradient=gradient, rtol=1e-3, atol=1e-3, options=dict(cuda_graph=flag)
        )
        return torch.autograd.grad(s.ys.square().sum(), [y0, *func.parameters()])

    for gradient in ("adjoint", "discrete"):
        gradients(1.0, gradient, kept)
        with ThreadPoolExecutor(len(scales)) as threads:
            jobs = [threads.submit(gradients, scale, gradient, kept) for scale in scales]
        for scale, job in zip(scales, jobs, strict=True):
            for a, b in zip(job.result(), gradients(scale, gradient, False), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert kept.count == 4


@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
def test_a_field_under_a_transform_is_the_hosts(eager, gradient):
    func, found = MLP(), []
    weights = {name: p.detach() for name, p in func.named_parameters()}
    for flag in (False, True):
        ode = NeuralODE(func, gradient=gradient, options=dict(cuda_graph=flag), rtol=1e-4, atol=1e-4)

        def loss(weights, ode=ode):
            named = {f"func.{name}": x for name, x in weights.items()}
            return torch.func.functional_call(ode, named, (Y, linspace(0.0, 1.0, 3))).sum()

        found.append(torch.func.grad(loss)(weights))
    assert "in the place of its own" in ode.stats.why and "in the place of its own" in ode.stats.why_backward
    assert all(torch.equal(found[0][name], found[1][name]) for name in weights)


@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
def test_a_deferred_solve_that_nobody_looks_at_keeps_nothing_alive(eager, gradient):
    options = dict(cuda_graph=True, throw="deferred")
    y0 = 2.0 * Y.clone().requires_grad_()
    s = solve(MLP(), y0, linspace(0.0, 1.0, 3), gradient=gradient, rtol=1e-3, atol=1e-3, options=options)
    s.ys.sum().backward()
    stats, of_y0, of_stats = s.stats, weakref.ref(y0), weakref.ref(s.stats)
    gc.disable()
    try:
        del s, y0
        assert of_y0() is None, "it hangs on the user's graph"
        del stats
        assert of_stats() is None, "a cycle that only a collection frees"
    finally:
        gc.enable()


@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
def test_captured_loops_do_not_keep_what_keeps_them(eager, gradient):
    kept, y0 = graphs.Graphs(), Y.clone().requires_grad_()
    solve(
        MLP(), y0, linspace(0.0, 1.0, 3), gradient=gradient, rtol=1e-3, atol=1e-3, options=dict(cuda_graph=kept)
    ).ys.sum().backward()
    assert kept.count == 2
    of_kept = weakref.ref(kept)
    gc.disable()
    try:
        del kept
        assert of_kept() is None, "a cycle, with memory of the device in it, that only a collection frees"
    finally:
        gc.enable()


@torch.no_grad()
def test_a_captured_solve_serves_again_for_other_states_and_times(eager):
    kept = graphs.Graphs()
    func = MLP()
    for y0, end in ((Y, 1.0), (2 * Y, 1.0), (Y, 0.5)):
        t = linspace(0.0, end, 4)
        device = solve(func, y0, t, options=dict(cuda_graph=kept))
        assert torch.equal(device.ys, solve(func, y0, t).ys)
    assert kept.count == 1
