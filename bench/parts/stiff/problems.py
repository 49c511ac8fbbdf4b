"""The stiff problems of stiff.py, with reference values: the test sets of Hairer and Wanner, and of Bari."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

F64 = torch.float64


class Problem(NamedTuple):
    """atol: in units of rtol. end: y(t). cheap: also by methods of low order at small tolerances."""

    name: str
    field: Callable[[Tensor, Tensor], Tensor]
    start: tuple[float, ...]
    t: float
    atol: float
    end: tuple[float, ...]
    cheap: bool = False

    def error(self, y: np.ndarray, rtol: float) -> float:
        """The largest error of y(t), in units of atol + rtol |y|."""
        end = np.array(self.end)
        return float(np.max(np.abs(y - end) / (self.atol * rtol + rtol * np.abs(end))))


class Robertson(nn.Module):
    """Three reactions; rates: of shape (3,), or one row a sample."""

    def __init__(self, rates: Tensor | None = None) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([0.04, 1e4, 3e7], dtype=F64) if rates is None else rates)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        slow, back, fast = self.rates.unbind(-1)
        r1, r2, r3 = slow * a, back * b * c, fast * b**2
        return torch.stack([r2 - r1, r1 - r2 - r3, r3], -1)


def robertson(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    r1, r2, r3 = 0.04 * a, 1e4 * b * c, 3e7 * b**2
    return torch.stack([r2 - r1, r1 - r2 - r3, r3], -1)


def hires(t: Tensor, y: Tensor) -> Tensor:
    a, b, c, d, e, f, g, h = y.unbind(-1)
    r = 280.0 * f * h
    rows = [
        -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
        1.71 * a - 8.75 * b,
        -10.03 * c + 0.43 * d + 0.035 * e,
        8.32 * b + 1.71 * c - 1.12 * d,
        -1.745 * e + 0.43 * f + 0.43 * g,
        -r + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
        r - 1.81 * g,
        -r + 1.81 * g,
    ]
    return torch.stack(rows, -1)


def orego(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    return torch.stack([77.27 * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / 77.27, 0.161 * (a - c)], -1)


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    a, b = y.unbind(-1)
    return torch.stack([b, ((1 - a**2) * b - a) / 1e-6], -1)


PROBLEMS = (
    Problem(
        "robertson", robertson, (1.0, 0.0, 0.0), 1e11, 1e-6,
        (0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050), cheap=True,
    ),
    Problem(
        "hires", hires, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057), 321.8122, 1e-4,
        (0.7371312573325668e-3, 0.1442485726316185e-3, 0.5888729740967575e-4, 0.1175651343283149e-2,
         0.2386356198831331e-2, 0.6238968252742796e-2, 0.2849998395185769e-2, 0.2850001604814231e-2),
    ),
    Problem(
        "orego", orego, (1.0, 2.0, 3.0), 360.0, 1e-6,
        (0.1000814870318523e1, 0.1228178521549917e4, 0.1320554942846706e3),
    ),
    Problem("van der pol", van_der_pol, (2.0, 0.0), 2.0, 1.0, (0.1706167732170483e1, -0.8928097010247975)),
)  # fmt: skip
