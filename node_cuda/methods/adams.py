"""Steps of the Adams methods: the explicit method of Bashforth, and the implicit corrector of Moulton.

The coefficients are integrals of Lagrange polynomials (Hairer, Norsett and Wanner, Solving ODEs I, III.1). They are
exact on a uniform grid; elsewhere they are computed from the actual distances of the grid points. The 3/8 rule, of
order 4, takes the first steps.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from node_cuda._torch_modes import refuse_batched
from node_cuda._typing import Row
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.stage_times import Interval
from node_cuda.methods.explicit_rk import ExplicitRK
from node_cuda.methods.step import ProposedStep, Quadrature, Span, Step
from node_cuda.methods.tableau import Number
from node_cuda.methods.tableaus import TABLEAUS
from node_cuda.options import AdamsOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import InvalidInput, users_level

MIN_ORDER, MAX_ORDER = 4, 12


@lru_cache(maxsize=256)
def adams_weights(nodes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the integrals over [0, 1] of the Lagrange polynomials of these nodes.

    Nodes 0, -1, ..., 1 - q give Adams-Bashforth of order q; 1, 0, ..., 2 - q give Adams-Moulton of order q. The result
    is exact for integer nodes. Nodes may also be floats or 0-d tensors.
    """
    weights = []
    on_tape = any(isinstance(node, Tensor) for node in nodes)  # tensors cannot be mixed with fractions
    for i, node in enumerate(nodes):
        coefficients: list[Any] = [
            1.0 if on_tape else Fraction(1)
        ]  # ascending powers of prod_j (x - x_j) / (x_i - x_j)
        for j, other in enumerate(nodes):
            if j != i:
                shifted = [0 * coefficients[0], *coefficients]
                scaled = [-other * c for c in coefficients] + [0 * coefficients[0]]
                coefficients = [(a + b) / (node - other) for a, b in zip(shifted, scaled, strict=True)]
        weights.append(sum(c / (power + 1) for power, c in enumerate(coefficients)))
    return tuple(weights)


@dataclass(slots=True)
class Slope:
    """The field at an earlier grid point, and the integrands of the quadrature there."""

    t: float
    f: Tensor
    integrands: Sequence[Tensor | None]
    span: Span | None


class Adams:
    """Adams-Bashforth steps; with implicit=True Adams-Bashforth-Moulton steps, iterated until the tolerance is met.

    The method uses more past slopes with each step, up to its order. The explicit method has order 4 unless max_order
    is larger: beyond 4 the stability interval shrinks so fast that finer grids make the error larger. The implicit
    method has an order of up to 12; its accuracy is limited by the first steps, which have order 4.
    """

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        options: AdamsOptions,
        stats: Stats,
        *,
        implicit: bool,
        quadrature: Quadrature | None = None,
    ) -> None:
        default = MAX_ORDER if implicit else MIN_ORDER
        order = default if options.max_order is None else int(options.max_order)
        if order > MAX_ORDER:
            raise InvalidInput(f'options["max_order"] must be at most {MAX_ORDER}; got {order}.')
        if order < MIN_ORDER:
            warnings.warn(f"max_order is below {MIN_ORDER}, so the solver reduces to `rk4`.", stacklevel=users_level())
        self.problem = problem
        self.arithmetic = arithmetic
        self.stats = stats
        self.implicit = implicit
        self.order = order
        self.max_iters = options.max_iters
        self.inside = options.perturb
        self.quadrature = quadrature
        self.starter = ExplicitRK(
            problem, arithmetic, TABLEAUS["rk4"], estimate=False, inside=options.perturb, quadrature=quadrature
        )
        # An implicit formula of order q needs q - 1 past slopes, an explicit one q.
        self._slopes: collections.deque[Slope] = collections.deque(maxlen=max(order - implicit, 1))

    def first(self, t0: float, y0: Tensor, span: Span | None, inside: bool) -> Tensor | None:
        """Return None: every step evaluates the field at its start."""
        return None

    def carry(self, step: Step) -> Tensor | None:
        """Return None: every step evaluates the field at its start."""
        return None

    def slope_at_end(self, step: Step) -> Tensor:
        """Return f(t1, y1), for interpolation."""
        return self.starter.slope_at_end(step)

    def attempt(self, t0: float, move: ProposedStep, y0: Tensor, k1: Tensor | None) -> Step:
        """Take a step from (t0, y0)."""
        f0 = self.starter.slope_at_start(t0, move.span, y0)
        integrands = self.quadrature.take() if self.quadrature is not None else ()
        # Copy the slope: it is kept after its step, and func may write into the same buffer again.
        self._slopes.appendleft(
            Slope(t0, f0 if self.problem.field.copies_output else f0.clone(), integrands, move.span)
        )
        if len(self._slopes) < MIN_ORDER - self.implicit or self.order < MIN_ORDER:
            return self.starter.attempt(t0, move, y0, f0)
        slopes = list(self._slopes)
        at = self.starter.interval(t0, move)
        past = tuple(_node(slope, slopes[0], at) for slope in slopes)
        row = _row(past)
        y1 = self.arithmetic.combine(y0, [slope.f for slope in slopes], row, at.dt)
        last: Sequence[Tensor | None] | None = None
        if self.implicit:
            row = _row((1, *past))
            y1, last = self._correct(y0, y1, slopes, row, at, move.span)
        if self.quadrature is not None:
            self.quadrature.begin()
            integrands = [slope.integrands for slope in slopes]
            for i, weight in row:
                of_node = (integrands if last is None else [last, *integrands])[i]
                self.quadrature.add(of_node, float(weight), 0.0, at)
        return Step(at, y0, y1, [f0], span=move.span)

    def _correct(
        self, y0: Tensor, y1: Tensor, slopes: Sequence[Slope], row: Row, at: Interval, span: Span | None
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Iterate y1 = y0 + h (beta_0 f(t1, y1) + known) from the predicted y1; return y1 and the integrands there."""
        (_, beta), *known = row
        combine = self.arithmetic.combine
        # y0 is added last, so that only one rounding error has the size of y0.
        past = combine(torch.zeros_like(y0), [slope.f for slope in slopes], [(j - 1, w) for j, w in known], 1.0)
        integrands: Sequence[Tensor | None] = ()
        for _ in range(self.max_iters):
            if self.quadrature is not None:
                self.quadrature.wants(True)
            f1 = self.starter.slope_at(at, span, y1, inside=self.inside)
            integrands = self.quadrature.take() if self.quadrature is not None else ()
            previous, y1 = y1, combine(y0, [f1, past], [(0, beta), (1, 1.0)], at.dt)
            if self._converged(y0, previous, y1):
                return y1, integrands
        warnings.warn("Functional iteration did not converge. Solution may be incorrect.", stacklevel=users_level())
        self._slopes.pop()
        return y1, integrands

    def _converged(self, y0: Tensor, previous: Tensor, y1: Tensor) -> bool:
        """Return whether every element of the increment changed by less than atol + rtol |increment|. One host read."""
        self.stats.host_reads += 1
        refuse_batched(y0, y1)
        with torch.no_grad():
            a, b = previous - y0, y1 - y0
            scale = self.problem.norm.scale(torch.maximum(a.abs(), b.abs()))
            return bool(((a - b).abs() < scale).all())


def _node(slope: Slope, newest: Slope, at: Interval) -> Number | Tensor:
    """Return (t - t0) / h of a slope: an integer on a uniform grid (up to rounding), a tensor where autograd records
    it."""
    if slope.span is not None and newest.span is not None and isinstance(at.dt, Tensor):
        return (slope.span[0] - newest.span[0]).to(at.dt) / at.dt
    x = (slope.t - newest.t) / at.h
    return round(x) if abs(x - round(x)) < 1e-6 else x


def _row(nodes: tuple[Number | Tensor, ...]) -> Row:
    """Return the Adams weights of the slopes at these nodes; nodes count in steps from the start of the step."""
    if any(isinstance(node, Tensor) for node in nodes):
        return list(enumerate(adams_weights.__wrapped__(nodes)))
    return [(j, float(w)) for j, w in enumerate(adams_weights(nodes))]
