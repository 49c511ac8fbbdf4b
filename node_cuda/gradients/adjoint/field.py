"""The field of (y, a) in the backward solve, and the quadrature of the parameters' gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from node_cuda._torch_modes import set_recording, vjp
from node_cuda.gradients.reached import UsedParameters
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.fused_sums import FusedGradientAccumulator, SavedIntegrands
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.stage_times import Interval
from node_cuda.problem.problem import Problem


class Rates:
    """f, -a^T df/dy, and a^T df/dtheta as the quadrature's integrands, from one evaluation of f and one vjp.

    problem: the forward problem. first: called with the first f and y.
    """

    def __init__(self, problem: Problem, params: Sequence[Tensor], reached: UsedParameters) -> None:
        self.field = problem.field
        self.params = tuple(params)
        self.reached = reached
        self.nfe = 0
        self.integrands: Sequence[Tensor | None] = ()
        self.first: Callable[[Tensor, Tensor], None] | None = None
        self._with_params = True

    def wants(self, needed: bool) -> None:
        """Set whether the next evaluation needs the parameters' vjp."""
        self._with_params = needed and bool(self.params)

    def vjp(self, t: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return f(t, y) and a^T df/dy, which is None if f does not depend on y. Sets `integrands`.

        f is the tensor that func returned, and no copy.
        """
        self.nfe += 1
        params, recorded = self.params if self._with_params else (), torch.is_grad_enabled()
        set_recording(True)
        try:
            y = y.detach().requires_grad_(True)
            f = self.field(t, y)
            if f.requires_grad:
                vjp_y, *self.integrands = vjp(f, (y, *params), a)
            else:
                vjp_y, self.integrands = None, [None] * len(params)
        finally:
            set_recording(recorded)
        if params:
            self.reached.see(self.integrands)
        if self.first is not None:
            first, self.first = self.first, None
            first(f.detach(), y.detach())
        return f.detach(), vjp_y

    def f_alone(self, t: Tensor, y: Tensor) -> Tensor:
        """Return f(t, y), without a vjp."""
        self.nfe += 1
        return self.field(t, y)


class AdjointField(Rates):
    """The field of the flat state z = [y, a]. arithmetic: that of the backward solve."""

    def __init__(
        self, problem: Problem, arithmetic: Arithmetic, params: Sequence[Tensor], reached: UsedParameters
    ) -> None:
        super().__init__(problem, params, reached)
        self.arithmetic = arithmetic
        self.shape = problem.y0.shape
        self.copies_output = True

    def __call__(self, t: Tensor, z: Tensor, *, spare: bool = False, kept: bool = True) -> Tensor:
        """Return dz/dt at z."""
        y, a = (part.view(self.shape) for part in z.chunk(2))
        f, vjp_y = self.vjp(t, y, a)
        return self.arithmetic.pack_adjoint(f, vjp_y)


class ParameterGradient:
    """dL/dtheta = int a^T df/dtheta dt, by the weights of the method that steps (y, a). No stage depends on it.

    norm: the norm of the parameters' errors. in_norm: these errors take part in the error norm.
    """

    def __init__(self, field: AdjointField, norm: ErrorNorm, *, in_norm: bool) -> None:
        self.field = field
        self.norm = norm
        self.sums = field.arithmetic.sums(field.params, with_error=in_norm)

    @property
    def total(self) -> list[Tensor]:
        """The sums over the accepted steps."""
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
        """Add weighted integrands to the sums of this step.

        The minus turns the integral from t1 down to t0 into the one from t0 up to t1.
        """
        if self.field.params:
            self.sums.add(integrands, -weight, -error_weight, at)

    def scaled_errors(self) -> list[Tensor]:
        return self.sums.scaled_errors(self.norm)

    def device_ratio(self) -> Tensor | None:
        return self.sums.device_ratio(self.norm)

    def commit(self) -> None:
        """Add the sums of the accepted step to the total."""
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
        """Return the gradients, in the parameters' dtypes.

        copies: return copies, which the caller may keep. Without them the next solve writes into the same memory.
        """
        return [g.to(p.dtype, copy=copies) for g, p in zip(self.total, self.field.params, strict=True)]
