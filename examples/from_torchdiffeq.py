"""Moving from torchdiffeq: one changed import, the same steps, the same loss, less time.

What this shows: the script below the import line is written for torchdiffeq, and no line of it is changed. The two
classes of Dupont et al. 2019, a disc and a ring around it, are separated by an ODE-Net with one more dimension.
Without --library it runs once with each library and compares losses and times. float64, so that rounding does not hide
a difference. The adjoint is that of both libraries' defaults; `gradient="auto"` would be faster still.

    python examples/from_torchdiffeq.py [--library node_cuda | torchdiffeq] [--short] [--out from_torchdiffeq.png]
"""

import argparse
import importlib
import importlib.util
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        return self.net(y)


class Classifier(nn.Module):
    def __init__(self, odeint):
        super().__init__()
        self.odeint = odeint
        self.field = Field()
        self.head = nn.Linear(3, 1)
        self.register_buffer("t", torch.tensor([0.0, 1.0]))

    def forward(self, x):
        y0 = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
        y1 = self.odeint(self.field, y0, self.t, rtol=1e-5, atol=1e-5, method="dopri5")[-1]
        return self.head(y1)[:, 0]


def disc_and_ring(n):
    """n points with radius below 0.5 (class 0) and n between 1 and 1.5 (class 1)."""
    radius = torch.cat([0.5 * torch.rand(n), 1.0 + 0.5 * torch.rand(n)])
    angle = 2 * torch.pi * torch.rand(2 * n)
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x.double(), torch.cat([torch.zeros(n), torch.ones(n)]).double()


def train(library, iterations):
    # ---- the changed line: `from torchdiffeq import odeint_adjoint` or `from node_cuda import odeint_adjoint`
    odeint_adjoint = importlib.import_module(library).odeint_adjoint
    # ---- all below is the same
    torch.manual_seed(0)
    model = Classifier(odeint_adjoint).double()
    x, label = disc_and_ring(250)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses, times, begun = [], [], time.process_time()
    for _ in range(iterations):
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(model(x), label)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        times.append(time.process_time() - begun)
    nfe = model.field.nfe / iterations
    print(f"{library:11s}  loss {losses[-1]:.10f}  {nfe:.1f} evaluations a step  {times[-1]:.1f} s of CPU time")
    return model, losses, times, nfe


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["node_cuda", "torchdiffeq"], help="by default both, one after the other")
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("from_torchdiffeq.png"), help="the picture")
    arguments = parser.parse_args()
    libraries = [arguments.library] if arguments.library else ["node_cuda", "torchdiffeq"]
    if not arguments.library and importlib.util.find_spec("torchdiffeq") is None:
        print("torchdiffeq is not installed (pip install torchdiffeq), so node_cuda runs alone.")
        libraries = ["node_cuda"]
    found = {library: train(library, 10 if arguments.short else 120) for library in libraries}
    if len(found) == 2:
        (_, ours, our_times, _), (_, theirs, their_times, _) = found.values()
        apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
        ratio = their_times[-1] / our_times[-1]
        print(f"largest relative difference of the losses {apart:.1e}; torchdiffeq takes {ratio:.2f} times the time")

    model, losses, times, nfe = found[libraries[0]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    side = torch.linspace(-1.7, 1.7, 60, dtype=torch.float64)
    with torch.no_grad():
        score = model(torch.cartesian_prod(side, side)).view(60, 60).T
    left.contourf(side, side, score.sigmoid(), levels=10, cmap="RdBu", vmin=0, vmax=1)
    x, label = disc_and_ring(150)
    left.scatter(*x.T, c=label, cmap="RdBu", s=6, edgecolors="k", linewidths=0.3)
    left.set(aspect="equal", title="learned classes")
    for (library, (_, losses_of, times_of, _)), line in zip(found.items(), ("-", "--"), strict=False):
        right.semilogy(times_of, losses_of, line, label=library)
    right.set(xlabel="CPU time, s", ylabel="training loss")
    right.legend()
    figure.savefig(arguments.out, dpi=90)
    print(f"found: loss={losses[-1]:.12g} nfe={nfe:.1f} seconds={times[-1]:.2f}")


if __name__ == "__main__":
    main()
