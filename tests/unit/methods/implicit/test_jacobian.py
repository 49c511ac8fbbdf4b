"""The Jacobian of the field: right by every route, in few evaluations, and the sentences of what has none."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import F64, linspace

from node_cuda import odeint, solve
from node_cuda.methods.implicit.blocks import Blocks
from node_cuda.methods.implicit.jacobian import Jacobian
from node_cuda.problem.problem import make_problem
from node_cuda.solution import Stats
from node_cuda.status import InvalidField, InvalidInput

T, Y = linspace(0.0, 1.0, 2), torch.tensor([[0.3, -0.7], [1.1, 0.2], [0.5, 0.9]], dtype=F64)
AT = torch.tensor(0.4, dtype=F64)


def field(t, y):
    a, b = y.unbind(-1)
    return torch.stack([a * b + t**2, torch.sin(a) * torch.exp(t) - b**3], -1)


def right(y):
    """(df/dy, df/dt) of each sample."""
    a, b = y.unbind(-1)
    first = torch.stack([b, a], -1)
    second = torch.stack([torch.cos(a) * torch.exp(AT), -3 * b**2], -1)
    return torch.stack([first, second], -2), torch.stack([2 * AT.expand_as(a), torch.sin(a) * torch.exp(AT)], -1)


def jacobian(func, y0=Y, batch_dims=1, jac=None):
    problem = make_problem(func, y0, T, 1e-3, 1e-3)
    return Jacobian(problem, Blocks(problem, batch_dims), jac, Stats(), timed=True), problem


class OneByOne(torch.autograd.Function):
    """-x^3, by an operation that reads a number in its backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return -(x**3)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return -3 * x**2 * g if float(g.sum()) < 1e9 else g


class Once(torch.autograd.Function):
    """-x^3, differentiable once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return -(x**3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return -3 * x**2 * g


@pytest.mark.parametrize("recording", [False, True])
def test_it_is_that_of_each_sample_and_costs_one_evaluation(recording):
    found, problem = jacobian(field)
    with torch.set_grad_enabled(recording):
        result = found.at(AT, Y)
    assert problem.field.nfe == 1
    assert torch.allclose(result.jacobian, right(Y)[0]) and torch.allclose(result.df_dt, right(Y)[1])
    assert torch.allclose(result.f, field(AT, Y))
    assert not any(x.requires_grad for x in result)  # nothing here needs a gradient


def test_the_time_derivative_of_a_single_sample_comes_with_the_same_products():
    found, _ = jacobian(field, Y[:1], batch_dims=0)
    with torch.no_grad():
        result = found.at(AT, Y[:1])
    by_y, by_t = right(Y[:1])
    assert torch.allclose(result.jacobian, by_y) and torch.allclose(result.df_dt, by_t)
    autonomous, _ = jacobian(lambda t, y: -(y**3), Y[:1], batch_dims=0)
    assert autonomous.at(AT, Y[:1]).df_dt is None


def test_on_the_tape_it_is_differentiable_by_second_derivatives_of_the_field():
    found, _ = jacobian(field)
    y = Y.clone().requires_grad_()
    result = found.at(AT, y, twice=True)
    (by_y,) = torch.autograd.grad(result.jacobian.sum() + result.df_dt.sum(), y)
    (expected,) = torch.autograd.grad(sum(x.sum() for x in right(y)), y)
    assert torch.allclose(by_y, expected)


def test_a_parameter_of_the_field_is_seen_though_y_has_no_gradient():
    rate = torch.tensor(2.0, dtype=F64, requires_grad=True)
    found, _ = jacobian(lambda t, y: -rate * y)
    result = found.at(AT, Y, twice=True)
    (by_rate,) = torch.autograd.grad(result.jacobian.sum(), rate)
    assert float(by_rate) == -6.0


def test_the_users_jacobian_is_taken_and_checked():
    func = torch.no_grad()(field)
    found, _ = jacobian(func, jac=lambda t, y: right(y)[0])
    with torch.no_grad():
        assert torch.equal(found.at(AT, Y).jacobian, right(Y)[0])
    with pytest.raises(InvalidInput, match=r"real tensor of \(3, 2, 2\).*got torch.float64 of shape \(3, 2\)"):
        jacobian(func, jac=lambda t, y: y)[0].at(AT, Y)


def test_a_field_that_does_not_go_through_vmap_is_differentiated_row_by_row_and_says_what_that_costs():
    found, _ = jacobian(lambda t, y: OneByOne.apply(y))
    with pytest.warns(UserWarning, match=r"2 backward passes one after another.*options=dict\(jac"):
        first = found.at(AT, Y).jacobian
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        second = found.at(AT, Y).jacobian
    assert torch.allclose(first, torch.diag_embed(-3 * Y**2)) and torch.equal(first, second)


def test_a_field_that_torch_cannot_differentiate_is_refused_and_a_constant_one_is_not():
    found, _ = jacobian(torch.no_grad()(field))
    with pytest.raises(InvalidField, match=r"torch.no_grad\(\).*options=dict\(jac"):
        found.at(AT, Y)
    with pytest.raises(InvalidField, match=r"torch.no_grad\(\)"):  # a graph by t alone, or by a parameter
        jacobian(lambda t, y: y.detach() * t)[0].at(AT, Y)
    constant, _ = jacobian(lambda t, y: torch.ones_like(y))
    assert not constant.at(AT, Y).jacobian.any()


def test_a_rosenbrock_gradient_of_a_field_that_is_differentiable_once_is_refused():
    """torch itself would take the Jacobian for a constant, and say nothing."""
    y = Y.clone().requires_grad_()
    found, _ = jacobian(lambda t, y: Once.apply(y))
    with pytest.raises(InvalidField, match=r"differentiates func twice.*kvaerno5"):
        found.at(AT, y, twice=True)
    jacobian(lambda t, y: Once.apply(y))[0].at(AT, y)  # first derivatives only
    with torch.no_grad():
        odeint(lambda t, y: Once.apply(y), Y, T, method="rodas5p")


@pytest.mark.parametrize("couple", [lambda y: y - y.mean(0), lambda y: torch.roll(y, 1, 0), lambda y: y[:1] * y])
def test_samples_that_see_each_other_are_found(couple):
    with pytest.raises(InvalidInput, match=r"do not see each other.*Drop batch_dims"):
        jacobian(lambda t, y: couple(y))[0].at(AT, Y)


def test_inference_mode_is_no_obstacle():
    with torch.inference_mode():
        y = odeint(lambda t, y: -(y**3), Y.clone(), T, method="rodas5p", rtol=1e-5)
    assert torch.allclose(y[-1], Y / torch.sqrt(1 + 2 * Y**2), rtol=1e-4)


def decay_by(jac, gradient="discrete"):
    """A linear field by kvaerno5 with this Jacobian."""
    y0, t = torch.ones(1, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    return solve(
        lambda t, y: -3 * y, y0, t, method="kvaerno5", gradient=gradient, adjoint_params=(), options=dict(jac=jac)
    )


def test_a_jacobian_that_is_not_the_derivative_gives_a_warning():
    with pytest.warns(
        UserWarning, match=r'options\["jac"\] is not df/dy.*gradients of "discrete" and "backprop" are wrong'
    ):
        decay_by(lambda t, y: torch.tensor([[-3.3]], dtype=F64))
    decay_by(lambda t, y: torch.tensor([[-3.0]], dtype=F64))  # the right one is quiet


def test_weak_coupling_of_the_samples_is_found_beside_a_stiff_component():
    rates = torch.tensor([1e3, 1.0], dtype=F64)

    def coupled(t, y):
        return -rates * y - 1e-3 * (y - y.mean(0))

    y0, t = torch.rand(3, 2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    with pytest.raises(InvalidInput, match="do not see each other"):
        solve(coupled, y0, t, method="kvaerno5", options=dict(batch_dims=1))
    solve(lambda t, y: -rates * y, y0, t, method="kvaerno5", options=dict(batch_dims=1))


def test_the_time_of_a_recorded_step_is_no_leaf_so_that_its_gradient_does_not_go_through_all_steps_before():
    times = []

    def func(t, y):
        times.append(t)
        return -y * t

    y0 = torch.ones(2, dtype=F64, requires_grad=True)
    solve(func, y0, torch.tensor([0.0, 1.0], dtype=F64), method="rodas5p", options=dict(max_step=0.25))
    linearised = [t for t in times if t.requires_grad]
    assert len(linearised) >= 4 and all(t.grad_fn is not None for t in linearised[1:])
