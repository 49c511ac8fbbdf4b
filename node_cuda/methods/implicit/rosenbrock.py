"""One step of a Rosenbrock method: a linear system for each stage, all with the same matrix, without iterations."""

from __future__ import annotations

from torch import Tensor

from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.stage_times import Interval
from node_cuda.methods.evaluations import Evaluations
from node_cuda.methods.implicit.blocks import Blocks
from node_cuda.methods.implicit.inside import InsideError
from node_cuda.methods.implicit.jacobian import Jacobian, Linearised
from node_cuda.methods.implicit.linear import Factorised
from node_cuda.methods.implicit.tableau import Rosenbrock
from node_cuda.methods.step import ProposedStep, Seen, Span, Step
from node_cuda.options import ImplicitOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats


class RosenbrockSteps(Evaluations):
    """Steps of the method `tableau` for `problem`.

    Autograd differentiates them with second derivatives of the field, because the formula contains df/dy. everywhere:
    see `InsideError`.
    """

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        tableau: Rosenbrock,
        options: ImplicitOptions,
        stats: Stats,
        *,
        everywhere: bool,
    ) -> None:
        super().__init__(problem, arithmetic, inside=True)
        self.tableau = tableau
        self.stats = stats
        self.blocks = Blocks(problem, options.batch_dims)
        self.jacobian = Jacobian(problem, self.blocks, options.jac, stats, timed=True)
        self._stages = self.prepared(tableau.nodes[1:], tableau.rows[1:])
        self._last = arithmetic.last_stage(tableau.b_row, tableau.err_row, 1.0, self.end)
        self._inside = InsideError(self, tableau, everywhere=everywhere)
        self._start: tuple[Tensor, Linearised] | None = None  # y0 of the step that is tried, and the field there
        self._after_jump = False
        self.seen: Seen | None = None
        """The last evaluation of a step."""

    def first(self, t0: float, y0: Tensor, span: Span | None, inside: bool) -> Tensor | None:
        """Return f(t0, y0), which also shows what kind of function the field is. inside: just after t0."""
        self._after_jump = inside
        return self.f(self.start_time(t0, span, inside), y0)

    def attempt(self, t0: float, move: ProposedStep, y0: Tensor, k1: Tensor | None) -> Step:
        """Take a step from (t0, y0)."""
        at, start = self.interval(t0, move), self._linearised(t0, y0, move.span)
        step, matrix = self._attempt_at(at, y0, start, move.span)
        assert step.error is not None
        step.error = self._inside.added(step.error, step, matrix, at.signed)
        return step

    def _attempt_at(
        self, at: Interval, y0: Tensor, start: Linearised, span: Span | None = None
    ) -> tuple[Step, Factorised]:
        """Return a step over this interval with its embedded error, and its matrix. start: the field at its start."""
        arithmetic, tableau = self.arithmetic, self.tableau
        matrix = Factorised(self.blocks, start.jacobian, 1.0 / float(tableau.gamma), at.dt)
        self.stats.factorisations += 1
        of_time = None if start.df_dt is None else self.blocks.join(start.df_dt) * at.dt
        times = self.slots(at, tableau.nodes[1:], span)
        v: list[Tensor] = []
        for i in range(tableau.stages):
            f = start.f
            if i:
                z = arithmetic.rk_stage(self._stages[i - 1], at, y0, v, times[i - 1])
                f = self.f(times[i - 1], z)
                self.seen = Seen(times[i - 1], z, f)
                f = arithmetic.combine(f, v, tableau.couplings[i], 1.0)
            if of_time is not None and tableau.slopes[i]:
                f = f + tableau.slopes[i] * of_time
            v.append(matrix.solve(f))
        self.stats.linear_solves += tableau.stages
        y1, error = arithmetic.rk_finish(self._last, at, y0, v, None)
        return Step(at, y0, y1, v, error, None, span), matrix

    def again(self, at: Interval, t: Tensor, y0: Tensor, k1: Tensor | None, span: Span | None = None) -> Step | None:
        """Return a step that was taken before. t: its start; k1: None."""
        return self._attempt_at(at, y0, self.jacobian.at(t, y0, twice=True), span)[0]

    def carry(self, step: Step) -> Tensor | None:
        """Return None: the next step linearises the field at its start."""
        self._after_jump = step.jump
        return None

    def _linearised(self, t0: float, y0: Tensor, span: Span | None) -> Linearised:
        """Return the linearised field at the start of a step. It is kept while the step is tried again."""
        if self._start is not None and self._start[0] is y0:
            self.jacobian.check(self._start[1].jacobian, t0)  # the step is tried again: is it this that fails?
            return self._start[1]
        t = self.start_time(t0, span, self._after_jump)
        self._start = y0, self.jacobian.at(t, y0, twice=True)
        return self._start[1]
