"""Outputs inside a step: y(t0 + x h) = y0 + P(x) (y1 - y0) + dt sum_j B_j(x) k_j, 0 <= x <= 1.

`prepare` is called once for a step with outputs and returns the slopes, for which it may evaluate the field. The
outputs are then computed from these slopes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from node_cuda._torch_modes import forward_mode
from node_cuda.kernels.arithmetic import Arithmetic, Polynomials
from node_cuda.kernels.arithmetic import position as place
from node_cuda.methods.explicit_rk import ExplicitRK
from node_cuda.methods.implicit.steps import ImplicitSteps
from node_cuda.methods.implicit.tableau import weight_rows
from node_cuda.methods.step import Step, Stepper
from node_cuda.methods.tableau import DenseOutput, Tableau
from node_cuda.status import InvalidInput

# Cubic Hermite: 3 x^2 - 2 x^3 for y1 - y0, x - 2 x^2 + x^3 and x^3 - x^2 for the slopes at the ends.
HERMITE = ((0, (1.0, -2.0, 1.0)), (1, (0.0, -1.0, 1.0)))
HERMITE_END = (0.0, 3.0, -2.0)


class Interpolant:
    """y inside a step: prepared polynomials, applied to the slopes that `slopes` returns for the step."""

    def __init__(
        self, arithmetic: Arithmetic, polynomials: Polynomials, slopes: Callable[[Step], list[Tensor]]
    ) -> None:
        self._arithmetic = arithmetic
        self._polynomials = polynomials
        self.prepare = slopes

    def evaluate(self, step: Step, k: Sequence[Tensor], x: float | Tensor) -> Tensor:
        """Return y at t0 + x h; x is a 0-d tensor where autograd records it."""
        return self._arithmetic.dense_eval(self._polynomials, step.at, step.y0, step.y1, k, x)

    def outputs(self, step: Step, k: Sequence[Tensor], first: int, out: Tensor) -> None:
        """Write the outputs from index `first` on, which all lie in this step, into the rows of `out`; without
        autograd."""
        self._arithmetic.dense_outputs(self._polynomials, step.at, step.y0, step.y1, k, first, out)


def dense_of(tableau: Tableau, dense: str) -> DenseOutput:
    """Return the interpolant of an adaptive method: that of torchdiffeq, or with dense="accurate" one of the method's
    order.

    The accurate one is the default where it costs no evaluation.
    """
    accurate = tableau.accurate
    torchdiffeqs = dense == "torchdiffeq" or (dense == "default" and accurate is not None and accurate.extra > 0)
    chosen = tableau.dense if accurate is None or torchdiffeqs else accurate
    if chosen is None:
        raise InvalidInput(f"method {tableau.name!r} has an embedded error but no interpolant; give it `dense`.")
    return chosen


def of_method(stepper: ExplicitRK, tableau: Tableau, dense: str) -> Interpolant:
    """Return the interpolant that the polynomials of an adaptive method define."""
    chosen = dense_of(tableau, dense)
    polynomials = stepper.arithmetic.polynomials(chosen.weight_rows)
    return Interpolant(stepper.arithmetic, polynomials, _slopes_of(stepper, chosen))


def of_implicit(stepper: ImplicitSteps, *, chord: bool = False) -> Interpolant:
    """Return the interpolant over the stages of an implicit method, which costs no evaluation. chord: the linear
    one."""
    if chord:
        return linear(stepper.arithmetic)
    polynomials = stepper.arithmetic.polynomials(weight_rows(stepper.tableau))
    return Interpolant(stepper.arithmetic, polynomials, lambda step: step.k)


def _slopes_of(stepper: ExplicitRK, dense: DenseOutput) -> Callable[[Step], list[Tensor]]:
    """Return the stages of the step followed by the extra stages of the interpolant."""
    if not dense.extra:
        return lambda step: step.k
    extra = stepper.prepared(dense.nodes, dense.rows)
    return lambda step: stepper.extra_stages(step, extra)


def linear(arithmetic: Arithmetic) -> Interpolant:
    """Return the linear interpolant, y0 + x (y1 - y0)."""
    return Interpolant(arithmetic, arithmetic.polynomials((), (1.0,)), lambda step: [])


def cubic_hermite(arithmetic: Arithmetic, stepper: Stepper) -> Interpolant:
    """Return the cubic through y0 and y1 with the slopes at both ends.

    It costs one evaluation in each step with outputs.
    """

    def slopes(step: Step) -> list[Tensor]:
        # Copy the first slope, because func may write into its buffer again.
        return [step.k[0].clone(), stepper.slope_at_end(step)]

    return Interpolant(arithmetic, arithmetic.polynomials(HERMITE, HERMITE_END), slopes)


def position(step: Step, s: float, direction: float, t: Tensor | None = None) -> float | Tensor:
    """Return x in [0, 1] of the solver time s in a step. t is the same time of the user.

    The result is a 0-d tensor if autograd records t or the ends of the step.
    """
    if t is None and not (step.span is not None and (torch.is_grad_enabled() or forward_mode())):
        return place(step.at, s)
    if t is None:
        # Autograd records the ends of the step, and the output time stays fixed.
        t = torch.tensor(direction * s, dtype=torch.float64, device="cpu")
    # Computed on the host, because some devices have no double precision.
    ends = torch.tensor([direction * step.t0, direction * step.t1], dtype=t.dtype, device="cpu")
    start, stop = ends if step.span is None else (end.cpu() for end in step.span)
    return ((t.cpu() - start) / (stop - start)).to(step.y0.device, step.y0.dtype.to_real())
