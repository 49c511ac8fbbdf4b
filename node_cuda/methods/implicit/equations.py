"""The common part of the steppers that solve equations by Newton's iterations.

The Jacobian is kept over steps while the iterations contract well. Autograd differentiates the stages by the implicit
function theorem at their solution, and never through the iterations.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor

from node_cuda._torch_modes import first_derivatives
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.stage_times import Interval
from node_cuda.methods.evaluations import Evaluations
from node_cuda.methods.implicit.blocks import Blocks
from node_cuda.methods.implicit.jacobian import Jacobian
from node_cuda.methods.implicit.newton import Newton
from node_cuda.methods.implicit.tableau import Dirk, FullyImplicit
from node_cuda.methods.step import Seen, Span, Step
from node_cuda.options import FixedImplicitOptions, ImplicitOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats

SLOW = 0.03
"""A contraction rate from which on the Jacobian is computed anew for the next step."""
SAME = 1e-6
"""The relative difference of two step sizes that share a matrix: the points of an even grid are rounded."""
UNSOLVED = 20.0
"""The error, in units of the tolerances, of an adaptive step whose equations were not solved: at order 5 the next step
is half as long."""
HELD = 100.0
"""In eps: the smallest rtol that a state's dtype holds in a stiff problem (docs/stiff.md)."""


T = TypeVar("T", Dirk, FullyImplicit)


class EquationSteps(Evaluations, Generic[T]):
    """Solves the equations of a step, if necessary with a new Jacobian.

    On a fixed grid, where the step cannot be made smaller, the last attempt is by full Newton iterations.
    """

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        tableau: T,
        options: ImplicitOptions | FixedImplicitOptions,
        stats: Stats,
    ) -> None:
        fixed = isinstance(options, FixedImplicitOptions)
        super().__init__(problem, arithmetic, inside=options.perturb if fixed else True)
        self.tableau: T = tableau
        self.stats = stats
        self.blocks = Blocks(problem, options.batch_dims)
        self.jacobian = Jacobian(problem, self.blocks, options.jac, stats, timed=False)
        dtype = problem.y0.dtype.to_real()
        held = HELD * torch.finfo(dtype).eps if fixed else 0.0
        self.newton = Newton(problem.norm, dtype, options.newton_tol, stats, held=held)
        self.most = options.max_iters if fixed else 0  # full iterations
        self.slope: Tensor | None = None  # f at the start of a step, or near it: a guess
        self._last = arithmetic.last_stage(
            tableau.b_row, tableau.err_row if isinstance(tableau, Dirk) else None, 1.0, self.end
        )
        self._derivative: Tensor | None = None  # df/dy, of this step or of an earlier one
        self._of_this_step = self._after_jump = False
        self.seen: Seen | None = None
        """The last evaluation in the iterations of a step."""
        self._records = False  # func was seen to use parameters that require a gradient

    def first(self, t0: float, y0: Tensor, span: Span | None, inside: bool) -> Tensor | None:
        """Return f(t0, y0), which also shows what kind of function the field is, if it is a stage. inside: just after
        t0."""
        self._after_jump = inside
        f0 = self.f(self.start_time(t0, span, inside), y0)
        return f0 if self.tableau.carry_last_stage else None

    def again(self, at: Interval, t: Tensor, y0: Tensor, k1: Tensor | None, span: Span | None = None) -> Step | None:
        """Return a step that was taken before, from its own Jacobian; None: its equations are not solved now.

        t: its start, where k1 is evaluated if it was not carried on.
        """
        self._forget()
        self._renew(t.detach(), y0)
        if k1 is None and self.tableau.carry_last_stage:
            k1 = self.f(t, y0)
        step = self._attempt_at(at, y0, k1, span)
        return None if step.unsolved else step

    def carry(self, step: Step) -> Tensor | None:
        """Return the last stage, which is f(t1, y1), or the field beyond a jump; None if neither is a stage."""
        self._of_this_step, self._after_jump = False, step.jump
        if step.jump or self.newton.rate > SLOW:
            self._derivative = None
        if not self.tableau.carry_last_stage:
            return None
        if step.jump:
            ends = None if step.span is None else (step.span[1], step.span[1])
            return self.f(self.start_time(step.t1, ends, inside=True), step.y1)
        return step.k[-1]

    # ------------------------------------------------------------------ a step
    @abstractmethod
    def _stages_of(
        self, at: Interval, y0: Tensor, k1: Tensor | None, span: Span | None, *, full: bool
    ) -> list[Tensor] | None:
        """Return the stages; None: Newton's iterations did not find one. full: with full iterations."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop the matrix and the guesses of earlier steps."""

    def _attempt_at(self, at: Interval, y0: Tensor, k1: Tensor | None, span: Span | None) -> Step:
        """Return a step over this interval, with its embedded error if the method has one."""
        k: list[Tensor] | None = None
        while k is None:
            renewed = self._derivative is None
            if renewed:
                self._renew(self.start_time(at.t0, None, self._after_jump), y0)
            k = self._stages_of(at, y0, k1, span, full=False)
            if k is None and (renewed or self._of_this_step):
                k = self._stages_of(at, y0, k1, span, full=True) if self.most else None
                if k is None:
                    return self._unsolved(at, y0, k1, span)
            elif k is None:
                self._derivative = None
        y1, error = self.arithmetic.rk_finish(self._last, at, y0, k, None)
        return Step(at, y0, y1, k, error, None, span)

    def _renew(self, t: Tensor, y0: Tensor) -> None:
        found = self.jacobian.at(t, y0.detach())
        self._records = self._records or found.f.requires_grad
        self._derivative, self.slope = found.jacobian.detach(), found.f.detach()
        self._of_this_step = True

    def _taped(self, at: Interval, *states: Tensor | None) -> bool:
        """Return whether autograd must record the stages."""
        if not torch.is_grad_enabled():
            return False
        return self._records or at.taped or any(x is not None and x.requires_grad for x in states)

    def _unsolved(self, at: Interval, y0: Tensor, k1: Tensor | None, span: Span | None) -> Step:
        """Return a step that is to be rejected."""
        self.stats.rejected_by_newton += 1
        assert self._derivative is not None
        self.jacobian.check(self._derivative, at.t0)
        error = None
        if self.tableau.adaptive:
            with torch.no_grad():
                error = (UNSOLVED * self.newton.scale(y0)).to(y0.dtype)
        return Step(at, y0, y0, [] if k1 is None else [k1], error, None, span, unsolved=True)


class Solved(torch.autograd.Function):
    """k, moved to where (I - h a J) (k' - k) = f - k. The backward pass solves the transposed system once."""

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
