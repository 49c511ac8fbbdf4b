"""Sums over a list of tensors by the compiled kernels: one launch for the whole list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from node_cuda.kernels.memory import address, resolved
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.stage_times import Interval
from node_cuda.kernels.sums import GradientAccumulator


class SavedIntegrands(list[Tensor]):
    """Tensors from the start of a step, kept if it is rejected, in the dtypes of the sums."""


class FusedGradientAccumulator(GradientAccumulator):
    """`GradientAccumulator` by the kernels.

    The buffers have the memory layout of the first tensors that are added, so that transposed ones need no copy.
    code_of: the codes of the dtypes in csrc.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        module: ModuleType,
        on: tuple[int, int],
        code_of: Mapping[torch.dtype, int],
        *,
        with_error: bool,
    ) -> None:
        super().__init__(like, with_error=with_error)
        self._module = module
        self._on = on
        self._code_of = code_of
        self._codes = [code_of[x.dtype] for x in like]
        self._plan: Any = None
        self._of_kept: Any = None  # the plan that adds the kept tensors to the same sums
        self._keeper: Any = None
        self._kept = SavedIntegrands()
        self._has_sum = self._has_error = False

    def begin(self) -> None:
        self._has_sum = self._has_error = False

    def add(
        self, tensors: Sequence[Tensor | None], weight: float, error_weight: float, at: Interval | None = None
    ) -> None:
        """Add weighted tensors to the sum of this step and to its error. One launch; two if only one of the sums starts
        here."""
        plan, given = (self._of_kept, tensors) if isinstance(tensors, SavedIntegrands) else self._laid_out(tensors)
        error_weight = error_weight if self.with_error else 0.0
        where = self._module.ONE if at is None else at.native
        addresses = _addresses(given)
        if weight and error_weight and self._has_sum != self._has_error:
            plan.accumulate(addresses, where, weight, 0.0, self._has_sum)
            plan.accumulate(addresses, where, 0.0, error_weight, self._has_error)
        elif weight or error_weight:
            plan.accumulate(addresses, where, weight, error_weight, self._has_sum if weight else self._has_error)
        self._has_sum = self._has_sum or bool(weight)
        self._has_error = self._has_error or bool(error_weight)

    def scaled_errors(self, norm: ErrorNorm) -> list[Tensor]:
        return super().scaled_errors(norm) if self._has_sum and self._has_error else []

    def device_ratio(self, norm: ErrorNorm) -> Tensor | None:
        """Return the largest rms of the scaled errors, on the device. One launch."""
        if not (self._has_sum and self._has_error):
            return None
        self._plan.ratio(norm.rtol, norm.atol, self._workspace.data_ptr(), self._ratio.data_ptr())
        return self._ratio

    def commit(self) -> None:
        """Add the sum of the accepted step to the total. One launch."""
        self._next = None
        if self._has_sum:
            self._plan.commit(self._module.ONE)

    def commit_if_accepted(self, at: Interval) -> None:
        """Add the step to the totals if the device accepted it. at: the current step. One launch."""
        if self._has_sum:
            self._plan.commit(at.native)

    def restart(self) -> None:
        """Set the totals to zero, in place."""
        torch._foreach_zero_(self.total)

    def keep(self, tensors: Sequence[Tensor | None]) -> SavedIntegrands:
        """Copy the tensors into memory with a fixed address. One launch."""
        _, given = self._laid_out(tensors)
        keeper = self._keeper or self._make_keeper()
        keeper.accumulate(_addresses(given), self._module.ONE, 1.0, 0.0, False)
        return self._kept

    def keep_if_accepted(self, tensors: Sequence[Tensor | None], at: Interval) -> None:
        """Replace the kept tensors by these if the device accepted the step. at: the current step. One launch."""
        _, given = self._laid_out(tensors)
        self._keeper.keep(_addresses(given), at.native, False)

    def _laid_out(self, tensors: Sequence[Tensor | None]) -> tuple[Any, list[Tensor | None]]:
        """Return the plan, made for the first tensors that are added, and these tensors in the layout of the
        buffers."""
        tensors = [None if x is None else resolved(x) for x in tensors]
        plan = self._plan or self._lay_out(tensors)
        return plan, [
            None if x is None else self._as_laid_out(x, total) for x, total in zip(tensors, self.total, strict=True)
        ]

    def _lay_out(self, first: Sequence[Tensor | None]) -> Any:
        """Make buffers with the memory format of these tensors, and the table of them on the device."""
        for i, (x, dtype) in enumerate(zip(first, self.dtypes, strict=True)):
            if x is not None and torch.empty_like(x).stride() == x.stride():
                self.total[i] = torch.empty_strided(x.size(), x.stride(), dtype=dtype, device=x.device).zero_()
        self._sum = [torch.empty_like(x) for x in self.total]
        self._error = [torch.empty_like(x) for x in self.total] if self.with_error else []
        device = self.total[0].device
        self._parts, self._plan = self._bind(self._sum, self._error, self.total, self._codes)
        self._workspace = torch.zeros(self._plan.workspace_size(), dtype=torch.uint8, device=device)
        self._ratio = torch.empty(1, dtype=torch.float64, device=device)
        return self._plan

    def _make_keeper(self) -> Any:
        """Make memory for the kept tensors and the plans that read and write it; return the plan that writes."""
        codes = [self._code_of[d] for d in self.dtypes]
        self._kept = SavedIntegrands(map(torch.empty_like, self.total))
        self._parts_of_kept, self._of_kept = self._bind(self._sum, self._error, self.total, codes)
        self._parts_of_keeper, self._keeper = self._bind(self._kept, (), (), self._codes)
        return self._keeper

    def _bind(
        self, sums: Sequence[Tensor], errors: Sequence[Tensor], totals: Sequence[Tensor], codes: Sequence[int]
    ) -> tuple[Tensor, Any]:
        """Make the table of these buffers on the device, for tensors of these dtypes, and its plan."""
        sizes = [x.numel() for x in sums]
        addresses = ([x.data_ptr() for x in each] for each in (sums, errors, totals))
        table = bytearray(self._module.parts(*addresses, sizes, codes))
        parts = torch.frombuffer(table, dtype=torch.uint8).to(sums[0].device)
        return parts, self._module.SumsPlan(parts.data_ptr(), sizes, self._on)

    def _as_laid_out(self, x: Tensor, like: Tensor) -> Tensor:
        """Return x, or a copy of it if its layout differs from that of the buffers."""
        if x.stride() == like.stride() or x.numel() <= 1:
            return x
        return torch.empty_like(like, dtype=x.dtype).copy_(x)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else address(x, "the gradient of a parameter") for x in tensors]
