"""A test for stiff fields, from the stages of an explicit method.

Two stages at the end of a step are evaluations of the field at the same time and at two states, z_i and z_j. So
|k_j - k_i| / |z_j - z_i| is about the largest |lambda| of df/dy. If h |lambda| lies at the boundary of the stability
region for many steps, then stability limits the steps, and not accuracy. Hairer and Wanner II, IV.2.
"""

from __future__ import annotations

import warnings

import torch

from node_cuda._torch_modes import numbers
from node_cuda.methods.explicit_rk import ExplicitRK
from node_cuda.methods.step import Step
from node_cuda.methods.tableau import SparseRow
from node_cuda.solution import Stats
from node_cuda.status import StiffnessWarning, users_level

EVERY = 50
"""The test looks at one accepted step of this many, until one of them is stiff."""
ENOUGH, CLEARED = 15, 6
"""The number of stiff steps that make a field stiff, and of other steps in a row after which the count starts again."""


class StiffnessTest:
    """Gets the accepted steps of a solve, counts the stiff ones in its statistics, and warns once a process.

    stages: the two stages at the end of a step, and the row of z_j - z_i.
    """

    warned = False

    def __init__(self, stepper: ExplicitRK, stages: tuple[int, int, SparseRow], stats: Stats, direction: float) -> None:
        self.stats = stats
        self.direction = direction
        self.arithmetic = stepper.arithmetic
        self.first, self.second, self._row = stages
        self._tableau = stepper.tableau
        self._suspected = False
        self._hits = self._misses = 0

    def look(self, step: Step) -> None:
        """Test an accepted step. Most steps cost nothing; a tested one costs one host read."""
        if not self._suspected and self.stats.accepted % EVERY:
            return
        self.stats.host_reads += 1
        with torch.no_grad():
            k = [x.detach() if x.dtype.itemsize > 2 else x.detach().float() for x in step.k]  # squares overflow in half
            z = self.arithmetic.combine(torch.zeros_like(k[0]), k, self._row, 1.0)
            slopes, states = numbers(
                torch.stack([torch.linalg.vector_norm(x) for x in (k[self.second] - k[self.first], z)])
            )
        # z has no factor h, so the ratio is h |lambda|.
        if not (states > 0.0 and slopes / states > self._tableau.stability_boundary):
            self._misses += 1
            if self._misses == CLEARED:
                self._suspected, self._hits = False, 0
            return
        self._suspected, self._misses = True, 0
        self._hits += 1
        self.stats.stiff_steps += 1
        if self._hits == ENOUGH and not StiffnessTest.warned:
            StiffnessTest.warned = True
            warnings.warn(
                f"func is stiff at t = {self.direction * step.t1:.4g}: h |lambda| = {slopes / states:.3g}, so that "
                'stability limits the steps of this explicit method, and not accuracy. Use method="rodas5p", or '
                '"kvaerno5" for a large state (docs/stiff.md).',
                StiffnessWarning,
                stacklevel=users_level(),
            )


def stiffness_test(stepper: ExplicitRK, stats: Stats, direction: float) -> StiffnessTest | None:
    """Return the test for the steps of this method, or None if it has no two stages at the end of a step."""
    stages = stepper.tableau.stages_at_end
    return None if stages is None else StiffnessTest(stepper, stages, stats, direction)
