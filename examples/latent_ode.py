"""A latent ODE on series that are observed at irregular times.

What this shows: each series has 20 observations at times of its own. A recurrent network reads them backwards in time
and gives the distribution of a latent state z(0); z(t) is solved for all times at once, and a decoder gives the value
at each of them (Rubanova et al. 2019). The loss counts the observed times alone. In the end the model continues series
that it has not seen beyond their last observation.

    python examples/latent_ode.py [--library torchdiffeq] [--short] [--out latent_ode.png]
"""

import argparse
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

LATENT, NOISE = 4, 0.1
T = torch.linspace(0.0, 5.0, 51)  # the series are observed at 20 of the first 31 of these times, until t = 3
SEEN, OBSERVATIONS = 31, 20


def series(n):
    """n damped oscillations with random phase and speed at the times T: (n, 51), with noise."""
    phase, speed = 2 * torch.pi * torch.rand(n, 1), 2.0 + torch.rand(n, 1)
    return torch.exp(-0.2 * T) * torch.cos(phase + speed * T) + NOISE * torch.randn(n, len(T))


def observed(n):
    """The places in T at which each series is observed, in order of time: (n, 20)."""
    return torch.rand(n, SEEN).argsort(1)[:, :OBSERVATIONS].sort(1).values


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENT, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, LATENT))
        self.nfe = 0

    def forward(self, t, z):
        self.nfe += 1
        return self.net(z)


class LatentODE(nn.Module):
    def __init__(self, odeint):
        super().__init__()
        self.odeint = odeint
        self.reader = nn.GRU(2, 32, batch_first=True)
        self.to_latent = nn.Linear(32, 2 * LATENT)
        self.field = Field()
        self.decoder = nn.Sequential(nn.Linear(LATENT, 32), nn.Tanh(), nn.Linear(32, 1))

    def latent(self, values, places):
        """The distribution of z(0) from the observations, read from the last to the first."""
        times = T[places]
        gaps = torch.diff(times, prepend=torch.zeros(len(times), 1), dim=1)
        _, state = self.reader(torch.stack([values, gaps], 2).flip(1))
        mean, log_std = self.to_latent(state[0]).chunk(2, -1)
        return Normal(mean, log_std.exp())

    def forward(self, z0):
        """The values at all times: (series, 51)."""
        return self.decoder(self.odeint(self.field, z0, T, rtol=1e-4, atol=1e-5))[..., 0].T


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["node_cuda", "torchdiffeq"], default="node_cuda")
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("latent_ode.png"), help="the picture")
    arguments = parser.parse_args()
    if arguments.library == "node_cuda":
        from node_cuda import odeint_adjoint

        odeint_adjoint = partial(odeint_adjoint, gradient="auto")
    else:
        from torchdiffeq import odeint_adjoint

    torch.manual_seed(0)
    data, places, new = series(200), observed(200), series(50)
    values, new_places = data.gather(1, places), observed(50)
    model, iterations = LatentODE(odeint_adjoint), 2 if arguments.short else 300
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    losses, begun = [], time.process_time()
    for iteration in range(iterations):
        batch = torch.randperm(len(data))[:50]
        z0 = model.latent(values[batch], places[batch])
        found = model(z0.rsample()).gather(1, places[batch])
        likelihood = Normal(found, NOISE).log_prob(values[batch]).sum(1)
        penalty = kl_divergence(z0, Normal(0.0, 1.0)).sum(1)
        loss = (min(1.0, iteration / 200) * penalty - likelihood).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if iteration % 100 == 0:
            print(f"{iteration:4d}  loss {losses[-1]:.3f}")
    seconds, nfe = time.process_time() - begun, model.field.nfe / iterations

    with torch.no_grad():
        found = model(model.latent(new.gather(1, new_places), new_places).mean)
    error = (found - new).square().mean(0)
    inside, beyond = error[:SEEN].mean().sqrt().item(), error[SEEN:].mean().sqrt().item()
    print(f"new series: error {inside:.3f} until t = 3, {beyond:.3f} beyond it; the noise alone is {NOISE:g}")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained")
    for i in range(3):
        left.plot(T, found[i] + 3 * i, f"C{i}")
        left.plot(T, new[i] + 3 * i, f"C{i}.", markersize=2, alpha=0.4)
        left.plot(T[new_places[i]], new[i, new_places[i]] + 3 * i, f"C{i}o", markersize=4)
    left.axvspan(0.0, 3.0, color="0.93")
    left.set(xlabel="t", yticks=[], title="read at the large points (until t = 3), continued", xlim=(0, 5))
    left.title.set_fontsize(9)
    right.plot(losses, linewidth=0.7)
    right.set(xlabel="iteration", ylabel="negative bound on the log-likelihood", yscale="symlog")
    figure.savefig(arguments.out, dpi=90)
    loss = sum(losses[-20:]) / len(losses[-20:])
    print(f"found: loss={loss:.6g} nfe={nfe:.1f} seconds={seconds:.2f} error={inside:.4f} error_beyond={beyond:.4f}")


if __name__ == "__main__":
    main()
