"""A pendulum from noisy paths: a learned energy keeps the energy, a learned field does not.

What this shows: a field may use autograd inside. Here it is Hamilton's, dq/dt = dH/dp and dp/dt = -dH/dq, of a learned
H(q, p) (Greydanus et al. 2019). Beside it the same paths, in pieces of three points, train a plain network. Both are
then solved for ten times as long as the data, and the true energy of the learned paths is compared.

    python examples/hamiltonian.py [--library torchdiffeq] [--short] [--out hamiltonian.png]
"""

import argparse
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn


def energy(state):
    """Of a pendulum of length, mass and gravity one; state (..., 2) holds angle and momentum."""
    q, p = state.unbind(-1)
    return p**2 / 2 - torch.cos(q)


def pendulum(t, state):
    q, p = state.unbind(-1)
    return torch.stack([p, -torch.sin(q)], -1)


class Hamiltonian(nn.Module):
    """(dH/dp, -dH/dq) of H = net(q, p), by autograd."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        self.nfe = 0

    def forward(self, t, state):
        self.nfe += 1
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            state = state if state.requires_grad else state.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(state).sum(), state, create_graph=training)
        dq, dp = slope.unbind(-1)
        return torch.stack([dp, -dq], -1)


class Plain(nn.Module):
    """net(q, p)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        self.nfe = 0

    def forward(self, t, state):
        self.nfe += 1
        return self.net(state)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["node_cuda", "torchdiffeq"], default="node_cuda")
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("hamiltonian.png"), help="the picture")
    arguments = parser.parse_args()
    if arguments.library == "node_cuda":
        from node_cuda import odeint, odeint_adjoint

        odeint_adjoint = partial(odeint_adjoint, gradient="auto")
    else:
        from torchdiffeq import odeint, odeint_adjoint
    tolerance = dict(rtol=1e-5, atol=1e-6)

    torch.manual_seed(0)
    t = torch.linspace(0.0, 5.0, 11)
    starts = torch.stack([4.0 * torch.rand(40) - 2.0, torch.zeros(40)], -1)  # released at rest
    with torch.no_grad():
        paths = odeint(pendulum, starts, t, **tolerance)
    data = paths + 0.01 * torch.randn_like(paths)
    pieces = torch.stack([data[i : len(t) - 2 + i].flatten(0, 1) for i in range(3)])  # (3 points, 360 pieces, 2)

    iterations = 4 if arguments.short else 300
    begun, found, losses = time.process_time(), {}, {}
    for name, field in (("Hamiltonian", Hamiltonian()), ("plain network", Plain())):
        optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        losses[name] = []
        for _ in range(iterations):
            optimizer.zero_grad()
            loss = (odeint_adjoint(field, pieces[0], t[:3], **tolerance) - pieces)[1:].square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses[name].append(loss.item())
        found[name] = field
    seconds, nfe = time.process_time() - begun, found["Hamiltonian"].nfe / iterations

    far, start = torch.linspace(0.0, 50.0, 1001), torch.tensor([[1.8, 0.0]])
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained")
    drift = {}
    with torch.no_grad():
        left.plot(*odeint(pendulum, start, far, **tolerance)[:, 0].T, color="0.6", linewidth=4, label="true")
        for (name, field), colour in zip(found.items(), ("C0", "C3"), strict=True):
            path = odeint(field, start, far, **tolerance)[:, 0]
            change = energy(path) - energy(start)
            drift[name] = change.abs().max().item()
            left.plot(*path.T, color=colour, linewidth=1, label=name)
            right.plot(far, change, color=colour)
            print(f"{name:14s} loss {losses[name][-1]:.6f}  largest change of energy to t = 50: {drift[name]:.4f}")
    left.set(xlabel="angle", ylabel="momentum")
    left.legend(fontsize=8, loc="upper right")
    right.axvspan(0.0, 5.0, color="0.9")
    right.set(xlabel="t (grey: the data)", ylabel="change of energy")
    figure.savefig(arguments.out, dpi=90)
    loss = losses["Hamiltonian"][-1]
    print(f"found: loss={loss:.6g} nfe={nfe:.1f} seconds={seconds:.2f} drift={drift['Hamiltonian']:.5f}")


if __name__ == "__main__":
    main()
