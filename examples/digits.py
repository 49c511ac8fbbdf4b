"""Handwritten digits: an ODE-Net beside the residual network of the same width.

What this shows: `NeuralODE` is a layer that takes the place of the residual blocks h + f(h). It has the parameters of
one block. Its number of steps can be chosen later, and its gradient mode decides how the memory of a training step
grows with them: all evaluations are kept ("backprop"), one state a step ("discrete", which "auto" chooses here), or one
step ("adjoint"). The memory is the peak that torch allocates in one training step.

    python examples/digits.py [--library torchdiffeq] [--short] [--out digits.png]
"""

import argparse
import os
import time
from itertools import accumulate
from pathlib import Path

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler, which measures the memory, is silent

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from node_cuda import NeuralODE

WIDTH, STEPS = 16, 8
T = torch.tensor([0.0, 1.0])


class Block(nn.Module):
    """f(t, h) = conv(relu(conv([h, t]))); it counts how often it is evaluated."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(WIDTH + 1, WIDTH, 3, padding=1)
        self.outer = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.nfe = 0

    def forward(self, t, h):
        self.nfe += 1
        time_channel = t.to(h.dtype).expand(len(h), 1, *h.shape[2:])
        return self.outer(torch.relu(self.inner(torch.cat([h, time_channel], 1))))


class Residual(nn.Module):
    """h + f(h), some times, each time with other parameters."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, h):
        for i, block in enumerate(self.blocks):
            h = h + block(torch.tensor(i / len(self.blocks)), h)
        return h


class TorchdiffeqODE(nn.Module):
    """The same layer by torchdiffeq's adjoint."""

    def __init__(self, func):
        super().__init__()
        self.func = func

    def forward(self, h):
        from torchdiffeq import odeint_adjoint

        return odeint_adjoint(self.func, h, T, method="midpoint", options=dict(step_size=1 / STEPS))[-1]


def ode(steps, gradient):
    options = dict(step_size=1 / steps)
    return NeuralODE(Block(), T, last_only=True, method="midpoint", options=options, gradient=gradient)


def network(middle):
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1), middle, nn.Flatten(), nn.Linear(WIDTH * 64, 10)
    )  # images (n, 1, 8, 8) -> scores (n, 10)


def train(middle, images, labels, epochs):
    """Returns the network, its loss after each epoch, the evaluations in a training step, and the CPU time."""
    torch.manual_seed(0)
    net = network(middle())
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    losses, steps, begun = [], 0, time.process_time()
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            loss = cross_entropy(net(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            total, steps = total + loss.item() * len(batch), steps + 1
        scheduler.step()
        losses.append(total / len(images))
        print(f"  epoch {epoch}  loss {losses[-1]:.4f}")
    evaluations = sum(block.nfe for block in net.modules() if isinstance(block, Block))
    return net, losses, evaluations / steps, time.process_time() - begun


def peak_memory(net, images, labels):
    """The largest number of MiB that torch held during a training step, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        cross_entropy(net(images), labels).backward()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["node_cuda", "torchdiffeq"], default="node_cuda")
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="the picture")
    arguments = parser.parse_args()
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(pixels / 16).float().view(-1, 1, 8, 8)[order], torch.tensor(digits)[order]
    seen, epochs = (256, 1) if arguments.short else (1347, 12)

    ours = (lambda: ode(STEPS, "auto")) if arguments.library == "node_cuda" else (lambda: TorchdiffeqODE(Block()))
    found = {}
    for name, middle in (("residual network", lambda: Residual(STEPS)), ("ODE-Net", ours)):
        print(name)
        net, losses, evaluations, seconds = train(middle, images[:seen], labels[:seen], epochs)
        with torch.no_grad():
            accuracy = (net(images[1347:]).argmax(1) == labels[1347:]).float().mean().item()
        parameters = sum(p.numel() for p in net.parameters())
        found[name] = accuracy, losses, evaluations, seconds
        print(f"  accuracy {accuracy:.3f}, {parameters} parameters, {evaluations:.0f} evaluations a training step")

    depths, memory = (2, 4) if arguments.short else (4, 8, 16, 32, 64), {}
    for name in ("residual network", "backprop", "discrete", "adjoint"):
        layers = (Residual(n) if name == "residual network" else ode(n, name) for n in depths)
        memory[name] = [peak_memory(network(layer), images[:64], labels[:64]) for layer in layers]
        print(f"{name:16s} MiB with {depths} steps or blocks:", *(f"{size:.1f}" for size in memory[name]))

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    for name, (accuracy, losses, _, _) in found.items():
        left.semilogy(range(1, epochs + 1), losses, "o-", label=f"{name}: accuracy {accuracy:.3f}")
    left.set(xlabel="epoch", ylabel="training loss")
    for name, sizes in memory.items():
        right.loglog(depths, sizes, "s--" if name == "residual network" else "o-", label=name)
    right.set_xticks(depths, depths)
    right.set_xticks([], minor=True)
    right.set(xlabel="blocks, or steps of the ODE-Net", ylabel="MiB in a training step")
    for panel in (left, right):
        panel.legend(fontsize=8)
    figure.savefig(arguments.out, dpi=90)

    accuracy, losses, evaluations, seconds = found["ODE-Net"]
    print(f"found: loss={losses[-1]:.6g} nfe={evaluations:.1f} seconds={seconds:.2f} accuracy={accuracy:.4f}")


if __name__ == "__main__":
    main()
