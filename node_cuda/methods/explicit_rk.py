"""One step of an explicit Runge-Kutta method, computed from its tableau.

z_i = y0 + h sum_j a_ij k_j,  k_i = f(t0 + c_i h, z_i),  y1 = y0 + h sum_i b_i k_i.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from node_cuda.kernels import reference
from node_cuda.kernels.arithmetic import Arithmetic, Stage
from node_cuda.kernels.stage_times import HERE, JUST_AFTER, Interval
from node_cuda.methods.evaluations import Evaluations
from node_cuda.methods.step import ProposedStep, Quadrature, Span, Step
from node_cuda.methods.tableau import Tableau
from node_cuda.problem.field import share_memory
from node_cuda.problem.problem import Problem


class ExplicitRK(Evaluations):
    """Steps of the method `tableau` for `problem`.

    estimate: also compute the error estimate. inside: evaluate the stages at the two ends of a step one rounding inside
    the step, so that a field with a discontinuity there is never evaluated on the other side. Adaptive methods always
    do this. compensated: y is summed over the steps with compensation.
    """

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        tableau: Tableau,
        *,
        estimate: bool,
        inside: bool = False,
        quadrature: Quadrature | None = None,
        compensated: bool = False,
    ) -> None:
        super().__init__(problem, arithmetic, inside=inside or estimate)
        self.tableau = tableau
        self.quadrature = quadrature
        self.compensated = compensated
        self._end: tuple[Tensor, Tensor | None] | None = None  # y1 of the last accepted step, and what it lost
        self._b = tableau.weights
        self._e = tuple(float(e) for e in tableau.b_err) if estimate and tableau.b_err else (0.0,) * tableau.stages
        # For an FSAL method the argument of the last stage is y1 itself.
        self._known = tableau.stages - tableau.fsal
        self._nodes = tableau.nodes[1:]
        self._stages = self.prepared(self._nodes[: self._known - 1], tableau.rows[1 : self._known])
        err_row = tableau.err_row if estimate else None
        partial = None if err_row is None else tuple((j, e) for j, e in err_row if j < self._known)
        self._last = arithmetic.last_stage(tableau.b_row, partial, 1.0, self.end)
        self.integrands: Sequence[Tensor | None] = ()  # of the last evaluation
        self.first_integrands: Sequence[Tensor | None] = ()  # of k1, which is kept after a rejected step

    def first(self, t0: float, y0: Tensor, span: Span | None, inside: bool) -> Tensor | None:
        """Return f(t0, y0) for adaptive methods, else None. inside: evaluate just after t0."""
        if not self.tableau.adaptive:
            return None
        return self._evaluate(0, self.start_time(t0, span, inside), y0)

    def attempt(self, t0: float, move: ProposedStep, y0: Tensor, k1: Tensor | None) -> Step:
        """Take a step from (t0, y0)."""
        if k1 is None:
            k1 = self.slope_at_start(t0, move.span, y0)
        step = self.attempt_at(self.interval(t0, move), y0, k1, move.span)
        if not self.field.copies_output and share_memory(step.k):
            # func returned a buffer that held an earlier stage: repeat the step with copies.
            self.field.copies_output = True
            return self.attempt(t0, move, y0, None)
        return step

    def attempt_at(self, at: Interval, y0: Tensor, k1: Tensor, span: Span | None = None) -> Step:
        """Take a step over this interval. The host need not know its times."""
        arithmetic, fsal, summed = self.arithmetic, self.tableau.fsal, self.quadrature is not None
        if self.quadrature is not None:
            self.quadrature.begin()
            self.integrands = self.first_integrands
            self._add(0, at)
        k = [k1]
        times = self.slots(at, self._nodes, span)
        for i, stage in enumerate(self._stages, start=1):
            t = times[i - 1]
            z = arithmetic.rk_stage(stage, at, y0, k, t)
            k.append(self._summed(i, t, z, at) if summed else self.f(t, z))
        y1, error = arithmetic.rk_finish(self._last, at, y0, k, times[-1] if fsal else None)
        last = lost = None
        if self.compensated:
            y1, lost = reference.compensated(y0, k, self._last.row, at.dt, self._lost_before(y0))
        if fsal:
            k.append(self._summed(self._known, times[-1], y1, at) if summed else self.f(times[-1], y1))
            last = (k[-1], self._e[-1]) if self._e[-1] else None
        return Step(at, y0, y1, k, error, last, span, lost=lost)

    def carry(self, step: Step) -> Tensor | None:
        """Return k1 of the next step, or None if it must be evaluated.

        It is the last stage of this step where the tableau says so, and f(t1, y1) just after a discontinuity.
        """
        self._end = step.y1, step.lost
        if not self.tableau.adaptive:
            return None
        if step.jump:
            return self._evaluate(0, self.start_time(step.t1, None, inside=True), step.y1)
        if self.tableau.carry_last_stage:
            self.first_integrands = self.integrands
            return step.k[-1]
        return None

    def slope_at_start(self, t0: float, span: Span | None, y0: Tensor) -> Tensor:
        """Return f(t0, y0), the first stage of a step."""
        return self._evaluate(0, self.start_time(t0, span, self.inside), y0)

    def slope_at_beginning(self, at: Interval, y0: Tensor, *, inside: bool | None = None) -> Tensor:
        """Return f(t0, y0) for a step whose times the host need not know.

        inside: evaluate just after t0; by default as the other stages.
        """
        (t,) = self.arithmetic.times(at, (0.0,), JUST_AFTER if (self.inside if inside is None else inside) else HERE)
        return self._evaluate(0, t, y0)

    def extra_stages(self, step: Step, stages: Sequence[Stage]) -> list[Tensor]:
        """Return the stages of the step followed by these extra stages, which dense output needs."""
        k = list(step.k)
        for t, stage in zip(self.slots(step.at, [s.node for s in stages], step.span), stages, strict=True):
            k.append(self.f(t, self.arithmetic.rk_stage(stage, step.at, step.y0, k, t)))
        return k

    def _evaluate(self, i: int, t: Tensor, z: Tensor) -> Tensor:
        """Evaluate stage i, and fetch its integrands."""
        if self.quadrature is None:
            return self.f(t, z)
        next_k1 = self.tableau.carry_last_stage and i == self.tableau.stages - 1
        self.quadrature.wants(bool(self._b[i] or self._e[i] or (next_k1 and (self._b[0] or self._e[0]))))
        k = self.f(t, z)
        self.integrands = self.quadrature.take()
        if i == 0:
            self.first_integrands = self.integrands
        return k

    def _summed(self, i: int, t: Tensor, z: Tensor, at: Interval) -> Tensor:
        """Stage i, whose integrands are added to the quadrature."""
        k = self._evaluate(i, t, z)
        self._add(i, at)
        return k

    def _lost_before(self, y0: Tensor) -> Tensor:
        """Return what the step that ended at y0 lost, or zeros if y0 is not the end of a step."""
        end, lost = self._end or (None, None)
        return lost if end is y0 and lost is not None else reference.nothing_lost(y0)

    def _add(self, i: int, at: Interval) -> None:
        """Add stage i to the quadrature with its weights."""
        if self.quadrature is not None and (self._b[i] or self._e[i]):
            self.quadrature.add(self.integrands, self._b[i], self._e[i], at)
