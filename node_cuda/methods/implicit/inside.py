"""Estimates the error between the ends of a step from the residual of the dense output.

A stiff component is exact at the ends of a step of any size. So the embedded estimate lets steps grow until the
polynomial between the ends is far off. In a step that contains an output, the residual r = p' - f(p) is computed at one
place. (I - h gamma J)^-1 h gamma r is about the error of p there, for stiff components and for others.
"""

from __future__ import annotations

import bisect

import torch
from torch import Tensor

from node_cuda.kernels.stage_times import Interval
from node_cuda.methods.evaluations import Evaluations
from node_cuda.methods.implicit.linear import Factorised
from node_cuda.methods.implicit.tableau import Implicit, slope_row, weight_rows
from node_cuda.methods.step import Step

PLACE = 0.75
"""The place of the residual. In the middle the residual of a Hermite polynomial vanishes by symmetry."""


class InsideError:
    """Adds the error inside a step to its error estimate.

    everywhere: outputs may be needed in any step, at times that are not known yet (events, dense output).
    """

    def __init__(self, stepper: Evaluations, tableau: Implicit, *, everywhere: bool) -> None:
        self.stepper = stepper
        self.everywhere = everywhere
        self._polynomials = stepper.arithmetic.polynomials(weight_rows(tableau))
        self._slopes = slope_row(tableau, PLACE)

    def added(self, error: Tensor, step: Step, matrix: Factorised, weight: float) -> Tensor:
        """Return the larger of a step's error and of the error inside, for each element. weight: h gamma, or h if
        `matrix` contains 1 / gamma."""
        at = step.at
        if not (self.everywhere or self._holds_output(at)):
            return error
        arithmetic = self.stepper.arithmetic
        with torch.no_grad():
            (t,) = arithmetic.times(at, (PLACE,), self.stepper.end)
            y = arithmetic.dense_eval(self._polynomials, at, step.y0, step.y1, step.k, PLACE)
            inside = matrix.solve(arithmetic.combine(self.stepper.f(t, y), step.k, self._slopes, -1.0))
            return torch.maximum(error.abs(), inside.abs().mul_(abs(weight))).to(error.dtype)

    def _holds_output(self, at: Interval) -> bool:
        """Return whether an output lies strictly between the ends of the step."""
        times = self.stepper.arithmetic.output_times
        i = bisect.bisect_right(times, at.t0)
        return i < len(times) and times[i] < at.t1
