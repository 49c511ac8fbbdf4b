"""One step of an ESDIRK method: a nonlinear system for each stage but the first, all with the same matrix.

The Jacobian is kept over steps while Newton's iterations contract well; the matrix I - h gamma J over the stages. On
the tape a stage is differentiated by the implicit function theorem at its solution, never through the iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from node_cuda._torch_modes import first_derivatives
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.stage_times import Interval
from node_cuda.methods.evaluations import Evaluations
from node_cuda.methods.implicit.blocks import Blocks
from node_cuda.methods.implicit.inside import InsideError
from node_cuda.methods.implicit.jacobian import Jacobian
from node_cuda.methods.implicit.linear import Factorised
from node_cuda.methods.implicit.newton import Newton
from node_cuda.methods.implicit.tableau import Esdirk
from node_cuda.methods.step import ProposedStep, Span, Step
from node_cuda.options import ImplicitOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats

SLOW = 0.03
"""A contraction rate from which on the Jacobian is computed anew for the next step."""
UNSOLVED = 20.0
"""The error, in units of the tolerances, of a step whose equations were not solved: at order 5 the next is half as
long."""


class EsdirkSteps(Evaluations):
    """Steps of the method `tableau` for `problem`. everywhere: see `InsideError`."""

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        tableau: Esdirk,
        options: ImplicitOptions,
        stats: Stats,
        *,
        everywhere: bool,
    ) -> None:
        super().__init__(problem, arithmetic, inside=True)
        self.tableau = tableau
        self.stats = stats
        self.norm = problem.norm
        self.blocks = Blocks(problem, options.batch_dims)
        self.jacobian = Jacobian(problem, self.blocks, options.jac, stats, timed=False)
        self.newton = Newton(problem.norm, problem.y0.dtype.to_real(), options.newton_tol, stats)
        self.gamma = float(tableau.gamma)
        self._stages = self.prepared(tableau.nodes[1:], tableau.rows[1:])
        self._last = arithmetic.last_stage(tableau.b_row, tableau.err_row, 1.0, self.end)
        self._inside = InsideError(self, tableau, everywhere=everywhere)
        self._derivative: Tensor | None = None  # df/dy, of this step or of an earlier one
        self._of_this_step = self._after_jump = False
        self._matrix: tuple[float, Factorised] | None = None  # and the h gamma that it was made for

    def first(self, t0: float, y0: Tensor, span: Span | None, inside: bool) -> Tensor | None:
        """f(t0, y0); inside: just after t0."""
        self._after_jump = inside
        return self.f(self.start_time(t0, span, inside), y0)

    def attempt(self, t0: float, move: ProposedStep, y0: Tensor, k1: Tensor | None) -> Step:
        """A step from (t0, y0)."""
        if k1 is None:
            k1 = self.f(self.start_time(t0, move.span, False), y0)
        step = self._attempt_at(self.interval(t0, move), y0, k1, move.span)
        if not step.unsolved:
            assert step.error is not None
            step.error = self._judged(step, step.error)
        return step

    def _attempt_at(self, at: Interval, y0: Tensor, k1: Tensor, span: Span | None = None) -> Step:
        """A step over this interval, with its embedded error."""
        k: list[Tensor] | None = None
        while k is None:
            renewed = self._derivative is None
            if renewed:
                self._renew(self.start_time(at.t0, None, self._after_jump), y0)
            k = self._solved(at, y0, k1, span)
            if k is None and (renewed or self._of_this_step):
                return self._unsolved(at, y0, k1, span)
            if k is None:
                self._derivative = None
        y1, error = self.arithmetic.rk_finish(self._last, at, y0, k, None)
        return Step(at, y0, y1, k, error, None, span)

    def again(self, at: Interval, t: Tensor, y0: Tensor, k1: Tensor | None) -> Step | None:
        """A step that was taken before, from its own Jacobian; None: its equations are not solved now. t: its start,
        where the field is k1 if that was not carried on."""
        self._renew(t.detach(), y0)
        step = self._attempt_at(at, y0, self.f(t, y0) if k1 is None else k1)
        return None if step.unsolved else step

    def carry(self, step: Step) -> Tensor | None:
        """The last stage, which is f(t1, y1), or the field beyond a jump."""
        self._of_this_step, self._after_jump = False, step.jump
        if step.jump or self.newton.rate > SLOW:
            self._derivative = None
        if step.jump:
            return self.f(self.start_time(step.t1, None, inside=True), step.y1)
        return step.k[-1]

    # ------------------------------------------------------------------ a step
    def _judged(self, step: Step, error: Tensor) -> Tensor:
        """The error that the step is judged by."""
        matrix = self._matrix_of(step.at)
        if self.tableau.filtered:
            with torch.no_grad():
                error = matrix.solve(error)
        return self._inside.added(error, step, matrix, step.at.signed * self.gamma)

    def _renew(self, t: Tensor, y0: Tensor) -> None:
        with torch.no_grad():
            self._derivative = self.jacobian.at(t, y0.detach()).jacobian
        self._of_this_step = True
        self._matrix = None

    def _matrix_of(self, at: Interval) -> Factorised:
        """I - h gamma J for this step's h."""
        hg = at.signed * self.gamma
        if self._matrix is None or self._matrix[0] != hg:
            assert self._derivative is not None
            self._matrix = hg, Factorised(self.blocks, self._derivative, 1.0, hg)
            self.stats.factorisations += 1
        return self._matrix[1]

    def _solved(self, at: Interval, y0: Tensor, k1: Tensor, span: Span | None) -> list[Tensor] | None:
        """The stages; None: Newton's iterations did not find one."""
        tableau, arithmetic = self.tableau, self.arithmetic
        hg = at.signed * self.gamma
        with torch.no_grad():
            matrix, scale = self._matrix_of(at), self.norm.scale(y0.abs())
        taped = torch.is_grad_enabled() and any(x.requires_grad for x in (y0, k1))
        taped = taped or (at.taped and torch.is_grad_enabled())
        self.newton.rate = 0.0
        k = [k1]
        times = self.slots(at, tableau.nodes[1:], span)
        for i, t in enumerate(times, start=1):
            base = arithmetic.rk_stage(self._stages[i - 1], at, y0, k, t)
            with torch.no_grad():
                guess = self._guess(i, k)
                found = self.newton.solve(lambda z, t=t: self.f(t, z), base, guess, hg, matrix, scale)
            if found is None:
                return None
            k.append(self._on_tape(at, t, base, found) if taped else found)
        return k

    def _on_tape(self, at: Interval, t: Tensor, base: Tensor, k: Tensor) -> Tensor:
        """A stage that was found, as a function of what it depends on: dk = (I - h gamma J)^-1 df at fixed k, with the
        Jacobian at the stage itself."""
        found = self.jacobian.at(t, base + at.dt * self.gamma * k)
        matrix = Factorised(self.blocks, found.jacobian, 1.0, at.signed * self.gamma)
        self.stats.factorisations += 1
        return _Solved.apply(matrix, k, found.f)

    def _guess(self, i: int, k: list[Tensor]) -> Tensor:
        row = self.tableau.guesses[i]
        if len(row) == 1:
            return k[row[0][0]]
        (j, weight), *rest = row
        guess = k[j] * weight
        for j, weight in rest:
            guess.add_(k[j], alpha=weight)
        return guess

    def _unsolved(self, at: Interval, y0: Tensor, k1: Tensor, span: Span | None) -> Step:
        """A step that is to be rejected."""
        self.stats.rejected_by_newton += 1
        assert self._derivative is not None
        self.jacobian.check(self._derivative, at.t0)
        with torch.no_grad():
            error = (UNSOLVED * self.norm.scale(y0.abs())).to(y0.dtype)
        return Step(at, y0, y0, [k1], error, None, span, unsolved=True)


class _Solved(torch.autograd.Function):
    """k, moved to where (I - h gamma J) (k' - k) = f - k; backwards one solution of the transposed system."""

    @staticmethod
    def forward(ctx, matrix, k, f):
        ctx.matrix = matrix
        ctx.save_for_backward(f)
        return k + matrix.solve(f - k)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (f,) = ctx.saved_tensors
        with torch.no_grad():
            of_f = ctx.matrix.solve(grad, transposed=True)
        instead = 'method="rodas5p", whose steps are differentiated as often as func is'
        return None, None, *first_derivatives((of_f,), "A stage of an implicit method", f, grad, instead=instead)
