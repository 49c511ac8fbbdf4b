"""Which fields can be compiled: what is found and becomes an input, and what is refused, with the reason."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from native import CLOSE_IN_FLOAT, Timed, compare, reason, start
from problems import F64, linspace
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from node_cuda import InvalidField, NeuralODE, solve
from node_cuda.native import build
from node_cuda.native.tracing import graph_of, while_loop

pytestmark = pytest.mark.usefixtures("interpreted")
T = linspace(0.0, 1.0, 3)
MIDPOINT = dict(method="midpoint", options=dict(step_size=0.25))
RATE = torch.tensor([[-1.0, 0.5]], dtype=F64)
HALF = 0.5


class Plain(nn.Module):
    """Keeps a tensor as an attribute, one in a list, one in a dict, and a buffer."""

    def __init__(self):
        super().__init__()
        self.plain = torch.tensor([1.0, -0.5], dtype=F64)
        self.items = [torch.tensor(0.5, dtype=F64), {"a": torch.tensor([0.25, 1.0], dtype=F64)}]
        self.register_buffer("kept", torch.tensor([2.0, 0.5], dtype=F64))

    def forward(self, t, y):
        return -y * self.plain * self.items[0] * self.items[1]["a"] * self.kept

    def tensors(self):
        return [self.plain, self.items[0], self.items[1]["a"], self.kept]


def closure():
    scale, weight = torch.tensor([0.5, -1.0], dtype=F64), nn.Parameter(torch.eye(2, dtype=F64))
    return lambda t, y: (y * scale + RATE) @ weight * HALF, [scale, weight, RATE]


def test_tensors_of_attributes_closures_and_globals_are_inputs_of_the_graph():
    """Their numbers change in place, and the next solve sees that without another graph."""
    plain = Plain()
    for field, tensors in (closure(), (plain, plain.tensors())):
        first = compare(field, start(), T, **MIDPOINT)
        before = [x.detach().clone() for x in tensors]
        try:
            for x in tensors:
                with torch.no_grad():
                    x.mul_(1.5)
                second = compare(field, start(), T, **MIDPOINT)
                assert not torch.equal(second.ys, first.ys)
                first = second
        finally:
            with torch.no_grad():
                for x, old in zip(tensors, before, strict=True):
                    x.copy_(old)


class Flow(nn.Module):
    """A continuous normalizing flow with the exact trace, by autograd.grad inside of the field."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, t, state):
        z, _ = state
        with torch.enable_grad():
            z = z.requires_grad_(True)
            dz = self.net(torch.cat([z, t.expand(len(z), 1)], 1))
            trace = sum(torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
        return dz, -trace.unsqueeze(1)


def test_the_exact_trace_of_a_flow():
    compare(Flow(), (start(), torch.zeros(3, 1, dtype=F64)), T, rtol=1e-3, atol=1e-3, method="adaptive_heun")


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)

    def forward(self, t, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.tanh(self.lin(y)).float()


def test_autocast_inside_and_around_the_field():
    y0 = start(torch.float32)
    with torch.no_grad():
        compare(Autocast(), y0, T, **MIDPOINT, limit=1e-2)  # products are rounded to 8 bits
        field = Timed(torch.float32)
        plain = compare(field, y0, T, **MIDPOINT, limit=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = compare(field, y0, T, **MIDPOINT, limit=1e-2)
    assert not torch.equal(plain.ys, rounded.ys)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = parametrizations.spectral_norm(nn.Linear(2, 2).double())

    def forward(self, t, y):
        return torch.tanh(self.lin(y))


def test_spectral_norm_is_compiled_in_eval_and_refused_while_it_trains():
    field = Normed().eval()
    compare(field, start(), T, **MIDPOINT)
    field.train()
    with torch.no_grad():
        found = solve(field, start(), T, method="midpoint", options=dict(step_size=0.25, compile=True))
    assert found.stats.loop == "host" and "writes into a tensor that it keeps" in str(found.stats.why)
    field.eval()
    compare(field, start(), T, **MIDPOINT)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3)

    def forward(self, t, y):
        return torch.tanh(self.norm(self.conv(y))) * torch.cos(t)


def test_a_convolution():
    compare(Convolution(), torch.randn(2, 3, 5, 5), T, **MIDPOINT, limit=1e-5)


def overwrites_its_argument(t, y):
    y.mul_(-2.0)
    return y


def returns_its_argument(t, y):
    return y


def returns_a_view(t, y):
    return y.t().contiguous().t()


@pytest.mark.parametrize("field", [overwrites_its_argument, returns_its_argument, returns_a_view])
@pytest.mark.parametrize("method", ["adaptive_heun", "midpoint"])
def test_a_field_that_writes_into_its_argument_or_returns_it(field, method):
    y0 = start()
    compare(field, y0, T, method=method, rtol=1e-3, atol=1e-3)
    assert torch.equal(y0, start())


# ------------------------------------------------------------------ what is refused
class Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, t, y):
        return -self.drop(y)


class Batched(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2).double()

    def forward(self, t, y):
        return -self.norm(y)


class Counts(nn.Module):
    """Writes into a buffer at each evaluation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, t, y):
        self.calls += 1
        return -y


def branches(t, y):
    return -y if t < 0.5 else y


def reads_the_time(t, y):
    return -y * math.cos(float(t))


def calls_numpy(t, y):
    return torch.from_numpy(-np.asarray(y))


class Returns(nn.Module):
    """Returns its argument, a parameter, or a view of one of them."""

    def __init__(self, kind):
        super().__init__()
        self.w, self.kind = nn.Parameter(torch.arange(6, dtype=F64).reshape(3, 2)), kind

    def forward(self, t, y):
        return {"y": y, "y[:]": y[:], "w": self.w, "w.view": self.w.view(3, 2)}[self.kind]


@pytest.mark.parametrize("kind", ["y", "y[:]", "w", "w.view"])
def test_a_field_may_return_its_argument_or_a_tensor_that_it_keeps(kind):
    """A loop must not return its input, so that it gets a copy."""
    for solver in (dict(method="bosh3", rtol=1e-4, atol=1e-4), MIDPOINT):
        compare(Returns(kind), start(), T, **solver)


def draws(t, y):
    return -y + 0.1 * torch.randn_like(y)


REFUSED = {
    "dropout": (Dropout, "draws random numbers"),
    "BatchNorm in training": (Batched, "writes into a tensor that it keeps"),
    "a counter in a buffer": (Counts, "writes into a tensor that it keeps"),
    "noise": (lambda: draws, "draws random numbers"),
    "if t < 0.5": (lambda: branches, "reads numbers from its tensors"),
    "float(t)": (lambda: reads_the_time, "reads numbers from its tensors"),
    "numpy": (lambda: calls_numpy, "torch cannot trace func"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_field_that_cannot_be_compiled_is_solved_by_the_host_with_the_reason(case):
    make, why = REFUSED[case]
    state, before = torch.get_rng_state(), None
    with torch.no_grad():
        if case in ("dropout", "noise"):
            found = solve(make(), start(), T, method="midpoint", options=dict(compile=True))
            torch.set_rng_state(state)
            before = solve(make(), start(), T, method="midpoint")
            assert torch.equal(found.ys, before.ys)  # the search for the reason draws no numbers
            assert found.stats.loop == "host" and why in str(found.stats.why)
        else:
            assert why in reason(make(), start(), T, method="midpoint")
        with pytest.raises(ValueError, match=why):
            solve(make(), start(), T, method="midpoint", options=dict(compile="require"))


def test_fields_with_dropout_or_batch_norm_are_compiled_in_eval():
    for make in (Dropout, Batched):
        compare(make().eval(), start(), T, **MIDPOINT)


def reads_a_number(t, y):
    return -y / (1 + y.norm().item())


def test_a_number_read_from_a_double_is_refused_because_the_compiler_rounds_it_to_float32():
    assert "from a float64 tensor" in reason(reads_a_number, start(), T, **MIDPOINT)
    compare(reads_a_number, start(torch.float32), T, limit=CLOSE_IN_FLOAT, **MIDPOINT)


def test_a_refused_field_is_not_traced_again(monkeypatch):
    with torch.no_grad():
        first = solve(branches, start(), T, method="midpoint", options=dict(compile=True))
        monkeypatch.setattr(build, "native", None)
        monkeypatch.setattr("node_cuda.native.forward.CompiledForward", None)
        again = solve(branches, start(), T, method="midpoint", options=dict(compile=True))
    assert again.stats.why == first.stats.why is not None


class Lookup(nn.Module):
    """Makes a tensor from numbers at each evaluation: a constant of the graph, not a tensor that func keeps."""

    def forward(self, t, y):
        return -y * torch.tensor([1.0, 2.0], dtype=F64) + torch.ones_like(y) * torch.arange(2, dtype=F64)


def test_tensors_that_the_field_makes_are_part_of_the_graph():
    compare(Lookup(), start(), T, **MIDPOINT)


# ------------------------------------------------------------------ loops in a graph
def test_a_loop_in_a_graph_repeats_its_body_and_writes_into_the_tensors_that_are_named():
    def run(n, x):
        rows = x.new_zeros(5, 2)

        def body(i, x, rows, n):
            rows.index_copy_(0, i.reshape(1), x.unsqueeze(0))
            return [i + 1, x * 2]

        i, x = while_loop(lambda i, x, rows, n: i < n, body, [torch.zeros_like(n), x.clone()], [rows, n], [0])
        return i, x, rows

    graph = graph_of(run, [torch.tensor(0), torch.zeros(2)])
    for n in (0, 3):  # other numbers than those that it was traced with
        i, x, rows = graph(torch.tensor(n), torch.tensor([1.0, -1.0]))
        assert int(i) == n and torch.equal(x, 2.0**n * torch.tensor([1.0, -1.0]))
        expected = [[2.0**j, -(2.0**j)] if j < n else [0.0, 0.0] for j in range(5)]
        assert rows.tolist() == expected


@pytest.mark.parametrize("shape", [(4, 3, 5), (64, 128, 256)])
def test_products_of_matrices_keep_their_value(shape):
    n, k, m = shape
    x, w, b = torch.randn(n, k, dtype=F64), torch.randn(k, m, dtype=F64), torch.randn(m, dtype=F64)
    graph = graph_of(lambda x, w, b: (x @ w, torch.addmm(b, x, w), torch.addmm(b, x, w, alpha=2.0)), [x, w, b])
    for found, expected in zip(graph(x, w, b), (x @ w, b + x @ w, b + 2 * x @ w), strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_the_solution_does_not_share_memory_with_the_state():
    y0 = start()
    with torch.no_grad():
        ys = solve(Timed(), y0, T, method="midpoint", options=dict(compile="require")).ys
    y0.zero_()
    assert torch.equal(ys[0], start())


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.calls, self.last, self.log = 0, torch.zeros(3, 2), []

    def forward(self, t, y):
        return self.layer(y)


class Keeps(Linear):
    def forward(self, t, y):
        self.last = self.layer(y)
        return self.last


class CountsInItsAnswer(Linear):
    def forward(self, t, y):
        self.calls += 1
        return self.layer(y) * min(1.0, self.calls / 500)


class DrawsInPython(Linear):
    def forward(self, t, y):
        return self.layer(y) * (random.random() < 2.0)


class DrawsInNumpy(Linear):
    def forward(self, t, y):
        return self.layer(y) * float(np.random.rand() < 2.0)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Keeps, "keeps a tensor of each evaluation, 'last'"),
        (CountsInItsAnswer, "answers differently"),
        (DrawsInPython, "random numbers"),
        (DrawsInNumpy, "random numbers"),
    ],
)
def test_a_field_that_is_more_than_its_code_is_not_traced(kind, why):
    field = kind()
    with torch.no_grad():
        stats = solve(field, torch.ones(3, 2), torch.linspace(0, 1, 3), options=dict(compile=True)).stats
    assert stats.loop == "host" and why in stats.why
    copy.deepcopy(field)  # no attribute is a tensor of the trace


@pytest.mark.usefixtures("interpreted")
def test_a_write_that_counts_no_version_is_noticed_before_the_backward_pass():
    field = Linear()
    ys = solve(field, torch.ones(3, 2), torch.linspace(0, 1, 3), gradient="discrete", options=dict(compile=True)).ys
    field.layer.weight.data.mul_(2.0)
    with pytest.raises(InvalidField, match="changed between"):
        ys.sum().backward()


class Checkpointed(Linear):
    def forward(self, t, y):
        return checkpoint(self.layer, y, use_reentrant=False)


def gradient(make, called, options):
    torch.manual_seed(0)
    layer = NeuralODE(make(), torch.linspace(0, 1, 3), gradient="discrete", options=options)
    named = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    ys = torch.func.functional_call(layer, named, (torch.ones(3, 2),)) if called else layer(torch.ones(3, 2))
    ys.sum().backward()
    found = named if called else dict(layer.named_parameters())
    return found["func.layer.weight"].grad, layer.stats


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("make", "called"), [(Checkpointed, False), (Linear, True)])
def test_the_host_takes_the_steps_again_if_only_the_backward_pass_cannot_be_compiled(make, called):
    expected, _ = gradient(make, called, {})
    found, stats = gradient(make, called, dict(compile=True))
    assert stats.loop == "native" and stats.loop_backward == "host" and stats.why_backward
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # float32, steps that differ by rounding
