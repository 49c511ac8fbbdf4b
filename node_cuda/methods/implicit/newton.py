"""Simplified Newton iterations for one stage, k = f(t, base + h gamma k), with a matrix that is factorised already.

Hairer and Wanner II, IV.8: the contraction rate theta is watched; what is left of the error, theta / (1 - theta) times
the last change, must be small in units of the tolerances; a rate that would not get there ends the iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from node_cuda.kernels.norms import ErrorNorm
from node_cuda.methods.implicit.linear import Factorised
from node_cuda.solution import Stats

MOST = 10
"""Iterations of a stage."""
SMALL = 0.01
"""What may be left of the error of a stage, in units of the tolerances."""


class Newton:
    """rate: the largest theta since it was set to 0."""

    def __init__(self, norm: ErrorNorm, dtype: torch.dtype, tol: float | None, stats: Stats) -> None:
        self.norm = norm
        self.stats = stats
        rtol = float(norm.rtol.min()) if isinstance(norm.rtol, Tensor) else norm.rtol
        # Below rounding no iteration gets any smaller.
        rounding = 10.0 * torch.finfo(dtype).eps / rtol if rtol else SMALL
        self.tol = max(SMALL, min(rounding, 0.5)) if tol is None else tol
        self.rate = 0.0
        self._eta = 1.0  # of the stage before

    def solve(
        self,
        field: Callable[[Tensor], Tensor],
        base: Tensor,
        k: Tensor,
        hg: float,
        matrix: Factorised,
        scale: Tensor,
    ) -> Tensor | None:
        """The stage, from the guess k; None: not found. hg: h gamma. scale: what counts as 1 in the state."""
        eta = max(self._eta, 1e-16) ** 0.8
        before = math.inf
        for left in range(MOST - 1, -1, -1):
            g = field(torch.add(base, k, alpha=hg)).sub(k)
            change = matrix.solve(g)
            k = k + change
            self.stats.newton_iterations += 1
            self.stats.linear_solves += 1
            self.stats.host_reads += 1
            size = self.norm(change.mul_(hg).div_(scale))
            if not math.isfinite(size):
                return None
            if before < math.inf and before > 0.0:
                theta = size / before
                self.rate = max(self.rate, theta)
                if theta >= 1.0:
                    return None
                eta = theta / (1.0 - theta)
                if theta**left / (1.0 - theta) * size > self.tol:
                    return None
            if eta * size <= self.tol:
                self._eta = eta
                return k
            before = size
        return None
