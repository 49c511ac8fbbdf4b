"""A warning for a backward solve that costs far more than the forward solve, because a step ends at every output."""

from __future__ import annotations

import threading
import warnings

from node_cuda.gradients.adjoint.backward_solve import BackwardSettings
from node_cuda.loop.request import SolveSpec
from node_cuda.methods.registry import lookup
from node_cuda.status import PerformanceWarning, users_level

MANY = 10
"""The number of outputs for each step of the forward solve from which on there is a warning."""

_untold = threading.Lock()  # the first warning acquires it, and it is never released


def warn_of_many_outputs(request: SolveSpec, settings: BackwardSettings, solves: int) -> None:
    """Warn, once a process, if the outputs and not the steps decide what the backward solve costs. The solve, by an
    adaptive method, is over and succeeded. solves: how many there were, each with these outputs; the statistics are
    their sum."""
    method, stats = request.method, request.stats
    landings = solves * (len(request.problem.times) - 1)
    if method.tableau is None or landings <= MANY * stats.accepted:
        return
    backward = lookup(settings.method_name, settings.options, quiet=True)
    if not backward.adaptive or backward.tableau is None or not _untold.acquire(blocking=False):
        return
    # y and a are changed at an output, so that no stage is carried beyond it.
    warnings.warn(
        f'The backward solve of gradient="adjoint" ends a step at every output: {landings} of them, where the forward '
        f"solve took {stats.accepted} steps. It will need about {landings * backward.tableau.stages} evaluations of "
        f'func, each with a vjp; the forward solve needed {stats.nfe}. Use `gradient="discrete", checkpoints="auto"`, '
        "which differentiates the steps of the forward solve, or ask for fewer outputs.",
        PerformanceWarning,
        stacklevel=users_level(),
    )
