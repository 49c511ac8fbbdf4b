"""node_cuda as a replacement of torchdiffeq 0.2.5: it has the same steps, evaluations and numbers."""

from __future__ import annotations

import inspect

import pytest
import torch
from problems import (
    BY_NAME,
    F64,
    PROBLEMS,
    Counting,
    TimedLinear,
    as_tuple,
    flat,
    linspace,
    loss_of,
    max_difference,
    relative_difference,
)
from tolerances import GLOBAL_ERROR_OVER_RTOL, OUTPUT_FLOOR, SCATTER_FACTOR, TIME_FLOOR
from torch import nn

import node_cuda
from node_cuda import solve

torchdiffeq = pytest.importorskip("torchdiffeq")

ADAPTIVE = {"dopri5": (1e-3, 1e-7), "bosh3": (1e-3, 1e-5), "adaptive_heun": (1e-2, 1e-3), "dopri8": (1e-3, 1e-6)}
FIXED = {"rk4": (1e-7,), "euler": (1e-7,), "midpoint": (1e-7,)}
SEEDS = (1, 2, 3)


# ------------------------------------------------------------------ measuring torchdiffeq
class Watched(Counting):
    """Counts evaluations and stores the end times of accepted steps, by the callbacks of torchdiffeq."""

    def __init__(self, func, direction: float = 1.0):
        super().__init__(func)
        self.direction = direction
        self.accepted, self.rejected, self.times = 0, 0, []

    def _accept(self, t0, dt):
        self.accepted += 1
        self.times = (self.times or [float(t0)]) + [float(t0) + self.direction * float(dt)]


class WatchedSteps(Watched):
    def callback_accept_step(self, t0, y0, dt):
        self._accept(t0, dt)

    def callback_reject_step(self, t0, y0, dt):
        self.rejected += 1


class WatchedGrid(Watched):
    def callback_step(self, t0, y0, dt):
        self._accept(t0, dt)


def one_ulp(func, seed):
    """Return the field with each element of its result changed by one ulp, up or down at random."""
    generator = torch.Generator().manual_seed(seed)

    def move(k):
        up = torch.randint(0, 2, k.shape, generator=generator).to(F64) * 2 - 1
        return k * (1 + torch.finfo(F64).eps * up)

    def perturbed(t, y):
        k = func(t, y)
        return tuple(move(part) for part in k) if isinstance(k, tuple) else move(k)

    return perturbed


def run_torchdiffeq(problem, method, rtol, seed=None):
    """Return (accepted, rejected, nfe), step times and outputs; with a seed, for the field changed by one ulp."""
    func = problem.make() if seed is None else one_ulp(problem.make(), seed)
    watch = (WatchedGrid if method in FIXED else WatchedSteps)(func, -1.0 if problem.reversed else 1.0)
    ys = torchdiffeq.odeint(watch, problem.y0, problem.t, rtol=rtol, atol=rtol * 1e-2, method=method)
    return (watch.accepted, watch.rejected, watch.nfe), watch.times, ys


def scatter(problem, method, rtol, counts, times, ys):
    """Return the change of torchdiffeq's step times and outputs if f changes by one ulp; None if its counts change."""
    time_scatter = output_scatter = 0.0
    for seed in SEEDS:
        moved_counts, moved_times, moved_ys = run_torchdiffeq(problem, method, rtol, seed)
        if moved_counts != counts:
            return None
        time_scatter = max(time_scatter, *(abs(a - b) for a, b in zip(times, moved_times, strict=True)))
        output_scatter = max(output_scatter, max_difference(moved_ys, ys))
    return time_scatter, output_scatter


def outputs_of_torchdiffeq(method):
    """Return the option for torchdiffeq's interpolant, for methods whose default interpolant is another one."""
    return dict(dense="torchdiffeq") if method in ("bosh3", "adaptive_heun", "fehlberg2") else {}


def differences(problem, method, rtol, counts, times, ys, moved):
    """Return the differences between our run and torchdiffeq's, as sentences."""
    where = f"{method} on {problem.name} at rtol {rtol:g}"
    func = Counting(problem.make())
    options = dict(record_steps=True, **outputs_of_torchdiffeq(method))
    ours = solve(func, problem.y0, problem.t, rtol=rtol, atol=rtol * 1e-2, method=method, options=options)
    our_counts = (ours.stats.accepted, ours.stats.rejected, func.nfe)
    if ours.stats.nfe != func.nfe:
        yield f"{where}: stats.nfe is {ours.stats.nfe}, but f was called {func.nfe} times"
    if our_counts != counts or len(ours.stats.step_times) != len(times):
        yield f"{where}: (accepted, rejected, nfe) is {our_counts}, torchdiffeq's {counts}"
        return
    off = max(abs(a - b) for a, b in zip(ours.stats.step_times, times, strict=True))
    limit = max(SCATTER_FACTOR * moved[0], TIME_FLOOR * abs(float(problem.t[-1] - problem.t[0])))
    if not off <= limit:
        yield f"{where}: step times differ by {off:.1e}, allowed {limit:.1e}"
    off = max_difference(ours.ys, ys)
    limit = max(SCATTER_FACTOR * moved[1], OUTPUT_FLOOR * float(flat(ys).abs().max()))
    if not off <= limit:
        yield f"{where}: outputs differ by {off:.1e}, allowed {limit:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rtol"), [(m, r) for m, rtols in (ADAPTIVE | FIXED).items() for r in rtols])
def test_steps_evaluations_times_and_outputs_are_those_of_torchdiffeq(method, rtol):
    """If torchdiffeq's own counts change with one ulp of f, the case is left out. At least eight cases must remain."""
    used, found = [], []
    with torch.no_grad():
        for problem in PROBLEMS:
            theirs = run_torchdiffeq(problem, method, rtol)
            moved = scatter(problem, method, rtol, *theirs)
            if moved is not None:
                used.append(problem.name)
                found += differences(problem, method, rtol, *theirs, moved)
    assert not found, "\n".join(found)
    assert len(used) >= 8, f"only {used} have step counts that one ulp of f leaves alone"


@pytest.mark.parametrize("method", ["heun2", "heun3", "fehlberg2", "implicit_adams", "scipy_solver"])
@pytest.mark.parametrize("name", ["linear", "tuple", "reversed", "mlp"])
def test_the_other_methods_agree_to_the_tolerance(name, method):
    problem = BY_NAME[name]
    options = {} if method in ("fehlberg2", "scipy_solver") else dict(step_size=0.05)
    arguments = dict(rtol=1e-5, atol=1e-7, method=method, options=options)
    with torch.no_grad():
        ours = node_cuda.odeint(problem.make(), problem.y0, problem.t, **arguments)
        theirs = torchdiffeq.odeint(problem.make(), problem.y0, problem.t, **arguments)
    tight = 1e-9 if method in ("heun2", "heun3", "scipy_solver") else GLOBAL_ERROR_OVER_RTOL * 1e-5
    assert relative_difference(ours, theirs) <= tight


# ------------------------------------------------------------------ options that change the steps
OPTIONS = {
    "first_step": dict(first_step=0.01),
    "max_step": dict(max_step=0.11),
    "min_step": dict(min_step=0.2),
    "safety": dict(safety=0.7),
    "ifactor": dict(ifactor=2.0),
    "dfactor": dict(dfactor=0.7),
    "step_t": dict(step_t=torch.tensor([0.31, 1.7, 1.9, 3.3], dtype=F64)),
    "jump_t": dict(jump_t=torch.tensor([0.31, 1.7], dtype=F64)),
    "step_t and jump_t": dict(step_t=torch.tensor([2.5, 0.4], dtype=F64), jump_t=torch.tensor([0.9], dtype=F64)),
    "step_t before t0": dict(step_t=torch.tensor([-3.0, 0.4], dtype=F64)),
    "norm": dict(norm=lambda y: y.abs().max()),
    "dtype": dict(dtype=torch.float64),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_of_the_step_loop_gives_the_steps_of_torchdiffeq(options, method):
    problem = BY_NAME["oscillating"]
    watch, func = WatchedSteps(problem.make()), Counting(problem.make())
    arguments = dict(rtol=1e-5, atol=1e-7, method=method)
    with torch.no_grad():
        theirs = torchdiffeq.odeint(watch, problem.y0, problem.t, **arguments, options=options)
        options = dict(options, record_steps=True, **outputs_of_torchdiffeq(method))
        ours = solve(func, problem.y0, problem.t, **arguments, options=options)
    assert (ours.stats.accepted, ours.stats.rejected, func.nfe) == (watch.accepted, watch.rejected, watch.nfe)
    assert ours.stats.step_times == pytest.approx(watch.times, abs=1e-8)  # one ulp of f moves them by 1e-9
    assert relative_difference(ours.ys, theirs) <= OUTPUT_FLOOR


@pytest.mark.parametrize("rtol", [(1e-4, 1e-7), torch.tensor(1e-5, dtype=F64)], ids=["tuple", "0-d tensor"])
def test_tupled_tolerances_give_the_steps_of_torchdiffeq(rtol):
    problem = BY_NAME["tuple"]
    watch, func = WatchedSteps(problem.make()), Counting(problem.make())
    with torch.no_grad():
        theirs = torchdiffeq.odeint(watch, problem.y0, problem.t, rtol=rtol, atol=1e-8)
        ours = solve(func, problem.y0, problem.t, rtol=rtol, atol=1e-8)
    assert (ours.stats.accepted, ours.stats.rejected, func.nfe) == (watch.accepted, watch.rejected, watch.nfe)
    assert relative_difference(ours.ys, theirs) <= OUTPUT_FLOOR


def test_per_element_tolerances_give_the_steps_of_torchdiffeq():
    problem = BY_NAME["linear"]
    rtol, atol = torch.tensor([1e-4, 1e-7], dtype=F64), torch.tensor([1e-9, 1e-5], dtype=F64)
    watch, func = WatchedSteps(problem.make()), Counting(problem.make())
    with torch.no_grad():
        theirs = torchdiffeq.odeint(watch, problem.y0, problem.t, rtol=rtol, atol=atol)
        ours = solve(func, problem.y0, problem.t, rtol=rtol, atol=atol)
    assert (ours.stats.accepted, ours.stats.rejected, func.nfe) == (watch.accepted, watch.rejected, watch.nfe)
    assert relative_difference(ours.ys, theirs) <= OUTPUT_FLOOR


def test_the_times_that_the_field_sees_are_those_of_torchdiffeq():
    """Stages at the end of a step are evaluated one ulp before it, and after a jump one ulp after it."""
    seen: dict[str, list[float]] = {"ours": [], "theirs": []}
    options = dict(first_step=0.125, max_step=0.125, jump_t=torch.tensor([0.3125], dtype=F64))
    for key, odeint in (("ours", node_cuda.odeint), ("theirs", torchdiffeq.odeint)):

        def func(t, y, key=key):
            seen[key].append(float(t))
            return torch.cos(t) * y

        odeint(func, torch.ones(2, dtype=F64), linspace(0.0, 1.0, 2), rtol=1e-3, atol=1e-3, options=options)
    assert len(seen["ours"]) == len(seen["theirs"])
    assert seen["ours"] == pytest.approx(seen["theirs"], rel=0, abs=3e-16)
    before, behind = 0.3125 - 2**-54, 0.3125 + 2**-54
    assert before in seen["ours"] and behind in seen["ours"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_single_precision_agrees_to_the_tolerance(dtype):
    problem = BY_NAME["complex" if dtype.is_complex else "oscillating"]
    y0, t = problem.y0.to(dtype), problem.t.float()
    with torch.no_grad():
        ours = node_cuda.odeint(problem.make(), y0, t, rtol=1e-4, atol=1e-6)
        theirs = torchdiffeq.odeint(problem.make(), y0, t, rtol=1e-4, atol=1e-6)
    assert ours.dtype == theirs.dtype == dtype
    assert relative_difference(ours, theirs) <= 1e-4


# ------------------------------------------------------------------ the surface
@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint", "odeint_event", "odeint_dense"])
def test_the_signature_begins_with_torchdiffeqs(name):
    ours = inspect.signature(getattr(node_cuda, name)).parameters
    theirs = inspect.signature(getattr(torchdiffeq, name)).parameters
    for key, parameter in theirs.items():
        if parameter.kind is parameter.VAR_KEYWORD or key == "odeint_interface":
            continue
        assert key in ours, f"{name}() lost its argument {key}"
        assert ours[key].default == parameter.default
        assert ours[key].kind == parameter.kind
    positional = [k for k, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD and k != "odeint_interface"]
    assert list(ours)[: len(positional)] == positional or name == "odeint_event"


def test_every_method_of_torchdiffeq_is_a_method_of_ours():
    from torchdiffeq._impl.odeint import SOLVERS

    assert set(SOLVERS) <= set(node_cuda.METHODS)


# ------------------------------------------------------------------ gradients and backward cost
def adjoint_run(odeint_adjoint, problem_name, **arguments):
    """(gradients for y0 and parameters, nfe of the backward pass)."""
    problem = BY_NAME[problem_name]
    func = Counting(problem.make())
    y0 = tuple(part.clone().requires_grad_() for part in as_tuple(problem.y0))
    start = y0 if isinstance(problem.y0, tuple) else y0[0]
    ys = odeint_adjoint(func, start, problem.t, adjoint_params=tuple(func.parameters()), **arguments)
    forward = func.nfe
    grads = torch.autograd.grad(loss_of(ys), [*y0, *func.parameters()])
    return tuple(grads), func.nfe - forward


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [1e-3, 1e-7])
@pytest.mark.parametrize("name", [p.name for p in PROBLEMS if p.name not in ("stiffish", "complex")])
def test_adjoint_gradients_agree_and_cost_no_more_evaluations_than_torchdiffeqs(name, rtol):
    """(stiffish: unstable backwards in either library. complex: gradients/adjoint/test_mode.py, dL/dt right too.)"""
    ours, our_nfe = adjoint_run(node_cuda.odeint_adjoint, name, rtol=rtol, atol=rtol * 1e-2)
    theirs, their_nfe = adjoint_run(torchdiffeq.odeint_adjoint, name, rtol=rtol, atol=rtol * 1e-2)
    assert relative_difference(ours, theirs) <= GLOBAL_ERROR_OVER_RTOL * rtol
    assert our_nfe <= their_nfe


@pytest.mark.parametrize("method", ["bosh3", "adaptive_heun", "fehlberg2", "dopri8", "rk4", "euler", "midpoint"])
def test_no_method_costs_more_backward_evaluations_than_in_torchdiffeq(method):
    for name in ("mlp", "reversed_timed_mlp"):
        rtol = 1e-2 if method in ("adaptive_heun", "fehlberg2") else 1e-4
        arguments = dict(rtol=rtol, atol=rtol, method=method)
        _, ours = adjoint_run(node_cuda.odeint_adjoint, name, **arguments)
        _, theirs = adjoint_run(torchdiffeq.odeint_adjoint, name, **arguments)
        assert ours <= theirs, f"{method} on {name}"


class Wide(nn.Module):
    """The field for which the backward cost of torchdiffeq is documented, with PyTorch's initialisation."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2)).to(F64)

    def forward(self, t, y):
        return self.net(y)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1.0, 5.0, 20.0])
def test_fifty_outputs_cost_at_most_three_fifths_of_torchdiffeqs_backward_evaluations(T):
    y0 = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    nfe = {}
    for key, library in (("ours", node_cuda), ("theirs", torchdiffeq)):
        func = Counting(Wide(1))
        ys = library.odeint_adjoint(func, y0, linspace(0.0, T, 50))
        forward = func.nfe
        ys.sum().backward()
        nfe[key] = func.nfe - forward
    assert nfe["ours"] <= 0.6 * nfe["theirs"], nfe


def test_at_most_eight_backward_evaluations_per_output_if_one_step_suffices():
    func = Counting(Wide(1))
    y0 = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    outputs = 50
    ys = node_cuda.odeint_adjoint(func, y0, linspace(0.0, 1.0, outputs), rtol=1e-3, atol=1e-3)
    forward = func.nfe
    ys.sum().backward()
    assert func.nfe - forward <= 8 * (outputs - 1)


def test_the_statistics_count_the_backward_evaluations_too():
    func = Counting(TimedLinear())
    y0 = torch.ones(3, 2, dtype=F64, requires_grad=True)
    solution = solve(func, y0, linspace(0.0, 2.0, 3), gradient="adjoint")
    assert solution.stats.nfe == func.nfe
    assert solution.stats.nfe_backward == 0
    solution.ys.sum().backward()
    assert solution.stats.nfe_backward == func.nfe - solution.stats.nfe
