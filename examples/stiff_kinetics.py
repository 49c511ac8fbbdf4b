"""Robertson's three reaction rates learned from data: a stiff problem, by the gradient of an implicit method.

What this shows: the rates of the reactions lie nine decades apart. An explicit method must take steps as short as the
fastest reaction needs, for all of the time; an implicit one (method="rodas5p") needs a few dozen. Its gradient is exact
with gradient="discrete". The data are the concentrations at 20 times to t = 1e4 with a noise of 1 %; the rates start at
ten times and a tenth of the true ones.

    python examples/stiff_kinetics.py [--method kvaerno5] [--short] [--out stiff_kinetics.png]
"""

import argparse
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from node_cuda import solve

F64 = torch.float64
TRUE = torch.tensor([0.04, 1e4, 3e7], dtype=F64)


class Robertson(nn.Module):
    """A -> B, B + C -> A + C, 2 B -> C + B; the rates by their logarithms."""

    def __init__(self, rates):
        super().__init__()
        self.log_rates = nn.Parameter(rates.log())

    def forward(self, t, y):
        a, b, c = y.unbind(-1)
        slow, back, fast = self.log_rates.exp()
        r1, r2, r3 = slow * a, back * b * c, fast * b**2
        return torch.stack([r2 - r1, r1 - r2 - r3, r3], -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="rodas5p", help="rodas5p (default), kvaerno5 or kvaerno3")
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("stiff_kinetics.png"), help="the picture")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    t = torch.cat([torch.zeros(1, dtype=F64), torch.logspace(-3, 4, 20, dtype=F64)])
    tolerance = dict(rtol=1e-5, atol=1e-10)
    with torch.no_grad():
        truth = solve(Robertson(TRUE), y0, t, method=arguments.method, **tolerance)
        # stops after so many attempts, with the outputs that were reached
        limit = dict(throw=False, max_num_steps=500 if arguments.short else 20_000)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            explicit = solve(Robertson(TRUE), y0, t, options=limit, **tolerance)
    data = truth.ys[1:] * (1 + 0.01 * torch.randn(20, 3, dtype=F64))
    print(f"{arguments.method}: {truth.stats.accepted} steps, {truth.stats.nfe} evaluations to t = {float(t[-1]):g}")
    reached, taken = float(explicit.t_reached), explicit.stats.accepted
    print(f"dopri5: {taken} steps, {explicit.stats.nfe} evaluations to t = {reached:.4g}; there it was stopped")

    for warning in told:
        print(f"it warned: {warning.message}")

    func, iterations = Robertson(TRUE * torch.tensor([10.0, 0.1, 10.0], dtype=F64)), 3 if arguments.short else 150
    optimizer = torch.optim.Adam(func.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    losses, rates, nfe, begun = [], [], 0, time.process_time()
    for iteration in range(iterations):
        optimizer.zero_grad()
        found = solve(func, y0, t, method=arguments.method, gradient="discrete", **tolerance)
        loss = (found.ys[1:].clamp(min=1e-12).log() - data.log()).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        rates.append(func.log_rates.detach().exp() / TRUE)
        nfe += found.stats.nfe + found.stats.nfe_backward
        if iteration % 25 == 0:
            print(f"{iteration:4d}  loss {losses[-1]:.3e}  rates {[f'{rate:.4g}' for rate in rates[-1] * TRUE]}")
    seconds = time.process_time() - begun

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained")
    for i, (name, scale) in enumerate((("A", 1), ("B × 10⁴", 1e4), ("C", 1))):
        left.semilogx(t[1:], scale * data[:, i], f"C{i}.", markersize=5)
        left.semilogx(t[1:], scale * found.ys.detach()[1:, i], f"C{i}", label=name)
    left.axvline(reached, color="0.6", linestyle=":", label=f"dopri5 after {taken} steps")
    left.set(xlabel="t", ylabel="concentration")
    left.legend(fontsize=8)
    right.semilogy(torch.stack(rates), label=["0.04", "1e4", "3e7"])
    right.set(xlabel="iteration", ylabel="rate / true rate")
    right.legend(fontsize=8)
    figure.savefig(arguments.out, dpi=90)
    print(f"found: loss={losses[-1]:.6g} nfe={nfe / iterations:.1f} seconds={seconds:.2f} explicit_steps={taken}")


if __name__ == "__main__":
    main()
