"""Flow matching in the plane: how many evaluations does a sample need?

What this shows: a flow is trained without any solve, by regression on straight lines from noise to data (Lipman et al.
2023). To sample, one solves dx/dt = v(t, x) from t = 0 to 1. Euler, midpoint and dopri5 reach different qualities for
the same number of evaluations. The quality is the energy distance between samples and new data: zero if both have the
same distribution, up to chance.

    python examples/flow_matching.py [--library torchdiffeq] [--short] [--out flow_matching.png]
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

CHANCE = 5e-4  # two sets of 4000 samples of the data are about so far apart


class Velocity(nn.Module):
    """v(t, x); t is one number, or one for each sample."""

    def __init__(self):
        super().__init__()
        hidden = (nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.net = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), *hidden, nn.Linear(128, 2))
        self.nfe = 0

    def forward(self, t, x):
        self.nfe += 1
        return self.net(torch.cat([x, t.to(x.dtype).reshape(-1, 1).expand(len(x), 1)], 1))


def checkerboard(n):
    """Samples on the dark squares of a board with 4 x 4 squares, from -2 to 2."""
    column, row = torch.randint(4, (n,)), torch.randint(2, (n,))
    return torch.stack([column - 2.0, 2.0 * row + column % 2 - 2.0], 1) + torch.rand(n, 2)


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'|."""
    within = sum(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b))
    return (2 * torch.cdist(a, b).mean() - within).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["node_cuda", "torchdiffeq"], default="node_cuda")
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("flow_matching.png"), help="the picture")
    arguments = parser.parse_args()
    if arguments.library == "node_cuda":
        from node_cuda import odeint
    else:
        from torchdiffeq import odeint

    torch.manual_seed(0)
    field, iterations, samples = Velocity(), 100 if arguments.short else 6000, 500 if arguments.short else 4000
    optimizer = torch.optim.Adam(field.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    recent = 0.0
    for iteration in range(iterations):
        noise, data, t = torch.randn(512, 2), checkerboard(512), torch.rand(512)
        x = torch.lerp(noise, data, t[:, None])
        loss = (field(t, x) - (data - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        recent += 0.01 * (loss.item() - recent) if iteration else loss.item()
        if iteration % 1000 == 0:
            print(f"{iteration:4d}  loss {recent:.4f}")

    start, data = torch.randn(samples, 2), checkerboard(samples)
    grids = (1, 2, 5, 20) if arguments.short else (1, 2, 4, 8, 16, 32, 64)
    quality, shown, seconds = {}, None, 0.0
    for method in ("euler", "midpoint", "dopri5"):
        # Of a fixed grid each interval between two times is a step; dopri5 chooses its steps by the tolerance.
        for amount in (1e-1, 1e-2, 1e-3, 1e-4) if method == "dopri5" else grids:
            t = torch.linspace(0.0, 1.0, 2 if method == "dopri5" else amount + 1)
            tolerance = dict(rtol=amount, atol=amount) if method == "dopri5" else {}
            field.nfe, begun = 0, time.process_time()
            with torch.no_grad():
                found = odeint(field, start, t, method=method, **tolerance)[-1]
            seconds += time.process_time() - begun
            distance = energy_distance(found, data)
            quality.setdefault(method, []).append((field.nfe, max(distance, CHANCE)))
            print(f"{method:9s} {amount:<7g} nfe {field.nfe:4d}  energy distance {distance:.5f}")
            shown, nfe = found, field.nfe

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.7), layout="constrained")
    left.scatter(*shown[:1500].T, s=2, color="C0")
    left.set(title="samples by dopri5", aspect="equal", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5))
    for method, points in quality.items():
        right.loglog(*zip(*points, strict=True), "o-", label=method)
    right.axhspan(CHANCE / 1.2, CHANCE * 1.2, color="0.9", label="no more than by chance")
    right.set(xlabel="evaluations of the field", ylabel="energy distance to the data")
    right.legend()
    figure.savefig(arguments.out, dpi=90)
    print(f"found: loss={recent:.6g} nfe={nfe} seconds={seconds:.2f} energy_distance={distance:.5f}")


if __name__ == "__main__":
    main()
