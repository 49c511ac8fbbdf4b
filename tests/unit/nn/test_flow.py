"""ContinuousFlow: densities with a known answer, both ways, and the estimated trace against the exact one."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from problems import F64, relative_difference
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal

from node_cuda import ContinuousFlow, InvalidField, InvalidInput, InvalidType, regularized

A = torch.tensor([[0.3, -0.8], [0.5, -0.6]], dtype=F64)
TIGHT = dict(rtol=1e-9, atol=1e-11)


class Linear(nn.Module):
    """dx/dt = A x."""

    def __init__(self, matrix=A):
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, t, x):
        return x @ self.matrix.T


class Curved(nn.Module):
    """A small network of (t, x)."""

    def __init__(self, dim=2):
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Sequential(nn.Linear(dim + 1, 6), nn.Tanh(), nn.Linear(6, dim)).double()

    def forward(self, t, x):
        return self.net(torch.cat([x, t.expand(len(x), 1)], 1))


def data(n=5, dim=2):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(1), dtype=F64)


# ------------------------------------------------------------------ closed forms
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("t", [(0.0, 1.5), (1.0, 0.0)])
def test_the_log_det_of_a_linear_field_is_its_trace_times_the_time(trace, t):
    """With a diagonal matrix each rademacher vector gives the trace exactly."""
    matrix = A if trace == "exact" else torch.diag(torch.tensor([0.3, -0.7], dtype=F64))
    span = t[1] - t[0]
    z, log_det = ContinuousFlow(Linear(matrix), 2, t, trace=trace, **TIGHT)(data())
    assert torch.allclose(z, data() @ torch.matrix_exp(matrix * span).T, atol=1e-8)
    assert torch.allclose(log_det, torch.full((5,), float(matrix.trace()) * span, dtype=F64), atol=1e-9)


def test_the_density_of_a_linear_flow_is_that_of_a_gaussian():
    """z = e^A x is standard normal, so x has the covariance e^-A e^-A^T."""
    back = torch.matrix_exp(-A)
    truth = MultivariateNormal(torch.zeros(2, dtype=F64), back @ back.T).log_prob(data())
    found = ContinuousFlow(Linear(), 2, trace="exact", **TIGHT).log_prob(data())
    assert torch.allclose(found, truth, atol=1e-8)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint", "discrete"])
def test_the_gradient_of_the_log_density_is_that_of_the_formula(gradient):
    func = Linear()
    flow = ContinuousFlow(func, 2, trace="exact", gradient=gradient, **TIGHT)
    (found,) = torch.autograd.grad(flow.log_prob(data()).sum(), func.matrix)
    matrix = A.clone().requires_grad_()
    z = data() @ torch.matrix_exp(matrix).T
    (truth,) = torch.autograd.grad((-0.5 * z.square().sum(1) + matrix.trace()).sum(), matrix)
    assert torch.allclose(found, truth, rtol=1e-6)


def test_a_constant_field_has_log_det_zero():
    class Constant(nn.Module):
        def forward(self, t, x):
            return torch.ones_like(x)

    z, log_det = ContinuousFlow(Constant(), 2)(data())
    assert torch.allclose(z, data() + 1) and not log_det.any()


# ------------------------------------------------------------------ the trace
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_the_estimated_trace_is_the_exact_one_in_the_mean(noise):
    """One sample, 4000 times: the mean of the estimates has a known spread."""
    func, x = Curved(), data(1).expand(4000, 2).contiguous()
    torch.manual_seed(0)
    given = dict(rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        _, exact = ContinuousFlow(func, 2, trace="exact", **given)(x[:1])
        _, estimates = ContinuousFlow(func, 2, noise=noise, **given)(x)
    spread = float(estimates.std()) / math.sqrt(len(x))
    assert spread > 0 and abs(float(estimates.mean() - exact)) < 4 * spread


def test_the_noise_is_drawn_once_for_a_solve_and_repeatable():
    flow = ContinuousFlow(Curved(), 2)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(flow.log_prob(data()))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
def test_the_noise_of_a_backward_pass_is_that_of_its_forward_pass(gradient):
    """A second solve with other noise lies between the two passes of the first."""
    grads = []
    for mode in (gradient, "backprop"):
        flow = ContinuousFlow(Curved(), 2, gradient=mode, **TIGHT)
        torch.manual_seed(0)
        first = flow.log_prob(data()).mean()
        flow.log_prob(data())
        grads.append(torch.autograd.grad(first, tuple(flow.parameters())))
    assert relative_difference(grads[0], grads[1]) < 1e-6


def test_the_trace_may_be_made_exact_after_training():
    flow = ContinuousFlow(Curved(), 2)
    flow.trace = "exact"
    assert torch.equal(flow.log_prob(data()), ContinuousFlow(Curved(), 2, trace="exact").log_prob(data()))
    flow.trace = "exakt"
    with pytest.raises(InvalidInput, match=r"trace must be 'hutchinson' or 'exact'.*Did you mean 'exact'"):
        flow.log_prob(data())


# ------------------------------------------------------------------ both ways
def test_the_inverse_takes_the_flow_back_to_the_data():
    flow = ContinuousFlow(Curved(), 2, trace="exact", **TIGHT)
    z, there = flow(data())
    x, back = flow.inverse(z)
    assert torch.allclose(x, data(), atol=1e-7) and torch.allclose(there, -back, atol=1e-7)


def test_samples_have_the_mean_and_the_covariance_of_the_density():
    torch.manual_seed(0)
    base = Independent(Normal(torch.tensor([1.0, 0.0], dtype=F64), torch.ones(2, dtype=F64)), 1)
    flow = ContinuousFlow(Linear(), 2, base=base, rtol=1e-5)
    x = flow.sample(20000)
    back = torch.matrix_exp(-A)
    assert x.shape == (20000, 2) and not x.requires_grad
    assert torch.allclose(x.mean(0), back[:, 0], atol=0.05)  # 4 standard errors of the mean of 20000
    assert torch.allclose(x.T.cov(), back @ back.T, atol=0.15)


def test_samples_from_the_default_base_have_the_shape_and_the_dtype_of_the_flow():
    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, t, x):
            return self.conv(x)

    flow = ContinuousFlow(Image(), (1, 4, 4), method="rk4")
    x = flow.sample(3)
    assert x.shape == (3, 1, 4, 4) and x.dtype == torch.float32
    assert flow.log_prob(x).shape == (3,)
    assert flow.double().sample(2).dtype == F64


def test_a_base_with_a_density_for_each_element_is_summed_over_a_sample():
    x = data()
    each = Normal(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))
    given = dict(trace="exact", method="rk4")
    assert torch.allclose(
        ContinuousFlow(Linear(), 2, base=each, **given).log_prob(x), ContinuousFlow(Linear(), 2, **given).log_prob(x)
    )


# ------------------------------------------------------------------ regularisers
def test_a_regularized_field_gives_its_penalty_with_the_log_density():
    """Of dx/dt = a x the kinetic part is int |a x|^2 dt = a |x0|^2 (e^(2 a) - 1) / 2."""
    a = 0.7
    func = Linear(a * torch.eye(2, dtype=F64))
    flow = ContinuousFlow(regularized(func, kinetic=1.0), 2, trace="exact", **TIGHT)
    log_p, penalty = flow.log_prob(data())
    truth = a * data().square().sum(1) * (math.exp(2 * a) - 1) / 2
    assert torch.allclose(penalty, truth, rtol=1e-6)
    assert torch.allclose(log_p, ContinuousFlow(func, 2, trace="exact", **TIGHT).log_prob(data()), atol=1e-8)
    assert flow.sample(3).shape == (3, 2), "a sample has no penalty"


@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
def test_a_regularized_flow_trains_in_every_mode(gradient):
    grads = []
    for mode in (gradient, "backprop"):
        torch.manual_seed(0)
        func = regularized(Curved(), kinetic=0.1, jacobian=0.1)
        flow = ContinuousFlow(func, 2, gradient=mode, rtol=1e-7, atol=1e-9)
        log_p, penalty = flow.log_prob(data())
        grads.append(torch.autograd.grad((penalty - log_p).mean(), tuple(flow.parameters())))
    assert relative_difference(grads[0], grads[1]) < 1e-4


# ------------------------------------------------------------------ a module
def test_a_copy_a_pickle_and_a_state_dict_give_the_same_density():
    flow = ContinuousFlow(Curved(), 2, trace="exact", method="rk4")
    truth = flow.log_prob(data())
    other = ContinuousFlow(Curved(), 2, trace="exact", method="rk4")
    nn.init.zeros_(other.ode.func.net[2].weight)
    other.load_state_dict(flow.state_dict())
    for again in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), other):
        assert torch.equal(again.log_prob(data()), truth)


def test_a_base_that_is_a_module_is_trained_with_the_field():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(2, dtype=F64))

        def sample(self, shape):
            return self.mean + torch.randn(*shape, 2, dtype=F64)

        def log_prob(self, z):
            return Normal(self.mean, torch.ones_like(self.mean)).log_prob(z)

    flow = ContinuousFlow(Linear(), 2, base=Shifted(), method="rk4")
    flow.log_prob(data()).sum().backward()
    assert {name for name, p in flow.named_parameters() if p.grad is not None} == {"ode.func.matrix", "base.mean"}


def test_a_density_without_autograd_is_that_with_it():
    flow = ContinuousFlow(Curved(), 2, trace="exact")
    truth = flow.log_prob(data())
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            found = flow.log_prob(data())
        assert torch.equal(found, truth) and not found.requires_grad


# ------------------------------------------------------------------ mistakes
WRONG = {
    "an argument": (dict(rtool=1e-3), InvalidType, r"ContinuousFlow\(\) got .* 'rtool'. Did you mean 'rtol'"),
    "trace": (dict(trace="exakt"), InvalidInput, "Did you mean 'exact'"),
    "noise": (dict(noise="gauss"), InvalidInput, "noise must be 'gaussian' or 'rademacher'; got 'gauss'"),
    "times": (dict(t=(0.0, 0.5, 1.0)), InvalidInput, "t must be two times"),
    "base": (dict(base=torch.randn), InvalidType, "base must have `sample` and `log_prob`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_raises_when_the_flow_is_made(case):
    given, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        ContinuousFlow(Linear(), 2, **given)


def test_samples_of_another_shape_are_refused():
    with pytest.raises(InvalidInput, match=r"samples of shape \(n, 2\); got shape \(5, 3\)"):
        ContinuousFlow(Linear(), 2)(data(dim=3))
    with pytest.raises(InvalidInput, match=r"got shape \(2,\)\. Use `x.unsqueeze\(0\)`"):
        ContinuousFlow(Linear(), 2)(data()[0])


def test_a_field_that_returns_another_shape_is_refused():
    class Narrow(nn.Module):
        def forward(self, t, x):
            return x[:, :1]

    with pytest.raises(InvalidField, match=r"func must return a tensor of x's shape, \(5, 2\); got shape \(5, 1\)"):
        ContinuousFlow(Narrow(), 2)(data())
