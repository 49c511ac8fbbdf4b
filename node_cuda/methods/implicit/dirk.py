"""One step of a diagonally implicit Runge-Kutta method: a system for each implicit stage, all with the same matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.stage_times import Interval
from node_cuda.methods.implicit.equations import SAME, EquationSteps, Solved
from node_cuda.methods.implicit.inside import InsideError
from node_cuda.methods.implicit.linear import Factorised
from node_cuda.methods.implicit.tableau import Dirk
from node_cuda.methods.step import ProposedStep, Seen, Span, Step
from node_cuda.options import FixedImplicitOptions, ImplicitOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats


class DirkSteps(EquationSteps[Dirk]):
    """Steps of the method `tableau` for `problem`. everywhere: see `InsideError`."""

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        tableau: Dirk,
        options: ImplicitOptions | FixedImplicitOptions,
        stats: Stats,
        *,
        everywhere: bool,
    ) -> None:
        super().__init__(problem, arithmetic, tableau, options, stats)
        self.gamma = float(tableau.gamma)
        first = int(tableau.explicit_first)
        self._nodes = tableau.nodes[first:]
        self._stages = self.prepared(self._nodes, tableau.rows[first:])
        self._inside = InsideError(self, tableau, everywhere=everywhere)
        self._matrix: tuple[float, Factorised] | None = None  # and the h gamma that it was made for

    def attempt(self, t0: float, move: ProposedStep, y0: Tensor, k1: Tensor | None) -> Step:
        """Take a step from (t0, y0)."""
        if k1 is None and self.tableau.explicit_first:
            k1 = self.f(self.start_time(t0, move.span, False), y0)
        step = self._attempt_at(self.interval(t0, move), y0, k1, move.span)
        if step.error is not None and not step.unsolved:
            step.error = self._judged(step, step.error)
        return step

    def carry(self, step: Step) -> Tensor | None:
        """Return the first stage of the next step, if that is explicit."""
        self.slope = step.k[-1].detach()
        return super().carry(step)

    # ------------------------------------------------------------------ a step
    def _judged(self, step: Step, error: Tensor) -> Tensor:
        """Return the error by which the step is judged."""
        matrix = self._matrix_of(step.at)
        if self.tableau.filtered:
            with torch.no_grad():
                error = matrix.solve(error)
        return self._inside.added(error, step, matrix, step.at.signed * self.gamma)

    def _forget(self) -> None:
        self._matrix = None

    def _renew(self, t: Tensor, y0: Tensor) -> None:
        super()._renew(t, y0)
        self._matrix = None

    def _matrix_of(self, at: Interval) -> Factorised:
        """Return I - h gamma J for this step's h."""
        hg = at.signed * self.gamma
        if self._matrix is None or abs(self._matrix[0] - hg) > SAME * abs(hg):
            assert self._derivative is not None
            self._matrix = hg, Factorised(self.blocks, self._derivative, 1.0, hg)
            self.stats.factorisations += 1
        return self._matrix[1]

    def _stages_of(
        self, at: Interval, y0: Tensor, k1: Tensor | None, span: Span | None, *, full: bool
    ) -> list[Tensor] | None:
        arithmetic, hg = self.arithmetic, at.signed * self.gamma
        with torch.no_grad():
            scale = self.newton.scale(y0)
        taped = self._taped(at, y0, k1)
        self.newton.rate = 0.0
        k = [] if k1 is None else [k1]
        for t, stage in zip(self.slots(at, self._nodes, span), self._stages, strict=True):
            base = arithmetic.rk_stage(stage, at, y0, k, t)
            with torch.no_grad():
                found = self._found(t, base, k, hg, scale, at, full=full)
            if found is None:
                return None
            k.append(self._on_tape(at, t, base, found) if taped else found)
        return k

    def _found(
        self, t: Tensor, base: Tensor, k: list[Tensor], hg: float, scale: Tensor, at: Interval, *, full: bool
    ) -> Tensor | None:
        """Return the next stage, k = f(t, base + h gamma k)."""

        def of_state(change: Tensor) -> Tensor:
            return change.mul_(hg).div_(scale)

        def linearised(x: Tensor) -> tuple[Tensor, Factorised]:
            z = torch.add(base, x, alpha=hg)
            found = self.jacobian.at(t, z)
            self.seen = Seen(t, z, found.f)
            self.stats.factorisations += 1
            return found.f - x, Factorised(self.blocks, found.jacobian, 1.0, hg)

        def residual(x: Tensor) -> Tensor:
            z = torch.add(base, x, alpha=hg)
            f = self.f(t, z)
            self.seen = Seen(t, z, f)
            return f.sub(x)

        if full:
            return self.newton.full(linearised, torch.zeros_like(base), of_state, self.most)
        return self.newton.solve(residual, self._guess(k), self._matrix_of(at), of_state)

    def _on_tape(self, at: Interval, t: Tensor, base: Tensor, k: Tensor) -> Tensor:
        """Return a stage that was found as a function of the tensors that it depends on: dk = (I - h gamma J)^-1 df at
        fixed k, with the Jacobian at the stage itself."""
        found = self.jacobian.at(t, base + at.dt * self.gamma * k)
        matrix = Factorised(self.blocks, found.jacobian, 1.0, at.signed * self.gamma)
        self.stats.factorisations += 1
        return Solved.apply(matrix, k, found.f)

    def _guess(self, k: list[Tensor]) -> Tensor:
        """Return a guess of the stage that follows these."""
        row = self.tableau.guesses[len(k)]
        if not row:
            assert self.slope is not None
            return self.slope
        if len(row) == 1:
            return k[row[0][0]]
        (j, weight), *rest = row
        guess = k[j] * weight
        for j, weight in rest:
            guess.add_(k[j], alpha=weight)
        return guess
