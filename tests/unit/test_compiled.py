"""torch.compile of a model that contains a solve: there is one graph break, and the solve is not compiled."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from node_cuda import NeuralODE, odeint, odeint_adjoint, odeint_dense, odeint_event, solve
from node_cuda._eager import eager

# The compiler reads `.grad` of every tensor, and torch warns about that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
T = torch.linspace(0.0, 1.0, 3)
SAID = r"a solve is one graph break\. Drop fullgraph=True, and compile func instead"
if torch.__version__ < (2, 7):  # its messages name the function only
    SAID = r"call torch\._dynamo\.disable\(\) wrapped function <function "


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, t, y):
        return self.net(y)


WAYS = ("odeint", "adjoint", "discrete", "event", "dense", "layer")


class Around(nn.Module):
    """A solve between two layers. The layers can be compiled."""

    def __init__(self, way):
        super().__init__()
        self.field, self.before, self.after = Field(), nn.Linear(2, 2), nn.Linear(2, 2)
        self.way = way
        self.layer = NeuralODE(self.field)

    def forward(self, x):
        x = self.before(x)
        if self.way == "odeint":
            ys = odeint(lambda t, y: self.field.net(y), x, T, rtol=1e-5, atol=1e-6)
        elif self.way in ("adjoint", "discrete"):
            ys = odeint_adjoint(self.field, x, T, gradient=self.way)
        elif self.way == "event":
            ys = odeint_event(self.field, x, T[0], event_fn=lambda t, y: t - 0.5)[1]
        elif self.way == "dense":
            ys = odeint_dense(self.field, x, T[0], T[-1])(T)
        else:
            ys = self.layer(x, T)
        return self.after(ys[-1])


class Counted:
    """A backend that counts its graphs and their operations."""

    def __init__(self):
        self.names = []

    def __call__(self, module, inputs):
        self.names.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module.forward


@pytest.fixture
def breaks():
    """Return the reasons of the graph breaks of torch.compile so far."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield lambda: [reason for reason, count in counters["graph_break"].items() for _ in range(count)]
    torch._dynamo.reset()


@pytest.mark.parametrize("way", WAYS)
def test_a_solve_is_one_graph_break_and_nothing_is_compiled_inside(breaks, way):
    """A second shape compiles the two graphs around the solve again, for any size. A third shape compiles nothing."""
    torch.manual_seed(0)
    model, backend = Around(way), Counted()
    compiled = torch.compile(model, backend=backend)
    graphs, broken = [], []
    for size in (4, 5, 6):
        x = torch.randn(size, 2)
        ours, expected = compiled(x), model(x)
        assert torch.equal(ours, expected)
        grads = [torch.autograd.grad(y.sum(), list(model.parameters())) for y in (ours, expected)]
        assert all(map(torch.equal, *grads))
        graphs.append(len(backend.names))
        broken.append(len(breaks()))
    assert graphs[0] == 2 and graphs[2] == graphs[1] <= 4
    assert broken[0] == (2 if way == "dense" else 1)  # the function that odeint_dense returns is called too
    assert all(re.search(SAID, reason) for reason in breaks())


@pytest.mark.parametrize("gradient", ["backprop", "adjoint", "discrete"])
def test_a_compiled_training_step_does_not_trace_the_backward_pass(breaks, gradient):
    field, backend = Field(), Counted()

    def step(x):
        loss = solve(field, x, T, gradient=gradient).ys[-1].square().sum()
        loss.backward()
        return loss

    torch.compile(step, backend=backend)(torch.ones(4, 2))
    ours = [p.grad for p in field.parameters()]
    field.zero_grad()
    step(torch.ones(4, 2))
    assert all(torch.equal(a, b.grad) for a, b in zip(ours, field.parameters(), strict=True))
    assert len(backend.names) <= 2 and len(breaks()) == 2  # the graph break of the solve, and torch's at backward()


def test_fullgraph_is_refused_with_a_message(breaks):
    with pytest.raises(Exception, match=SAID):
        torch.compile(Around("odeint"), backend="eager", fullgraph=True)(torch.ones(4, 2))


@pytest.mark.parametrize("gradient", ["backprop", "adjoint", "discrete"])
@pytest.mark.parametrize("around", [False, True], ids=["alone", "in a compiled model"])
def test_a_compiled_field_runs_compiled_inside_the_solve(breaks, gradient, around):
    """The graph contains only the field, and computes it. Python code of the field runs only during the trace."""
    inner, runs = Counted(), []

    def backend(module, inputs):
        compiled = inner(module, inputs)

        def run(*arguments):
            runs.append(1)
            return compiled(*arguments)

        return run

    field = Field()
    fast = torch.compile(field, backend=backend)

    def value(y0):
        return solve(fast, y0, T, gradient=gradient).ys[-1]

    outer = torch.compile(value, backend="eager") if around else value
    y = outer(torch.ones(4, 2))
    assert torch.equal(y, solve(field, torch.ones(4, 2), T, gradient=gradient).ys[-1])
    forward = len(runs)
    assert forward >= 10 and 1 <= len(inner.names) <= 4 and all(len(names) <= 4 for names in inner.names)
    y.sum().backward()
    assert field.net[0].weight.grad is not None and (len(runs) > forward) == (gradient != "backprop")


def test_with_torch_2_6_the_compiler_is_off_while_a_marked_function_runs(monkeypatch):
    """There a mark holds for one frame. The function that switches has the mark."""
    active, skipped = ["a compiler"], []

    def set_eval_frame(compiler):
        active.append(compiler)
        return active[-2]

    frames = SimpleNamespace(set_eval_frame=set_eval_frame, skip_code=skipped.append)
    monkeypatch.setattr(torch._C._dynamo, "eval_frame", frames)

    @eager
    def half(x, *, by=2):
        """Return a half."""
        assert active[-1] is None
        return x / by

    assert half(3.0) == 1.5 and active == ["a compiler", None, "a compiler"]
    with pytest.raises(ZeroDivisionError):
        half(3.0, by=0)
    assert active[-1] == "a compiler"
    assert skipped == [half.__code__] and half.__doc__ == "Return a half." and half._torchdynamo_disable
