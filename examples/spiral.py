"""Learns the field of a spiral from short pieces of one path.

What this shows: a field is any nn.Module of (t, y), and a solve is a layer that one can train. Each training step takes
20 random pieces of the path, 10 points long, as one batch. gradient="auto" gives the exact gradient of the computed
steps; torchdiffeq's adjoint gives an approximation.

    python examples/spiral.py [--library torchdiffeq] [--short] [--out spiral.png]
"""

import argparse
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

TRUE = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])


def spiral(t, y):
    return y**3 @ TRUE


class Field(nn.Module):
    """dy/dt = net(y^3); it counts how often it is evaluated."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        return self.net(y**3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["node_cuda", "torchdiffeq"], default="node_cuda")
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("spiral.png"), help="the picture")
    arguments = parser.parse_args()
    if arguments.library == "node_cuda":
        from node_cuda import odeint, odeint_adjoint

        odeint_adjoint = partial(odeint_adjoint, gradient="auto")
    else:
        from torchdiffeq import odeint, odeint_adjoint

    torch.manual_seed(0)
    y0, t = torch.tensor([[2.0, 0.0]]), torch.linspace(0.0, 25.0, 1000)
    with torch.no_grad():
        path = odeint(spiral, y0, t)[:, 0]

    field, iterations, piece = Field(), 20 if arguments.short else 600, 10
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    losses, begun = [], time.process_time()
    for iteration in range(iterations):
        start = torch.randint(len(t) - piece, (20,))
        wanted = torch.stack([path[start + i] for i in range(piece)])
        found = odeint_adjoint(field, path[start], t[:piece], rtol=1e-5, atol=1e-6)
        loss = (found - wanted).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if iteration % 100 == 0:
            print(f"{iteration:4d}  loss {losses[-1]:.5f}")
    seconds, nfe = time.process_time() - begun, field.nfe / iterations

    with torch.no_grad():
        learned = odeint(field, y0, t)[:, 0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    left.plot(*path.T, color="0.6", linewidth=4, label="data")
    left.plot(*learned.T, color="C3", linewidth=1, label="learned, from its start to t = 25")
    left.legend(loc="upper right", fontsize=8)
    left.set(xlabel="$y_1$", ylabel="$y_2$", aspect="equal")
    right.semilogy(losses, linewidth=0.7)
    right.set(xlabel="iteration", ylabel="mean |error| of a minibatch")
    figure.savefig(arguments.out, dpi=90)

    loss = (learned - path).abs().mean().item()
    print(f"found: loss={loss:.6g} nfe={nfe:.1f} seconds={seconds:.2f}")


if __name__ == "__main__":
    main()
