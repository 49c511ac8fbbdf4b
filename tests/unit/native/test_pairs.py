"""An operation on pairs of real numbers gives what torch gives for the complex ones, with torch's gradients."""

from __future__ import annotations

import pytest
import torch
from problems import relative_difference
from torch.nn import functional

from node_cuda.native.complex_pairs import as_reals, has_complex, without_complex
from node_cuda.native.tracing import Refused, graph_of, refusals

C = torch.complex128
generator = torch.Generator().manual_seed(0)
Z, W = (torch.randn(3, 3, dtype=C, generator=generator) for _ in range(2))
X = torch.randn(3, 3, dtype=torch.float64, generator=generator)
S = torch.tensor(0.7, dtype=torch.float64)

# A hundred roundings of 1e-16 in other orders, relative to the largest element: some functions have poles nearby.
ROUNDING = 1e-13


def converted(function):
    """Return what a function of (Z, W, X, S) gives as a graph without complex tensors."""
    inputs = [Z, W, X, S]
    with refusals(), torch.no_grad():
        graph = graph_of(function, inputs)
    reals, again = without_complex(graph, inputs)
    assert not has_complex(reals)
    return again(reals(*as_reals(inputs)))


def with_gradients(function):
    """Return a function that gives the outputs of another one, and the gradients of a loss that weighs all of them."""

    def both(*inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        loss = torch.zeros((), dtype=torch.float64)
        with torch.enable_grad():
            outputs = function(*leaves)
            for x in outputs:
                real = torch.view_as_real(x * 1) if x.is_complex() else x
                weights = torch.cos(torch.arange(real.numel(), dtype=torch.float64)).reshape(real.shape)
                loss = loss + (weights * real).sum()
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        gradients = (torch.zeros_like(x) if g is None else g.clone() for g, x in zip(found, leaves, strict=True))
        return [*(x.detach().clone() for x in outputs), *gradients]

    return both


def written(z, w, x, s):
    made = torch.zeros_like(z)
    made[0] = z[1]
    made[1:].add_(w[1:], alpha=2).mul_(z[1:])
    return made


GROUPS = {
    "sums": lambda z, w, x, s: [
        z + w - x + 1j - (s - z),
        torch.add(z, w, alpha=3) - torch.sub(x, z, alpha=2),
        (1j - z) + torch.rsub(z, w),
        z.mean() + z.sum(0) + w.mean(1) + z.cumsum(0),
    ],
    "products": lambda z, w, x, s: [
        z * w * x * s * (1.5 - 2j) * 2.0,
        -1j * z + 0j * w + (1j * x) * (2 * z),
        z * torch.arange(3) * (x > 0),
        torch.addcmul(z, w, w, value=0.3),
        z**2 + z**3 + w**1 + w**0,
        (z * z.conj()).real,
    ],
    "quotients": lambda z, w, x, s: [
        z / w + z / x + x / w + z / 2.0 + z / (1 - 2j) + 1 / z + z / 2j,
        x / (1e200 * (1 + z)) * 1e200,  # the square of the divisor is infinite
        torch.reciprocal(z) + z**-2,
    ],
    "products of matrices": lambda z, w, x, s: [
        z @ w + z @ x.to(C),
        z @ w[0] + torch.addmv(w[0], z, w[1]),
        torch.dot(z[0], w[0]) + torch.vdot(z[0], w[1]),
        torch.einsum("bij,bjk->bik", z.expand(2, 3, 3), w.expand(2, 3, 3)),
        torch.baddbmm(z, z.expand(2, 3, 3), w.expand(2, 3, 3)),
        torch.addmm(w[0], z, w, beta=2, alpha=0.5j) + functional.linear(z, w, z[0]),
        functional.conv1d(z[None], torch.stack([w, z])),
    ],
    "parts and conjugates": lambda z, w, x, s: [
        z.conj() @ w.mT.conj() + w.conj() * z.conj().imag + z.mH @ w + torch.conj_physical(z),
        z.real * w.imag + 1j * z.imag + torch.complex(z.real, x) + torch.polar(x.abs(), z.real),
        torch.view_as_complex(torch.tanh(torch.view_as_real(z * w))),
        z.abs() + z.angle(),
        z.sgn(),
        torch.linalg.vector_norm(z) + z.norm(dim=1),
    ],
    "functions": lambda z, w, x, s: [
        torch.exp(z * 1j * s) + z.log(),
        z.sqrt() + (-z).sqrt() + w**0.5 + z**1.3,
        z.sin() + w.cos() + z.sinh() * w.cosh() + z.tan(),
        torch.tanh(z) + torch.tanh(400 * w) + torch.tanh(1e-9 * z) * 1e9,
        torch.sigmoid(z),
    ],
    "shapes": lambda z, w, x, s: [
        torch.cat([z, x + 0 * z.real, w]).reshape(3, 9)[:, ::2].flip(0),
        torch.stack([z, w], -1).flatten() * z.new_ones(1),
        z.split(1)[0] * w.unbind(1)[2] + z.chunk(2)[1].roll(1, 1),
        z[torch.tensor([0, 2])] * w[1] + z[:2, :1].expand(2, 3) + z.index_select(0, torch.tensor([1, 1])),
        z.gather(0, torch.zeros(3, 3, dtype=torch.long)) + z.repeat(1, 1)[None].squeeze(0),
        torch.diag(z) + torch.diagonal(w) + torch.diag_embed(z[0]).sum(0),
        z.tril() + w.triu() + functional.pad(z[1:, 1:], (1, 0, 1, 0), value=2.0),
        torch.kron(z[:2], w[:2]) + torch.index_add(z, 0, torch.tensor([1, 1]), w[:2], alpha=2).sum(),
    ],
    "choices and constants": lambda z, w, x, s: [
        torch.where(x > 0, z, w) + torch.where(x > 0, 1j * z, 0.0),
        torch.where(torch.isfinite(z) & ~torch.isnan(z) & (z != w) & (z == z) & ~torch.isinf(z), z, w),
        z.masked_fill(x > 0, 2.0),
        torch.ones_like(z) * w + torch.full((3, 3), 1 + 2j, dtype=C) + torch.zeros(3, dtype=C) + torch.ones(3, dtype=C),
        torch.eye(3, dtype=C) * z + torch.tensor([1j, 2.0, 3j], dtype=C) * z * torch.tensor(2 - 1j),
    ],
}


@pytest.mark.parametrize("name", GROUPS)
def test_values_and_gradients_are_those_of_complex_numbers(name):
    function = with_gradients(GROUPS[name])
    for i, (found, expected) in enumerate(zip(converted(function), function(Z, W, X, S), strict=True)):
        assert found.shape == expected.shape and found.dtype == expected.dtype, i
        assert relative_difference(found, expected.resolve_conj()) <= ROUNDING, i


def test_single_precision_stays_single():
    def function(z, w, x, s):
        z = z.to(torch.complex64)
        return [z * s + 1j * z, torch.tanh(z) / z.abs()]

    for found, expected in zip(converted(function), function(Z, W, X, S), strict=True):
        assert found.dtype == expected.dtype == torch.complex64
        assert relative_difference(found, expected) <= 1e-6  # a few roundings of 6e-8


def test_a_complex_tensor_is_made_by_writing_into_its_parts():
    (found,) = converted(lambda *x: [written(*x)])
    assert relative_difference(found, written(Z, W, X, S)) <= ROUNDING


@pytest.mark.parametrize(
    "function, name",
    [
        (lambda z: torch.fft.fft(z), "aten._fft_c2c.default"),
        (lambda z: z.prod(0), "aten.prod.dim_int"),
        (lambda z: z.view(torch.float64), "aten.view.dtype"),
        (lambda z: 2.0**z, "power"),
    ],
)
def test_an_operation_without_a_rule_is_refused_by_its_name(function, name):
    with pytest.raises(Refused, match=name) as error:
        converted(lambda z, w, x, s: [function(z)])
    assert "\n" not in str(error.value)
