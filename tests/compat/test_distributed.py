"""Gradients under DistributedDataParallel, fully_shard, DataParallel and autocast."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from problems import F64, MLP, linspace, loss_of, relative_difference
from torch import nn

from node_cuda import ContinuousFlow, NeuralODE, ODEBlock, Unsupported, odeint, odeint_adjoint

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # built without distributed
    fully_shard = None

T = linspace(0.0, 1.0, 3)
TIGHT = dict(rtol=1e-9, atol=1e-9)


class Net(nn.Module):
    """A module with a field and a solve as its forward pass, for DistributedDataParallel."""

    def __init__(self, solver=odeint_adjoint):
        super().__init__()
        self.field = MLP(dim=2, seed=7, timed=True)
        self.solver = solver

    def forward(self, y0):
        return self.solver(self.field, y0, T, **TIGHT)


def batch():
    return torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=F64)


def gradients(net, y0):
    net(y0).square().mean().backward()
    return tuple(p.grad for p in net.parameters())


def sharded(net):
    """FSDP2: the parameters are swapped for shards between the passes."""
    if fully_shard is not None:
        fully_shard(net)
    return net


discrete = functools.partial(odeint_adjoint, gradient="discrete")
DDP = nn.parallel.DistributedDataParallel
WRAPPED = {
    "odeint": (DDP, odeint),
    "adjoint": (DDP, odeint_adjoint),
    "discrete": (DDP, discrete),
    "adjoint in shards": (sharded, odeint_adjoint),
    "discrete in shards": (sharded, discrete),
}


class Density(nn.Module):
    """A flow as a training step uses it, with one number for each sample."""

    def __init__(self):
        super().__init__()
        self.flow = ContinuousFlow(MLP(dim=2, seed=7, timed=True), 2, trace="exact", **TIGHT)

    def forward(self, y0):
        z, log_det = self.flow(y0)
        return self.flow.base_log_prob(z) + log_det


class Trained(nn.Module):
    """A field of layers, of which FSDP can shard each."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2, dtype=F64)

    def forward(self, t, y):
        return torch.tanh(self.inner(y))


LAYERS = {
    "flow": (DDP, Density),
    "flow in shards": (sharded, lambda: ContinuousFlow(MLP(dim=2, seed=7, timed=True), 2, trace="exact", **TIGHT)),
    "block in shards": (sharded, lambda: ODEBlock(MLP(dim=2, seed=7, timed=True), timed=True, **TIGHT)),
}


def gradients_of_layer(layer, y0):
    """The mean over samples of a number of each."""
    if isinstance(layer, ContinuousFlow):
        layer.log_prob(y0).square().mean().backward()
        return tuple(p.grad for p in layer.parameters())
    return gradients(layer, y0)


def refused_in_parts(gradient):
    """Return the message for a field of which FSDP shards a layer."""
    net = NeuralODE(Trained(), T, gradient=gradient)
    fully_shard(net.func.inner)
    fully_shard(net)
    with torch.no_grad():
        assert net(batch()).isfinite().all(), "without a gradient there is nothing to refuse"
    try:
        net(batch())
    except Unsupported as error:
        return str(error)


def train_on_half(rank, file, results):
    """Run one of two processes: compute the gradients of its half of the batch, averaged over both processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        for name, (wrap, solver) in WRAPPED.items():
            net = wrap(Net(solver))
            grads = gradients(net, batch().chunk(2)[rank] if wrap is DDP or fully_shard is not None else batch())
            grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
            torch.save(grads, f"{results}-{name}-{rank}.pt")
        for name, (wrap, make) in LAYERS.items():
            torch.manual_seed(0)
            net = wrap(make())
            grads = gradients_of_layer(net, batch().chunk(2)[rank])
            grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
            torch.save(grads, f"{results}-{name}-{rank}.pt")
        refused = [refused_in_parts(gradient) for gradient in ("adjoint", "discrete", "auto")]
        torch.save(refused, f"{results}-refused-{rank}.pt")
        del net
        dist.barrier()  # gloo aborts a process if its peer ends first
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.skipif(sys.platform == "win32", reason="file:// rendezvous of two processes")
def test_two_processes_over_gloo_have_the_gradients_of_one(tmp_path):
    mp.spawn(train_on_half, args=(tmp_path / "rendezvous", tmp_path / "grads"), nprocs=2)
    for name, (_, solver) in WRAPPED.items():
        truth = gradients(Net(solver), batch())
        for rank in range(2):
            grads = torch.load(tmp_path / f"grads-{name}-{rank}.pt")
            assert relative_difference(tuple(grads), truth) < 1e-6  # the two halves take other steps, with rtol 1e-9
    for name, (_, make) in LAYERS.items():
        truth = gradients_of_layer(make(), batch())
        for rank in range(2):
            grads = torch.load(tmp_path / f"grads-{name}-{rank}.pt")
            assert relative_difference(tuple(grads), truth) < 1e-6
    for rank in range(2):
        for words in torch.load(tmp_path / f"grads-refused-{rank}.pt"):
            assert "FSDP shards 'inner' inside of func" in words and "`fully_shard(NeuralODE(func))`" in words


def replica_of(module):
    """Return a replica as DataParallel makes it on another device: its parameters are tensors with a graph."""
    replica = module._replicate_for_data_parallel()
    replica._former_parameters = {}
    for name, parameter in module._parameters.items():
        copy = parameter * 1.0
        setattr(replica, name, copy)
        replica._former_parameters[name] = copy
    for name, child in module._modules.items():
        replica._modules[name] = replica_of(child)
    return replica


def test_replicas_of_data_parallel_have_gradients():
    """Their parameters() is empty: the adjoint must look for tensors that require gradients instead."""
    net = Net()
    truth = gradients(net, batch())
    net.zero_grad()
    replica = replica_of(net)
    assert not list(replica.parameters())
    replica(batch()).square().mean().backward()
    assert relative_difference(tuple(p.grad for p in net.parameters()), truth) < 1e-9


class Nested(nn.Module):
    """A field with a submodule. The submodules of a replica are replicas too."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2, dtype=F64)
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=F64))

    def forward(self, t, y):
        return self.scale * torch.tanh(self.inner(y))


def test_replicas_of_nested_fields_have_gradients():
    func = Nested()
    odeint_adjoint(func, batch(), T, **TIGHT).sum().backward()
    truth = tuple(p.grad.clone() for p in func.parameters())
    func.zero_grad()
    odeint_adjoint(replica_of(func), batch(), T, **TIGHT).sum().backward()
    assert relative_difference(tuple(p.grad for p in func.parameters()), truth) < 1e-9


def test_replicas_of_a_flow_have_gradients():
    flow = ContinuousFlow(Nested(), 2, trace="exact", gradient="adjoint", **TIGHT)
    flow.log_prob(batch()).sum().backward()
    truth = tuple(p.grad.clone() for p in flow.parameters())
    flow.zero_grad()
    replica_of(flow).log_prob(batch()).sum().backward()
    assert relative_difference(tuple(p.grad for p in flow.parameters()), truth) < 1e-9


def test_data_parallel_without_a_gpu_has_the_right_gradients():
    net = Net()
    truth = gradients(net, batch())
    net.zero_grad()
    assert relative_difference(gradients(nn.DataParallel(net), batch()), truth) < 1e-12


# ------------------------------------------------------------------ autocast
class Watching(nn.Module):
    """Notes the dtype in which its matrix product runs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.seen: list[torch.dtype] = []

    def forward(self, t, y):
        out = self.linear(y)
        self.seen.append(out.dtype)
        return torch.tanh(out)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("solver", [odeint, odeint_adjoint], ids=["odeint", "odeint_adjoint"])
def test_the_field_has_the_same_dtype_in_both_passes_under_autocast(solver, method):
    func = Watching()
    y0 = batch().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = solver(func, y0, T.float(), rtol=1e-2, atol=1e-2, method=method)
        loss = ys.float().square().mean()
    forward = len(func.seen)
    assert set(func.seen) == {torch.bfloat16}
    loss.backward()  # outside the context, as usual
    assert set(func.seen[forward:]) <= {torch.bfloat16}
    assert ys.dtype == torch.float32 and y0.grad.dtype == torch.float32
    assert func.linear.weight.grad.dtype == torch.float32


def test_the_backward_pass_is_not_autocast_when_the_forward_pass_was_not():
    func = Watching()
    loss = odeint_adjoint(func, batch().float(), T.float(), rtol=1e-2, atol=1e-2).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    assert set(func.seen) == {torch.float32}


def test_gradients_under_autocast_are_those_of_the_field_in_low_precision():
    func = Watching()
    grads = []
    for solver in (odeint, odeint_adjoint):
        func.zero_grad()
        y0 = batch().float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(solver(func, y0, T.float(), rtol=1e-2, atol=1e-2))
        loss.backward()
        grads.append((y0.grad, func.linear.weight.grad.clone()))
    assert relative_difference(grads[1], grads[0]) < 0.1  # bfloat16 has three digits at best, and rtol is 1e-2
