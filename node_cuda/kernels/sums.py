"""Sums over the stages of a step, and over steps, of a list of tensors: the quadrature of the parameters' gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from node_cuda.kernels import reference
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.stage_times import Interval


class GradientAccumulator:
    """Sums a list of tensors like `like`. Half and bfloat16 accumulate in float32.

    with_error: the sum of a step gets an error estimate.
    """

    def __init__(self, like: Sequence[Tensor], *, with_error: bool) -> None:
        self.like = like
        self.with_error = with_error
        self.dtypes = [torch.promote_types(x.dtype, torch.float32) for x in like]
        self._total: list[Tensor] | None = None  # None before the first accepted step
        self._sum: list[Tensor] = []
        self._error: list[Tensor] = []
        self._next: list[Tensor] | None = None
        self._zeros: list[Tensor | None] = [None] * len(like)

    @property
    def total(self) -> list[Tensor]:
        """The sums over accepted steps."""
        if self._total is None:
            self._total = self._zero_sums()
        return self._total

    def begin(self) -> None:
        """Start a step: discard the sums of a step that was rejected."""
        self._sum, self._error = [], []

    def add(
        self, tensors: Sequence[Tensor | None], weight: float, error_weight: float, at: Interval | None = None
    ) -> None:
        """Add sum_i += weight x_i, error_i += error_weight x_i; with `at` times its signed size. None stands for
        zeros."""
        if at is not None:
            weight, error_weight = at.signed * weight, at.signed * error_weight
        given: list[Any] = list(tensors)
        for i, x in enumerate(given):
            if x is None:
                given[i] = self._zero(i)
        if weight == 1.0 and not self._sum:
            self._sum = [x.to(d, copy=True) for x, d in zip(given, self.dtypes, strict=True)]
        elif weight:
            if not self._sum and self._total is None:
                self._sum = self._zero_sums()  # which becomes the total, so that no -0.0 gets into it
            self._sum = reference.accumulate(self._sum, given, weight, self.dtypes)
        if error_weight and self.with_error:
            self._error = reference.accumulate(self._error, given, error_weight, self.dtypes)

    def scaled_errors(self, norm: ErrorNorm) -> list[Tensor]:
        """Return error_i / (atol + rtol max(|total_i|, |total_i + sum_i|)) of the step that was just tried."""
        self._next = None
        if not (self._error and self._sum):
            return []
        self._next = list(torch._foreach_add(self.total, self._sum))
        return reference.scaled_sums(self._error, self.total, self._next, norm)

    def device_ratio(self, norm: ErrorNorm) -> Tensor | None:
        """Return the largest rms of the scaled errors, one double on their device, or None if no error takes part."""
        scaled = [error for error in self.scaled_errors(norm) if error.numel()]
        if not scaled:
            return None
        rms = [torch.linalg.vector_norm(error).double() / math.sqrt(error.numel()) for error in scaled]
        return torch.stack(rms).amax().reshape(1)

    def commit(self) -> None:
        """Add the sum of the accepted step to the total."""
        if self._next is not None:
            self._total, self._next = self._next, None
        elif self._sum and self._total is None:
            self._total, self._sum = self._sum, []
        elif self._sum:
            torch._foreach_add_(self.total, self._sum)

    def _zero_sums(self) -> list[Tensor]:
        return [torch.zeros_like(x, dtype=d) for x, d in zip(self.like, self.dtypes, strict=True)]

    def _zero(self, i: int) -> Tensor:
        zero = self._zeros[i]
        if zero is None:
            zero = self._zeros[i] = torch.zeros_like(self.like[i])
        return zero
