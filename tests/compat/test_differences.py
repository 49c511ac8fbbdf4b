"""The intended differences from torchdiffeq 0.2.5 (docs/differences.md) that no other file tests.

If torchdiffeq's result is quick to compute, the tests check it too, so that the page stays true.
"""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from problems import F64, Counting, TimedLinear, linspace, relative_difference
from shim.pretend_gpu import CUDA
from torch import nn

import node_cuda
from node_cuda import METHODS, TABLEAUS, odeint, odeint_adjoint, odeint_dense, odeint_event, solve
from node_cuda.methods.registry import lookup
from node_cuda.options import FixedOptions

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "differences.md"
Y = torch.tensor([1.0, 0.5], dtype=F64)
GRID = dict(step_size=0.25)


def decay(t, y):
    return -y


def constant(t, y):
    return torch.ones_like(y)


def leaf(y):
    return y.clone().requires_grad_(True)


def scalar(x):
    return torch.tensor(x, dtype=F64)


# ------------------------------------------------------------------ the page
def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(test_\w+)`", PAGE.read_text())
    existing = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert named
    assert sorted(set(named) - existing) == []


# ------------------------------------------------------------------ methods
@pytest.mark.parametrize("name", ["tsit5", "bosh5"])
def test_methods_that_torchdiffeq_lacks_are_of_order_five(name, torchdiffeq):
    assert name in METHODS and TABLEAUS[name].order == 5
    with pytest.raises(ValueError, match="Invalid method"):
        torchdiffeq.odeint(decay, Y, linspace(0.0, 1.0, 2), method=name)


def adams_errors(library, method, power, counts):
    """Return the errors at t = 4 of y' = y cos t, for grids with these numbers of steps. power=1: a uniform grid."""
    grids = [4 * torch.linspace(0, 1, n + 1, dtype=F64) ** power for n in counts]
    ends = [library(lambda t, y: y * torch.cos(t), Y, t, method=method, rtol=1e-12, atol=1e-12)[-1] for t in grids]
    return [float((end - Y * math.exp(math.sin(4.0))).abs().max()) for end in ends]


@pytest.mark.parametrize("power", [1.0, 1.5], ids=["uniform", "uneven"])
def test_explicit_adams_converges_with_order_four_and_torchdiffeqs_error_grows(power, torchdiffeq):
    coarse, fine = adams_errors(odeint, "explicit_adams", power, (80, 160))
    assert math.log2(coarse / fine) > 3.75
    coarse, fine = adams_errors(torchdiffeq.odeint, "explicit_adams", power, (40, 80))
    assert fine > coarse > 1.0


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
def test_implicit_adams_is_accurate_on_an_uneven_grid(torchdiffeq):
    ours, theirs = (adams_errors(solver, "implicit_adams", 1.5, (160,))[0] for solver in (odeint, torchdiffeq.odeint))
    assert ours < 1e-10 < 1e-6 < theirs


# ------------------------------------------------------------------ the step loop
@pytest.mark.filterwarnings("ignore:t holds one time")
@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams", "scipy_solver"])
def test_one_output_time_needs_no_evaluation(method):
    func = Counting(decay)
    y0 = leaf(Y)
    ys = odeint_adjoint(func, y0, linspace(0.3, 0.3, 1), method=method)
    ys.sum().backward()
    assert func.nfe == 0
    assert torch.equal(y0.grad, torch.ones_like(Y))


def test_a_jump_exactly_at_the_end_of_a_step_is_handled(torchdiffeq):
    def field(t, y):
        return torch.where(t < 0.5, 1.0, -3.0) * torch.ones_like(y)

    def error_and_nfe(library):
        func = Counting(field)
        options = dict(first_step=0.5, jump_t=torch.tensor([0.5], dtype=F64))
        end = library(func, Y, linspace(0.0, 1.0, 2), rtol=1e-8, atol=1e-8, options=options)[-1]
        return float((end - (Y - 1.0)).abs().max()), func.nfe

    error, nfe = error_and_nfe(odeint)
    assert error < 1e-14
    their_error, their_nfe = error_and_nfe(torchdiffeq.odeint)
    assert their_error > 1e-8 and their_nfe > 5 * nfe


def test_an_output_at_the_end_of_a_step_has_the_bits_of_that_end():
    starts = {}

    class Field:
        def __call__(self, t, y):
            return y * torch.cos(t)

        def callback_accept_step(self, t0, y0, dt):
            starts[float(t0)] = y0

    ys = odeint(Field(), Y, linspace(0.0, 2.0, 3), options=dict(step_t=[1.0]))
    assert torch.equal(starts[1.0], ys[1])


def test_a_nan_beyond_the_end_of_a_domain_only_shortens_the_step(torchdiffeq):
    arguments = (lambda t, y: -torch.sqrt(y), torch.ones(1, dtype=F64), linspace(0.0, 1.5, 2))
    options = dict(first_step=3.0)  # so long that the square root is not defined at a stage
    assert float(odeint(*arguments, options=options)[-1]) == pytest.approx(0.25**2, rel=1e-6)
    with pytest.raises(AssertionError, match="underflow"):
        torchdiffeq.odeint(*arguments, options=options)


@pytest.mark.slow
def test_max_num_steps_is_sufficient_exactly_when_it_is_in_torchdiffeq(torchdiffeq):
    def enough(library, outputs):
        def works(steps):
            try:
                library(lambda t, y: y * torch.cos(9 * t), Y, linspace(0.0, 2.0, outputs),
                        options=dict(max_num_steps=steps))  # fmt: skip
            except AssertionError:
                return False
            return True

        return next(steps for steps in range(1, 100) if works(steps))

    for outputs in (2, 5):
        assert enough(odeint, outputs) == enough(torchdiffeq.odeint, outputs)


@pytest.mark.parametrize("name", ["adaptive_heun", "fehlberg2"])
def test_the_last_stage_is_carried_as_in_torchdiffeq(name, torchdiffeq):
    assert TABLEAUS[name].carry_last_stage and not TABLEAUS[name].fsal
    nfe, ends = [], []
    for library, options in ((odeint, dict(dense="torchdiffeq")), (torchdiffeq.odeint, None)):
        func = Counting(lambda t, y: y * torch.cos(t))
        arguments = dict(method=name, rtol=1e-3, atol=1e-3, options=options)
        ends.append(library(func, Y, linspace(0.0, 2.0, 2), **arguments)[-1])
        nfe.append(func.nfe)
    assert nfe[0] == nfe[1]
    assert relative_difference(*ends) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_option_reaches_the_callbacks_and_changes_no_step(dtype):
    class Field:
        def __init__(self):
            self.seen = set()

        def __call__(self, t, y):
            assert t.dtype == torch.float32
            return torch.cos(9 * t) * y

        def callback_step(self, t0, y0, dt):
            self.seen |= {t0.dtype, dt.dtype}

    func = Field()
    plain, typed = (
        solve(func, Y.float(), torch.linspace(0, 1, 3), rtol=1e-5, atol=1e-5, options=dict(record_steps=True, **more))
        for more in ({}, dict(dtype=dtype))
    )
    assert func.seen == {torch.float64, dtype}
    assert plain.stats.step_times == typed.stats.step_times


@pytest.mark.gpu
def test_times_on_another_device_give_no_warning():
    ys = odeint(decay, Y.to(CUDA), linspace(0.0, 1.0, 2))
    assert torch.allclose(ys[-1].cpu(), Y / math.e)


# ------------------------------------------------------------------ gradients
def test_the_size_of_the_first_step_has_no_gradient(torchdiffeq):
    first = scalar(0.1).requires_grad_()
    y0 = leaf(Y)
    arguments = dict(rtol=1e-3, atol=1e-3, options=dict(first_step=first))
    ours, theirs = (
        library(decay, y0, linspace(0.0, 1.0, 2), **arguments)[-1].sum() for library in (odeint, torchdiffeq.odeint)
    )
    assert torch.autograd.grad(ours, first, allow_unused=True) == (None,)
    assert float(torch.autograd.grad(theirs, first)[0]) != 0.0


def test_the_gradient_of_the_starting_time_is_right():
    t = linspace(0.1, 1.3, 3).requires_grad_()
    func = TimedLinear()
    (grad,) = torch.autograd.grad(odeint(func, Y, t, rtol=1e-9, atol=1e-9)[-1].sum(), t)
    (truth,) = torch.autograd.grad(func.exact(Y, t)[-1].sum(), t)
    assert relative_difference(grad, truth) < 1e-6


class Scaled(nn.Module):
    """The field y' = -y for any `scale`, which multiplies only the gradient of the parameter."""

    def __init__(self, scale):
        super().__init__()
        self.w = nn.Parameter(scalar(1.0))
        self.scale = scale
        self.steps = []

    def forward(self, t, y):
        return -(1 + (self.w - self.w.detach()) * self.scale) * y

    def callback_step_adjoint(self, t0, y0, dt):
        self.steps.append(float(dt))


def test_the_first_backward_step_is_chosen_without_the_parameters(torchdiffeq):
    def first_steps(library):
        funcs = Scaled(1.0), Scaled(1e6)
        for func in funcs:
            library.odeint_adjoint(func, leaf(Y), linspace(0.0, 1.0, 2), rtol=1e-5, atol=1e-5)[-1].sum().backward()
        return [func.steps[0] for func in funcs]

    ours = first_steps(node_cuda)
    assert ours[0] == ours[1]
    theirs = first_steps(torchdiffeq)
    assert theirs[1] < 1e-3 * theirs[0]


def test_a_custom_adjoint_norm_sees_zero_for_time():
    seen = set()

    def norm(parts):
        seen.add(float(parts[0]))
        return torch.stack([part.abs().max() for part in parts]).max()

    t = linspace(0.0, 1.0, 3).requires_grad_()
    odeint_adjoint(TimedLinear(), leaf(Y), t, adjoint_options=dict(norm=norm)).sum().backward()
    assert seen == {0.0}
    assert t.grad is not None and bool((t.grad != 0).any())


def test_the_field_is_never_differentiated_by_time():
    asked = []

    class Field(TimedLinear):
        def forward(self, t, y):
            asked.append(t.requires_grad)
            return super().forward(t, y)

    t = linspace(0.0, 1.0, 3).requires_grad_()
    odeint_adjoint(Field(), leaf(Y), t).sum().backward()
    assert not any(asked)


def test_parameters_wider_than_the_state_do_not_widen_the_backward_pass():
    dtypes = set()

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(scalar(0.5))

        def forward(self, t, y):
            dtypes.add(y.dtype)
            return self.w * y

    func = Field()
    odeint_adjoint(func, leaf(Y.float()), torch.tensor([0.0, 1.0]), rtol=1e-5, atol=1e-5)[-1].sum().backward()
    assert dtypes == {torch.float32}
    assert func.w.grad.dtype == F64


def test_the_backward_pass_has_the_autocast_state_of_the_forward_pass():
    dtypes = set()

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, t, y):
            out = self.linear(y)
            dtypes.add(out.dtype)
            return out.float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = odeint_adjoint(Field(), torch.ones(2, 4), torch.tensor([0.0, 1.0]), rtol=1e-2, atol=1e-2)
    assert dtypes == {torch.bfloat16}
    dtypes.clear()
    ys.sum().backward()
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["jump_t", "step_t"])
def test_a_list_of_times_works_like_a_tensor_in_both_passes_and_directions(kind):
    def costs(times, t):
        func = Counting(TimedLinear())
        ys = odeint_adjoint(func, leaf(Y), t, options={kind: times})
        forward = func.nfe
        ys[-1].sum().backward()
        return forward, func.nfe - forward

    for t in (linspace(0.0, 1.0, 2), linspace(1.0, 0.0, 2)):
        assert costs([0.5], t) == costs(torch.tensor([0.5], dtype=F64), t)


# ------------------------------------------------------------------ events
@pytest.mark.parametrize("method, options", [("dopri5", {}), ("rk4", GRID), ("implicit_adams", GRID)])
def test_an_event_that_is_zero_at_the_start_happens_there(method, options):
    event_t, ys = odeint(constant, torch.zeros(1, dtype=F64), linspace(0.0, 1.0, 2), method=method, options=options,
                         event_fn=lambda t, y: y[0])  # fmt: skip
    assert float(event_t) == 0.0
    assert torch.equal(ys[-1], torch.zeros(1, dtype=F64))


@pytest.mark.parametrize("method, options", [("dopri5", {}), ("rk4", GRID)])
def test_an_event_is_located_to_the_smallest_atol_of_the_elements(method, options):
    atol = torch.tensor([1e-3, 1e-9], dtype=F64)
    event_t, _ = odeint(constant, torch.zeros(2, dtype=F64), linspace(0.0, 1.0, 2), atol=atol, method=method,
                        options=options, event_fn=lambda t, y: y[0] - 1.03)  # fmt: skip
    assert abs(float(event_t) - 1.03) <= 1e-9


@pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
def test_the_parameters_of_an_event_function_get_their_gradient(solver):
    class Threshold(nn.Module):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(scalar(2.0))

        def forward(self, t, y):
            return y[0] - self.level

    class Drift(nn.Module):
        def __init__(self):
            super().__init__()
            self.speed = nn.Parameter(scalar(3.0))

        def forward(self, t, y):
            return self.speed * torch.ones_like(y)

    event, drift = Threshold(), Drift()
    event_t, ys = odeint_event(drift, leaf(torch.tensor([0.5], dtype=F64)), scalar(0.25), event_fn=event,
                               odeint_interface=solver)  # fmt: skip
    # t* = t0 + (level - y0) / speed, y(t*) = level
    (by_level,) = torch.autograd.grad(event_t, event.level, retain_graph=True)
    assert float(by_level) == pytest.approx(1 / 3)
    assert float(torch.autograd.grad(ys[-1].sum(), event.level)[0]) == pytest.approx(1.0)


# ------------------------------------------------------------------ odeint_dense
@pytest.mark.parametrize("method", METHODS)
def test_dense_output_of_every_method_takes_tuples_vectors_of_times_and_both_directions(method):
    coarse = isinstance(lookup(method, None).options, FixedOptions)
    options = dict(step_size=0.01, interp="cubic") if coarse else {}
    start = (Y, scalar(2.0))
    for t0, t1 in ((0.0, 1.0), (1.0, 0.0)):
        solution = odeint_dense(lambda t, s: (-s[0], s[1]), start, scalar(t0), scalar(t1), rtol=1e-6, atol=1e-6,
                                method=method, options=options)  # fmt: skip
        times = torch.tensor([[0.0, 0.2, 0.5], [0.7, 0.9, 1.0]], dtype=F64)
        first, second = solution(times)
        assert first.shape == (2, 3, 2) and second.shape == (2, 3)
        rtol = 2e-2 if method in ("euler", "implicit_euler") else 1e-3
        assert torch.allclose(first, Y * torch.exp(t0 - times)[..., None], rtol=rtol)
        assert torch.allclose(second, 2.0 * torch.exp(times - t0), rtol=rtol)


def test_dense_output_beyond_the_end_is_refused_and_not_extrapolated():
    solution = odeint_dense(decay, Y, scalar(0.0), scalar(1.0))
    with pytest.raises(ValueError, match="between 0 and 1"):
        solution(scalar(1.001))


# ------------------------------------------------------------------ mistakes
@pytest.mark.parametrize("method", METHODS)
def test_an_integer_state_is_refused_by_every_method(method):
    with pytest.raises(NotImplementedError, match="floating point"):
        odeint(decay, torch.tensor([1]), linspace(0.0, 1.0, 2), method=method)


def test_a_complex_field_of_a_real_state_is_refused():
    with pytest.raises(RuntimeError, match="imaginary part"):
        odeint(lambda t, y: 1j * y, Y, linspace(0.0, 1.0, 2))
