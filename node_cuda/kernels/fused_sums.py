"""Sums over a list of tensors by the compiled kernels: one launch for the whole list."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from node_cuda.kernels.memory import address, resolved
from node_cuda.kernels.sums import Sums
from node_cuda.norms import ErrorNorm

_PART = struct.Struct("=6q")  # struct Part of csrc/launchers.h


class FusedSums(Sums):
    """See `Sums`. The buffers are laid out as the first tensors that come, so that transposed ones need no copy.

    codes: the dtypes of `like` as csrc knows them.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        module: ModuleType,
        on: tuple[int, int],
        codes: Sequence[int],
        *,
        with_error: bool,
    ) -> None:
        super().__init__(like, with_error=with_error)
        self._module = module
        self._on = on
        self._codes = codes
        self._plan: Any = None
        self._has_sum = self._has_error = False

    def begin(self) -> None:
        """See `Sums`."""
        self._has_sum = self._has_error = False

    def add(self, tensors: Sequence[Tensor | None], weight: float, error_weight: float) -> None:
        """See `Sums`. One launch; two where one of the sums begins and the other goes on."""
        tensors = [None if x is None else resolved(x) for x in tensors]
        plan = self._plan or self._lay_out(tensors)
        error_weight = error_weight if self.with_error else 0.0
        given = [
            None if x is None else self._as_laid_out(x, total) for x, total in zip(tensors, self.total, strict=True)
        ]
        addresses = [0 if x is None else address(x, "the gradient of a parameter") for x in given]
        if weight and error_weight and self._has_sum != self._has_error:
            plan.accumulate(addresses, weight, 0.0, self._has_sum)
            plan.accumulate(addresses, 0.0, error_weight, self._has_error)
        elif weight or error_weight:
            plan.accumulate(addresses, weight, error_weight, self._has_sum if weight else self._has_error)
        self._has_sum = self._has_sum or bool(weight)
        self._has_error = self._has_error or bool(error_weight)

    def scaled_errors(self, norm: ErrorNorm) -> list[Tensor]:
        """See `Sums`."""
        return super().scaled_errors(norm) if self._has_sum and self._has_error else []

    def device_ratio(self, norm: ErrorNorm) -> Tensor | None:
        """See `Sums`. One launch."""
        if not (self._has_sum and self._has_error):
            return None
        self._plan.ratio(norm.rtol, norm.atol, self._workspace.data_ptr(), self._ratio.data_ptr())
        return self._ratio

    def commit(self) -> None:
        """See `Sums`. One launch."""
        self._next = None
        if self._has_sum:
            self._plan.commit()

    def _lay_out(self, first: Sequence[Tensor | None]) -> Any:
        """Buffers of the memory format of these tensors, and the table of them on the device."""
        for i, (x, dtype) in enumerate(zip(first, self.dtypes, strict=True)):
            if x is not None and torch.empty_like(x).stride() == x.stride():
                self.total[i] = torch.empty_strided(x.size(), x.stride(), dtype=dtype, device=x.device).zero_()
        self._sum = [torch.empty_like(x) for x in self.total]
        self._error = [torch.empty_like(x) for x in self.total] if self.with_error else []
        device, sizes, chunk = self.total[0].device, [x.numel() for x in self.total], 0
        table = bytearray()
        for i, (total, size, code) in enumerate(zip(self.total, sizes, self._codes, strict=True)):
            error = self._error[i].data_ptr() if self._error else 0
            table += _PART.pack(self._sum[i].data_ptr(), error, total.data_ptr(), size, chunk, code)
            chunk += self._module.chunks_of(size)
        self._parts = torch.frombuffer(table, dtype=torch.uint8).to(device)
        self._plan = self._module.SumsPlan(self._parts.data_ptr(), sizes, self._on)
        self._workspace = torch.zeros(self._plan.workspace_size(), dtype=torch.uint8, device=device)
        self._ratio = torch.empty(1, dtype=torch.float64, device=device)
        return self._plan

    def _as_laid_out(self, x: Tensor, like: Tensor) -> Tensor:
        """x, or a copy of it where its numbers do not lie as the buffers do."""
        if x.stride() == like.stride() or x.numel() <= 1:
            return x
        return torch.empty_like(like, dtype=x.dtype).copy_(x)
