"""Several processes train one neural ODE by DistributedDataParallel.

What this shows: a module with a solve inside is wrapped as any other one, and its gradient modes all work with DDP.
Each process solves for its part of the batch and chooses its steps from that part; the gradients are averaged. The loss
is therefore that of one process, up to the tolerances. Started by plain `python`, it is a group of one process.

    torchrun --nproc-per-node 2 examples/several_processes.py [--library torchdiffeq] [--short] [--out FILE.png]
    python examples/several_processes.py
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        return self.net(y)


class Flow(nn.Module):
    """y at the times t, from y0. DDP calls this module, and not the field, so that it sees one backward pass."""

    def __init__(self, odeint_adjoint):
        super().__init__()
        self.field = Field()
        self.odeint_adjoint = odeint_adjoint

    def forward(self, y0, t):
        return self.odeint_adjoint(self.field, y0, t, rtol=1e-6, atol=1e-6)


def lotka_volterra(t, y):
    """Prey and predators, by the logarithms of their numbers."""
    prey, predators = y.unbind(-1)
    return torch.stack([1.0 - predators.exp(), prey.exp() - 1.0], -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["node_cuda", "torchdiffeq"], default="node_cuda")
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("several_processes.png"), help="the picture")
    arguments = parser.parse_args()
    if arguments.library == "node_cuda":
        from node_cuda import odeint, odeint_adjoint

        odeint_adjoint = partial(odeint_adjoint, gradient="auto")
    else:
        from torchdiffeq import odeint, odeint_adjoint

    if "RANK" in os.environ:  # torchrun says how many processes there are, and which one this is
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, processes = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same data and the same first parameters in all processes
    t = torch.linspace(0.0, 3.0, 16)
    with torch.no_grad():
        paths = odeint(lotka_volterra, torch.rand(64, 2) - 0.5, t)
    mine = paths[:, rank::processes]

    model = DistributedDataParallel(Flow(odeint_adjoint))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    iterations = 5 if arguments.short else 150
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    losses, begun = [], time.process_time()
    for _ in range(iterations):
        optimizer.zero_grad()
        loss = (model(mine[0], t) - mine).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)  # the sum over all processes
        losses.append(mean.item() / processes)
    seconds, nfe = time.process_time() - begun, model.module.field.nfe / iterations

    if rank == 0:
        with torch.no_grad():
            learned = odeint(model.module.field, paths[0, :8], t)
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained")
        left.plot(*paths[:, :8].permute(2, 0, 1), color="0.6", linewidth=4)
        left.plot(*learned.permute(2, 0, 1), color="C3", linewidth=1)
        left.set(xlabel="log of the prey", ylabel="log of the predators", title="true (grey) and learned")
        right.semilogy(losses)
        right.set(xlabel="iteration", ylabel="mean squared error", title=f"{processes} process(es)")
        figure.savefig(arguments.out, dpi=90)
        print(f"{processes} process(es), {len(mine[0])} of 64 paths in each")
        print(f"found: loss={losses[-1]:.8g} nfe={nfe:.1f} seconds={seconds:.2f} processes={processes}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
