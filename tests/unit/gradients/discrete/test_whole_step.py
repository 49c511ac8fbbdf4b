"""One vjp a step, of small states, gives the gradients of one vjp a stage."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from problems import F64, MLP
from torch import nn

from node_cuda import TABLEAUS, InvalidField, _torch_modes, solve
from node_cuda.gradients.discrete import whole_step

Y = torch.tensor([0.7, -0.4], dtype=F64)
# Two orders of summation of the same hundred or so float64 terms, each of the size of the result.
SAME = dict(rtol=1e-12, atol=1e-13)


def asked(method, **options):
    if not TABLEAUS[method].adaptive:
        return dict(method=method, options=dict(step_size=0.19, **options))
    rtol = {"adaptive_heun": 1e-3, "fehlberg2": 1e-4, "bosh3": 1e-4, "dopri8": 1e-9}.get(method, 1e-6)
    return dict(method=method, rtol=rtol, atol=rtol, options=options)


def found(func, t, y0=Y, **arguments):
    """Return the gradients and the statistics."""
    y0 = y0.clone().requires_grad_()
    solution = solve(func, y0, t, gradient="discrete", **arguments)
    weights = torch.linspace(-0.5, 1.0, solution.ys.numel(), dtype=y0.dtype).reshape(solution.ys.shape)
    inputs = [y0, *(p for p in func.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad((solution.ys * weights).sum(), inputs, materialize_grads=True)
    return gradients, solution.stats


def both(monkeypatch, make, t, **arguments):
    """Return what is found by one vjp a step, and by one a stage."""
    one = found(make(), t, **arguments)
    monkeypatch.setattr(whole_step, "SMALL", 0)
    return one, found(make(), t, **arguments)


def assert_same(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        torch.testing.assert_close(a, b, **SAME)
    assert one[1].nfe_backward == other[1].nfe_backward
    assert one[1].recomputed_steps == other[1].recomputed_steps


OUTPUTS = {
    "the end": torch.tensor([0.0, 1.7], dtype=F64),
    "many inside": torch.linspace(0.0, 1.7, 40, dtype=F64),
    "few inside": torch.tensor([0.0, 0.3, 0.31, 1.2, 1.7], dtype=F64),
    "backwards": torch.tensor([1.7, 0.6, -0.2], dtype=F64),
}


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("method", TABLEAUS)
def test_gradients_and_evaluations_are_those_of_one_vjp_a_stage(method, outputs, monkeypatch):
    assert_same(*both(monkeypatch, lambda: MLP(timed=True), OUTPUTS[outputs], checkpoints=3, **asked(method)))


@pytest.mark.parametrize("options", [dict(jump_t=[0.5]), dict(step_t=[0.31, 1.2]), dict(dense="accurate")], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "fehlberg2", "tsit5"])
def test_so_they_are_with_jumps_and_with_stages_of_the_interpolant(method, options, monkeypatch):
    assert_same(*both(monkeypatch, lambda: MLP(timed=True), OUTPUTS["few inside"], **asked(method, **options)))


class Counted(torch.autograd.Function):
    """The identity, which notes its evaluations and its vjps."""

    order: ClassVar[list[str]] = []

    @staticmethod
    def forward(ctx, x):
        Counted.order.append("forward")
        return x.clone()

    @staticmethod
    def backward(ctx, g):  # pyright: ignore
        Counted.order.append("backward")
        return g


class Watched(MLP):
    def forward(self, t, y):
        return Counted.apply(super().forward(t, y))


class Wide(MLP):
    """With further parameters, which take part in dy/dt by their first element."""

    def __init__(self, further):
        super().__init__(dtype=torch.float32)
        self.further = nn.Parameter(torch.zeros(further))

    def forward(self, t, y):
        return super().forward(t, y) + self.further[:1].sum()


OF_MLP = sum(p.numel() for p in MLP().parameters())


@pytest.mark.parametrize(
    ("elements", "further", "at_once"),
    [
        (whole_step.SMALL, 0, True),
        (whole_step.SMALL + 2, 0, False),
        (2, whole_step.FEW - OF_MLP, True),
        (2, whole_step.FEW - OF_MLP + 1, False),
    ],
)
def test_only_a_small_state_of_a_field_with_few_parameters_has_one_vjp_a_step(elements, further, at_once):
    """In it autograd computes the products of all stages in one call, and so without the solver's code between them."""
    calls = []

    def counting(function):
        return lambda *arguments, **options: calls.append(0) or function(*arguments, **options)

    y0 = torch.zeros(elements // 2, 2, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counting(torch.autograd.grad))
        patch.setattr(_torch_modes, "_run_backward", counting(_torch_modes._run_backward))
        found(Wide(further), torch.linspace(0, 1, 5), y0, method="rk4")
    # The last step comes first, and decides by stages whether a step's graph fits.
    assert len(calls) - 1 == (4 + 3 if at_once else 16)  # and that of the test


def test_one_step_is_held_at_a_time():
    """All products of a step come before the evaluations of the step that lies before it."""
    Counted.order.clear()
    found(Watched(), torch.linspace(0, 1, 6, dtype=F64), method="rk4")
    order = "".join(word[0] for word in Counted.order)
    assert order.endswith("ffffbbbb" * 5)


class Constant(nn.Module):
    """A field that returns its parameter itself; with `stop` without a gradient."""

    def __init__(self, stop=False):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.3, -0.2], dtype=F64))
        self.stop = stop

    def forward(self, t, y):
        return self.rate.detach() if self.stop else self.rate


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5", "fehlberg2"])
@pytest.mark.parametrize("stop", [False, True])
def test_a_field_without_a_graph_has_the_gradients_of_one_vjp_a_stage(method, stop, monkeypatch):
    assert_same(*both(monkeypatch, lambda: Constant(stop), OUTPUTS["few inside"], **asked(method)))


class Buffered(MLP):
    """A field that returns the same memory at each call, where autograd does not record."""

    def __init__(self):
        super().__init__()
        self.out = torch.zeros(2, dtype=F64)

    def forward(self, t, y):
        value = super().forward(t, y)
        return value if torch.is_grad_enabled() else self.out.copy_(value)


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_a_field_that_reuses_its_output_has_the_gradients_of_one_vjp_a_stage(method, monkeypatch):
    assert_same(*both(monkeypatch, Buffered, OUTPUTS["few inside"], **asked(method)))


def test_a_parameter_that_was_used_in_the_forward_pass_alone_is_told():
    class Switching(MLP):
        uses = True

        def forward(self, t, y):
            out = super().forward(t, y)
            return out if self.uses else torch.tanh(y @ self.w1.T).sum() * y

    func, y0 = Switching(), Y.clone().requires_grad_()
    y = solve(func, y0, OUTPUTS["the end"], method="rk4", gradient="discrete", options=dict(step_size=0.5)).ys
    func.uses = False
    with pytest.raises(InvalidField):
        y[-1].sum().backward()
