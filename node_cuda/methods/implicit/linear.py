"""The linear systems of a step, factorised once for all samples and all iterations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from node_cuda.methods.implicit.blocks import Blocks
from node_cuda.methods.implicit.tableau import FullyImplicit

INVERTED = 8
"""The largest size of a single matrix that is inverted: a product is one call, a solution by its factors is four."""


class Matrices:
    """Matrices of shape (count, size, size). A singular one gives NaN or infinity."""

    def __init__(self, matrix: Tensor) -> None:
        self._inverse: Tensor | None = None
        if len(matrix) == 1 and matrix.shape[-1] <= INVERTED:
            inverse, info = torch.linalg.inv_ex(matrix[0])
            self._inverse = torch.where(info == 0, inverse, torch.nan).mT  # the result for a singular one is undefined
        else:
            self._lu, self._pivots, _ = torch.linalg.lu_factor_ex(matrix)

    @property
    def inverted(self) -> bool:
        """There is one matrix, and it was inverted."""
        return self._inverse is not None

    def solve(self, rows: Tensor, *, transposed: bool = False) -> Tensor:
        """Return x of shape (count, size); with `transposed`, by the transposed of real matrices. If the matrix was
        inverted, rows may be a vector."""
        if self._inverse is not None:
            inverse = self._inverse.mT if transposed else self._inverse
            return torch.mv(inverse.mT, rows) if rows.ndim == 1 else rows @ inverse
        return torch.linalg.lu_solve(self._lu, self._pivots, rows[..., None], adjoint=transposed)[..., 0]


class Factorised:
    """a I - s J for the Jacobian of each sample. Autograd records it where it records J or s."""

    def __init__(self, blocks: Blocks, jacobian: Tensor, a: float, s: float | Tensor) -> None:
        self.blocks = blocks
        matrix = jacobian * -s
        matrix.diagonal(dim1=-2, dim2=-1).add_(a)
        self._matrices = Matrices(matrix)

    def solve(self, b: Tensor, *, transposed: bool = False) -> Tensor:
        """Return x for a state b; with `transposed`, by the transposed matrices."""
        if self.blocks.vector and self._matrices.inverted:
            return self._matrices.solve(b, transposed=transposed)
        return self.blocks.join(self._matrices.solve(self.blocks.split(b), transposed=transposed))


class Part(NamedTuple):
    """An eigenvalue mu of A, the row of V^-1 that leads to its system, and the column of V that leads back."""

    mu: complex
    into: Tensor
    back: Tensor


def parted(tableau: FullyImplicit, dtype: torch.dtype, device: torch.device) -> list[Part]:
    """Return the parts of a method's A, one for each pair of conjugate eigenvalues. dtype: a real one."""
    a = torch.tensor([[float(x) for x in row] for row in tableau.a], dtype=torch.float64, device="cpu")
    values, vectors = torch.linalg.eig(a)
    inverse, parts = torch.linalg.inv(vectors), []
    for i, mu in enumerate(values.tolist()):
        into, back = inverse[i], vectors[:, i]
        if mu.imag == 0.0:
            parts.append(Part(mu.real, into.real.to(device, dtype), back.real.to(device, dtype)))
        elif mu.imag > 0.0:  # twice: the real part of the result is that of both
            parts.append(Part(mu, into.to(device, dtype.to_complex()), (2.0 * back).to(device, dtype.to_complex())))
    return parts


class Transformed:
    """I - h A x J, the system of all stages with one Jacobian, as systems of the size of one stage.

    A = V diag(mu) V^-1, so that each mu gives a system I - h mu J. Two conjugate mu give one complex system (Hairer and
    Wanner II, IV.8). parts: those of `parted`.
    """

    def __init__(self, blocks: Blocks, jacobian: Tensor, parts: Sequence[Part], h: float) -> None:
        self.blocks = blocks
        self._systems: list[tuple[Matrices, Tensor, Tensor]] = []
        for mu, into, back in parts:
            matrix = jacobian * (-h * mu)
            matrix.diagonal(dim1=-2, dim2=-1).add_(1.0)
            self._systems.append((Matrices(matrix), into, back))

    def solve(self, b: Tensor) -> Tensor:
        """Return x for the states b of all stages, of shape (stages, *state)."""
        rows = torch.stack([self.blocks.split(x) for x in b])
        found = torch.zeros_like(rows)
        for matrices, into, back in self._systems:
            w = matrices.solve(torch.tensordot(into, rows.to(into.dtype), 1))
            x = back[:, None, None] * w
            found += x.real if x.is_complex() else x
        return torch.stack([self.blocks.join(x) for x in found])


class Coupled:
    """The system of all stages with a Jacobian for each, in one matrix a sample: block i, j is I_ij - h a_ij J_i."""

    def __init__(self, blocks: Blocks, jacobians: Tensor, tableau: FullyImplicit, h: float) -> None:
        self.blocks = blocks
        a = torch.tensor([[float(x) for x in row] for row in tableau.a], dtype=jacobians.dtype, device=jacobians.device)
        size = tableau.stages * blocks.size
        matrix = torch.einsum("ij,ibkl->bikjl", a * -h, jacobians).reshape(blocks.count, size, size)
        matrix.diagonal(dim1=-2, dim2=-1).add_(1.0)
        self._matrices = Matrices(matrix)

    def solve(self, b: Tensor, *, transposed: bool = False) -> Tensor:
        """Return x for the states b of all stages, of shape (stages, *state)."""
        rows = torch.stack([self.blocks.split(x) for x in b], 1).flatten(1)
        found = self._matrices.solve(rows, transposed=transposed).view(self.blocks.count, len(b), -1)
        return torch.stack([self.blocks.join(x) for x in found.unbind(1)])
