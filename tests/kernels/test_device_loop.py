"""The device loop through the shim: whole solves, compared with the host loop by the same kernels."""

from __future__ import annotations

import gc
import math
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import F64, MLP, Counting, TimedLinear, as_tuple, linspace

from node_cuda import TABLEAUS, NeuralODE, SolveError, Status, solve
from node_cuda.controllers import Controller
from node_cuda.cuda_graphs import cache as graphs
from node_cuda.status import InvalidInput

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
def test_the_device_loop_has_the_bits_of_the_host_loop(eager, method, case):
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
def test_the_device_loop_on_a_fixed_grid_has_the_bits_of_the_host_loop(eager, method, options):
    host, device = both(TimedLinear(), Y, linspace(0.0, 1.0, 7), method, options)
    assert device.stats.loop == "eager"
    assert torch.equal(device.ys, host.ys)


BACKWARDS = {
    "dopri5": {},
    "bosh3": dict(jump_t=[0.4]),
    "adaptive_heun": {},
    "rk4": dict(step_size=0.13),
    "euler": dict(step_size=0.2, perturb=True),
}


@pytest.mark.parametrize("outputs", [2, 5])
@pytest.mark.parametrize("method", BACKWARDS)
def test_the_backward_solve_of_the_adjoint_on_the_device_has_the_bits_of_the_host_loop(eager, method, outputs):
    func, found, stats = MLP(), [], []
    options, tol = BACKWARDS[method], 1e-2 if method == "adaptive_heun" else 1e-3
    for flag in (False, True):
        y0, t = Y.clone().requires_grad_(), linspace(0.0, 1.0, outputs).requires_grad_()
        s = solve(
            func, y0, t, method=method, gradient="adjoint", rtol=tol, atol=tol, options=dict(options, cuda_graph=flag)
        )
        weights = torch.arange(1, 1 + s.ys.numel(), dtype=F64).view_as(s.ys)
        found.append(torch.autograd.grad((weights * s.ys).sum(), [y0, t, *func.parameters()]))
        stats.append(s.stats)
    assert [s.loop_backward for s in stats] == ["host", "eager"], stats[1].why_backward
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    if method in ("dopri5", "adaptive_heun"):  # the other methods also evaluate f after discontinuities, and for dL/dt
        assert stats[0].nfe_backward == stats[1].nfe_backward


def test_the_captured_backward_solve_is_reused_for_other_times(eager):
    func, kept = TimedLinear(), graphs.GraphCache()
    for start, end in ((0.0, 1.0), (0.3, 1.1)):
        found = []
        for flag in (kept, False):
            y0, t = Y.clone().requires_grad_(), linspace(start, end, 4).requires_grad_()
            s = solve(func, y0, t, gradient="adjoint", rtol=1e-4, atol=1e-4, options=dict(cuda_graph=flag))
            found.append(torch.autograd.grad(s.ys.square().sum(), [y0, t, *func.parameters()]))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept.count == 2


def test_options_of_the_backward_solve_do_not_change_where_the_forward_loop_runs(eager):
    func, y0 = MLP(), Y.clone().requires_grad_()
    s = solve(
        func, y0, linspace(0.0, 1.0, 3), gradient="adjoint", options=dict(cuda_graph=True),
        adjoint_options=dict(norm="seminorm"),
    )  # fmt: skip
    s.ys.sum().backward()
    assert (s.stats.loop_backward, s.stats.why_backward) == ("eager", None)


@pytest.mark.parametrize("deferred", [False, True])
def test_check_raises_the_failure_of_a_backward_solve(eager, deferred):
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


def test_the_next_solve_does_not_overwrite_gradients(eager):
    kept, func = graphs.GraphCache(), MLP()
    found = []
    for scale in (1.0, 2.0):
        y0 = (scale * Y).requires_grad_()
        s = solve(func, y0, linspace(0.0, 1.0, 3), gradient="adjoint", options=dict(cuda_graph=kept))
        gradients = torch.autograd.grad(s.ys.sum(), [y0, *func.parameters()])
        found.append((gradients, [g.clone() for g in gradients]))
    assert kept.count == 2  # forwards and backwards
    assert all(torch.equal(a, b) for gradients, copies in found for a, b in zip(gradients, copies, strict=True))
    assert not torch.equal(found[0][0][0], found[1][0][0])


def test_threads_use_the_memory_of_a_captured_solve_one_after_another(eager):
    class Slow(MLP):
        def forward(self, t, y):
            time.sleep(1e-4)  # lets another thread run
            return super().forward(t, y)

    func, kept, scales = Slow(), graphs.GraphCache(), (1.0, 0.5, 2.0)

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
def test_a_field_under_a_transform_runs_on_the_host(eager, gradient):
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
def test_a_deferred_solve_without_a_check_keeps_no_memory(eager, gradient):
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
def test_captured_loops_do_not_keep_their_owner_alive(eager, gradient):
    kept, y0 = graphs.GraphCache(), Y.clone().requires_grad_()
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


# ------------------------------------------------------------------ problems, states, outputs and options of all kinds
def agree(func, y0, t, options=None, **solver):
    """Run both loops, and check that the device has the bits, steps, evaluations and status of the host. Returns
    both."""
    host, device = both(func, y0, t, solver.pop("method", "dopri5"), options, **solver)
    assert (device.stats.loop, device.stats.why) == ("eager", None)
    for ours, theirs in zip(as_tuple(device.ys), as_tuple(host.ys), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours[~ours.isnan()], theirs[~theirs.isnan()])
    assert device.status is host.status
    assert (device.stats.accepted, device.stats.rejected) == (host.stats.accepted, host.stats.rejected)
    return host, device


def turn(t, y):
    return torch.where(t < 0.5, 1.0, -3.0) * y


def decay(t, y):
    return -y


class Buffered:
    """Returns the same memory every time."""

    def __init__(self):
        self.out = torch.empty(2, dtype=F64)

    def __call__(self, t, y):
        return torch.neg(y, out=self.out)


EIGHTHS = dict(first_step=0.125, max_step=0.125)
SOLVES = {
    "rejections": dict(func=turn, t=linspace(0.0, 1.0, 4), rtol=1e-6, atol=1e-6),
    "no outputs but the ends": dict(t=linspace(0.0, 3.0, 2)),
    "many outputs in one step": dict(t=linspace(0.0, 0.02, 40), options=dict(first_step=1.0)),
    "outputs at the ends of steps": dict(t=linspace(0.0, 1.0, 9), options=EIGHTHS),
    "outputs beside the ends of steps": dict(
        t=torch.tensor([0.0, 0.125, math.nextafter(0.125, 1.0), 0.25 - 2**-54, 0.25, 1.0], dtype=F64), options=EIGHTHS
    ),
    "two times, one ulp apart": dict(t=torch.tensor([1.0, math.nextafter(1.0, 2.0)], dtype=F64)),
    "a far start": dict(t=1e6 + linspace(0.0, 1.0, 3)),
    "backwards, with jumps": dict(t=linspace(1.0, 0.0, 4), func=turn, options=dict(jump_t=[0.5, 0.75])),
    "jumps and steps, some outside": dict(
        t=linspace(0.0, 1.0, 4), func=turn, options=dict(jump_t=[-1.0, 0.5, 7.0], step_t=torch.tensor([0.2, 0.9, 3.0]))
    ),
    "a jump at the start, at an output and at the end": dict(
        t=linspace(0.0, 1.0, 5), func=turn, options=dict(jump_t=[0.0, 0.5, 1.0])
    ),
    "largest step": dict(t=linspace(0.0, 1.0, 3), options=dict(max_step=0.07)),
    "smallest step": dict(t=linspace(0.0, 1.0, 3), rtol=1e-9, atol=1e-12, options=dict(min_step=0.1)),
    "a tight law": dict(t=linspace(0.0, 3.0, 3), options=dict(safety=0.7, ifactor=1.5, dfactor=0.8)),
    "I": dict(t=linspace(0.0, 3.0, 3), options=dict(controller="I")),
    "PI": dict(t=linspace(0.0, 3.0, 3), options=dict(controller="PI")),
    "a controller of the user's": dict(t=linspace(0.0, 3.0, 3), options=dict(controller=Controller(1.0, 0.2, 0.1))),
    "accurate": dict(t=linspace(0.0, 3.0, 9), method="bosh3", options=dict(dense="accurate")),
    "0-d": dict(y0=torch.tensor(0.7, dtype=F64)),
    "one element": dict(y0=torch.tensor([0.7], dtype=F64)),
    "float32": dict(y0=torch.tensor([0.7, -0.4])),
    "times in float32": dict(t=linspace(0.0, 1.0, 4).float()),
    "float16": dict(y0=torch.tensor([0.7, -0.4], dtype=torch.float16), rtol=1e-2, atol=1e-2),
    "bfloat16": dict(y0=torch.tensor([0.7, -0.4], dtype=torch.bfloat16), rtol=1e-1, atol=1e-1),
    "complex64": dict(y0=torch.tensor([0.7 + 1j, -0.4]), func=lambda t, y: 1j * y),
    "complex128": dict(y0=torch.tensor([0.7 + 1j, -0.4], dtype=torch.complex128), func=lambda t, y: (1j - t) * y),
    "a conjugate": dict(y0=torch.tensor([0.7 + 1j, -0.4], dtype=torch.complex128).conj(), func=lambda t, y: 1j * y),
    "a transposed state": dict(y0=torch.arange(6.0, dtype=F64).view(2, 3).T),
    "an expanded state": dict(y0=torch.ones(1, 2, dtype=F64).expand(3, 2)),
    "tolerances of each element": dict(
        rtol=torch.tensor([1e-3, 1e-7], dtype=F64), atol=torch.tensor([1e-8, 1e-4], dtype=F64)
    ),
    "a tuple": dict(y0=(Y, torch.ones(3, 1, dtype=F64)), func=lambda t, y: (-y[0] * y[1].sum(), -y[1])),
    "a tuple with tolerances of each part": dict(
        y0=(Y, torch.ones(3, 1, dtype=F64)),
        func=lambda t, y: (-y[0] * y[1].sum(), -y[1]),
        rtol=(1e-3, 1e-7),
        atol=(1e-4, torch.full((3, 1), 1e-8, dtype=F64)),
    ),
    "a tuple with an empty part": dict(y0=(Y, Y.new_empty(0, 2)), func=lambda t, y: (-y[0], y[1])),
    "the same buffer every time": dict(func=Buffered()),
    "a field that writes into its argument": dict(func=lambda t, y: y.neg_()),
    "a constant field": dict(func=lambda t, y: torch.ones_like(y)),
    "a field that is zero": dict(func=lambda t, y: torch.zeros_like(y)),
    "a field with a wider result": dict(y0=torch.tensor([0.7, -0.4]), func=lambda t, y: -y.double()),
    "a grid": dict(method="heun3", t=linspace(0.0, 1.0, 4), options=dict(step_size=0.3)),
    "a grid, backwards": dict(method="rk4", t=linspace(1.0, 0.0, 4), options=dict(step_size=0.3, interp="cubic")),
    "a grid of the user's": dict(
        method="midpoint",
        t=linspace(0.0, 1.0, 4),
        options=dict(grid_constructor=lambda f, y0, t: torch.cat([t[:1], t[:1] + 0.01, t[-1:]])),
    ),
    "one step of a grid": dict(method="euler", t=linspace(0.0, 1.0, 12), options=dict(step_size=5.0)),
}


@pytest.mark.parametrize("case", SOLVES)
@torch.no_grad()
def test_solves_of_all_kinds_have_the_bits_of_the_host_loop(eager, case):
    given = {"func": decay, "y0": Y, "t": linspace(0.0, 1.0, 4), "rtol": 1e-4, "atol": 1e-5, **SOLVES[case]}
    host, device = agree(**given)
    assert all(bool(part.isfinite().all()) for part in as_tuple(device.ys))
    if case == "rejections":
        assert host.stats.rejected > 0
    # Each attempt of the device includes evaluations that the host makes only where needed: stages for interpolation,
    # and the other side of a discontinuity.
    more = case == "accurate" or "cubic" in str(given) or "jump_t" in given.get("options", {})
    assert device.stats.nfe >= host.stats.nfe if more else device.stats.nfe == host.stats.nfe
    assert device.check() is device


@pytest.mark.parametrize(
    ("method", "options"),
    [("dopri5", {}), ("dopri8", dict(dense="accurate")), ("bosh3", {}), ("rk4", dict(interp="cubic")), ("euler", {})],
)
@torch.no_grad()
def test_the_number_of_evaluations_is_that_of_the_start_plus_that_of_each_attempt(eager, method, options):
    """In a step without outputs the host skips the evaluations for interpolation. The device makes them in each
    step."""
    func = Counting(turn)
    given = dict(rtol=1e-4, atol=1e-4, method=method, options={**options, "cuda_graph": graphs.GraphCache()})
    solve(func, Y, linspace(0.0, 1.0, 4), **given)
    before = func.nfe
    stats = solve(func, Y, linspace(0.0, 1.0, 4), **given).stats
    attempts = stats.accepted + stats.rejected
    beginning = {"rk4": 0, "euler": 0}.get(method, 2)
    each = (stats.nfe - beginning) / attempts
    assert each == int(each) > 0
    assert func.nfe - before == beginning + each * (attempts + 2), "and two that Eager makes for nothing"


# ------------------------------------------------------------------ failures
def blow_up(t, y):
    return torch.where(t > 1.6, math.nan, 1.0) * y


def noise(t, y):
    """No step is small enough for this field after t = 1.6."""
    return torch.where(t > 1.6, 1e30 * torch.cos(1e25 * t), 1.0) * y


NAN = torch.full((2,), math.nan, dtype=F64)
END = linspace(1.0, 3.0, 5)  # steps from 0 can shrink for a long time
QUICKLY = dict(dfactor=0.01)  # steps shrink
FAILURES = {
    "too many steps": (decay, Y, END, dict(max_num_steps=2, **EIGHTHS)),
    "too many steps since an output": (decay, Y, END, dict(max_num_steps=4.5, first_step=0.09, max_step=0.09)),
    "no steps at all": (decay, Y, END, dict(max_num_steps=0, first_step=0.1)),
    "a step too small": (noise, Y, END, dict(jump_t=[1.6], **QUICKLY)),
    "a step too small, backwards": (lambda t, y: noise(-t, y), Y, -END, dict(jump_t=[-1.6], **QUICKLY)),
    "NaN at the start": (decay, NAN, END, {}),
    "NaN at the start, with a first step": (decay, NAN, END, dict(first_step=0.1)),
    "a field that is NaN": (lambda t, y: y * math.nan, Y, END, {}),
    "NaN on the way": (blow_up, Y, END, dict(dfactor=0.2)),
    "NaN on the way, with a smallest step": (blow_up, Y, END, dict(min_step=0.1)),
    "NaN at a jump": (blow_up, Y, END, dict(jump_t=[1.6], **QUICKLY)),
}


def message(call):
    """Return (type, status, time, the sentence without its statistics, the statistics) of the error that is raised."""
    with pytest.raises((SolveError, InvalidInput)) as failure:
        call()
    error = failure.value
    text = str(error)
    if not isinstance(error, SolveError):
        return type(error), text
    assert text.endswith(f"({error.stats})")
    return type(error), error.status, error.t, text.removesuffix(f"({error.stats})"), error.stats.rejected


@pytest.mark.parametrize("case", FAILURES)
@torch.no_grad()
def test_a_failure_has_the_message_of_the_host_loop(eager, case):
    func, y0, t, options = FAILURES[case]
    kept = graphs.GraphCache()

    def run(**more):
        return solve(func, y0, t, rtol=1e-2, atol=1e-2, options={**options, **more})

    expected = message(run)
    assert message(lambda: run(cuda_graph=kept)) == expected
    pending = run(throw="deferred", cuda_graph=kept)
    assert pending.status is Status.PENDING and bool(pending.ys[-1].isnan().all())
    looked_at = message(pending.check)
    if "holds NaN" in expected[3]:  # y0 and its slope may have other values by now
        assert looked_at[:3] == expected[:3] and "y0 or func(t0, y0) is not finite" in looked_at[3]
    else:
        assert looked_at == expected
    assert pending.status is expected[1]
    assert message(pending.check) == looked_at, "the second time as well"
    good = solve(decay, Y, t[0] + 0.01 * (t - t[0]), rtol=1e-2, atol=1e-2, options=dict(cuda_graph=kept))
    assert good.status is Status.SUCCESS, "the next one does not notice"


@pytest.mark.parametrize("case", ["too many steps since an output", "NaN on the way, with a smallest step"])
@torch.no_grad()
def test_a_partial_solution_ends_at_the_same_time_as_on_the_host(eager, case):
    func, y0, t, options = FAILURES[case]
    host, device = agree(func, y0, t, dict(options, throw=False), rtol=1e-2, atol=1e-2)
    assert device.stats.nfe == host.stats.nfe
    assert host.ys[0].isfinite().all() and host.ys[-1].isnan().all()
    assert message(device.check) == message(host.check)


@pytest.mark.parametrize("throw", [True, False])
@torch.no_grad()
def test_tolerances_that_are_too_small_raise_the_same_error_as_on_the_host(eager, throw):
    zero = torch.zeros(2, dtype=F64)
    host, device = (
        message(lambda o=options: solve(decay, zero, END, rtol=1e-3, atol=0.0, options=dict(o, throw=throw)))
        for options in ({}, dict(cuda_graph=True))
    )
    assert host == device and host[0] is InvalidInput
    deferred = solve(decay, zero, END, rtol=1e-3, atol=0.0, options=dict(cuda_graph=True, throw="deferred"))
    assert message(deferred.check)[1] is Status.NON_FINITE


@pytest.mark.parametrize("deferred", [False, True])
@torch.no_grad()
def test_a_grid_with_nan_raises_only_in_check(eager, deferred):
    host, device = (
        solve(blow_up, Y, END, method="rk4", options=options)
        for options in ({}, dict(cuda_graph=True, throw="deferred" if deferred else True))
    )
    assert host.status is Status.NON_FINITE and device.status is (Status.PENDING if deferred else host.status)
    assert torch.equal(device.ys.isnan(), host.ys.isnan())
    device.ys.zero_()  # the user may write into it by now
    if not deferred:
        device.ys.copy_(host.ys)
    assert message(device.check) == message(host.check)
    assert device.status is Status.NON_FINITE


# ------------------------------------------------------------------ the owner of memory
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@torch.no_grad()
def test_no_later_solve_overwrites_a_solution_or_a_state(eager, method):
    kept, y0, t = graphs.GraphCache(), Y.clone(), linspace(0.0, 1.0, 4)

    def run(y0, **more):
        return solve(decay, y0, t, method=method, options={"cuda_graph": kept, **more})

    first = run(y0, throw="deferred")
    expected = first.ys.clone()
    second = run(2 * y0)
    assert torch.equal(y0, Y) and torch.equal(first.ys, expected)
    assert first.ys.untyped_storage().data_ptr() != second.ys.untyped_storage().data_ptr()
    second.ys.fill_(math.nan)
    first.ys[-1] = math.nan
    y0.fill_(7.0)
    assert first.check().status is Status.SUCCESS
    assert torch.equal(run(Y).ys, expected)
    assert kept.count == 1
