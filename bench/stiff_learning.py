"""Robertson's three reaction rates learned from data, by the gradient of an implicit method.

The data are the concentrations at 20 times to t = 1e4, with a relative noise of 1 %; the rates start at ten times and a
tenth of the true ones. Adam on the logarithms of the rates, and of the concentrations in the loss.

    python bench/stiff_learning.py [--method rodas5p] [--epochs 150]
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from node_cuda import solve
from parts.stiff.problems import F64, Robertson

TRUE = (0.04, 1e4, 3e7)
EXPLICIT_STEPS = 20000


class Learned(nn.Module):
    """The rates by their logarithms."""

    def __init__(self) -> None:
        super().__init__()
        factors = torch.tensor([10.0, 0.1, 10.0], dtype=F64)
        self.log_rates = nn.Parameter((torch.tensor(TRUE, dtype=F64) * factors).log())

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b, c = y.unbind(-1)
        slow, back, fast = self.log_rates.exp()
        r1, r2, r3 = slow * a, back * b * c, fast * b**2
        return torch.stack([r2 - r1, r1 - r2 - r3, r3], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="rodas5p")
    parser.add_argument("--epochs", type=int, default=150)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    t = torch.cat([torch.zeros(1, dtype=F64), torch.logspace(-3, 4, 20, dtype=F64)])
    solver = dict(method=arguments.method, rtol=1e-5, atol=1e-10)
    with torch.no_grad():
        truth = solve(Robertson(), y0, t, **solver)
        assert isinstance(truth.ys, torch.Tensor)
        data = truth.ys[1:] * (1 + 0.01 * torch.randn(20, 3, dtype=F64))
        explicit = solve(
            Robertson(), y0, t, rtol=1e-5, atol=1e-10, options=dict(throw=False, max_num_steps=EXPLICIT_STEPS)
        )
    print(f"{arguments.method}: {truth.stats.accepted} steps, {truth.stats.nfe} evaluations to t = {float(t[-1]):g}")
    reached = float(explicit.t_reached)
    print(f"dopri5: {explicit.stats.accepted} steps, {explicit.stats.nfe} evaluations to t = {reached:.4g}, given up")
    func = Learned()
    optimizer = torch.optim.Adam(func.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)
    begun = time.perf_counter()
    for epoch in range(arguments.epochs):
        optimizer.zero_grad()
        ys = solve(func, y0, t, gradient="discrete", **solver).ys
        assert isinstance(ys, torch.Tensor)
        loss = (ys[1:].clamp(min=1e-12).log() - data.log()).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        if epoch % 25 == 0 or epoch == arguments.epochs - 1:
            rates = ", ".join(f"{rate:.4g}" for rate in func.log_rates.exp().tolist())
            print(f"epoch {epoch:3d}  loss {loss.item():.3e}  rates {rates}  {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
