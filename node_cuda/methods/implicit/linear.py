"""The linear systems of a step, (a I - s J) x = b, factorised once for all samples and stages."""

from __future__ import annotations

import torch
from torch import Tensor

from node_cuda.methods.implicit.blocks import Blocks

INVERTED = 8
"""The largest single matrix that is inverted: a product is one call, a solution by its factors four."""


class Factorised:
    """a I - s J for the Jacobian of each sample. On the tape where J or s is. A singular one gives NaN or infinity."""

    def __init__(self, blocks: Blocks, jacobian: Tensor, a: float, s: float | Tensor) -> None:
        self.blocks = blocks
        matrix = jacobian * -s
        matrix.diagonal(dim1=-2, dim2=-1).add_(a)
        self._inverse: Tensor | None = None
        if blocks.count == 1 and blocks.size <= INVERTED:
            inverse, info = torch.linalg.inv_ex(matrix[0])
            self._inverse = torch.where(info == 0, inverse, torch.nan).mT  # of a singular one the result is undefined
        else:
            self._lu, self._pivots, _ = torch.linalg.lu_factor_ex(matrix)

    def solve(self, b: Tensor, *, transposed: bool = False) -> Tensor:
        """x, for a state b; transposed: by the transposed matrices."""
        rows = self.blocks.split(b)
        if self._inverse is not None:
            return self.blocks.join(rows @ (self._inverse.mT if transposed else self._inverse))
        x = torch.linalg.lu_solve(self._lu, self._pivots, rows[..., None], adjoint=transposed)
        return self.blocks.join(x[..., 0])
