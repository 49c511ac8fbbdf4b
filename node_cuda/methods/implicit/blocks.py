"""Splits a state into independent samples, each a vector of real numbers with a separate Jacobian matrix."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from node_cuda.kernels.norms import HALF
from node_cuda.problem.problem import Problem
from node_cuda.status import InvalidInput, InvalidState

MOST_NUMBERS = 2**28
"""The largest Jacobian, in numbers: 2 GiB in double, and a step holds three of its size."""


class Blocks:
    """Splits flat states like the problem's into `count` samples of `size` numbers, and joins them again.

    batch_dims: the number of first dimensions of the state, and of each component of a tuple, that count samples. A
    complex number counts as two real ones, so that the field need not be holomorphic.
    """

    def __init__(self, problem: Problem, batch_dims: int) -> None:
        y0 = problem.y0
        if y0.dtype in HALF:
            raise InvalidState(
                f"implicit methods solve linear systems, which torch does in float32 and float64; got a state of "
                f"{y0.dtype}. Use `y0.float()`."
            )
        if y0.numel() == 0:
            raise InvalidInput(
                f"y0 has no elements, so an implicit method has no equations to solve; got shape {tuple(y0.shape)}. "
                'Skip the solve for an empty batch, or take an explicit method on a fixed grid: method="rk4".'
            )
        shapes = problem.layout.shapes or (y0.shape,)
        leads = {tuple(shape[:batch_dims]) for shape in shapes}
        if batch_dims and (len(leads) > 1 or any(len(shape) < batch_dims for shape in shapes)):
            got = ", ".join(str(tuple(shape)) for shape in shapes)
            raise InvalidInput(
                f'options["batch_dims"] = {batch_dims} needs as many dimensions of samples in front of each component '
                f"of the state, the same in all; got {got}. An integral, too, is one for each sample then. Drop "
                "batch_dims, or give each component these dimensions."
            )
        lead = shapes[0][:batch_dims]
        self.count = lead.numel()
        self.numbers = 2 if y0.is_complex() else 1
        per_sample = [shape[batch_dims:].numel() for shape in shapes]
        self.size = sum(per_sample) * self.numbers
        self._shape = y0.shape
        self.vector = y0.ndim == 1 and self.count == 1 and self.numbers == 1  # a state is its sample
        self._bounds: list[tuple[int, int, int]] = []
        if len(shapes) > 1 and self.count > 1:  # the samples of a component lie together, not those of the state
            ends = list(accumulate(size * self.count for size in per_sample))
            self._bounds = [(end - size * self.count, end, size) for end, size in zip(ends, per_sample, strict=True)]
        if self.count * self.size**2 > MOST_NUMBERS:
            raise InvalidInput(
                f"the Jacobian of this state is {self.count} x {self.size} x {self.size} numbers, "
                f"{self.count * self.size**2 * y0.dtype.to_real().itemsize / 2**30:.3g} GiB. If the state is a batch "
                "of samples that do not see each other, say so: options=dict(batch_dims=1). Else take an explicit "
                'method, "dopri5": implicit ones for large dense systems are not here yet.'
            )

    def split(self, x: Tensor) -> Tensor:
        """Return a state as (count, size)."""
        if self._bounds:
            x = torch.cat([x[start:stop].reshape(self.count, size) for start, stop, size in self._bounds], 1)
        if self.numbers == 2:
            x = torch.view_as_real(x.resolve_conj())
        return x.reshape(self.count, self.size)

    def join(self, blocks: Tensor) -> Tensor:
        """Return the contiguous state that (count, size) came from."""
        if self.numbers == 2:
            blocks = torch.view_as_complex(blocks.contiguous().view(self.count, -1, 2))
        if self._bounds:
            parts = blocks.split([size for _, _, size in self._bounds], 1)
            return torch.cat([part.reshape(-1) for part in parts])
        return blocks.contiguous().view(self._shape)
