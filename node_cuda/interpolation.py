"""Outputs between the ends of a step: y(t0 + x h), 0 <= x <= 1.

An interpolant is asked once a step for what it needs (`prepare`, which may evaluate the field) and then for each
output (`evaluate`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from node_cuda.kernels import reference as kernels
from node_cuda.status import InvalidInput
from node_cuda.steppers.explicit_rk import ExplicitRK
from node_cuda.steppers.step import Step, Stepper
from node_cuda.tableau import DenseOutput, Tableau


class Interpolant(Protocol):
    """y inside a step."""

    def prepare(self, step: Step) -> list[Tensor]:
        """What `evaluate` needs beyond y0 and y1; called once for a step that holds an output."""
        ...

    def evaluate(self, step: Step, k: list[Tensor], x: float | Tensor, out: Tensor | None = None) -> Tensor:
        """y at t0 + x h; into `out` if given. x a 0-d tensor where the tape must see it."""
        ...


class Polynomial:
    """y0 + h sum_i B_i(x) k_i with the polynomials of a `DenseOutput`."""

    def __init__(self, stepper: ExplicitRK, dense: DenseOutput) -> None:
        self.stepper = stepper
        self.dense = dense

    def prepare(self, step: Step) -> list[Tensor]:
        """The stages, and the interpolant's extra ones."""
        return self.stepper.extra_stages(step, self.dense.nodes, self.dense.rows) if self.dense.extra else step.k

    def evaluate(self, step: Step, k: list[Tensor], x: float | Tensor, out: Tensor | None = None) -> Tensor:
        """See `Interpolant`."""
        row = []
        for i, weights in self.dense.weight_rows:
            value = 0.0
            for weight in reversed(weights):
                value = (value + weight) * x
            row.append((i, value))
        return kernels.dense_eval(step.y0, k, row, step.dt, out)


class Linear:
    """y0 + x (y1 - y0), exactly y0 and y1 at the ends."""

    def prepare(self, step: Step) -> list[Tensor]:
        """Nothing."""
        return []

    def evaluate(self, step: Step, k: list[Tensor], x: float | Tensor, out: Tensor | None = None) -> Tensor:
        """See `Interpolant`."""
        return kernels.combine(step.y0, [step.y1 - step.y0], [(0, 1.0)], x, out)


class CubicHermite:
    """The cubic through y0 and y1 with the field's slopes at both ends; costs one evaluation a step with outputs."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper

    def prepare(self, step: Step) -> list[Tensor]:
        """f0 and f1. A copy of f0, as func may write its buffer again."""
        return [step.k[0].clone(), self.stepper.slope_at_end(step)]

    def evaluate(self, step: Step, k: list[Tensor], x: float | Tensor, out: Tensor | None = None) -> Tensor:
        """See `Interpolant`."""
        h00 = x * x * (3 - 2 * x)
        f0, f1 = x * (1 - x) * (1 - x), x * x * (x - 1)
        ends = kernels.combine(step.y0, [step.y1 - step.y0], [(0, 1.0)], h00)
        return kernels.combine(ends, k, [(0, f0), (1, f1)], step.dt, out)


def default_interpolant(stepper: ExplicitRK, tableau: Tableau, dense: str) -> Interpolant:
    """The interpolant of an adaptive method: its default one, or with dense="accurate" one of the method's order."""
    chosen = tableau.dense if dense == "default" or tableau.accurate is None else tableau.accurate
    if chosen is None:
        raise InvalidInput(f"method {tableau.name!r} has an embedded error but no interpolant; give it `dense`.")
    return Polynomial(stepper, chosen)


def position(step: Step, s: float, direction: float, t: Tensor | None = None) -> float | Tensor:
    """x in [0, 1] of the solver time s in a step; a 0-d tensor if t, the same time as the user's, is on the tape."""
    if t is None and not (step.span is not None and torch.is_grad_enabled()):
        return min((s - step.t0) / (step.t1 - step.t0), 1.0)
    if t is None:
        # The ends of the step are on the tape, and the time asked for stays where it is.
        t = torch.tensor(direction * s, dtype=torch.float64, device=step.y0.device)
    start = step.span[0] if step.span is not None else torch.tensor(direction * step.t0, dtype=t.dtype, device=t.device)
    stop = step.span[1] if step.span is not None else torch.tensor(direction * step.t1, dtype=t.dtype, device=t.device)
    return ((t - start) / (stop - start)).to(step.y0.device, step.y0.dtype.to_real())
