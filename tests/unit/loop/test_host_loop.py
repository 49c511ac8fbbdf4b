"""The cost of a step: tensor operations, host reads and saved memory, counted in torch's dispatcher."""

from __future__ import annotations

import contextlib

import pytest
import torch
from problems import F64, MLP, linspace
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from node_cuda import odeint, odeint_adjoint, solve

STEP_OPS = 34  # of one dopri5 step, f excluded (torchdiffeq: 142)
BACKWARD_STEP_OPS = 80  # of one step of the adjoint, f and its vjp excluded (torchdiffeq: about 200)
READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"}
EVERYTHING = dict(rtol=1e3, atol=1e3)  # every step is accepted


def is_view(op) -> bool:
    """Return whether an operation returns an alias of an input that it does not write to, so that no data moves."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


class OpCounter(TorchDispatchMode):
    """Counts tensor operations except views, host reads, and the elements that the operations write."""

    def __init__(self):
        super().__init__()
        self.ops = self.reads = self.elements = 0
        self.by_name: dict[str, int] = {}
        self.running = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.running and not is_view(func):
            name = func._schema.name
            self.ops += 1
            self.by_name[name] = self.by_name.get(name, 0) + 1
            self.reads += name in READS
            outputs = result if isinstance(result, tuple | list) else (result,)
            self.elements += sum(x.numel() for x in outputs if isinstance(x, torch.Tensor))
        return result

    @contextlib.contextmanager
    def paused(self):
        running, self.running = self.running, False
        try:
            yield
        finally:
            self.running = running


class Silent(torch.autograd.Function):
    """The field y' = -sum(p) y cos t and its derivatives, with the counter paused in both passes."""

    @staticmethod
    def forward(ctx, counter, t, y, *params):
        with counter.paused():
            ctx.counter = counter
            ctx.save_for_backward(t, y, *params)
            return -sum(p.sum() for p in params) * y * torch.cos(t)

    @staticmethod
    def backward(ctx, grad):
        with ctx.counter.paused():
            t, y, *params = ctx.saved_tensors
            total = sum(p.sum() for p in params)
            through = (grad * y).sum()
            grad_t = through * total * torch.sin(t) if ctx.needs_input_grad[1] else None
            grad_y = -total * torch.cos(t) * grad
            return (None, grad_t, grad_y, *(torch.full_like(p, float(-through * torch.cos(t))) for p in params))


class SilentField(nn.Module):
    """A field whose operations are not counted, with `count` parameter tensors of different shapes."""

    def __init__(self, counter: OpCounter, count: int):
        super().__init__()
        self.counter, self.nfe = counter, 0
        self.weights = nn.ParameterList(torch.full((1 + i % 3, 2), 0.1 / count, dtype=F64) for i in range(count))

    def forward(self, t, y):
        self.nfe += 1
        return Silent.apply(self.counter, t, y, *self.weights)


def forward_cost(odeint, steps, *, grad=False, outputs=2, **options):
    counter = OpCounter()
    func = SilentField(counter, 3)
    y0 = torch.ones(4, 8, dtype=F64)
    options = dict(first_step=1 / steps, max_step=1 / steps, **options)
    with counter, torch.set_grad_enabled(grad):
        odeint(func, y0, linspace(0.0, 1.0, outputs), **EVERYTHING, options=options)
    return counter, func.nfe / 6


def slope(cost, few=8, many=24):
    """Return (operations, host reads) of one more step, without the constant costs of a solve."""
    (a, steps_a), (b, steps_b) = cost(few), cost(many)
    steps = steps_b - steps_a
    assert steps >= (many - few) * 0.9
    return (b.ops - a.ops) / steps, (b.reads - a.reads) / steps


# ------------------------------------------------------------------ forward
def test_a_dopri5_step_costs_at_most_34_operations_and_one_host_read():
    ops, reads = slope(lambda steps: forward_cost(odeint, steps))
    assert ops <= STEP_OPS
    assert reads <= 1


def test_a_step_of_the_forward_pass_of_the_adjoint_costs_no_more():
    ops, reads = slope(lambda steps: forward_cost(odeint_adjoint, steps, grad=True))
    assert ops <= STEP_OPS
    assert reads <= 1


def test_the_counter_finds_the_known_counts_of_torchdiffeq(torchdiffeq):
    """The same measurement finds about 142 operations and 18 reads for torchdiffeq, so the counter is right."""
    ops, reads = slope(lambda steps: forward_cost(torchdiffeq.odeint, steps))
    assert 130 <= ops <= 160
    assert 15 <= reads <= 20


def test_a_step_without_an_output_pays_nothing_for_dense_output():
    few, _ = forward_cost(odeint, 60, outputs=2)
    for dense in ({}, dict(dense="accurate")):
        more, _ = forward_cost(odeint, 60, outputs=2, **dense)
        assert more.ops <= few.ops + 20


def test_an_output_costs_a_few_operations_and_no_host_read():
    (few, _), (many, _) = (forward_cost(odeint, 20, outputs=n) for n in (11, 211))
    assert (many.ops - few.ops) / 200 <= 12
    assert (many.reads - few.reads) / 200 <= 0.1


def test_the_host_reads_that_are_reported_are_those_that_happen():
    counter = OpCounter()
    func = SilentField(counter, 3)
    with counter, torch.no_grad():
        solution = solve(func, torch.ones(4, dtype=F64), linspace(0.0, 1.0, 5), rtol=1e-6, atol=1e-8)
    assert abs(counter.reads - solution.stats.host_reads) <= 5  # those of the input checks may or may not be counted


def test_rejected_steps_cost_no_more_than_accepted_ones():
    """One more rejected step costs six evaluations and no outputs."""
    counter = OpCounter()
    func = SilentField(counter, 1)
    with counter, torch.no_grad():
        solution = solve(
            func, torch.ones(4, dtype=F64), linspace(0.0, 1.0, 2), rtol=1e-9, atol=1e-9, options=dict(first_step=0.99)
        )
    assert solution.stats.rejected > 0
    steps = solution.stats.rejected + solution.stats.accepted
    assert func.nfe == 1 + 6 * steps
    assert counter.ops <= STEP_OPS * steps + 100


# ------------------------------------------------------------------ the backward pass of the adjoint
def backward_cost(steps, count=3, *, time=False, odeint_adjoint=odeint_adjoint, **adjoint_options):
    counter = OpCounter()
    func = SilentField(counter, count)
    y0 = torch.ones(4, 2, dtype=F64, requires_grad=True)
    t = linspace(0.0, 1.0, 2).requires_grad_(time)
    options = dict(first_step=1 / steps, max_step=1 / steps)
    ys = odeint_adjoint(func, y0, t, **EVERYTHING, options=options, adjoint_options=dict(options, **adjoint_options))
    before = func.nfe
    loss = ys.sum()
    with counter:
        loss.backward()
    return counter, (func.nfe - before) / 6


@pytest.mark.parametrize("time", [False, True], ids=["", "with dL/dt"])
@pytest.mark.parametrize("options", [dict(), dict(norm="seminorm")], ids=["default", "seminorm"])
def test_a_step_of_the_adjoint_costs_at_most_80_operations_for_any_number_of_parameters(options, time):
    ops, reads = slope(lambda steps: backward_cost(steps, 24, time=time, **options))
    assert ops <= BACKWARD_STEP_OPS
    assert reads <= 1


def test_the_number_of_parameter_tensors_does_not_matter():
    few, _ = slope(lambda steps: backward_cost(steps, 2))
    many, _ = slope(lambda steps: backward_cost(steps, 24))
    assert many <= few + 1


def test_the_counter_finds_the_known_backward_counts_of_torchdiffeq(torchdiffeq):
    ops, reads = slope(lambda steps: backward_cost(steps, 4, odeint_adjoint=torchdiffeq.odeint_adjoint))
    assert 170 <= ops <= 260
    assert 18 <= reads <= 30


# ------------------------------------------------------------------ memory and length
@contextlib.contextmanager
def saved_elements():
    """Return the elements that autograd saves for the backward pass. Each storage counts once."""
    storages: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def saved_bytes(odeint, steps):
    func, y0 = MLP(), torch.ones(64, 2, dtype=F64, requires_grad=True)
    with saved_elements() as storages:
        ys = odeint(
            func, y0, linspace(0.0, 1.0, 2), **EVERYTHING, options=dict(first_step=1 / steps, max_step=1 / steps)
        )
    assert ys.requires_grad
    return sum(storages.values())


def test_the_adjoint_saves_the_same_for_any_number_of_steps():
    assert saved_bytes(odeint_adjoint, 64) == saved_bytes(odeint_adjoint, 8)


def test_backprop_saves_in_proportion_to_the_steps():
    few, some, many = (saved_bytes(odeint, steps) for steps in (8, 16, 32))
    assert (many - some) / (some - few) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_backprop_through_many_outputs_costs_in_proportion_to_their_number(method):
    """The test counts elements written in both passes. torchdiffeq copies the whole solution for each output: four
    times the outputs cost sixteen times the work."""

    def elements(outputs):
        y0 = torch.ones(256, dtype=F64, requires_grad=True)
        counter = OpCounter()
        options = dict(first_step=0.1, max_step=0.1) if method == "dopri5" else dict(step_size=0.1)
        with counter:
            ys = odeint(lambda t, y: -y, y0, linspace(0.0, 1.0, outputs), **EVERYTHING, method=method, options=options)
            ys.sum().backward()
        return counter.elements

    few, some, many = elements(50), elements(200), elements(800)
    assert (many - some) <= 4.6 * (some - few)


def test_the_adjoint_through_many_outputs_costs_in_proportion_to_their_number():
    def elements(outputs):
        counter = OpCounter()
        func, y0 = MLP(), torch.ones(16, 2, dtype=F64, requires_grad=True)
        with counter:
            odeint_adjoint(func, y0, linspace(0.0, 1.0, outputs), rtol=1e-3, atol=1e-3).sum().backward()
        return counter.elements

    few, some, many = elements(6), elements(18), elements(54)
    assert (many - some) <= 3.4 * (some - few)
