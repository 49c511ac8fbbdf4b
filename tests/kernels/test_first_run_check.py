"""The first captured solve of a process, and its first captured gradients, are compared with the host loop.

Broken captures stand for a driver or a toolkit that captures wrongly.
"""

from __future__ import annotations

import math

import pytest
import torch
from problems import F64, TimedLinear, linspace
from shim.eager import Eager

from node_cuda import SolveError, Status, solve
from node_cuda.cuda_graphs import capture, device_loop, first_run_check
from node_cuda.cuda_graphs.cache import GraphCache
from node_cuda.cuda_graphs.first_run_check import Outcome, difference
from node_cuda.gradients.adjoint.cuda_graph import CapturedAdjoint
from node_cuda.gradients.discrete.cuda_graph_reverse import CapturedReversePass

Y = torch.tensor([0.7, -0.4], dtype=F64)
T = linspace(0.0, 1.0, 3)
KINDS = ("solve", "adjoint", "discrete")
WAS_NOT = "differs from that of the host loop"


@pytest.fixture
def first(eager, monkeypatch):
    """Reset the record of comparisons. The list holds the results of the comparisons."""
    found = []
    monkeypatch.setattr(first_run_check, "_confirmed", set())
    monkeypatch.setattr(first_run_check, "_refuted", {})
    real = first_run_check.difference
    monkeypatch.setattr(first_run_check, "difference", lambda *args: found.append(real(*args)) or found[-1])
    return found


def run(kind, flag, *, between=lambda: None, func=None, throw=True, dtype=F64):
    """Return (the result, the solution). between: a function to call before the backward pass."""
    func = TimedLinear(dtype=dtype) if func is None else func
    options = dict(cuda_graph=flag, max_step=0.15, **(dict(throw=throw) if flag else {}))
    given = dict(method="bosh3", rtol=1e-3, atol=1e-3, options=options)
    if kind == "solve":
        with torch.no_grad():
            s = solve(func, Y.to(dtype), T, **given)
        return [s.ys], s
    y0 = Y.to(dtype).requires_grad_()
    s = solve(func, y0, T, gradient=kind, **given)
    between()
    return [s.ys.detach(), *torch.autograd.grad(s.ys.square().sum(), [y0, *func.parameters()])], s


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("throw", [True, "deferred"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_right_result_is_compared_once_for_each_dtype(first, kind, throw):
    func, kept = TimedLinear(), GraphCache()
    _, host = run(kind, False, func=func)
    backward = []
    for _ in range(2):
        _, s = run(kind, kept, func=func, throw=throw)
        assert len(first) == (1 if kind == "solve" else 2) and not any(first)
        assert s.status is (Status.SUCCESS if throw is True else Status.PENDING)
        stats = s.check().stats
        assert (stats.accepted, stats.rejected, stats.nfe) == (host.stats.accepted, host.stats.rejected, host.stats.nfe)
        assert (stats.loop, stats.why) == ("eager", None)
        assert (stats.loop_backward, stats.why_backward) == ("host" if kind == "solve" else "eager", None)
        backward.append((stats.nfe_backward, stats.recomputed_steps, stats.peak_checkpoints))
    assert backward[0] == backward[1]
    run(kind, kept, func=TimedLinear(dtype=torch.float32), dtype=torch.float32)
    assert len(first) == (2 if kind == "solve" else 4) and not any(first)


class Early(Eager):
    """Leaves its loops after two steps."""

    def repeat(self, step, control):
        return type("Repeat", (), {"tier": self.tier, "run": staticmethod(lambda: step.replay(2))})(), None


def leave_early(monkeypatch):
    monkeypatch.setattr(capture, "GraphCapture", Early)


def write_wrong_outputs(monkeypatch):
    real = device_loop.OutputLoop.put_outputs

    def put(self, step, outputs):
        real(self, step, outputs)
        self.ys[-1].mul_(1 + 1e-9)

    monkeypatch.setattr(device_loop.OutputLoop, "put_outputs", put)


def double_a_gradient(monkeypatch):
    adjoint, walk = CapturedAdjoint.run, CapturedReversePass.of_params

    def doubled(params):
        return [*params[:-1], 2 * params[-1]]

    def run_wrongly(self, *args, **more):
        adj_t, adj_y0, params = adjoint(self, *args, **more)
        return adj_t, adj_y0, doubled(params)

    monkeypatch.setattr(CapturedAdjoint, "run", run_wrongly)
    monkeypatch.setattr(CapturedReversePass, "of_params", lambda self: doubled(walk(self)))


BROKEN = [
    ("solve", leave_early),
    ("solve", write_wrong_outputs),
    ("adjoint", leave_early),
    ("adjoint", double_a_gradient),
    ("discrete", leave_early),
    ("discrete", double_a_gradient),
]


@pytest.mark.parametrize("throw", [True, "deferred"])
@pytest.mark.parametrize(("kind", "spoil"), BROKEN, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_after_a_wrong_result_the_host_solves(first, monkeypatch, kind, spoil, throw):
    func, kept = TimedLinear(), GraphCache()
    expected, host = run(kind, False, func=func)

    def before_the_backward_pass():
        if kind != "solve":
            spoil(monkeypatch)

    if kind == "solve":
        spoil(monkeypatch)
    with pytest.warns(RuntimeWarning, match=rf"a captured .* on cpu {WAS_NOT} \(.*\)\. The host loop solves") as told:
        found, s = run(kind, kept, func=func, between=before_the_backward_pass, throw=throw)
    assert len(told) == 1 and same(found, expected)
    why = s.stats.why if kind == "solve" else s.stats.why_backward
    assert (s.stats.loop if kind == "solve" else s.stats.loop_backward) == "host" and WAS_NOT in why
    assert s.check().status is Status.SUCCESS
    assert (s.stats.accepted, s.stats.nfe_backward) == (host.stats.accepted, host.stats.nfe_backward)
    compared = len(first)
    found, s = run(kind, kept, func=func, throw=throw)  # without another warning
    assert same(found, expected)
    assert (s.stats.loop, s.stats.loop_backward) == ("host", "host") and WAS_NOT in s.stats.why
    assert len(first) == compared


def test_an_earlier_deferred_solve_can_still_be_differentiated(first, monkeypatch):
    func, kept = TimedLinear(), GraphCache()
    expected, _ = run("discrete", False, func=func)

    def refute():
        first_run_check._refuted[Y.device] = WAS_NOT

    found, s = run("discrete", kept, func=func, throw="deferred", between=refute)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (s.stats.loop, s.stats.loop_backward, s.stats.why_backward) == ("eager", "host", WAS_NOT)
    assert s.check().status is Status.SUCCESS and s.stats.accepted > 0


@pytest.mark.parametrize("throw", [True, "deferred"])
def test_a_solve_that_fails_as_on_the_host_counts_as_right(first, throw):
    options = dict(cuda_graph=True, throw=throw, max_num_steps=2, max_step=0.1)
    with torch.no_grad(), pytest.raises(SolveError, match="max_num_steps"):
        solve(TimedLinear(), Y, T, options=options).check()
    assert first == [None]


def test_without_memory_for_the_comparison_the_next_solve_is_compared(first, monkeypatch):
    func, kept = TimedLinear(), GraphCache()
    with monkeypatch.context() as patch:

        def no_room(*_):
            raise torch.OutOfMemoryError

        patch.setattr(first_run_check, "difference", no_room)
        assert run("solve", kept, func=func)[1].stats.loop == "eager"
    assert run("solve", kept, func=func)[1].stats.loop == "eager" and first == [None]


# ------------------------------------------------------------------ what is a difference
def outcomes(change, x=None, steps=((3, 1), (3, 1))):
    x = torch.linspace(-1.0, 1.0, 7, dtype=F64) if x is None else x
    return difference(
        Outcome(Status.SUCCESS, [change(x), None], steps[0]), Outcome(Status.SUCCESS, [x, None], steps[1]), x.dtype
    )


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_only_more_than_rounding_counts_as_a_difference(dtype):
    x, eps = torch.linspace(-1.0, 1.0, 7).to(dtype), torch.finfo(dtype).eps
    assert outcomes(lambda x: x, x) is None
    assert outcomes(lambda x: x * (1 + 4 * eps), x) is None
    assert "differ by" in outcomes(lambda x: x * 1.2, x)
    assert "differ by" in outcomes(lambda x: x.clone().index_fill_(0, torch.tensor([2]), math.nan), x)
    nan = x.clone().index_fill_(0, torch.tensor([2]), math.nan)
    assert outcomes(lambda x: x.clone(), nan) is None


def test_steps_count_as_equal_if_their_bits_are():
    assert "steps" in outcomes(lambda x: x, steps=((4, 1), (3, 1)))
    assert outcomes(lambda x: x * (1 + 1e-15), steps=((4, 1), (3, 1))) is None
    assert "steps" in outcomes(lambda x: x * (1 + 1e-15), steps=((5, 1), (3, 1)))


def test_a_sum_close_to_zero_is_compared_relative_to_the_others():
    large, small = torch.ones(2, dtype=F64), torch.full((2,), 1e-17, dtype=F64)
    a, b = Outcome(Status.SUCCESS, [large, small]), Outcome(Status.SUCCESS, [large, 0 * small])
    assert difference(a, b, F64) is None
    assert "differ by" in difference(a._replace(tensors=[large, 1e8 * small]), b, F64)
    assert "MAX_STEPS" in difference(Outcome(Status.MAX_STEPS, ()), b, F64)
