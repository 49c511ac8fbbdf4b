"""One step of an explicit Runge-Kutta method, from its tableau.

z_i = y0 + h sum_j a_ij k_j,  k_i = f(t0 + c_i h, z_i),  y1 = y0 + h sum_i b_i k_i.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from node_cuda._typing import Row
from node_cuda.field import share_memory
from node_cuda.kernels import reference as kernels
from node_cuda.problem import Problem
from node_cuda.steppers.step import Clock, Move, Quadrature, Span, Step
from node_cuda.tableau import Tableau


class ExplicitRK:
    """Steps of the method `tableau` for `problem`.

    estimate: also compute the error estimate. inside: evaluate stages at the ends of a step on the step's own side,
    one rounding away, so that a field that is discontinuous there is never asked on the other side; adaptive methods
    always do.
    """

    def __init__(
        self,
        problem: Problem,
        tableau: Tableau,
        *,
        estimate: bool,
        inside: bool = False,
        quadrature: Quadrature | None = None,
    ) -> None:
        self.field = problem.field
        self.clock = Clock(problem.direction, problem.time_dtype, problem.y0.device)
        self.tableau = tableau
        self.estimate = estimate
        self.inside = inside or estimate
        self.quadrature = quadrature
        self._b = tuple(float(b) for b in tableau.b)
        self._e = tuple(float(e) for e in tableau.b_err) if estimate and tableau.b_err else (0.0,) * tableau.stages
        self._err_row = tableau.err_row if estimate else None
        self._integrands: Sequence[Tensor] = ()  # of the last evaluation
        self._first_integrands: Sequence[Tensor] = ()  # of k1, which outlives a rejected step

    def first(self, t0: float, y0: Tensor, span: Span | None, inside: bool) -> Tensor | None:
        """f(t0, y0), for methods whose steps hand it on; inside: just after t0."""
        if not self.tableau.adaptive:
            return None
        return self._evaluate(0, self._start_time(t0, span, inside), y0)

    def attempt(self, t0: float, move: Move, y0: Tensor, k1: Tensor | None) -> Step:
        """A step from (t0, y0)."""
        tableau, span = self.tableau, move.span
        dt, signed = self.signed_step(move), self.clock.direction * move.h
        if k1 is None:
            k1 = self.slope_at_start(t0, span, y0)
        if self.quadrature is not None:
            self.quadrature.begin()
            self._integrands = self._first_integrands
            self._add(0, signed)
        k = [k1]
        times = self._times_at(tableau.nodes[1:], t0, move, self.inside)
        # With FSAL the last stage's argument is y1 itself.
        for i in range(1, tableau.stages - tableau.fsal):
            k.append(self._evaluate(i, times[i - 1], kernels.rk_stage(y0, k, tableau.rows[i], dt)))
            self._add(i, signed)
        y1, error = kernels.rk_finish(y0, k, tableau.b_row, self._err_row, dt)
        last = None
        if tableau.fsal:
            k.append(self._evaluate(tableau.stages - 1, times[-1], y1))
            self._add(tableau.stages - 1, signed)
            last = (k[-1], signed * self._e[-1]) if self._e[-1] else None
        if not self.field.copies_output and share_memory(k):
            # func returned a buffer that held an earlier stage: take the step again, on copies.
            self.field.copies_output = True
            return self.attempt(t0, move, y0, None)
        return Step(t0, move.t1, move.h, dt, y0, y1, k, error, last, span)

    def carry(self, step: Step) -> Tensor | None:
        """The next step's k1: the last stage where the method says so, f(t1, y1) beyond a jump, None to evaluate it."""
        if not self.tableau.adaptive:
            return None
        if step.jump:
            return self._evaluate(0, self._start_time(step.t1, None, inside=True), step.y1)
        if self.tableau.carry_last_stage:
            self._first_integrands = self._integrands
            return step.k[-1]
        return None

    def signed_step(self, move: Move) -> float | Tensor:
        """The step in the user's time, a 0-d tensor where the tape must see it."""
        if move.span is None:
            return self.clock.direction * move.h
        return (move.span[1] - move.span[0]).to(self.clock.device, self.clock.dtype)

    def slope_at_start(self, t0: float, span: Span | None, y0: Tensor) -> Tensor:
        """f(t0, y0), as the first stage of a step."""
        return self._evaluate(0, self._start_time(t0, span, self.inside), y0)

    def slope_at(self, t0: float, move: Move, y1: Tensor, inside: bool) -> Tensor:
        """f(t1, y1) at the end of a step from t0; inside: on the step's own side."""
        return self.field(self._times_at([1.0], t0, move, inside)[0], y1)

    def slope_at_end(self, step: Step) -> Tensor:
        """f(t1, y1), for interpolation."""
        return self.slope_at(step.t0, Move(step.t1, step.h, step.span), step.y1, inside=False)

    def extra_stages(self, step: Step, nodes: Sequence[float], rows: Sequence[Row]) -> list[Tensor]:
        """The step's stages, and further ones at t0 + c h with rows over all before them (for dense output)."""
        k = list(step.k)
        times = self._times_at(nodes, step.t0, Move(step.t1, step.h, step.span), self.inside)
        for t, row in zip(times, rows, strict=True):
            k.append(self.field(t, kernels.rk_stage(step.y0, k, row, step.dt)))
        return k

    def _evaluate(self, i: int, t: Tensor, z: Tensor) -> Tensor:
        """Stage i, and its integrands."""
        if self.quadrature is None:
            return self.field(t, z)
        next_k1 = self.tableau.carry_last_stage and i == self.tableau.stages - 1
        self.quadrature.wants(bool(self._b[i] or self._e[i] or (next_k1 and (self._b[0] or self._e[0]))))
        k = self.field(t, z)
        self._integrands = self.quadrature.take()
        if i == 0:
            self._first_integrands = self._integrands
        return k

    def _add(self, i: int, dt: float) -> None:
        """Give stage i its weights in the quadrature."""
        if self.quadrature is not None and (self._b[i] or self._e[i]):
            self.quadrature.add(self._integrands, dt * self._b[i], dt * self._e[i])

    def _start_time(self, t0: float, span: Span | None, inside: bool) -> Tensor:
        start = self.clock.tensors([self.clock.after(t0) if inside else t0])[0]
        return start if span is None else _with_gradient_of(span[0], start)

    def _times_at(self, nodes: Sequence[float], t0: float, move: Move, inside: bool) -> tuple[Tensor, ...]:
        t1, h, span = move
        if not nodes:
            return ()
        end = self.clock.before(t1) if inside else t1
        times = self.clock.tensors([end if c == 1.0 else t0 + c * h for c in nodes])
        if span is None:
            return times
        start, stop = span
        return tuple(_with_gradient_of(start + c * (stop - start), t) for c, t in zip(nodes, times, strict=True))


def _with_gradient_of(source: Tensor, value: Tensor) -> Tensor:
    """`value` exactly, with the gradient of `source`."""
    source = source.to(value)
    return source + (value - source).detach()
