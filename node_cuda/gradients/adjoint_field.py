"""What the backward solve integrates: the field of (y, a), and the parameters' gradient beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from node_cuda.kernels import reference as kernels
from node_cuda.norms import ErrorNorm
from node_cuda.problem import Problem


class AdjointField:
    """The field of the flat state z = [y, a]: (f, -a^T df/dy), and a^T df/dtheta as the quadrature's integrands."""

    def __init__(self, problem: Problem, params: Sequence[Tensor]) -> None:
        self.field = problem.field
        self.params = tuple(params)
        self.shape = problem.y0.shape
        self.nfe = 0
        self.copies_output = True
        self.integrands: Sequence[Tensor] = ()
        self._with_params = True
        self._zeros: list[Tensor | None] = [None] * len(self.params)

    def wants(self, needed: bool) -> None:
        """Does the next evaluation need the parameters' vjp?"""
        self._with_params = needed and bool(self.params)

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        """dz/dt at z; one evaluation of f and one vjp."""
        self.nfe += 1
        y, a = (part.view(self.shape) for part in z.chunk(2))
        params = self.params if self._with_params else ()
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            f = self.field(t, y)
            if f.requires_grad:
                vjp_y, *vjps = torch.autograd.grad(f, (y, *params), a, allow_unused=True)
            else:
                vjp_y, vjps = None, [None] * len(params)
        self.integrands = [self._zero(i) if g is None else g for i, g in enumerate(vjps)]
        vjp_y = torch.zeros_like(y) if vjp_y is None else vjp_y
        return torch.cat([f.detach().reshape(-1), vjp_y.reshape(-1).neg()])

    def f_alone(self, t: Tensor, y: Tensor) -> Tensor:
        """f(t, y) without a vjp."""
        self.nfe += 1
        return self.field(t, y)

    def _zero(self, i: int) -> Tensor:
        zero = self._zeros[i]
        if zero is None:
            zero = self._zeros[i] = torch.zeros_like(self.params[i])
        return zero


class ParameterGradient:
    """dL/dtheta = int a^T df/dtheta dt by the weights of the method that steps (y, a): it never enters a stage.

    total: what accepted steps gave. Half and bfloat16 parameters accumulate in float32.
    """

    def __init__(self, field: AdjointField, norm: ErrorNorm, *, in_norm: bool) -> None:
        self.field = field
        self.norm = norm
        self.in_norm = in_norm
        self.dtypes = [torch.promote_types(p.dtype, torch.float32) for p in field.params]
        self.total = [torch.zeros_like(p, dtype=d) for p, d in zip(field.params, self.dtypes, strict=True)]
        self._sum: list[Tensor] = []
        self._error: list[Tensor] = []
        self._next: list[Tensor] | None = None

    def begin(self) -> None:
        """See `Quadrature`."""
        self._sum, self._error = [], []

    def wants(self, needed: bool) -> None:
        """See `Quadrature`."""
        self.field.wants(needed)

    def take(self) -> Sequence[Tensor]:
        """See `Quadrature`."""
        return self.field.integrands

    def add(self, integrands: Sequence[Tensor], weight: float, error_weight: float) -> None:
        """See `Quadrature`. The minus turns the integral from t1 down to t0 into the one from t0 up to t1."""
        if weight:
            self._sum = kernels.accumulate(self._sum, integrands, -weight, self.dtypes)
        if error_weight and self.in_norm:
            self._error = kernels.accumulate(self._error, integrands, -error_weight, self.dtypes)

    def scaled_errors(self) -> list[Tensor]:
        """The errors of the step that was just tried, for the norm."""
        self._next = None
        if not (self.in_norm and self._error and self._sum):
            return []
        self._next = list(torch._foreach_add(self.total, self._sum))
        return kernels.scaled_sums(self._error, self.total, self._next, self.norm)

    def commit(self) -> None:
        """The step was accepted."""
        if self._next is not None:
            self.total = self._next
        elif self._sum:
            torch._foreach_add_(self.total, self._sum)

    def gradients(self) -> list[Tensor]:
        """In the parameters' own dtypes."""
        return [g.to(p.dtype) for g, p in zip(self.total, self.field.params, strict=True)]
