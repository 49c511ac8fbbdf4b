"""options=dict(compensated=True): the rounding errors of y do not add up over the steps."""

from __future__ import annotations

import pytest
import torch
from problems import F64
from torch import nn

import node_cuda
from node_cuda import TABLEAUS, odeint, odeint_adjoint, odeint_event, solve
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.methods.explicit_rk import ExplicitRK
from node_cuda.methods.step import ProposedStep
from node_cuda.problem.problem import make_problem

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by jvp

Y = torch.linspace(2.0, 4.0, 64, dtype=F64)
T = torch.tensor([0.0, 4.0], dtype=F64)


def slow(t, y):
    """Return a field of order 0.2, computed in float64 and rounded, so that only the sum of y has rounding errors."""
    return (0.2 + 0.05 * torch.sin(y.double())).to(y.dtype)


def steps(method, count):
    return dict(max_step=4.0 / count) if TABLEAUS[method].adaptive else dict(step_size=4.0 / count)


def ulps(dtype, method, count, **options):
    """Return the error against the same method and steps in float64, in units of the last place."""
    options, y0 = dict(steps(method, count), **options), Y.to(dtype)
    with torch.no_grad():
        y = odeint(slow, y0, T.to(dtype), method=method, rtol=1e-2, atol=1e-2, options=options)[-1].double()
        right = odeint(slow, y0.double(), T, method=method, rtol=1e-2, atol=1e-2, options=steps(method, count))[-1]
    return float(((y - right) / (torch.finfo(dtype).eps * 2.0 ** right.log2().floor())).abs().max())


def test_thousands_of_steps_in_single_precision_end_within_one_unit_of_the_last_place():
    """Half a unit is the rounding of the result; the plain sum is off by 15."""
    assert ulps(torch.float32, "euler", 4000) > 10.0
    assert ulps(torch.float32, "euler", 4000, compensated=True) < 1.0


@pytest.mark.parametrize("method", TABLEAUS)
def test_a_half_precision_state_moves_by_steps_below_its_rounding_in_every_method(method):
    """The state of 2 to 4 has units of 1/64, and the steps of 1/500 or less would be lost."""
    assert ulps(torch.bfloat16, method, 200) > 40.0
    assert ulps(torch.bfloat16, method, 200, compensated=True) < 1.0


def test_float16_keeps_what_is_below_its_smallest_number():
    """What is lost is kept in float32: a step of 4e-8 is zero in float16."""
    y0, t = torch.zeros(1, dtype=torch.float16), torch.tensor([0.0, 1.0], dtype=torch.float16)
    options = dict(step_size=2.0**-8, compensated=True)
    y = odeint(lambda t, y: torch.full_like(y, 1e-5), y0, t, method="euler", options=options)[-1]
    assert float(y) == pytest.approx(1e-5, rel=0.02)  # 1e-5 has 8 bits in float16


def test_the_stages_of_a_float16_state_are_summed_in_single_precision():
    """The sum of two stages of 4e4 is infinite in float16."""
    y0, t = torch.zeros(1, dtype=torch.float16), torch.tensor([0.0, 2.0**-8], dtype=torch.float16)
    options = dict(step_size=2.0**-10, compensated=True)
    y = odeint(lambda t, y: torch.full_like(y, 4e4), y0, t, method="rk4", options=options)[-1]
    assert float(y) == pytest.approx(4e4 / 256, rel=1e-3)


class Wave(nn.Module):
    def __init__(self, dtype=F64):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.7, 1.3], dtype=dtype))

    def forward(self, t, y):
        return torch.sin(self.rate * y + t) - 0.1 * y * y


INSIDE = torch.tensor([0.0, 0.31, 1.0], dtype=F64)
STEP = dict(first_step=0.1, min_step=0.1, max_step=0.1)
GRIDS = {"midpoint": dict(step_size=0.1), "rk4": dict(step_size=0.1), "dopri5": STEP, "fehlberg2": STEP}


def loss(func, y0, t, method, **arguments):
    y = solve(func, y0, t, method=method, rtol=1e-7, atol=1e-8, **arguments).ys
    return (y[1].square() + y[2] * torch.tensor([1.0, -0.5], dtype=y.dtype)).sum()


@pytest.mark.parametrize("gradient", ["backprop", "discrete", "adjoint"])
@pytest.mark.parametrize("method", GRIDS)
def test_gradients_are_those_of_finite_differences(method, gradient):
    func, y0 = Wave(), torch.tensor([0.4, -0.9], dtype=F64, requires_grad=True)
    arguments = dict(options=dict(GRIDS[method], compensated=True), gradient=gradient)
    found = torch.autograd.grad(loss(func, y0, INSIDE, method, **arguments), (y0, func.rate))
    for tensor, gradients in zip((y0, func.rate), found, strict=True):
        for i, g in enumerate(gradients):
            with torch.no_grad():
                ends = []
                for eps in (1e-4, -1e-4):
                    tensor[i] += eps
                    ends.append(loss(func, y0, INSIDE, method, options=arguments["options"]))
                    tensor[i] -= eps
            # 1e-4 squared from the differences; the continuous adjoint differs by the error of the steps
            at = 1e-2 if gradient == "adjoint" else 1e-6
            assert float(g) == pytest.approx(float(ends[0] - ends[1]) / 2e-4, rel=at, abs=at)


@pytest.mark.parametrize("method", GRIDS)
def test_the_gradient_of_the_compensation_is_zero(method):
    """In float64 the values are the same to rounding, and so are the gradients, also those of the times."""

    def found(**options):
        func, y0, t = Wave(), torch.tensor([0.4, -0.9], dtype=F64, requires_grad=True), INSIDE.clone().requires_grad_()
        value = loss(func, y0, t, method, options=dict(GRIDS[method], **options))
        forward = torch.func.jvp(
            lambda y: loss(func, y, INSIDE, method, options=dict(GRIDS[method], **options)),
            (y0,),
            (torch.ones_like(y0),),
        )
        return *torch.autograd.grad(value, (y0, t, func.rate)), forward[1]

    for plain, compensated in zip(found(), found(compensated=True), strict=True):
        torch.testing.assert_close(compensated, plain, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("method", GRIDS)
def test_steps_that_the_discrete_adjoint_takes_again_have_the_same_bits(method):
    def found(checkpoints):
        func, y0 = Wave(torch.float32), torch.tensor([3.0, -2.0], requires_grad=True)
        options = dict(GRIDS[method], compensated=True)
        value = loss(func, y0, INSIDE.float(), method, options=options, gradient="discrete", checkpoints=checkpoints)
        return torch.autograd.grad(value, (y0, func.rate))

    for kept, again in zip(found(None), found(2), strict=True):
        assert torch.equal(kept, again)


def stepper():
    y0 = torch.tensor([3.0])
    problem = make_problem(lambda t, y: 0.1 * y, y0, torch.tensor([0.0, 1.0]), 1e-3, 1e-3)
    arithmetic = Arithmetic(y0, 1.0, ErrorNorm(1e-3, 1e-3), (0.0, 1.0))
    return ExplicitRK(problem, arithmetic, TABLEAUS["bosh3"], estimate=True, compensated=True), y0


def test_a_rejected_step_leaves_what_was_lost_before_untouched():
    rk, y0 = stepper()
    first = rk.attempt(0.0, ProposedStep(1e-3, 1e-3), y0, None)
    k1 = rk.carry(first)
    small = ProposedStep(first.t1 + 1e-3, 1e-3)
    once = rk.attempt(first.t1, small, first.y1, k1)
    rk.attempt(first.t1, ProposedStep(first.t1 + 0.5, 0.5), first.y1, k1)  # rejected: it is not carried
    again = rk.attempt(first.t1, small, first.y1, k1)
    assert once.lost is not None and float(once.lost) != 0.0
    assert torch.equal(once.lost, again.lost) and torch.equal(once.y1, again.y1)


def test_what_was_lost_is_forgotten_where_a_solve_continues_from_another_state():
    rk, y0 = stepper()
    first = rk.attempt(0.0, ProposedStep(1e-3, 1e-3), y0, None)
    rk.carry(first)
    assert float(first.lost) != 0.0
    move, same = ProposedStep(first.t1 + 1e-3, 1e-3), first.y1.clone()
    change = rk.attempt(first.t1, move, first.y1, None)
    anew = rk.attempt(first.t1, move, same, None)
    assert not torch.equal(anew.lost, change.lost)


def test_the_kernels_sum_with_compensation_too(shim):
    def run(path, dtype):
        options = dict(first_step=0.02, max_step=0.02, compensated=True)
        with node_cuda.backend(path), torch.no_grad():
            return odeint(slow, Y.to(dtype), T[:2].to(dtype) / 4, rtol=1e-2, atol=1e-2, options=options)[-1]

    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(run("fused", dtype), run("reference", dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_the_backward_solve_and_an_event_run_with_it():
    func, y0 = Wave(), torch.tensor([0.4, -0.9], dtype=F64, requires_grad=True)
    y = odeint_adjoint(func, y0, INSIDE, method="rk4", options=dict(compensated=True))
    plain = odeint_adjoint(func, y0, INSIDE, method="rk4")
    for found, right in zip(*(torch.autograd.grad(x[-1].sum(), (y0, func.rate)) for x in (y, plain)), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=0)
    settings = dict(event_fn=lambda t, y: y[0] - 0.6, rtol=1e-6, atol=1e-6)
    at = [odeint_event(func, y0, T[0], options=dict(compensated=x), **settings)[0] for x in (False, True)]
    torch.testing.assert_close(*at, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("kvaerno5", {}, "an implicit method"),
        ("implicit_adams", {}, "an Adams method"),
        ("scipy_solver", {}, "SciPy"),
        ("dopri5", dict(cuda_graph=True), "cuda_graph=True"),
    ],
)
def test_a_solve_that_cannot_be_compensated_is_refused(method, options, words):
    with pytest.raises(ValueError, match=words):
        odeint(slow, Y, T, method=method, options=dict(compensated=True, **options))


def test_a_value_that_is_not_a_bool_is_refused():
    with pytest.raises(TypeError, match="True or False; got 1"):
        odeint(slow, Y, T, options=dict(compensated=1))
