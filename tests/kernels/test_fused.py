"""Whole solves by the compiled kernels, through the public functions, compared with plain PyTorch.

They run on the CPU through the shim, and the same cases run on a GPU.

Tolerances. AGREE is the allowed difference of the two paths in float64, relative to the largest number of a tensor:
sums are rounded in another order, and a solve amplifies a few hundred of these differences. STEP_TIMES is for the
chosen steps: the error estimate has a relative rounding error of about eps / rtol, and the step size depends on its
root of the method's order. It holds for the loose tolerances used here, rtol >= 1e-4, which also keep the solves short.
"""

from __future__ import annotations

import gc
import math
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from problems import F64, MLP, as_tuple, is_adaptive, linspace, order_of
from shim.graphs import numbers_of
from shim.pretend_gpu import CUDA
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import node_cuda
from node_cuda import (
    METHODS,
    TABLEAUS,
    InvalidField,
    InvalidInput,
    SolveError,
    Stats,
    Status,
    Unsupported,
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
    solve,
)
from node_cuda.kernels import backend as dispatch
from node_cuda.kernels.control import DeviceStepControl
from node_cuda.kernels.fused import Fused
from node_cuda.kernels.fused_sums import FusedGradientAccumulator
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.sums import GradientAccumulator
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS

AGREE = 1e-10
STEP_TIMES = 1e-12
C128 = torch.complex128
LOOSE: dict[str, Any] = dict(rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------ where solves run
@dataclass
class Path:
    """The device of the kernels, and the arithmetic of every solve that used them."""

    device: torch.device
    solves: list[Fused] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """The launches of the plans, without those of the adjoint's packing and sums."""
        return sum(solve.plan.launches for solve in self.solves)

    @property
    def bytes(self) -> int:
        return sum(solve.plan.bytes for solve in self.solves)


@pytest.fixture(params=["shim", pytest.param("gpu", marks=pytest.mark.gpu)])
def path(request, monkeypatch):
    found = Path(CUDA if request.param == "gpu" else torch.device("cpu"))
    if request.param == "shim":
        request.getfixturevalue("shim")
    make = Fused.__init__

    def spy(self, *args, **kwargs):
        make(self, *args, **kwargs)
        found.solves.append(self)

    monkeypatch.setattr(Fused, "__init__", spy)
    return found


# ------------------------------------------------------------------ comparing
class Outcome(NamedTuple):
    """The result of a solve: outputs, gradients and statistics."""

    tensors: tuple[Tensor, ...]
    stats: Stats | None = None


def both(path: Path, call: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the result of `call` by the kernels, and in plain PyTorch."""
    path.solves.clear()
    with node_cuda.backend("reference"):
        expected = call()
    assert not path.solves, "the reference took the kernels"
    with node_cuda.backend("fused"):
        actual = call()
    assert path.launches > 0, "the kernels were never launched"
    return actual, expected


def assert_near(actual: Tensor, expected: Tensor, rel: float = AGREE) -> None:
    """Compare relative to the largest number of the tensor; NaN equals NaN."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.device == expected.device
    actual, expected = actual.detach(), expected.detach()
    assert torch.equal(actual.isnan(), expected.isnan())
    difference = (actual - expected).abs().nan_to_num(0.0)
    size = expected.abs().nan_to_num(0.0)
    largest = float(difference.max()) if difference.numel() else 0.0
    bound = rel * float(size.max()) if size.numel() else 0.0
    assert largest <= bound, f"off by {largest:.3g}, more than {bound:.3g}"


def assert_agree(actual: Outcome, expected: Outcome, rel: float = AGREE) -> None:
    assert len(actual.tensors) == len(expected.tensors)
    assert (actual.stats is None) is (expected.stats is None)
    for a, b in zip(actual.tensors, expected.tensors, strict=True):
        assert_near(a, b, rel)
    if expected.stats is not None and actual.stats is not None:
        counts = ("accepted", "rejected", "nfe", "nfe_backward")
        assert [getattr(actual.stats, c) for c in counts] == [getattr(expected.stats, c) for c in counts]
        assert actual.stats.step_times == pytest.approx(expected.stats.step_times, rel=STEP_TIMES, abs=STEP_TIMES)


def weighted(ys) -> Tensor:
    """Return a loss in which every number has a different weight."""
    parts = as_tuple(ys)
    total = torch.zeros((), dtype=F64, device=parts[0].device)
    for part in parts:
        part = torch.view_as_real(part) if part.is_complex() else part
        weights = torch.linspace(0.5, 1.5, part.numel(), dtype=F64, device=part.device).reshape(part.shape)
        total = total + (weights * part.to(F64)).sum()
    return total


# ------------------------------------------------------------------ the problems
MODES = ("none", "backprop", "adjoint", "discrete")
MODES_AND_METHODS = [*((mode, "dopri5") for mode in MODES), ("adjoint", "rk4")]


class Case(NamedTuple):
    """A problem. Its field (a module with parameters) and its state are made new for each solve."""

    func: Callable[[], nn.Module]
    y0: Any
    t: Tensor
    solver: dict[str, Any]

    def start(self, device: torch.device):
        """Return the field and the leaves: y0 (a tuple), t."""
        y0 = tuple(part.to(device).clone().requires_grad_() for part in as_tuple(self.y0))
        return self.func().to(device), y0, self.t.to(device).clone().requires_grad_()

    def state(self, y0):
        return y0 if isinstance(self.y0, tuple) else y0[0]

    @property
    def recording(self) -> dict[str, Any]:
        """Return the solver's arguments, which record the steps; on a device only if the times are numbers."""
        return {**self.solver, "options": {**self.solver.get("options", {}), "record_steps": True}}


def by_odeint(case: Case, device) -> Outcome:
    func, y0, t = case.start(device)
    with torch.no_grad():
        found = solve(func, case.state(y0), t, **case.recording)
    return Outcome(as_tuple(found.ys), found.stats)


def _differentiated(case: Case, device, gradient: str) -> Outcome:
    func, y0, t = case.start(device)
    found = solve(func, case.state(y0), t, gradient=gradient, **case.recording)
    grads = torch.autograd.grad(weighted(found.ys), (*y0, t, *func.parameters()))
    return Outcome((*as_tuple(found.ys), *grads), found.stats)


def by_backprop(case: Case, device) -> Outcome:
    return _differentiated(case, device, "backprop")


def by_adjoint(case: Case, device) -> Outcome:
    return _differentiated(case, device, "adjoint")


def by_discrete(case: Case, device) -> Outcome:
    return _differentiated(case, device, "discrete")


def by_event(case: Case, device) -> Outcome:
    tensors: list[Tensor] = []
    for interface in (odeint, odeint_adjoint):
        func, y0, t = case.start(device)

        def event(t, y):
            return t - 0.7 + 0.01 * as_tuple(y)[0].sum()

        found = odeint_event(
            func, case.state(y0), t[0].reshape(1), event_fn=event, odeint_interface=interface, **case.solver
        )
        event_t, ys = found
        grads = torch.autograd.grad(event_t + weighted(ys), (*y0, t, *func.parameters()))
        tensors += [event_t, *as_tuple(ys), *grads]
    return Outcome(tuple(tensors))


def by_dense(case: Case, device) -> Outcome:
    func, y0, t = case.start(device)
    with torch.no_grad():
        dense = odeint_dense(func, case.state(y0), t[0], t[-1], **case.recording)
        ys = dense(torch.linspace(float(t[0]), float(t[-1]), 9, dtype=F64, device=device).reshape(3, 3))
    return Outcome(as_tuple(ys), dense.stats)


FUNCTIONS = (by_odeint, by_backprop, by_adjoint, by_discrete, by_event, by_dense)


def normal(*shape, seed=0, dtype=F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network() -> nn.Module:
    return MLP(dim=3, hidden=4, seed=1, timed=True)


NETWORK = Case(network, normal(5, 3), linspace(0.0, 1.0, 4), LOOSE)


def settings(method: str) -> dict[str, Any]:
    """Return times and tolerances with a few steps, some with several outputs and some with none."""
    if is_adaptive(method):
        rtol = 1e-2 if order_of(method) < 3 else 1e-3
        return dict(method=method, rtol=rtol, atol=rtol, options=dict(first_step=0.3))
    return dict(method=method, rtol=1e-4, atol=1e-4, options=dict(step_size=0.15))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "scipy_solver"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_method_through_every_public_function_agrees_with_the_reference(path, function, method):
    if function is by_discrete and method not in (*TABLEAUS, *IMPLICIT_TABLEAUS):
        pytest.skip("the discrete adjoint is of Runge-Kutta methods")
    case = NETWORK._replace(solver=settings(method))
    assert_agree(*both(path, lambda: function(case, path.device)))


# ------------------------------------------------------------------ states, times and options
class Pair(nn.Module):
    """A field of two components of different shapes."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=F64))

    def forward(self, t, state):
        a, b = state
        return -self.w * a + torch.cos(3 * t) * b.sum(), torch.sin(b) * self.w.sum() - 0.1 * b


class Spiral(nn.Module):
    """A complex field."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([-0.2 + 3j, 0.1 - 1j], dtype=C128))

    def forward(self, t, y):
        return self.w * y * (1 + 0.5 * torch.sin(t)) + 0.1 * torch.conj(y)


class Switched(nn.Module):
    """Another field after t = 0.4."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -0.5, 0.3], dtype=F64))

    def forward(self, t, y):
        return torch.where(t < 0.4, self.w, -2 * self.w) * torch.sin(y)


class Sine(nn.Module):
    """y' = w sin(y) cos(3 t), for states of any shape."""

    def __init__(self, dtype=F64):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.5, dtype=dtype))

    def forward(self, t, y):
        return self.w * torch.sin(y) * torch.cos(3 * t)


def largest(scaled) -> Tensor:
    parts = [part.abs().max() for part in as_tuple(scaled) if part.numel()]
    return torch.stack([part.to(F64) for part in parts]).max()


def of_state_and_gradient(parts) -> Tensor:
    """A norm of the user for the backward solve."""
    return largest(tuple(parts))


def of_parameters(parts) -> Tensor:
    """A norm of the user of (t, y, adj_y, *adj_params) that uses only the parameters."""
    return largest(tuple(parts[3:]))


PAIR = Case(Pair, (normal(2, 3), normal(4, seed=1)), linspace(0.0, 1.0, 4), LOOSE)
EACH = torch.tensor([1e-3, 1e-4, 1e-2], dtype=F64)


def variant(base: Case = NETWORK, *, t: Tensor | None = None, y0: Any = None, options: Any = None, **solver) -> Case:
    solver = {**base.solver, **solver}
    if options is not None:
        solver["options"] = options
    return base._replace(t=base.t if t is None else t, y0=base.y0 if y0 is None else y0, solver=solver)


CASES = {
    "tuple": PAIR,
    "tuple, a tolerance for each component": variant(PAIR, rtol=(1e-3, 1e-4), atol=(1e-4, 1e-3)),
    "tuple, a tolerance for each element": variant(PAIR, rtol=(EACH, 1e-4), atol=(1e-4, 1e-3)),
    "tuple with an empty component": variant(PAIR, y0=(normal(2, 3), normal(0))),
    "a tolerance for each element": variant(rtol=EACH, atol=1e-2 * EACH),
    "a state of no dimensions": Case(Sine, torch.tensor(0.7, dtype=F64), linspace(0.0, 1.0, 4), LOOSE),
    "complex": Case(Spiral, torch.tensor([1.0 + 0.5j, -0.3j], dtype=C128), linspace(0.0, 1.0, 4), LOOSE),
    "times in single precision": variant(t=torch.linspace(0.0, 1.0, 4)),
    "reversed time": variant(t=linspace(1.0, -1.0, 4)),
    "jump_t and step_t": Case(
        Switched, normal(3), linspace(0.0, 1.0, 4), dict(**LOOSE, options=dict(jump_t=[0.4], step_t=[0.2, 0.7]))
    ),
    "a jump where the solve begins": Case(
        Switched, normal(3), linspace(0.4, 1.0, 3), dict(**LOOSE, options=dict(jump_t=[0.4], first_step=0.2))
    ),
    "a jump in reversed time": Case(
        Switched, normal(3), linspace(1.0, 0.0, 4), dict(**LOOSE, options=dict(jump_t=[0.4]))
    ),
    "a norm of the user's": variant(options=dict(norm=largest)),
    "a norm of the user's, of a tuple": variant(PAIR, options=dict(norm=largest)),
    "a norm that is a number": variant(options=dict(norm=lambda e: float(e.abs().mean()))),
    "a norm of the user's in the backward pass": variant(adjoint_options=dict(norm=of_state_and_gradient)),
    "a norm of the parameters alone in the backward pass": variant(
        adjoint_rtol=1e-6, adjoint_atol=1e-6, adjoint_options=dict(norm=of_parameters)
    ),
    "seminorm": variant(adjoint_options=dict(norm="seminorm")),
    "rejected steps": variant(t=linspace(0.0, 3.0, 3), options=dict(first_step=3.0)),
    "accurate outputs": variant(options=dict(dense="accurate")),
    "accurate outputs of bosh3": variant(method="bosh3", options=dict(dense="accurate")),
    "accurate outputs of dopri8": variant(method="dopri8", options=dict(dense="accurate")),
    "controller I": variant(t=linspace(0.0, 3.0, 3), options=dict(controller="I", first_step=2.0)),
    "controller PI": variant(t=linspace(0.0, 3.0, 3), options=dict(controller="PI", first_step=2.0)),
    "controller PID": variant(t=linspace(0.0, 3.0, 3), options=dict(controller="PID", first_step=2.0)),
    "max_step": variant(options=dict(max_step=0.2)),
    "min_step": variant(rtol=1e-9, atol=1e-9, options=dict(min_step=0.2)),
    "the solver's own first step": variant(options=dict()),
    "cubic outputs on a grid": variant(method="rk4", options=dict(step_size=0.15, interp="cubic")),
    "a grid's own side of a jump": variant(method="rk4", options=dict(step_size=0.15, perturb=True)),
}
ONCE = (by_odeint, by_backprop, by_adjoint, by_discrete)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("function", ONCE, ids=lambda f: f.__name__)
def test_every_kind_of_state_and_option_agrees_with_the_reference(path, function, name):
    case = CASES[name]
    actual, expected = both(path, lambda: function(case, path.device))
    assert_agree(actual, expected)
    if name == "rejected steps":
        assert actual.stats.rejected > 0


@pytest.mark.filterwarnings("ignore:t holds one time")
def test_a_single_time_returns_the_state(path):
    y0 = normal(3).to(path.device)
    with node_cuda.backend("fused"):
        assert torch.equal(odeint(lambda t, y: -y, y0, linspace(0.5, 0.5, 1)), y0[None])


# ------------------------------------------------------------------ dtypes
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


class Sines(nn.Module):
    """y' = w sin(y) cos(3 t), with a parameter for each element."""

    def __init__(self, dtype, n):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, n, dtype=F64).to(dtype))

    def forward(self, t, y):
        return self.w * torch.sin(y) * torch.cos(3 * t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("function", [by_adjoint, by_backprop, by_discrete], ids=lambda f: f.__name__)
def test_every_dtype_agrees_up_to_its_rounding(path, function, method, dtype):
    """All steps have the same size, so that no step is chosen by an error of a few rounding errors. A stage in them may
    be rounded differently once. The gradient of a half is a sum of a few hundred halves."""
    steps = dict(first_step=0.25, max_step=0.25) if method == "dopri5" else dict(step_size=0.25)
    case = Case(
        lambda: Sines(dtype, 37),
        normal(37).to(dtype),
        linspace(0.0, 1.0, 4),
        dict(method=method, rtol=1e3, atol=1e3, options=steps),
    )
    actual, expected = both(path, lambda: function(case, path.device))
    assert_agree(actual, expected, 16 * torch.finfo(dtype).eps)
    assert all(x.dtype in (dtype, F64) for x in actual.tensors)


def test_parameters_may_have_other_dtypes_than_the_state(path):
    """Gradients accumulate at least in float32, and are returned in the dtypes of the parameters."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(torch.linspace(0.5, 1.5, 5).to(dtype) for dtype in DTYPES)

        def forward(self, t, y):
            for w in self.weights:
                y = y * torch.cos(torch.abs(w).to(y.dtype))
            return y

    case = Case(Mixed, normal(5), linspace(0.0, 1.0, 3), LOOSE)
    (ys, _, _, *grads), (expected_ys, _, _, *expected) = (
        x.tensors for x in both(path, lambda: by_adjoint(case, path.device))
    )
    assert_near(ys, expected_ys)
    for a, b in zip(grads, expected, strict=True):
        assert_near(a, b, 16 * torch.finfo(a.dtype).eps)
    assert [g.dtype for g in grads] == list(DTYPES)


# ------------------------------------------------------------------ how a solve ends
class Ending(NamedTuple):
    func: Callable[[Tensor, Tensor], Tensor]
    status: Status
    options: dict[str, Any]
    y0: float = 1.0
    t1: float = 2.0


def broken(t, y):
    return torch.where(t > 0.5, y * math.nan, -y)


ENDINGS = {
    "done": Ending(lambda t, y: -y, Status.SUCCESS, {}),
    "out of steps": Ending(lambda t, y: -y, Status.MAX_STEPS, dict(max_num_steps=3, first_step=1e-3)),
    "no steps allowed": Ending(lambda t, y: -y, Status.MAX_STEPS, dict(max_num_steps=0)),
    "enough steps for each output": Ending(lambda t, y: -y, Status.SUCCESS, dict(max_num_steps=4, max_step=0.3)),
    "underflow": Ending(lambda t, y: y * y, Status.STEP_UNDERFLOW, dict(dfactor=0.05)),
    "the field is infinite from the start": Ending(lambda t, y: y / 0.0, Status.NON_FINITE, {}),
    "the state is NaN": Ending(lambda t, y: -y, Status.NON_FINITE, {}, math.nan),
    "the state is NaN, and the first step given": Ending(
        lambda t, y: -y, Status.NON_FINITE, dict(first_step=1e-300), math.nan
    ),
    "NaN later": Ending(broken, Status.NON_FINITE, dict(dfactor=0.05)),
    "NaN later, in a norm of the user's": Ending(broken, Status.NON_FINITE, dict(norm=largest, dfactor=0.05)),
    "the field is infinite after its start": Ending(
        lambda t, y: torch.where(t > 0, y / 0.0, -y), Status.STEP_UNDERFLOW, {}
    ),
    "the field is infinite after its start, in a norm of the user": Ending(
        lambda t, y: torch.where(t > 0, y / 0.0, -y), Status.STEP_UNDERFLOW, dict(norm=largest)
    ),
    "NaN in a step of min_step": Ending(broken, Status.NON_FINITE, dict(min_step=0.05)),
}


@pytest.mark.parametrize("name", list(ENDINGS))
def test_every_solve_ends_as_the_reference_does(path, name):
    ending = ENDINGS[name]
    y0 = torch.full((3,), ending.y0, dtype=F64, device=path.device)
    t = torch.tensor([0.0, 1.0, ending.t1], dtype=F64)

    def found(throw: bool):
        options = dict(ending.options, throw=throw)
        try:
            return solve(ending.func, y0, t, rtol=1e-3, atol=1e-6, options=options)
        except SolveError as error:
            return error

    actual, expected = both(path, lambda: found(throw=True))
    assert actual.status is expected.status is ending.status
    if isinstance(expected, SolveError):
        assert type(actual) is type(expected) and ending.status.sentence in str(actual)
        assert actual.t == pytest.approx(expected.t, rel=1e-6)
    # When a field fails, steps shrink to the last bit, where the pow of a GPU may differ.
    if path.device.type == "cpu":
        assert actual.stats.rejected == expected.stats.rejected
        assert not isinstance(expected, SolveError) or str(actual) == str(expected)
    actual, expected = both(path, lambda: found(throw=False))
    assert actual.status is expected.status is ending.status
    assert_near(actual.ys, expected.ys)


@pytest.mark.filterwarnings("ignore:rtol = 0 and atol")
def test_tolerances_that_no_state_can_meet_are_refused_as_by_the_reference(path):
    """The state is finite, but not in units of the tolerance, which is too small for half precision."""
    y0 = torch.full((3,), 6e4, dtype=torch.float16, device=path.device)

    def found():
        with pytest.raises(InvalidInput) as caught:
            odeint(lambda t, y: y * 0 + 6e4, y0, torch.tensor([0.0, 1.0]), rtol=0.0, atol=1e-36)
        return str(caught.value)

    actual, expected = both(path, found)
    assert actual == expected


@pytest.mark.parametrize("limit", [1000.0, 2.5, math.inf, 10**30])
def test_max_num_steps_may_be_any_number(path, limit):
    options = dict(max_num_steps=limit, max_step=0.1)

    def found():
        y0 = normal(3).to(path.device)
        solution = solve(lambda t, y: -y, y0, linspace(0.0, 1.0, 2), **LOOSE, options=dict(options, throw=False))
        return solution.status, solution.stats.accepted

    actual, expected = both(path, found)
    assert actual == expected
    assert actual[0] is (Status.MAX_STEPS if limit == 2.5 else Status.SUCCESS)


def test_a_gradient_of_the_parameters_that_is_not_finite_fails_as_in_the_reference(path):
    """The state and its gradient are finite: only the parameters' part of the norm is NaN."""

    class Cusp(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.ones(3, dtype=F64)), nn.Parameter(torch.zeros(3, dtype=F64))

        def forward(self, t, y):
            return -self.w * y + 0.0 * torch.sqrt(self.v)

    def found():
        y0 = normal(3).to(path.device).requires_grad_()
        loss = weighted(odeint_adjoint(Cusp().to(path.device), y0, linspace(0.0, 1.0, 3), **LOOSE))
        with pytest.raises(SolveError) as caught:
            loss.backward()
        return caught.value

    actual, expected = both(path, found)
    assert actual.status is expected.status is Status.NON_FINITE and str(actual) == str(expected)


def test_callbacks_are_called_with_the_same_numbers(path):
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0, dtype=F64))
            self.seen: list[tuple[str, Tensor]] = []

        def forward(self, t, y):
            return -self.w * torch.sin(3 * y) * torch.cos(5 * t)

        def note(self, name, t0, parts, dt):
            numbers = torch.cat([x.detach().double().reshape(-1).cpu() for x in (t0, *parts, dt)])
            self.seen.append((name, numbers))

        def callback_step(self, t0, y0, dt):
            self.note("step", t0, (y0,), dt)

        def callback_accept_step(self, t0, y0, dt):
            self.note("accept", t0, (y0,), dt)

        def callback_reject_step(self, t0, y0, dt):
            self.note("reject", t0, (y0,), dt)

        def callback_step_adjoint(self, t0, y0, dt):
            self.note("adjoint", t0, y0, dt)

    def seen():
        func = Watched().to(path.device)
        y0 = normal(3).to(path.device).requires_grad_()
        odeint_adjoint(func, y0, linspace(0.0, 2.0, 3), **LOOSE, options=dict(first_step=2.0)).sum().backward()
        return func.seen

    actual, expected = both(path, seen)
    assert [name for name, _ in actual] == [name for name, _ in expected]
    assert {name for name, _ in actual} == {"step", "accept", "reject", "adjoint"}
    for (_, a), (_, b) in zip(actual, expected, strict=True):
        assert_near(a, b)


# ------------------------------------------------------------------ the same bits


def assert_same_bits(one: Outcome, other: Outcome) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))
    assert one.stats == other.stats


# ------------------------------------------------------------------ the cost of a step
class Moves(TorchDispatchMode):
    """Counts the operations that read or write data of `size` elements or more, and the reads by the host."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.moved: list[str] = []
        self.read = 0
        self.running = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if self.running and not is_view and "empty" not in name:
            everything = _pytree.tree_leaves((args, kwargs, result))
            if any(isinstance(x, Tensor) and x.numel() >= self.size for x in everything):
                self.moved.append(name)
            self.read += name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")
        return result


class Hidden(torch.autograd.Function):
    """y' = -p y cos t and its derivatives, without counting in both directions."""

    @staticmethod
    def forward(ctx, counter, t, y, p):
        counter.running, ctx.counter = False, counter
        ctx.save_for_backward(t, y, p)
        result = -p * y * torch.cos(t)
        counter.running = True
        return result

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.counter.running = False
        t, y, p = ctx.saved_tensors
        grads = (None, None, -p * torch.cos(t) * grad, -y * torch.cos(t) * grad)
        ctx.counter.running = True
        return grads


class HiddenField(nn.Module):
    """A field without counting of its operations. `given` makes its result."""

    def __init__(self, counter: Moves, given: str, like: Tensor):
        super().__init__()
        self.counter, self.given = counter, given
        self.buffer = torch.empty_like(like)
        self.p = nn.Parameter(torch.full_like(like, 0.1))

    def forward(self, t, y):
        if self.given == "fresh":
            return Hidden.apply(self.counter, t, y, self.p)
        self.counter.running = False
        out = (
            torch.mul(y, -0.1, out=self.buffer)
            if self.given == "in a static buffer"
            else (-0.1 * y).t().contiguous().t()
        )
        self.counter.running = True
        return out


class Cost(NamedTuple):
    steps: float
    launches: float
    bytes: float
    moved: float
    scalars: float
    reads: float
    host_reads: float


SHAPE = (16, 20)  # more elements than the control has bytes


def cost(path: Path, monkeypatch, steps: int, *, given="fresh", inside=0, method="dopri5", backward=False) -> Cost:
    """Return the cost of a solve of this many steps without f, with `inside` outputs in each step, none of them at its
    end."""
    counter, reads = Moves(SHAPE[0] * SHAPE[1]), 0
    read = DeviceStepControl.read

    def counted(self):
        nonlocal reads
        reads += 1
        return read(self)

    y0 = normal(*SHAPE).to(path.device)
    func = HiddenField(counter, given, y0)
    t = torch.tensor([0.0, *((i + (j + 1) / (inside + 1)) / steps for i in range(steps) for j in range(inside))])
    t = torch.cat([t.double(), torch.ones(0 if inside else 1, dtype=F64)])
    options = dict(first_step=1 / steps, max_step=1 / steps)  # with tolerances that accept all of them
    path.solves.clear()
    with monkeypatch.context() as patch, node_cuda.backend("fused"):
        patch.setattr(DeviceStepControl, "read", counted)
        if backward:
            y0.requires_grad_()
            found = solve(func, y0, t, rtol=1e3, atol=1e3, method=method, options=options, gradient="adjoint")
            loss = weighted(found.ys)
            path.solves.clear()
            counter.moved, counter.read, reads, found.stats.host_reads = [], 0, 0, 0
            with counter:
                loss.backward()
            taken = found.stats.nfe_backward // 6
        else:
            with counter, torch.no_grad():
                found = solve(func, y0, t, rtol=1e3, atol=1e3, method=method, options=options)
            assert found.stats.rejected == 0
            taken = found.stats.accepted
    return Cost(taken, path.launches, path.bytes, len(counter.moved), counter.read, reads, found.stats.host_reads)


def of_a_step(path, monkeypatch, **how) -> Cost:
    """Return the cost of one more step, in which the cost of the set-up cancels."""
    few, many = (cost(path, monkeypatch, steps, **how) for steps in (16, 32))  # the last output is at the end of a step
    steps = many.steps - few.steps
    assert steps >= 15
    return Cost(*((b - a) / steps for a, b in zip(few, many, strict=True)))


SIZE = 8 * SHAPE[0] * SHAPE[1]


@pytest.mark.parametrize("inside", [0, 1, 3])
def test_a_dopri5_step_is_seven_launches_and_eight_with_outputs_and_moves_what_the_method_must(
    path, monkeypatch, inside
):
    """6 + 5 + 4 + 3 + 2 + ... of the five stages, 8 of the last one with the error, 4 of the norm: 37 sizes of the
    state. Outputs: y0 and six slopes once, and each output."""
    step = of_a_step(path, monkeypatch, inside=inside)
    assert step.launches == (8 if inside else 7)
    assert step.bytes == (37 + (7 + inside if inside else 0)) * SIZE
    assert step.moved == 0
    assert step.scalars == 0 and step.reads == step.host_reads == 1


@pytest.mark.parametrize("given", ["in a static buffer", "transposed"])
def test_outputs_of_the_field_in_another_layout_are_copied_once(path, monkeypatch, given):
    """Six clones, each with a read and a write: 12 more sizes of the state."""
    step = of_a_step(path, monkeypatch, given=given)
    assert step.moved == 6
    assert step.launches == 7 and step.bytes == 37 * SIZE
    assert step.scalars == 0 and step.reads == step.host_reads == 1


def test_a_step_of_the_backward_pass_moves_state_and_gradients_by_kernels_only(path, monkeypatch):
    step = of_a_step(path, monkeypatch, backward=True)
    assert step.moved == 0
    assert step.launches == 7 and step.bytes == 2 * 37 * SIZE
    assert step.scalars == 0 and step.reads == 1


def test_a_step_of_the_backward_pass_is_21_launches(shim, monkeypatch):
    """7 of the step, 6 that pack f and its vjp, 6 that sum the parameters' gradient, its norm and its commit."""
    launches = []
    here = Path(torch.device("cpu"))
    for steps in (8, 24):
        before = shim.lib.shim_launches()
        taken = cost(here, monkeypatch, steps, backward=True).steps
        launches.append((shim.lib.shim_launches() - before, taken))
    (few, steps), (many, more) = launches
    forward = 7  # the forward pass has the same number of steps
    assert (many - few) / (more - steps) == pytest.approx(forward + 21, abs=0.5)


# ------------------------------------------------------------------ the user's tensors
class Keeping(nn.Module):
    """Keeps every t and y that it gets, every k that it returns, and copies of them all."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.5, dtype=F64))
        self.kept: list[tuple[Tensor, ...]] = []
        self.copies: list[tuple[Tensor, ...]] = []

    def forward(self, t, y):
        k = self.w * torch.sin(y) * torch.cos(3 * t)
        self.kept.append((t, y, k))
        self.copies.append(tuple(x.detach().clone() for x in (t, y, k)))
        return k


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "rk4", "implicit_adams"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_tensors_that_a_field_keeps_are_never_overwritten(path, function, method):
    if function is by_discrete and method not in TABLEAUS:
        pytest.skip("the discrete adjoint is of Runge-Kutta methods")
    fields = []

    def make():
        fields.append(Keeping())
        return fields[-1]

    options = dict(first_step=2.0) if method == "dopri5" else settings(method)["options"]
    case = Case(make, normal(2, 3), linspace(0.0, 1.0, 4), dict(**LOOSE, method=method, options=options))
    with node_cuda.backend("fused"):
        function(case, path.device)
    for func in fields:
        assert func.kept
        for kept, copies in zip(func.kept, func.copies, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


class Odd(nn.Module):
    """A field of states of shape (3, 4) that returns the result of `give(self, t, y)`."""

    def __init__(self, give):
        super().__init__()
        self.give = give
        self.w = nn.Parameter(normal(4, 3, seed=7))
        self.z = nn.Parameter(normal(3, 4, seed=8, dtype=C128))
        self.register_buffer("static", torch.zeros(3, 4, dtype=F64))
        self.register_buffer("wide", torch.zeros(3, 9, dtype=F64))

    def forward(self, t, y):
        return self.give(self, t, y)


ODD = {
    "its argument": lambda f, t, y: y,
    "a view of its argument": lambda f, t, y: y.view(1, 3, 4)[0],
    "its argument transposed twice, and shifted": lambda f, t, y: y.flip(0).flip(1),
    "a transposed tensor": lambda f, t, y: (f.w * torch.sin(y.T)).T,
    "a column expanded": lambda f, t, y: torch.sin(y[:, :1] * f.w[0, 0]).expand(3, 4),
    "a number expanded": lambda f, t, y: t.expand(3, 4),
    "every second element": lambda f, t, y: torch.sin(torch.cat([y, f.w.T * y], 1))[:, ::2],
    "not at the start of its memory": lambda f, t, y: torch.cat([y.new_zeros(1), (f.w.T * y).reshape(-1)])[1:].view(
        3, 4
    ),
    "a parameter transposed": lambda f, t, y: f.w.T,
    "a part of a parameter": lambda f, t, y: f.w[:3, :1].expand(3, 4),
    "an imaginary part, with its sign still to apply": lambda f, t, y: torch.conj(f.z * y).imag,
    "zeros without memory": lambda f, t, y: torch._efficientzerotensor((3, 4), dtype=F64, device=y.device) * f.w[0, 0],
    "a tensor that requires grad": lambda f, t, y: torch.sin(y.detach().clone().requires_grad_()),
    "another dtype": lambda f, t, y: (f.w.T * y).float(),
}
STATIC = {
    "a static buffer": lambda f, t, y: torch.mul(y, -1.0, out=f.static),
    "a static buffer that is not contiguous": lambda f, t, y: f.wide[:, 1:8:2].copy_(-y),
    "a static buffer inside another": lambda f, t, y: f.wide.view(-1)[3:15].view(3, 4).copy_(-y),
}


@pytest.mark.parametrize("gradient, method", MODES_AND_METHODS)
@pytest.mark.parametrize("name", ODD)
def test_a_field_may_return_any_kind_of_tensor(path, name, gradient, method):
    def solved():
        y0 = normal(3, 4).to(path.device).requires_grad_()
        return in_mode(gradient, Odd(ODD[name]).to(path.device), y0, y0, settings(method))

    # Its rounding to float32 differs if the arguments differ.
    assert_agree(*both(path, solved), 1e-6 if name == "another dtype" else AGREE)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "bosh3", "explicit_adams"])
@pytest.mark.parametrize("name", STATIC)
def test_the_output_of_a_field_that_reuses_one_buffer_is_copied(path, name, method):
    def solved():
        y0 = normal(3, 4).to(path.device)
        return in_mode("none", Odd(STATIC[name]).to(path.device), y0, y0, settings(method))

    assert_agree(*both(path, solved))


class Laid(torch.autograd.Function):
    """The identity, with a gradient in another memory layout at each evaluation."""

    count = 0

    @staticmethod
    def forward(ctx, w):
        return w.clone()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        Laid.count += 1
        ways = (
            lambda x: x.contiguous(),
            lambda x: x.mT.contiguous().mT,
            lambda x: torch.stack([x, x], -1)[..., 1],
            lambda x: torch.conj(x.conj().resolve_conj()),
            lambda x: torch.imag(torch.conj(torch.complex(x, -x))) if not x.is_complex() else x,
            lambda x: x.mean().expand(x.shape),
        )
        return ways[Laid.count % len(ways)](grad)


@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
def test_gradients_of_parameters_may_have_any_memory_layout(path, dtype, first):
    """The sums have the layout of the first gradient."""

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(normal(3, 4, dtype=dtype))

        def forward(self, t, y):
            w = Laid.apply(self.w)
            return torch.sin(y) * (w.real if y.dtype != dtype else w)

    def solved():
        Laid.count = first
        y0 = normal(3, 4, seed=1).to(path.device).requires_grad_()
        solver = dict(method="bosh3", rtol=2e-2, atol=2e-2)
        return in_mode("adjoint", Field().to(path.device), y0, y0, solver)

    assert_agree(*both(path, solved))


GRADIENTS = {
    "expanded": lambda ys: torch.ones((), dtype=ys.dtype, device=ys.device).expand(ys.shape),
    "transposed": lambda ys: normal(*reversed(ys.shape)).to(ys).permute(*reversed(range(ys.ndim))),
    "every second element": lambda ys: torch.stack([normal(*ys.shape).to(ys)] * 2, -1)[..., 1],
    "conjugated": lambda ys: torch.conj(normal(*ys.shape).to(ys) * (1 + 0.5j)) if ys.is_complex() else ys.detach(),
    "an imaginary part, its sign still to apply": lambda ys: (
        ys.detach() if ys.is_complex() else torch.conj(normal(*ys.shape, dtype=C128).to(ys.device)).imag
    ),
}


@pytest.mark.parametrize("gradient, method", [("adjoint", "dopri5"), ("discrete", "dopri5"), ("discrete", "rk4")])
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("func", [Sine, Spiral])
def test_the_gradient_of_the_outputs_may_have_any_memory_layout(path, func, name, gradient, method):
    def solved():
        field = func().to(path.device)
        y0 = normal(3, 2, dtype=C128 if func is Spiral else F64).to(path.device).requires_grad_()
        t = linspace(0.0, 1.0, 4).to(path.device).requires_grad_()
        ys = solve(field, y0, t, gradient=gradient, **settings(method)).ys
        assert isinstance(ys, Tensor)
        return Outcome(torch.autograd.grad(ys, (y0, t, *field.parameters()), GRADIENTS[name](ys)))

    assert_agree(*both(path, solved))


class Conjugated(Spiral):
    """Gets a conjugated state and returns one."""

    def forward(self, t, y):
        return torch.conj(super().forward(t, torch.conj(y)))


@pytest.mark.parametrize("gradient", MODES)
def test_a_conjugated_field_and_state_agree_with_the_reference(path, gradient):
    def solved():
        func = Conjugated().to(path.device)
        leaf = torch.tensor([1.0 + 0.5j, -0.3j], dtype=C128, device=path.device).requires_grad_()
        y0 = torch.conj(leaf)
        assert y0.is_conj()
        return in_mode(gradient, func, y0, leaf, LOOSE)

    assert_agree(*both(path, solved))


def in_mode(gradient: str, func: nn.Module, y0: Tensor, leaf: Tensor, solver: dict[str, Any]) -> Outcome:
    """Return the outputs, and the gradients for the leaf and the parameters unless gradient="none"."""
    mode = "backprop" if gradient == "none" else gradient
    with torch.set_grad_enabled(gradient != "none"):
        ys = solve(func, y0, linspace(0.0, 1.0, 4), gradient=mode, **solver).ys
    assert isinstance(ys, Tensor)
    if gradient == "none":
        return Outcome((ys,))
    inputs = (leaf, *func.parameters())
    grads = torch.autograd.grad(weighted(ys), inputs, allow_unused=True)
    return Outcome((ys, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True))))


STATES = {
    "transposed": lambda device: normal(4, 3).to(device).T,
    "expanded": lambda device: normal(3, 1).to(device).expand(3, 4),
    "every second element": lambda device: normal(3, 8).to(device)[:, ::2],
    "not at the start of its memory": lambda device: normal(13).to(device)[1:].view(3, 4),
    "an imaginary part, its sign still to apply": lambda device: torch.conj(normal(3, 4, dtype=C128).to(device)).imag,
    "channels last": lambda device: normal(2, 3, 4, 5).to(device).contiguous(memory_format=torch.channels_last),
    "a parameter": lambda device: nn.Parameter(normal(3, 4).to(device)),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("gradient, method", MODES_AND_METHODS)
def test_a_state_may_have_any_memory_layout(path, gradient, name, method):
    def solved():
        y0 = STATES[name](path.device)
        before = y0.detach().clone()
        leaf = y0.detach().requires_grad_()  # shares its memory
        outcome = in_mode(gradient, Sine().to(path.device), leaf, leaf, settings(method))
        assert torch.equal(y0, before), "the caller's y0 was rewritten"
        return outcome

    assert_agree(*both(path, solved))


@pytest.mark.parametrize("primitive", ["dense_outputs", "scaled_error"])
def test_autograd_notices_that_a_kernel_overwrote_a_saved_tensor(path, primitive):
    """Without the version counter the gradient would be computed from the overwritten tensor, and be wrong."""
    y0, y1, k = (normal(5, seed=seed).to(path.device) for seed in range(3))
    arithmetic = dispatch.make_arithmetic("fused", y0, 1.0, ErrorNorm(1e-3, 1e-3), (0.0, 0.5, 1.0))
    assert isinstance(arithmetic, Fused)
    at = arithmetic.interval(0.0, 1.0, 1.0)
    polynomials = arithmetic.polynomials(((0, (1.0, -0.5)),))
    target = torch.ones(2, 5, dtype=F64, device=path.device) if primitive == "dense_outputs" else torch.ones_like(y0)
    w = torch.ones_like(target).requires_grad_()
    loss = (w * target).sum()
    loss.backward(retain_graph=True)
    assert w.grad is not None and bool((w.grad == 1.0).all())
    if primitive == "dense_outputs":
        arithmetic.dense_outputs(polynomials, at, y0, y1, [k], 1, target)
    else:
        arithmetic.scaled_error(at, target, None, y0, y1)
    assert not bool((target == 1.0).any()), "the kernel wrote nothing"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("function", [*FUNCTIONS, "a solve that fails"], ids=lambda f: getattr(f, "__name__", f))
def test_a_solve_frees_its_memory_without_the_garbage_collector(path, function):
    """A reference cycle would keep workspace and stages on the device until Python collects cycles, and Python does not
    know how much memory of the GPU is used."""
    case = NETWORK

    def run():
        if callable(function):
            function(case, path.device)
            return
        with pytest.raises(ZeroDivisionError):
            solve_a_little(normal(3).to(path.device), lambda t, y: -y if t < 0.5 else 1 / 0)

    gc.collect()
    gc.disable()
    try:
        with node_cuda.backend("fused"):
            run()
        found = [weakref.ref(arithmetic) for arithmetic in path.solves]
        assert found
        path.solves.clear()
        assert not any(arithmetic() for arithmetic in found)
    finally:
        gc.enable()


# ------------------------------------------------------------------ the choice of the path
def solve_a_little(y0: Tensor, func: Callable = lambda t, y: -y, **solver) -> Tensor:
    return odeint(func, y0, linspace(0.0, 1.0, 3), **{**LOOSE, **solver})


def test_the_innermost_context_decides_until_it_ends_also_by_an_exception(monkeypatch):
    monkeypatch.delenv("NODE_CUDA_BACKEND", raising=False)
    assert dispatch.chosen() == "auto"
    with node_cuda.backend("fused"):
        assert dispatch.chosen() == "fused"
        with pytest.raises(ZeroDivisionError), node_cuda.backend("reference"):
            assert dispatch.chosen() == "reference"
            raise ZeroDivisionError
        assert dispatch.chosen() == "fused"
    assert dispatch.chosen() == "auto"


def test_a_context_applies_to_its_thread_only(monkeypatch):
    monkeypatch.delenv("NODE_CUDA_BACKEND", raising=False)
    with node_cuda.backend("reference"):
        assert in_a_thread(dispatch.chosen) == "auto"


def in_a_thread(call: Callable[[], Any]) -> Any:
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    assert found, "the thread raised"
    return found[0]


def test_the_environment_decides_outside_any_context(shim, monkeypatch):
    y0 = normal(3)
    for word, fused in (("reference", False), ("fused", True), ("auto", True)):
        monkeypatch.setenv("NODE_CUDA_BACKEND", word)
        before = shim.lib.shim_launches()
        solve_a_little(y0)
        assert (shim.lib.shim_launches() > before) is fused
        with node_cuda.backend("reference"):
            before = shim.lib.shim_launches()
            solve_a_little(y0)
            assert shim.lib.shim_launches() == before


def test_an_unknown_name_is_refused_with_a_list_of_the_names(monkeypatch):
    names = "must be one of 'auto', 'reference', 'fused'"
    with pytest.raises(InvalidInput, match=f"{names}; got 'cuda'"), node_cuda.backend("cuda"):
        pytest.fail("entered")
    monkeypatch.setenv("NODE_CUDA_BACKEND", "gpu")
    with pytest.raises(InvalidInput, match=f"NODE_CUDA_BACKEND {names}; got 'gpu'"):
        solve_a_little(normal(3))
    with node_cuda.backend("reference"):
        solve_a_little(normal(3))


def test_fused_on_the_cpu_is_refused_with_the_reason_and_a_remedy():
    for call in (solve_a_little, lambda y0: odeint_dense(lambda t, y: -y, y0, torch.tensor(0.0), torch.tensor(1.0))):
        with node_cuda.backend("fused"), pytest.raises(Unsupported) as caught:
            call(normal(3))
        message = str(caught.value)
        assert "the state is on cpu" in message and "CUDA devices" in message and '"auto"' in message
    with node_cuda.backend("auto"):
        solve_a_little(normal(3))


@pytest.mark.parametrize("inside, fused", [("reference", False), ("fused", True)])
def test_the_backward_pass_uses_the_path_of_its_forward_pass(path, inside, fused):
    """Also outside of the context, in another context, and in another thread."""
    other = "fused" if inside == "reference" else "reference"
    for where in ("outside", "another context", "another thread"):
        func, (y0,), t = NETWORK.start(path.device)
        with node_cuda.backend(inside):
            loss = weighted(odeint_adjoint(func, y0, t, **LOOSE))
        path.solves.clear()
        if where == "outside":
            loss.backward()
        elif where == "another context":
            with node_cuda.backend(other):
                loss.backward()
        else:
            in_a_thread(loss.backward)
        assert (path.launches > 0) is fused, where


class Subclass(Tensor):
    """Observes every operation of torch, as subclasses may."""

    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_tensor_subclass_uses_the_reference(path, method):
    y0 = normal(3).to(path.device)
    expected = solve_a_little(y0, method=method)
    path.solves.clear()
    Subclass.seen = 0
    actual = solve_a_little(y0.as_subclass(Subclass), method=method)
    assert not path.solves and isinstance(actual, Subclass) and Subclass.seen > 20
    assert_near(actual.as_subclass(Tensor), expected)
    with node_cuda.backend("fused"), pytest.raises(Unsupported, match="is a Subclass, and the kernels take plain"):
        solve_a_little(y0.as_subclass(Subclass), method=method)


def test_a_dtype_without_kernels_uses_the_reference(shim):
    y0 = torch.tensor([1.0 + 0.5j, -0.3j])
    expected = solve_a_little(y0, method="rk4")
    before = shim.lib.shim_launches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that complex32 is experimental
        actual = solve_a_little(y0.to(torch.complex32), method="rk4")
        with node_cuda.backend("fused"), pytest.raises(Unsupported, match=r"no kernels for torch\.complex32"):
            solve_a_little(y0.to(torch.complex32), method="rk4")
    assert shim.lib.shim_launches() == before
    assert_near(actual.to(torch.complex64), expected, 1e-2)


TRANSFORMS = {
    "grad": lambda f, y, w: torch.func.grad(lambda y: f(y, w).sum())(y),
    "grad of a parameter": lambda f, y, w: torch.func.grad(lambda w: f(y, w).sum())(w),
    "vjp": lambda f, y, w: torch.func.vjp(f, y, w)[1](torch.ones(3, *y.shape, dtype=F64, device=y.device)),
    "jvp": lambda f, y, w: torch.func.jvp(f, (y, w), (torch.ones_like(y), torch.ones_like(w)))[1],
    "jvp of a parameter": lambda f, y, w: torch.func.jvp(lambda w: f(y, w), (w,), (torch.ones_like(w),))[1],
    "jacfwd": lambda f, y, w: torch.func.jacfwd(lambda y: f(y, w))(y),
    "jacrev": lambda f, y, w: torch.func.jacrev(lambda y: f(y, w))(y),
    "hessian": lambda f, y, w: torch.func.hessian(lambda y: f(y, w).sum())(y),
    "jvp without recording": lambda f, y, w: without_recording(TRANSFORMS["jvp"], f, y, w),
    "a dual state": lambda f, y, w: tangent(f, y, w, dual_state=True),
    "a dual parameter": lambda f, y, w: tangent(f, y, w, dual_state=False),
}


def without_recording(transform, f, y, w):
    with torch.no_grad():
        return transform(f, y, w)


def tangent(f, y, w, dual_state: bool) -> Tensor:
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        if dual_state:
            y = forward_ad.make_dual(y, torch.ones_like(y))
        else:
            w = forward_ad.make_dual(w, torch.ones_like(w))
        result = forward_ad.unpack_dual(f(y, w)).tangent
        assert result is not None
        return result.clone()


# torch implements the forward derivatives of some operations as scripts.
forward_mode_warns = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@forward_mode_warns
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_and_forward_mode_use_the_reference(path, name, method):
    if name == "jvp without recording" and method == "dopri5":
        pytest.skip("outputs of the reference go into one tensor, which forward mode refuses")

    def f(y, w):
        return solve_a_little(y, lambda t, y: torch.tanh(w @ y) * torch.cos(t), **settings(method))

    y, w = (normal(*shape, seed=len(shape)).to(path.device) for shape in ((3,), (3, 3)))
    actual = TRANSFORMS[name](f, y, w)
    assert not path.solves
    with node_cuda.backend("reference"):
        expected = TRANSFORMS[name](f, y, w)
    for a, b in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert torch.equal(a, b) and bool(b.any())
    with node_cuda.backend("fused"), pytest.raises(Unsupported, match=r"torch\.func transform|forward-mode"):
        TRANSFORMS[name](f, y, w)


def test_vmap_of_a_solve_raises_the_error_of_the_reference(path):
    words, values = [], []
    for name in ("auto", "reference"):
        with node_cuda.backend(name):
            with pytest.raises(RuntimeError, match="vmap") as caught:
                torch.func.vmap(solve_a_little)(normal(2, 3).to(path.device))
            words.append(str(caught.value))
            on_grid = torch.func.vmap(lambda y: solve_a_little(y, method="rk4"))
            values.append(on_grid(normal(2, 3).to(path.device)))
    assert words[0] == words[1] and torch.equal(*values)
    assert not path.solves


@forward_mode_warns
def test_a_field_may_use_transforms(path):
    """As continuous normalising flows do for the divergence."""
    w = normal(3, 3).to(path.device)

    def func(t, state):
        y, _ = state
        f = lambda y: torch.tanh(w @ y)  # noqa: E731
        divergence = torch.func.vmap(lambda y: torch.trace(torch.func.jacrev(f)(y)))(y)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(y, torch.ones_like(y))
            assert torch.autograd.forward_ad.unpack_dual(dual).tangent is not None
        return torch.func.vmap(f)(y), -divergence

    y0 = (normal(4, 3).to(path.device), torch.zeros(4, dtype=F64, device=path.device))

    def solved():
        with torch.no_grad():
            return Outcome(odeint(func, y0, linspace(0.0, 1.0, 3), **LOOSE))

    assert_agree(*both(path, solved))


def test_a_field_may_call_a_solver(path):
    def func(t, y):
        return torch.tanh(odeint(lambda s, z: -z * torch.cos(s), y, linspace(0.0, 0.5, 2), **LOOSE)[-1])

    for gradient in ("none", "backprop"):

        def solved(gradient=gradient):
            y0 = normal(3).to(path.device).requires_grad_()
            with torch.set_grad_enabled(gradient != "none"):
                ys = solve_a_little(y0, func)
            return Outcome((ys,) if gradient == "none" else (ys, *torch.autograd.grad(weighted(ys), y0)))

        assert_agree(*both(path, solved))


def test_solves_in_several_threads_agree_with_those_in_one(path):
    case = NETWORK._replace(solver=settings("dopri5"))

    def solved():
        with node_cuda.backend("fused"):
            return by_adjoint(case, path.device)

    expected = solved()
    found: list[Outcome] = []
    threads = [threading.Thread(target=lambda: found.append(solved())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4, "a thread raised"
    for outcome in found:  # up to rounding: on a GPU a matrix product may depend on other work
        assert_agree(outcome, expected)


def test_second_derivatives_agree_with_the_reference(path):
    def solved():
        func, (y0,), t = NETWORK.start(path.device)
        (first,) = torch.autograd.grad(weighted(odeint(func, y0, t, **LOOSE)), y0, create_graph=True)
        return Outcome((first, *torch.autograd.grad(first.square().sum(), (y0, *func.parameters()))))

    assert_agree(*both(path, solved))


def test_a_field_that_autograd_records_only_sometimes_has_the_gradient_of_the_reference(path):
    def solved():
        w = torch.tensor(1.5, dtype=F64, device=path.device, requires_grad=True)
        y0 = normal(3).to(path.device)

        def func(t, y):
            with torch.set_grad_enabled(bool(t > 0.4)):
                return w * torch.sin(y) * torch.cos(3 * t)

        ys = odeint(func, y0, linspace(0.0, 1.0, 4), **LOOSE, options=dict(max_step=0.2))
        return Outcome((ys, *torch.autograd.grad(weighted(ys), w)))

    assert_agree(*both(path, solved))


# Dynamo checks whether its arguments have a .grad, and suppresses the warning in a way that does not work with the
# filter "error".
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_field_agrees_with_the_reference(path):
    pytest.importorskip("torch._dynamo")
    w = normal(3, 3).to(path.device)
    func = torch.compile(lambda t, y: torch.tanh(y @ w) * torch.cos(t), backend="eager")

    def solved():
        y0 = normal(4, 3).to(path.device).requires_grad_()
        ys = solve_a_little(y0, func)
        return Outcome((ys, *torch.autograd.grad(weighted(ys), y0)))

    assert_agree(*both(path, solved))


def test_a_traced_field_agrees_with_the_reference(path):
    func = torch.fx.symbolic_trace(network()).to(path.device)
    case = NETWORK._replace(func=lambda: func)
    assert_agree(*both(path, lambda: by_adjoint(case, path.device)))


def test_a_solve_in_a_compiled_function_uses_the_kernels(path):
    pytest.importorskip("torch._dynamo")
    y0 = normal(3).to(path.device)

    def solved(y0):
        return odeint(lambda t, y: -y, y0, linspace(0.0, 1.0, 2), method="euler")

    expected = solved(y0)
    path.solves.clear()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(solved, backend="eager")(y0), expected)
    assert path.solves


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_a_trace_of_a_solve_gives_the_result_of_the_solve(path, method):
    y0 = normal(3).to(path.device)

    def solved(y0):
        return solve_a_little(y0, method=method)

    traced: Any = torch.jit.trace(solved, (y0,), check_trace=False)
    with node_cuda.backend("reference"):
        assert_near(traced(y0), solved(y0))


def test_exporting_a_solve_as_a_graph_is_refused_as_by_the_reference(path):
    make_fx: Any = pytest.importorskip("torch.fx.experimental.proxy_tensor").make_fx
    for name in ("reference", "auto"):
        with node_cuda.backend(name), pytest.raises(RuntimeError, match="value out of a tracing tensor"):
            make_fx(lambda y0: solve_a_little(y0))(normal(3).to(path.device))


class Wrapper(Tensor):
    """A tensor without memory, as distributed and quantised tensors are."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor):
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        wrapper.held = inner
        return wrapper

    def __repr__(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Wrapper({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        strip = _pytree.tree_map_only(Wrapper, lambda x: x.held, (args, kwargs or {}))
        result = func(*strip[0], **strip[1])
        if func._schema.name.endswith("_") and result is not None:  # in place
            return args[0]
        return _pytree.tree_map_only(Tensor, Wrapper, result)


class Unwrapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wrapper):
        return wrapper.held.clone()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return Wrapper(grad)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_field_that_returns_a_tensor_without_memory_is_solved_or_refused(path, method):
    y0 = normal(3).to(path.device)
    with node_cuda.backend("reference"), torch.no_grad():
        expected = solve_a_little(y0, lambda t, y: -y, method=method)
    try:
        with torch.no_grad():
            actual = solve_a_little(y0, lambda t, y: Wrapper(-y), method=method)
    except InvalidField as error:
        assert "Wrapper" in str(error)
    else:
        assert_near(actual.held if isinstance(actual, Wrapper) else actual, expected)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_parameters_without_memory_have_the_gradient_of_the_reference(path, method):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(Wrapper(torch.ones(3, dtype=F64, device=path.device)))

        def forward(self, t, y):
            return -y * Unwrapped.apply(self.w)

    def solved():
        func, y0 = Wrapped(), normal(3).to(path.device).requires_grad_()
        # Norms are read by tolist(), which torch does not support for such tensors.
        without = dict(norm="seminorm") if method == "dopri5" else {}
        solver = dict(settings(method), gradient="adjoint", adjoint_options={**settings(method)["options"], **without})
        ys = solve(func, y0, linspace(0.0, 1.0, 3), **solver).ys
        a, b = torch.autograd.grad(weighted(ys), (y0, func.w))
        assert isinstance(b, Wrapper)
        return Outcome((a, b.held))

    assert_agree(*both(path, solved))


def test_sparse_gradients_of_parameters_agree_with_the_reference(path):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 3, sparse=True, dtype=F64)
            with torch.no_grad():
                self.table.weight.copy_(normal(4, 3))

        def forward(self, t, y):
            return -y * self.table(torch.tensor(2, device=y.device))

    def solved():
        func, y0 = Table().to(path.device), normal(3).to(path.device).requires_grad_()
        solution = solve(func, y0, linspace(0.0, 1.0, 3), gradient="adjoint", **settings("rk4"))
        a, b = torch.autograd.grad(weighted(solution.ys), (y0, func.table.weight))
        return Outcome((a, b.to_dense()))

    assert_agree(*both(path, solved))


def test_a_sparse_field_agrees_with_the_reference_or_is_refused(path):
    y0 = normal(3).to(path.device)
    with node_cuda.backend("reference"):
        expected = solve_a_little(y0, method="rk4")
    try:
        actual = solve_a_little(y0, lambda t, y: (-y).to_sparse(), method="rk4")
    except InvalidField:
        return
    assert_near(actual, expected)


NUMBER = dict(**LOOSE, options=dict(norm=lambda e: float(largest(e))))


@pytest.mark.parametrize(
    "solver", [settings("dopri5"), settings("rk4"), NUMBER], ids=["dopri5", "rk4", "a norm that is a number"]
)
def test_the_default_device_of_torch_does_not_matter(path, solver):
    """`torch.set_default_device("cuda")` is a common first line. With the shim the other device is "meta"."""

    def solved():
        func = Pair().to(path.device)
        y0 = tuple(part.to(path.device).requires_grad_() for part in PAIR.y0)
        t = linspace(0.0, 1.0, 3)
        with torch.device("meta" if path.device.type == "cpu" else path.device):
            with torch.no_grad():
                ys = odeint(func, y0, t, **solver)
            loss = weighted(odeint_adjoint(func, y0, t, **solver))
            return Outcome((*ys, *torch.autograd.grad(loss, (*y0, func.w))))

    assert_agree(*both(path, solved))


@pytest.mark.parametrize("path", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("norm", [None, "seminorm"])
def test_parameters_on_another_device_have_the_gradient_of_the_reference(path, norm):
    class Offloaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(normal(3))

        def forward(self, t, y):
            return self.w.to(y.device) * torch.sin(y)

    def solved():
        func, y0 = Offloaded(), normal(3).to(path.device).requires_grad_()
        ys = odeint_adjoint(func, y0, linspace(0.0, 1.0, 3), **LOOSE, adjoint_options=dict(norm=norm))
        return Outcome((ys, *torch.autograd.grad(weighted(ys), (y0, func.w))))

    assert_agree(*both(path, solved))


def test_inference_mode_agrees_with_the_reference(path):
    for method in ("dopri5", "rk4"):
        for made_inside in (False, True):

            def solved(method=method, made_inside=made_inside):
                y0 = normal(3, 4).to(path.device)
                with torch.inference_mode():
                    ys = solve_a_little(y0.clone() if made_inside else y0, **settings(method))
                    dense = odeint_dense(lambda t, y: -y, y0, torch.tensor(0.0), torch.tensor(1.0), **LOOSE)(0.3)
                assert isinstance(dense, Tensor)
                return Outcome((ys, dense))

            assert_agree(*both(path, solved))


def test_a_state_made_in_inference_mode_can_be_solved_outside_of_it(path):
    def solved():
        with torch.inference_mode():
            y0 = normal(3).to(path.device)
        return Outcome((solve_a_little(y0), solve_a_little(y0, method="rk4")))

    assert_agree(*both(path, solved))


@pytest.mark.parametrize("gradient", MODES)
def test_autocast_agrees_with_the_reference(path, gradient):
    """The state stays in float32. The products in the field are in bfloat16, so the results agree up to its
    rounding."""

    def solved():
        func = MLP(dim=3, hidden=4, seed=1, timed=True, dtype=torch.float32).to(path.device)
        y0 = normal(5, 3).float().to(path.device).requires_grad_()
        with torch.autocast(path.device.type, dtype=torch.bfloat16):
            return in_mode(gradient, func, y0, y0, dict(method="rk4", options=dict(step_size=0.25)))

    actual, expected = both(path, solved)
    assert_agree(actual, expected, 2 * torch.finfo(torch.bfloat16).eps)
    assert actual.tensors[0].dtype == torch.float32


@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams"])
@pytest.mark.parametrize("when", [1, 4])
def test_a_field_that_returns_a_tensor_on_another_device_is_refused(path, method, when):
    calls = 0

    def func(t, y):
        nonlocal calls
        calls += 1
        return (-y).to("meta") if calls >= when else -y

    y0 = normal(3).to(path.device)
    with node_cuda.backend("fused"), pytest.raises(InvalidField) as caught:
        solve_a_little(y0, func, method=method, options=dict(step_size=0.1) if method != "dopri5" else {})
    message = str(caught.value)
    assert f"the state's device, {y0.device}; got meta" in message and f".to('{y0.device}')" in message


# ------------------------------------------------------------------ launches that fail
FAILING = {  # a primitive, and the method that launches it
    "start_control": (DeviceStepControl, "start"),
    "stage_time": (Fused, "times"),
    "initial_norms": (DeviceStepControl, "initial_norms"),
    "initial_change": (DeviceStepControl, "initial_change"),
    "rk_stage": (Fused, "rk_stage"),
    "rk_finish": (Fused, "rk_finish"),
    "error_ratio": (Fused, "judge"),
    "scaled_error": (Fused, "scaled_error"),
    "step_control": (DeviceStepControl, "judge_ratio"),
    "dense_eval": (Fused, "dense_outputs"),
    "pack_adjoint": (Fused, "pack_adjoint"),
    "accumulate": (FusedGradientAccumulator, "add"),
    "sums_ratio": (FusedGradientAccumulator, "device_ratio"),
    "commit_sums": (FusedGradientAccumulator, "commit"),
    "jump": (Fused, "real_dot"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_failed_launch_is_named_and_the_next_solve_works(shim, monkeypatch, name):
    options = dict(norm=largest) if name in ("scaled_error", "step_control") else {}
    case = variant(t=linspace(0.0, 0.5, 2), options=options)

    def train():
        with node_cuda.backend("fused"):
            return by_adjoint(case, torch.device("cpu"))

    expected = train()
    owner, method = FAILING[name]
    launch = getattr(owner, method)

    def failing(self, *args, **kwargs):
        shim.lib.shim_fail_next_launch(35)
        return launch(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, failing)
        with pytest.raises(RuntimeError, match=f"node_cuda: {name} failed: cudaErrorOfTheShim: as the test requests"):
            train()
    assert_same_bits(train(), expected)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_sparse_parameters_have_the_gradient_of_the_reference(path, method):
    y0 = normal(3, 2).to(path.device).requires_grad_()
    p = torch.eye(3, dtype=F64, device=path.device).to_sparse().requires_grad_()

    def solved():
        options = dict(adjoint_params=(p,), method=method)
        if method == "dopri5":  # torch has no norm of a sparse error
            options["adjoint_options"] = dict(norm="seminorm")
        ys = odeint_adjoint(lambda t, y: -0.1 * torch.sparse.mm(p, y), y0, linspace(0.0, 1.0, 3), **options)
        return torch.autograd.grad(ys.square().sum(), y0)[0]

    with node_cuda.backend("reference"):
        expected = solved()
    with node_cuda.backend("fused"):
        assert_near(solved(), expected)


def test_a_gradient_of_a_parameter_without_memory_is_refused(path):
    class Passed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
            return Wrapper(g)

    w = torch.ones(3, dtype=F64, device=path.device, requires_grad=True)
    y0 = normal(3).to(path.device)
    with node_cuda.backend("fused"):
        ys = odeint_adjoint(lambda t, y: -y * Passed.apply(w), y0, linspace(0.0, 1.0, 2), adjoint_params=(w,))
        with pytest.raises(InvalidField, match="the gradient of a parameter is a Wrapper without memory"):
            ys.sum().backward()


def test_the_norm_of_parameters_on_another_device_is_moved_to_the_device_of_the_state(path, monkeypatch):
    """A kernel that gets an address of the host would make the device unusable for the process."""
    seen = []
    monkeypatch.setattr(
        Fused, "sums", lambda self, like, *, with_error: GradientAccumulator(like, with_error=with_error)
    )
    ratio = GradientAccumulator.device_ratio
    monkeypatch.setattr(GradientAccumulator, "device_ratio", lambda self, norm: Elsewhere(ratio(self, norm), seen))
    w = torch.tensor(0.5, dtype=F64, requires_grad=True)  # on a GPU this is another device, which is allowed
    y0 = normal(3).to(path.device)
    with node_cuda.backend("fused"):
        ys = odeint_adjoint(lambda t, y: -y * w, y0, linspace(0.0, 1.0, 2), adjoint_params=(w,))
        (grad,) = torch.autograd.grad(ys[-1].sum(), w)
    assert seen and set(seen) == {y0.device}
    torch.testing.assert_close(grad, -(y0.cpu() * torch.tensor(-0.5, dtype=F64).exp()).sum(), rtol=1e-5, atol=0.0)


class Elsewhere:
    """A number that pretends to be on another device, and records where it is moved to."""

    def __init__(self, number, seen):
        self.number, self.seen = number, seen

    def to(self, device):
        self.seen.append(torch.device(device))
        return self.number.to(device)


# ------------------------------------------------------------------ the same bits
class Bits(NamedTuple):
    """The result of a solve, and norms on its way.

    The last bit of a norm rarely changes a step, and another order of its sum rarely changes that bit.
    """

    outcome: Outcome
    readings: list[dict[str, Any]]
    norms_of_parameters: list[float]


@pytest.fixture
def large(monkeypatch):
    """Yield solves with states and parameters of several blocks and chunks, in segments, with rejected steps; and
    backward."""
    n = 9001
    readings: list[dict[str, Any]] = []
    norms: list[float] = []
    read, ratio = DeviceStepControl.read, FusedGradientAccumulator.device_ratio

    def reading(self):
        now = read(self)
        readings.append(numbers_of(now))
        return now

    def norm(self, given):
        for i in range(12):
            other = ratio(self, ErrorNorm(given.rtol * (1 + i / 7), given.atol))
            assert other is not None
            norms.append(float(other))
        return ratio(self, given)

    monkeypatch.setattr(DeviceStepControl, "read", reading)
    monkeypatch.setattr(FusedGradientAccumulator, "device_ratio", norm)

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = (nn.Parameter(normal(n, seed=seed)) for seed in (1, 2))

        def forward(self, t, state):
            a, b = state
            return self.w * torch.sin(a) * torch.cos(9 * t) + b.mean(), self.b[:7] * b

    solver = dict(rtol=1e-4, atol=1e-4, options=dict(first_step=1.0))
    case = Case(Wide, (normal(n), normal(7)), linspace(0.0, 1.0, 2), solver)

    def run(device) -> Bits:
        readings.clear()
        norms.clear()
        with node_cuda.backend("fused"):
            return Bits(by_adjoint(case, device), readings.copy(), norms.copy())

    return run


def test_a_solve_gives_the_same_bits_twice_and_in_any_order_of_the_blocks(path, large, request):
    first = large(path.device)
    assert first.outcome.stats is not None and first.outcome.stats.rejected > 0
    assert len(first.readings) > 10 and len(first.norms_of_parameters) > 50
    if path.device.type == "cpu":
        request.getfixturevalue("shim").configure(2, 2)
    again = large(path.device)
    assert_same_bits(again.outcome, first.outcome)
    assert again.readings == first.readings and again.norms_of_parameters == first.norms_of_parameters
