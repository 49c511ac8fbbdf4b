"""One step of a fully implicit Runge-Kutta method: one system for all stages together."""

from __future__ import annotations

import torch
from torch import Tensor

from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.stage_times import Interval
from node_cuda.methods.implicit.equations import SAME, EquationSteps, Solved
from node_cuda.methods.implicit.jacobian import Linearised
from node_cuda.methods.implicit.linear import Coupled, Transformed, parted
from node_cuda.methods.implicit.tableau import FullyImplicit, lagrange
from node_cuda.methods.step import ProposedStep, Seen, Span, Step
from node_cuda.options import FixedImplicitOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats

FARTHEST = 2.0
"""The largest ratio of a step to the one before it at which the polynomial of that one gives the guess."""


class CoupledSteps(EquationSteps[FullyImplicit]):
    """Steps of the method `tableau` for `problem`.

    The iterations use one Jacobian for all stages, so that the system falls apart (`Transformed`). The gradient and
    the full iterations use the Jacobian of each stage, and one matrix of the size of all stages (`Coupled`).
    """

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        tableau: FullyImplicit,
        options: FixedImplicitOptions,
        stats: Stats,
    ) -> None:
        super().__init__(problem, arithmetic, tableau, options, stats)
        self._a = torch.tensor(
            [[float(x) for x in row] for row in tableau.a], dtype=problem.y0.dtype, device=problem.y0.device
        )
        self._parts = parted(tableau, problem.y0.dtype.to_real(), problem.y0.device)
        self._matrix: tuple[float, Transformed] | None = None  # and the h that it was made for
        self._before: tuple[float, list[Tensor]] | None = None  # size and stages of the step before

    def attempt(self, t0: float, move: ProposedStep, y0: Tensor, k1: Tensor | None) -> Step:
        """Take a step from (t0, y0)."""
        return self._attempt_at(self.interval(t0, move), y0, None, move.span)

    def carry(self, step: Step) -> Tensor | None:
        """Return None: no stage is known before the step."""
        self._before = None if step.jump else (step.at.h, [k.detach() for k in step.k])
        return super().carry(step)

    # ------------------------------------------------------------------ a step
    def _forget(self) -> None:
        self._matrix = self._before = None

    def _renew(self, t: Tensor, y0: Tensor) -> None:
        super()._renew(t, y0)
        self._matrix = None

    def _matrix_of(self, at: Interval) -> Transformed:
        """Return the matrices of the iterations for this step's h."""
        if self._matrix is None or abs(self._matrix[0] - at.signed) > SAME * at.h:
            assert self._derivative is not None
            self._matrix = at.signed, Transformed(self.blocks, self._derivative, self._parts, at.signed)
            self.stats.factorisations += 1
        return self._matrix[1]

    def _stages_of(
        self, at: Interval, y0: Tensor, k1: Tensor | None, span: Span | None, *, full: bool
    ) -> list[Tensor] | None:
        times = self.times(at, self.tableau.nodes, self.end, span)
        self.newton.rate = 0.0
        with torch.no_grad():
            scale = self.newton.scale(y0)

            def of_state(change: Tensor) -> Tensor:
                states = torch.tensordot(self._a, change, 1).mul_(at.signed)
                return states.abs().amax(0).div_(scale)

            def residual(k: Tensor) -> Tensor:
                rows = []
                for t, z, x in zip(times, self._arguments(at, y0, k), k, strict=True):
                    f = self.f(t, z)
                    self.seen = Seen(t, z, f)
                    rows.append(f.sub(x))
                return torch.stack(rows)

            def linearised(k: Tensor) -> tuple[Tensor, Coupled]:
                found, matrix = self._linearised(at, times, y0, k)
                return torch.stack([each.f - x for each, x in zip(found, k, strict=True)]), matrix

            if full:
                start = y0.new_zeros((self.tableau.stages, *y0.shape))
                found = self.newton.full(linearised, start, of_state, self.most)
            else:
                found = self.newton.solve(residual, self._guess(at, y0), self._matrix_of(at), of_state)
        if found is None:
            return None
        if self._taped(at, y0):
            each, matrix = self._linearised(at, times, y0, found)
            found = Solved.apply(matrix, found, torch.stack([x.f for x in each]))
        return list(found.unbind())

    def _arguments(self, at: Interval, y0: Tensor, k: Tensor) -> list[Tensor]:
        """Return y0 + h sum_j a_ij k_j for each stage."""
        parts = k.unbind()
        return [self.arithmetic.combine(y0, parts, row, at.dt) for row in self.tableau.full_rows]

    def _linearised(
        self, at: Interval, times: tuple[Tensor, ...], y0: Tensor, k: Tensor
    ) -> tuple[list[Linearised], Coupled]:
        """Return the field and its Jacobian at each stage, and the matrix of their system."""
        arguments = self._arguments(at, y0, k)
        found = [self.jacobian.at(t, z) for t, z in zip(times, arguments, strict=True)]
        self.seen = Seen(times[-1], arguments[-1], found[-1].f)
        self.stats.factorisations += 1
        return found, Coupled(self.blocks, torch.stack([x.jacobian for x in found]), self.tableau, at.signed)

    def _guess(self, at: Interval, y0: Tensor) -> Tensor:
        """Return the stages of the polynomial of the step before, continued; else the slope at the start."""
        if self._before is None or at.h > FARTHEST * self._before[0]:
            assert self.slope is not None
            return torch.stack([self.slope] * self.tableau.stages)
        h, k = self._before
        nodes = self.tableau.nodes
        rows = [lagrange(nodes, 1.0 + node * at.h / h) for node in nodes]
        return torch.stack([self.arithmetic.combine(torch.zeros_like(y0), k, row, 1.0) for row in rows])
