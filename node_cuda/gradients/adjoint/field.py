"""What the backward solve integrates: the field of (y, a), and the parameters' gradient beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from node_cuda.gradients.reached import UsedParameters
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.fused_sums import FusedGradientAccumulator, SavedIntegrands
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.stage_times import Interval
from node_cuda.problem.problem import Problem


class AdjointField:
    """The field of the flat state z = [y, a]: (f, -a^T df/dy), and a^T df/dtheta as the quadrature's integrands.

    problem: the forward one. arithmetic: the backward solve's. first: told of f and y of the first evaluation.
    """

    def __init__(
        self, problem: Problem, arithmetic: Arithmetic, params: Sequence[Tensor], reached: UsedParameters
    ) -> None:
        self.field = problem.field
        self.arithmetic = arithmetic
        self.params = tuple(params)
        self.reached = reached
        self.shape = problem.y0.shape
        self.nfe = 0
        self.copies_output = True
        self.integrands: Sequence[Tensor | None] = ()
        self.first: Callable[[Tensor, Tensor], None] | None = None
        self._with_params = True

    def wants(self, needed: bool) -> None:
        """Does the next evaluation need the parameters' vjp?"""
        self._with_params = needed and bool(self.params)

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        """dz/dt at z; one evaluation of f and one vjp."""
        y, a = (part.view(self.shape) for part in z.chunk(2))
        f, vjp_y = self._vjp(t, y, a)
        return self.arithmetic.pack_adjoint(f, vjp_y)

    def rates(self, t: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """dy/dt and da/dt, apart. f is what func returned, without a copy."""
        f, vjp_y = self._vjp(t, y, a)
        return f, torch.zeros_like(f) if vjp_y is None else vjp_y.neg()

    def _vjp(self, t: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """f(t, y) and a^T df/dy (None: f does not depend on y); sets `integrands`."""
        self.nfe += 1
        params = self.params if self._with_params else ()
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            f = self.field(t, y)
            if f.requires_grad:
                vjp_y, *self.integrands = torch.autograd.grad(f, (y, *params), a, allow_unused=True)
            else:
                vjp_y, self.integrands = None, [None] * len(params)
        if params:
            self.reached.see(self.integrands)
        if self.first is not None:
            first, self.first = self.first, None
            first(f.detach(), y.detach())
        return f.detach(), vjp_y

    def f_alone(self, t: Tensor, y: Tensor) -> Tensor:
        """f(t, y) without a vjp."""
        self.nfe += 1
        return self.field(t, y)


class ParameterGradient:
    """dL/dtheta = int a^T df/dtheta dt by the weights of the method that steps (y, a): it never enters a stage.

    norm: that of the parameters' errors; in_norm: they take part in the error norm.
    """

    def __init__(self, field: AdjointField, norm: ErrorNorm, *, in_norm: bool) -> None:
        self.field = field
        self.norm = norm
        self.sums = field.arithmetic.sums(field.params, with_error=in_norm)

    @property
    def total(self) -> list[Tensor]:
        """What accepted steps gave."""
        return self.sums.total

    def begin(self) -> None:
        self.sums.begin()

    def wants(self, needed: bool) -> None:
        self.field.wants(needed)

    def take(self) -> Sequence[Tensor | None]:
        return self.field.integrands

    def add(
        self, integrands: Sequence[Tensor | None], weight: float, error_weight: float, at: Interval | None = None
    ) -> None:
        """See `Quadrature`. The minus turns the integral from t1 down to t0 into the one from t0 up to t1."""
        if self.field.params:
            self.sums.add(integrands, -weight, -error_weight, at)

    def scaled_errors(self) -> list[Tensor]:
        return self.sums.scaled_errors(self.norm)

    def device_ratio(self) -> Tensor | None:
        return self.sums.device_ratio(self.norm)

    def commit(self) -> None:
        """The step was accepted."""
        self.sums.commit()

    def restart(self) -> None:
        if self.field.params:
            self._on_device.restart()

    def keep(self, integrands: Sequence[Tensor | None]) -> SavedIntegrands:
        return self._on_device.keep(integrands) if self.field.params else SavedIntegrands()

    def keep_if_accepted(self, integrands: Sequence[Tensor | None], at: Interval) -> None:
        if self.field.params:
            self._on_device.keep_if_accepted(integrands, at)

    def commit_if_accepted(self, at: Interval) -> None:
        if self.field.params:
            self._on_device.commit_if_accepted(at)

    @property
    def _on_device(self) -> FusedGradientAccumulator:
        assert isinstance(self.sums, FusedGradientAccumulator)
        return self.sums

    def gradients(self, *, copies: bool = False) -> list[Tensor]:
        """In the parameters' own dtypes; copies: for the caller to keep, as the next solve writes the sums again."""
        return [g.to(p.dtype, copy=copies) for g, p in zip(self.total, self.field.params, strict=True)]
