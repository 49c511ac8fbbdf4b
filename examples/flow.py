"""Two continuous normalizing flows: the density of two moons, and new digits.

What this shows: `ContinuousFlow(field, shape)` is a density. `-flow.log_prob(x).mean()` is the loss, and
`flow.sample(n)` draws from what was learned. In the plane the trace of df/dx is exact; for the digits, which are given
by their first 16 principal components, it is estimated by noise (Hutchinson's estimate, FFJORD).
With --library torchdiffeq the same flow is written by hand: see ByHand.

    python examples/flow.py [--library torchdiffeq] [--short] [--out flow.png]
"""

import argparse
import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits, make_moons
from torch import nn

from node_cuda import ContinuousFlow

TOLERANCE = dict(rtol=1e-4, atol=1e-4)


class Field(nn.Module):
    """dx/dt = net(x, t); it counts how often it is evaluated."""

    def __init__(self, dim, width):
        super().__init__()
        hidden = (nn.Linear(width, width), nn.Tanh())
        self.net = nn.Sequential(nn.Linear(dim + 1, width), nn.Tanh(), *hidden, nn.Linear(width, dim))
        self.nfe = 0

    def forward(self, t, x):
        self.nfe += 1
        return self.net(torch.cat([x, t.to(x.dtype).expand(len(x), 1)], 1))


class ByHand(nn.Module):
    """What ContinuousFlow does, as far as it is needed here, by torchdiffeq: forward is the field of (x, log det)."""

    def __init__(self, func, shape, trace):
        super().__init__()
        self.func, self.dim, self.trace = func, shape, trace

    def forward(self, t, state):
        taped = torch.is_grad_enabled()
        with torch.enable_grad():
            x = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            dx = self.func(t, x)
            along = [self.noise] if self.trace == "hutchinson" else torch.eye(self.dim)[:, None].expand(-1, len(x), -1)
            traces = [(torch.autograd.grad(dx, x, v, True, create_graph=taped)[0] * v).sum(1) for v in along]
        return dx, sum(traces)

    def log_prob(self, x):
        from torchdiffeq import odeint_adjoint

        self.noise = 2.0 * torch.randint(2, x.shape) - 1.0 if self.trace == "hutchinson" else None
        z, log_det = odeint_adjoint(self, (x, torch.zeros(len(x))), torch.tensor([0.0, 1.0]), **TOLERANCE)
        return log_det[-1] - 0.5 * z[-1].square().sum(1) - 0.5 * self.dim * math.log(2 * math.pi)

    @torch.no_grad()
    def sample(self, n):
        from torchdiffeq import odeint

        return odeint(self.func, torch.randn(n, self.dim), torch.tensor([1.0, 0.0]), **TOLERANCE)[-1]


def train(flow, data, iterations):
    """Adam on minibatches of the data; returns the losses, the mean of the negative log-likelihood."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    losses = []
    for iteration in range(iterations):
        batch = data[torch.randint(len(data), (256,))]
        optimizer.zero_grad()
        loss = -flow.log_prob(batch).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if iteration % 100 == 0:
            print(f"{iteration:4d}  loss {losses[-1]:.4f}")
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["node_cuda", "torchdiffeq"], default="node_cuda")
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("flow.png"), help="the picture")
    arguments = parser.parse_args()

    def make(dim, width, trace):
        field = Field(dim, width)
        if arguments.library == "torchdiffeq":
            return field, ByHand(field, dim, trace)
        return field, ContinuousFlow(field, dim, trace=trace, gradient="auto", **TOLERANCE)

    torch.manual_seed(0)
    iterations = 2 if arguments.short else 250
    moons = torch.tensor(make_moons(4000, noise=0.06, random_state=0)[0]).float() * 1.5 - torch.tensor([0.75, 0.4])
    pixels = torch.tensor(load_digits().data / 16).float()
    mean = pixels.mean(0)
    _, scale, axes = torch.linalg.svd(pixels - mean, full_matrices=False)
    to_pixels = axes[:16] * scale[:16, None] / math.sqrt(len(pixels))  # the components have variance one
    digits = (pixels - mean) @ torch.linalg.pinv(to_pixels)

    begun = time.process_time()
    field, flow = make(2, 64, "exact")
    losses = train(flow, moons, iterations)
    digit_field, digit_flow = make(16, 128, "hutchinson")
    digit_losses = train(digit_flow, digits, iterations)
    seconds, nfe = time.process_time() - begun, (field.nfe + digit_field.nfe) / (2 * iterations)
    found, found_digits = flow.sample(1500), digit_flow.sample(32) @ to_pixels + mean

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
    side = torch.linspace(-2.5, 2.5, 80)
    points = torch.cartesian_prod(side, side)
    density = flow.log_prob(points).exp().detach().view(80, 80).T.numpy()
    left.imshow(density, extent=(-2.5, 2.5, -2.5, 2.5), origin="lower", cmap="Blues")
    middle.scatter(*found.T, s=1.5)
    middle.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
    sheet = found_digits.clamp(0, 1).view(4, 8, 8, 8).permute(0, 2, 1, 3).reshape(32, 64)
    right.imshow(sheet.numpy(), cmap="gray_r")
    for panel, title in ((left, "density of the moons"), (middle, "samples"), (right, "new digits")):
        panel.set(title=title, xticks=[], yticks=[])
    figure.savefig(arguments.out, dpi=90)
    last = (sum(some[-20:]) / len(some[-20:]) for some in (losses, digit_losses))
    moons_loss, digits_loss = last
    print(f"negative log-likelihood: moons {moons_loss:.4f}, digits {digits_loss:.4f} (a normal density: 22.70)")
    print(f"found: loss={moons_loss:.6g} nfe={nfe:.1f} seconds={seconds:.2f} digits_loss={digits_loss:.6g}")


if __name__ == "__main__":
    main()
