"""Is the field stiff? Hairer's test, from what the steps of an explicit method have.

Two stages at the end of a step are evaluations of the field at one time and at two states, z_i and z_j, so that
|k_j - k_i| / |z_j - z_i| is about the largest |lambda| of df/dy. Where h |lambda| lies at the boundary of the method's
stability, step after step, it is stability that limits the steps, and no accuracy. Hairer and Wanner II, IV.2.
"""

from __future__ import annotations

import warnings

import torch

from node_cuda.methods.explicit_rk import ExplicitRK
from node_cuda.methods.step import Step
from node_cuda.methods.tableau import Row, Tableau, sparse
from node_cuda.solution import Stats
from node_cuda.status import StiffnessWarning, users_level

EVERY = 50
"""How many accepted steps lie between two looks at a field that is not suspected."""
ENOUGH, CLEARED = 15, 6
"""So many stiff steps are a stiff field; so many others in a row clear it of the suspicion."""


class StiffnessTest:
    """Told of the accepted steps of a solve; counts the stiff ones in its statistics, and warns once a process."""

    warned = False

    def __init__(self, stepper: ExplicitRK, stages: tuple[int, int], stats: Stats, direction: float) -> None:
        self.stats = stats
        self.direction = direction
        self.arithmetic = stepper.arithmetic
        self.first, self.second = stages
        a = stepper.tableau.a
        self._row = sparse(x - y for x, y in zip(a[self.second], _padded(a[self.first], self.second), strict=True))
        self.boundary = boundary(stepper.tableau)
        self._suspected = False
        self._hits = self._misses = 0

    def look(self, step: Step) -> None:
        """An accepted step. Mostly nothing; else one host read."""
        if not self._suspected and self.stats.accepted % EVERY:
            return
        self.stats.host_reads += 1
        with torch.no_grad():
            k = [x.detach() if x.dtype.itemsize > 2 else x.detach().float() for x in step.k]  # squares overflow in half
            z = self.arithmetic.combine(torch.zeros_like(k[0]), k, self._row, 1.0)
            slopes, states = torch.stack(
                [torch.linalg.vector_norm(x) for x in (k[self.second] - k[self.first], z)]
            ).tolist()
        if not (states > 0.0 and slopes / states > self.boundary):  # z is without its h, and so the ratio is h |lambda|
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
    """The test for this method's steps; None: it has not two stages at the end of a step."""
    ends = [i for i, node in enumerate(stepper.tableau.nodes) if node == 1.0]
    return StiffnessTest(stepper, (ends[-2], ends[-1]), stats, direction) if len(ends) > 1 else None


def boundary(tableau: Tableau) -> float:
    """The x > 0 at which |R(-x)|, R the stability function, becomes larger than 1."""
    coefficients, powers = [1.0], [1.0] * tableau.stages
    for _ in range(tableau.stages):
        coefficients.append(sum(float(b) * x for b, x in zip(tableau.b, powers, strict=True)))
        powers = [sum(float(a) * x for a, x in zip(row, powers, strict=False)) for row in tableau.a]
    x = 0.0
    while abs(sum(c * (-x) ** i for i, c in enumerate(coefficients))) <= 1.0 + 1e-9:
        x += 1e-3
    return x


def _padded(row: Row, length: int) -> Row:
    return (*row, *(0 for _ in range(length - len(row))))
