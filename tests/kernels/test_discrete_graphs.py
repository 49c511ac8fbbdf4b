"""The discrete adjoint through the shim: the steps that the device records, and the reverse pass over them."""

from __future__ import annotations

import pytest
import torch
from problems import F64, MLP, TimedLinear, linspace

from node_cuda import SolveError, Status, solve
from node_cuda.cuda_graphs import cache as graphs
from node_cuda.cuda_graphs import capture
from node_cuda.gradients.discrete import cuda_graph_forward as recording
from node_cuda.gradients.discrete import cuda_graph_reverse as walk_graphs
from node_cuda.gradients.discrete import mode as by_the_host
from node_cuda.status import InvalidField

Y = torch.tensor([0.7, -0.4], dtype=F64)

DISCRETE = {
    "dopri5": {},
    "dopri5, accurate": dict(dense="accurate"),
    "bosh3": dict(jump_t=[0.4]),
    "tsit5": dict(first_step=2.0),
    "rk4": dict(step_size=0.13),
    "rk4, cubic": dict(step_size=0.13, interp="cubic"),
    "midpoint": dict(step_size=0.2, perturb=True),
}


def discrete(func, flag, *, outputs=5, method="dopri5", options=None, checkpoints=None, timed=False, tol=1e-4):
    """Return the gradients of a weighted sum of the outputs, and the statistics."""
    y0, t = Y.clone().requires_grad_(), linspace(0.0, 1.0, outputs).requires_grad_(timed)
    s = solve(
        func,
        y0,
        t,
        method=method.partition(",")[0],
        gradient="discrete",
        checkpoints=checkpoints,
        rtol=tol,
        atol=tol,
        options=dict(options or {}, cuda_graph=flag),
    )
    weights = torch.arange(1, 1 + s.ys.numel(), dtype=F64).view_as(s.ys)
    return torch.autograd.grad((weights * s.ys).sum(), [y0, *func.parameters(), *([t] if timed else [])]), s.stats


def close(found, expected):
    """Compare sums that are rounded in another order: a few hundred rounding errors of float64."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("outputs", [2, 9])
@pytest.mark.parametrize("method", DISCRETE)
def test_the_discrete_adjoint_reverses_its_steps_on_the_device(eager, method, outputs):
    func = TimedLinear()
    (expected, host), (found, device) = (
        discrete(func, flag, method=method, outputs=outputs, options=DISCRETE[method]) for flag in (False, True)
    )
    assert (device.loop, device.why) == (device.loop_backward, device.why_backward) == ("eager", None)
    close(found, expected)
    assert (device.accepted, device.rejected, device.recomputed_steps) == (host.accepted, host.rejected, 0)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("most", ["auto", 5])
def test_a_solve_with_more_steps_than_checkpoints_runs_on_the_host(eager, most, method, monkeypatch):
    for module in (recording, by_the_host):
        monkeypatch.setattr(module, "slots_for", lambda *_: 5)
    func, kept = TimedLinear(), graphs.GraphCache()
    given = dict(method=method, checkpoints=most)
    options = dict(max_step=0.07) if method == "dopri5" else dict(step_size=0.07)
    expected, host = discrete(func, False, **given, options=options)
    known = method == "rk4"  # the number of steps is known in advance
    for again in (known, True, True):
        found, stats = discrete(func, kept, **given, options=options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert (stats.loop, stats.loop_backward, stats.why_backward) == ("host", "host", stats.why)
        assert f"{host.accepted} steps" in stats.why and (f"checkpoints={most!r} gives 5 states" in stats.why) is again
        assert (stats.accepted, stats.recomputed_steps, stats.checkpoint_slots) == (
            host.accepted,
            host.recomputed_steps,
            5,
        )
    assert kept.count == (0 if known else 1)
    few = dict(step_size=0.3) if known else dict(first_step=0.25)
    _, stats = discrete(func, graphs.GraphCache(), **given, options=few, tol=1e-2)
    assert (stats.loop, stats.loop_backward, stats.checkpoint_slots) == ("eager", "eager", 5), "few steps are captured"
    assert 1 < stats.peak_checkpoints == stats.accepted <= 5


def test_without_a_loop_on_the_device_the_host_launches_one_graph_for_each_step(eager):
    func = TimedLinear()
    expected, _ = discrete(func, False)
    found, stats = discrete(func, graphs.GraphCache("batches"))
    assert (stats.loop, stats.loop_backward, stats.recomputed_steps) == ("batches", "batches", 0)
    close(found, expected)


def test_dL_dt_of_the_flow_agrees_with_the_host(eager):
    func = TimedLinear()
    close(discrete(func, True, timed=True)[0], discrete(func, False, timed=True)[0])


@pytest.mark.parametrize("checkpoints", [None, 60])
def test_a_solve_with_more_steps_than_the_record_holds_is_repeated_with_a_larger_record(
    eager, checkpoints, monkeypatch
):
    monkeypatch.setattr(recording, "_first_room", lambda problem: 8)
    func, kept = TimedLinear(), graphs.GraphCache()
    options = dict(max_step=0.05)
    expected, host = discrete(func, False, options=options, checkpoints=checkpoints)
    (first, a), (second, b) = (discrete(func, kept, options=options, checkpoints=checkpoints) for _ in range(2))
    assert a.loop == "host" and f"it took {a.accepted} steps, and there was room to record 8" in a.why
    assert (a.accepted, a.rejected) == (host.accepted, host.rejected)
    assert b.loop == b.loop_backward == "eager" and b.checkpoint_slots == checkpoints
    assert all(torch.equal(x, y) for x, y in zip(first, expected, strict=True))
    close(second, expected)


def test_the_size_of_the_record_is_derived_from_the_free_memory_once(eager, monkeypatch):
    free = iter((40, 39, 38))
    monkeypatch.setattr(recording, "slots_for", lambda *_: next(free))
    func, kept = TimedLinear(), graphs.GraphCache()
    for _ in range(3):
        _, stats = discrete(func, kept, checkpoints="auto", options=dict(max_step=0.05))
        assert (stats.loop, stats.checkpoint_slots) == ("eager", 40)
    assert kept.count == 2, "one forwards and one backwards"


def test_two_solves_by_one_capture_keep_separate_records(eager):
    func, kept = TimedLinear(), graphs.GraphCache()
    given = dict(gradient="discrete", rtol=1e-4, atol=1e-4)
    starts = [(scale * Y).requires_grad_() for scale in (1.0, 0.5, 2.0)]
    times = [linspace(0.0, end, 4) for end in (1.0, 0.7, 1.3)]
    device, host = (
        sum(
            solve(func, y0, t, options=dict(cuda_graph=flag), **given).ys.square().sum()
            for y0, t in zip(starts, times, strict=True)
        )
        for flag in (kept, False)
    )
    close(
        torch.autograd.grad(device, [*starts, *func.parameters()]),
        torch.autograd.grad(host, [*starts, *func.parameters()]),
    )
    assert kept.count == 2


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_captured_reverse_pass_is_reused_for_outputs_at_other_times(eager, method):
    func, kept, found = MLP(), graphs.GraphCache(), ([], [])
    for end in (1.0, 0.1, 4.0, 1.0):
        for flag, gradients in zip((False, kept), found, strict=True):
            y0 = Y.clone().requires_grad_()
            s = solve(
                func, y0, linspace(0.0, end, 5), method=method, gradient="discrete", rtol=1e-4, atol=1e-4,
                options=dict(cuda_graph=flag),
            )  # fmt: skip
            gradients += torch.autograd.grad(s.ys.square().sum(), [y0, *func.parameters()])
    assert s.stats.loop_backward == "eager" and kept.count == 2
    close(*found)


def test_a_constant_field_has_gradients_of_zero(eager):
    class Constant(MLP):
        def forward(self, t, y):
            return torch.ones_like(y)

    (expected, _), (found, stats) = (discrete(Constant(), flag) for flag in (False, True))
    assert stats.loop_backward == "eager" and not any(g.any() for g in found[1:])
    close(found, expected)


def test_a_state_without_elements_runs_on_the_host(eager):
    y0 = Y.new_empty(0, 2).requires_grad_()
    s = solve(MLP(), y0, linspace(0.0, 1.0, 3), method="rk4", gradient="discrete", options=dict(cuda_graph=True))
    s.ys.sum().backward()
    assert (s.ys.shape, s.stats.why, y0.grad.shape) == ((3, 0, 2), "there is nothing to solve", (0, 2))


def test_a_second_backward_pass_uses_the_record_of_the_first_one(eager):
    func, y0 = MLP(), Y.clone().requires_grad_()
    s = solve(func, y0, linspace(0.0, 1.0, 4), gradient="discrete", options=dict(cuda_graph=True))
    first, second = (torch.autograd.grad(s.ys.sum(), [y0, *func.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_backward_pass_that_cannot_be_captured_runs_on_the_host_over_the_record_of_the_device(eager, monkeypatch):
    func, options = TimedLinear(), dict(max_step=0.1, jump_t=[0.4])
    expected, host = discrete(func, False, options=options)

    def refuse(*_, **__):
        raise capture.Uncapturable("it is so")

    monkeypatch.setattr(walk_graphs.CapturedReversePass, "__init__", refuse)
    found, stats = discrete(func, True, options=options)
    assert (stats.loop, stats.loop_backward, stats.why_backward) == ("eager", "host", "it is so")
    assert (stats.recomputed_steps, stats.peak_checkpoints) == (host.recomputed_steps, host.peak_checkpoints)
    close(found, expected)


def test_check_completes_a_deferred_discrete_gradient(eager, monkeypatch):
    func, y0, kept = MLP(), Y.clone().requires_grad_(), graphs.GraphCache()
    given = dict(gradient="discrete", rtol=1e-6)
    host = solve(func, y0, linspace(0.0, 1.0, 4), **given)
    expected = torch.autograd.grad(host.ys.sum(), [y0, *func.parameters()])

    def deferred():
        s = solve(func, y0, linspace(0.0, 1.0, 4), options=dict(cuda_graph=kept, throw="deferred"), **given)
        return s, torch.autograd.grad(s.ys.sum(), [y0, *func.parameters()])

    with monkeypatch.context() as patch:
        patch.setattr(recording, "_first_room", lambda problem: 2)
        s, found = deferred()
        assert all(g.isnan().all() for g in found)
        with pytest.raises(SolveError, match=r"room to record.*Solve once with `options=dict\(throw=True\)`"):
            s.check()
        solve(func, y0, linspace(0.0, 1.0, 4), options=dict(cuda_graph=kept), **given)
        s, found = deferred()
    assert s.check().status is Status.SUCCESS and s.stats.nfe_backward > 0
    close(found, expected)


@pytest.mark.parametrize(
    ("why", "given"),
    [
        ("reuses its last stage", dict(method="adaptive_heun")),
        ("fixed grid", dict(method="rk4", timed=True)),
    ],
)
def test_a_discrete_gradient_on_the_host_has_a_reason(eager, why, given):
    func = TimedLinear()
    found, stats = discrete(func, True, **given)
    assert stats.loop == "host" and why in stats.why
    assert all(torch.equal(a, b) for a, b in zip(found, discrete(func, False, **given)[0], strict=True))


def test_the_gradient_of_a_deferred_solve_that_failed_is_nan(eager):
    func, y0 = MLP(), Y.clone().requires_grad_()
    options = dict(cuda_graph=True, throw="deferred", max_num_steps=2)
    s = solve(func, y0, linspace(0.0, 9.0, 3), gradient="discrete", rtol=1e-9, atol=1e-9, options=options)
    found = torch.autograd.grad(s.ys[0].sum(), [y0, *func.parameters()])
    assert all(g.isnan().all() for g in found)
    with pytest.raises(SolveError, match="max_num_steps"):
        s.check()


class Switched(torch.nn.Module):
    """y' = -w y, or without its parameter."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(1.5, dtype=F64))
        self.uses_w = True

    def forward(self, t, y):
        return -(self.w if self.uses_w else 1.5) * y


@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
def test_a_parameter_that_the_captured_backward_pass_does_not_reach_is_reported(eager, gradient):
    func, y0 = Switched(), Y.clone().requires_grad_()
    s = solve(func, y0, linspace(0.0, 1.0, 3), gradient=gradient, options=dict(cuda_graph=True))
    func.uses_w = False
    with pytest.raises(InvalidField, match="does not use in the backward pass"):
        s.ys.sum().backward()
    assert s.stats.loop_backward == "eager"
