"""Newton's iterations for the equations of a stage, or of all stages together.

Simplified iterations use one matrix, which is factorised already. Hairer and Wanner II, IV.8: the contraction rate
theta is watched; the rest of the error, theta / (1 - theta) times the last change, must be small in units of the
tolerances; if theta is too large for that, the iteration ends. `full` computes the matrix anew in each iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from node_cuda.kernels.norms import ErrorNorm
from node_cuda.solution import Stats

MOST = 10
"""Simplified iterations of a stage."""
SMALL = 0.01
"""The error of a stage that may be left, in units of the tolerances."""


class Matrix(Protocol):
    """Solves for the change of the unknowns."""

    def solve(self, b: Tensor) -> Tensor:
        """Return x."""
        ...


class Newton:
    """The end of the iterations: the norm of a change, and what counts as small.

    tol: in units of the tolerances; None: `SMALL`, or what the dtype can hold. held: the smallest relative change of a
    state that counts, for solves whose tolerances choose no steps. rate: the largest theta since it was set to 0.
    """

    def __init__(
        self, norm: ErrorNorm, dtype: torch.dtype, tol: float | None, stats: Stats, *, held: float = 0.0
    ) -> None:
        self.norm = norm
        self.stats = stats
        self.held = held
        rtol = max(float(norm.rtol.min()) if isinstance(norm.rtol, Tensor) else norm.rtol, held)
        # Below rounding no iteration gets any smaller.
        rounding = 10.0 * torch.finfo(dtype).eps / rtol if rtol else SMALL
        self.tol = max(SMALL, min(rounding, 0.5)) if tol is None else tol
        self.rate = 0.0
        self._eta = 1.0  # of the stage before

    def scale(self, y0: Tensor) -> Tensor:
        """Return the change of each number of the state that counts as 1."""
        size = y0.abs()
        scale = self.norm.scale(size)
        return torch.maximum(scale, self.held * size.amax()) if self.held and size.numel() else scale

    def solve(
        self, residual: Callable[[Tensor], Tensor], k: Tensor, matrix: Matrix, of_state: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """Return the solution of residual(k) = 0, from the guess k; None: not found.

        of_state: returns the scaled change of the state for a change of k, which it may overwrite.
        """
        eta = max(self._eta, 1e-16) ** 0.8
        before = math.inf
        for left in range(MOST - 1, -1, -1):
            k, size = self._iterated(residual(k), k, matrix, of_state)
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

    def full(
        self,
        linearised: Callable[[Tensor], tuple[Tensor, Matrix]],
        k: Tensor,
        of_state: Callable[[Tensor], Tensor],
        most: int,
    ) -> Tensor | None:
        """Return the same by at most so many iterations, with the residual and the matrix of each k."""
        for _ in range(most):
            residual, matrix = linearised(k)
            k, size = self._iterated(residual, k, matrix, of_state)
            if not math.isfinite(size):
                return None
            if size <= self.tol:
                return k
        return None

    def _iterated(
        self, residual: Tensor, k: Tensor, matrix: Matrix, of_state: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, float]:
        """Return the next k, and the size of the change."""
        change = matrix.solve(residual)
        k = k + change
        self.stats.newton_iterations += 1
        self.stats.linear_solves += 1
        self.stats.host_reads += 1
        return k, self.norm(of_state(change))
