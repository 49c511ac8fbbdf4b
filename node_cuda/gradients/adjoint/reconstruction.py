"""A check of the backward solve: is the reconstructed state that of the forward solve?

If the field contracts, the backward solve expands: an error grows by exp(cT), and the gradient follows another
trajectory. Gholami, Keutzer and Biros 2019, arXiv:1902.10298.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from node_cuda.kernels.norms import ErrorNorm
from node_cuda.status import ReconstructionWarning, users_level

INTERPOLATION, PER_STEP = 100.0, 10.0
"""Errors up to this size, in units of the tolerances, are normal. An output between two steps has an error of some
tens. Each backward step adds about one, which grows a little for a well-behaved field."""


class Reconstruction:
    """Compares states at output times. worst: the largest error found, in units of the tolerances."""

    def __init__(self, norm: ErrorNorm) -> None:
        self.norm = norm
        self.worst = 0.0
        self._excess = 0.0
        self._words = ""

    def compare(self, t: float, rebuilt: Tensor, stored: Tensor, steps: int) -> None:
        """Compare y at the user's time t, reconstructed by `steps` backward steps, with the stored y. One host read."""
        scale = self.norm.scale(torch.maximum(rebuilt.abs(), stored.abs()))
        error = self.norm((rebuilt - stored) / scale)
        excess = error / (INTERPOLATION + PER_STEP * steps)
        if not error <= self.worst:
            self.worst = error
        if not excess <= self._excess:
            self._excess = excess
            self._words = (
                f"the backward solve reconstructed z at t = {t:.6g}, by {steps} steps, with an error of {error:.3g} "
                "tolerances"
            )

    def warn(self) -> None:
        """Issue a warning if an error was larger than the steps can explain."""
        if not self._excess <= 1.0:
            warnings.warn(
                f"{self._words}, so the gradient follows a wrong trajectory: the field contracts, and its backward "
                'solve is unstable. Use gradient="discrete", or more output times: z is reset at each of them.',
                ReconstructionWarning,
                stacklevel=users_level(),
            )
