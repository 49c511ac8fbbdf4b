"""Jumps: a ball that bounces when its path says so, and a drug that is dosed when the clock says so.

What this shows: `odeint_event` solves until a function of the state changes its sign, and gradients flow through the
time of the event. One solves from jump to jump; between two solves the state may be changed in any way.
1. A ball: gravity and the part of the speed that a bounce leaves are learned from the times of five bounces.
2. Doses at given times: the amounts and the rate of decay are learned from noisy concentrations.

    python examples/jumps.py [--library torchdiffeq] [--short] [--out jumps.png]
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

F64 = torch.float64
TOLERANCE = dict(rtol=1e-8, atol=1e-8)


class Ball(nn.Module):
    """height' = speed, speed' = -gravity; a bounce keeps a part of the speed. Both numbers by their logarithms."""

    def __init__(self, gravity, kept):
        super().__init__()
        self.logs = nn.Parameter(torch.tensor([gravity, kept], dtype=F64).log())
        self.nfe = 0

    def forward(self, t, state):
        self.nfe += 1
        height, speed = state
        return speed, -self.logs[0].exp().expand_as(height)

    def bounces(self, odeint_event, count):
        """The times of the first bounces, and the states after them."""
        t, state = torch.zeros((), dtype=F64), (torch.tensor(1.0, dtype=F64), torch.tensor(0.0, dtype=F64))
        times, states = [t], [state]
        for _ in range(count):
            t, (height, speed) = odeint_event(self, state, t, event_fn=lambda t, state: state[0], **TOLERANCE)
            # A little above the ground, so that the next search does not find the same bounce.
            state = (height[-1] + 1e-7, -self.logs[1].exp() * speed[-1])
            times.append(t)
            states.append(state)
        return torch.stack(times), states


class Drug(nn.Module):
    """concentration' = -rate concentration; the doses are added at given times."""

    def __init__(self, rate, doses):
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(rate, dtype=F64).log())
        self.doses = nn.Parameter(torch.tensor(doses, dtype=F64))
        self.nfe = 0

    def forward(self, t, c):
        self.nfe += 1
        return -self.log_rate.exp() * c

    def observed(self, odeint, dosed_at, points):
        """The concentrations at `points` times after each dose and before the next one: (doses, points)."""
        c, pieces = torch.zeros((), dtype=F64), []
        for dose, (start, end) in zip(self.doses, pairwise(dosed_at), strict=True):
            c = odeint(self, c + dose, torch.linspace(start, end, points, dtype=F64), **TOLERANCE)
            pieces.append(c)
            c = c[-1]
        return torch.stack(pieces)


def learn(model, loss_of, iterations, lr):
    """Adam with a decreasing rate; returns the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    losses = []
    for _ in range(iterations):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["node_cuda", "torchdiffeq"], default="node_cuda")
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("jumps.png"), help="the picture")
    arguments = parser.parse_args()
    if arguments.library == "node_cuda":
        from node_cuda import odeint, odeint_event
    else:
        from torchdiffeq import odeint, odeint_event
    torch.manual_seed(0)
    iterations = 3 if arguments.short else 150

    with torch.no_grad():
        wanted, _ = Ball(9.81, 0.8).bounces(odeint_event, 5)
    ball, begun = Ball(6.0, 0.6), time.process_time()
    ball_losses = learn(ball, lambda: (ball.bounces(odeint_event, 5)[0] - wanted).square().mean(), iterations, 0.05)
    gravity, kept = ball.logs.exp().tolist()
    print(f"ball: gravity {gravity:.4f} (true 9.81), part of the speed kept {kept:.4f} (true 0.8)")

    dosed_at, doses = [0.0, 2.0, 5.0, 6.5, 10.0], [1.0, 0.5, 1.5, 0.8]
    with torch.no_grad():
        clean = Drug(0.4, doses).observed(odeint, dosed_at, 8)
    noisy = clean + 0.02 * torch.randn_like(clean)
    drug = Drug(1.0, [0.2] * 4)
    drug_losses = learn(drug, lambda: (drug.observed(odeint, dosed_at, 8) - noisy).square().mean(), iterations, 0.1)
    seconds, nfe = time.process_time() - begun, (ball.nfe + drug.nfe) / (2 * iterations)
    amounts = ", ".join(f"{dose:.3f} ({true:g})" for dose, true in zip(drug.doses.tolist(), doses, strict=True))
    print(f"drug: rate {drug.log_rate.exp().item():.4f} (true 0.4), doses {amounts}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained")
    with torch.no_grad():
        for label, model, style in (("before", Ball(6.0, 0.6), ":"), ("after", ball, "-")):
            times, states = model.bounces(odeint_event, 5)
            path_t, path = [], []
            for (start, end), state in zip(pairwise(times), states[:-1], strict=True):
                piece = torch.linspace(start.item(), end.item(), 40, dtype=F64)
                path_t.append(piece)
                path.append(odeint(model, state, piece, **TOLERANCE)[0])
            left.plot(torch.cat(path_t), torch.cat(path), style, color="C0", label=f"{label} training")
        left.plot(wanted[1:], torch.zeros(5), "k^", label="bounces to match")
        left.set(xlabel="t", ylabel="height")
        left.legend(fontsize=8)
        fine = drug.observed(odeint, dosed_at, 40)
        for i in range(4):
            start, end = dosed_at[i : i + 2]
            right.plot(torch.linspace(start, end, 40), fine[i], color="C0")
            right.plot(torch.linspace(start, end, 8), noisy[i], "k.", markersize=4)
        right.set(xlabel="t", ylabel="concentration")
    figure.savefig(arguments.out, dpi=90)
    print(
        f"found: loss={ball_losses[-1] + drug_losses[-1]:.6g} nfe={nfe:.1f} seconds={seconds:.2f} "
        f"gravity={gravity:.5f} kept={kept:.5f}"
    )


if __name__ == "__main__":
    main()
