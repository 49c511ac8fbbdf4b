"""`gradient="auto"`: "discrete" with checkpoints="auto" where method, field and arguments allow it, else "adjoint".

Both take bounded memory, and only the first is exact for the computed steps. `stats.why_gradient` says why it was not
taken. cuda_graph=True changes nothing in the choice: a gradient is the same with and without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from node_cuda._typing import EventFunc
from node_cuda.gradients import by_adjoint
from node_cuda.gradients.discrete import mode as discrete
from node_cuda.gradients.inspection import AnswersByChance
from node_cuda.loop.request import SolveSpec
from node_cuda.problem.field import VectorField
from node_cuda.status import Status

R = TypeVar("R")


def outputs(request: SolveSpec) -> tuple[Tensor, Status]:
    """Return y at the problem's times. Its gradient is computed by the chosen mode."""
    return _by_one_of(discrete.outputs, by_adjoint.outputs, request)


def event(request: SolveSpec, event_fn: EventFunc) -> tuple[Tensor, Tensor]:
    """Return the event's time (no gradient), and y0 and y there. Their gradient is computed by the chosen mode."""
    return _by_one_of(
        lambda request: discrete.event(request, event_fn), lambda request: by_adjoint.event(request, event_fn), request
    )


def why_not_discrete(request: SolveSpec) -> str | None:
    """Return the reason not to choose "discrete", or None. Only reasons that are known before func is evaluated."""
    given, options, problem = request.adjoint, request.method.options, request.problem
    if request.method.tableau is None and request.method.implicit is None:
        return f"method={request.method.name!r} is no Runge-Kutta method"
    for name in ("rtol", "atol", "method", "options"):
        if getattr(given, name) is not None:
            return f'adjoint_{name} was given, which only "adjoint" reads'
    if options.check_reconstruction:
        return 'options["check_reconstruction"] was given, which only "adjoint" reads'
    if problem.adjoint_callbacks:
        return f'func has {sorted(problem.adjoint_callbacks)[0]}_adjoint, which only "adjoint" calls'
    if options.throw == "deferred":
        return 'a deferred solve has no gradient by "discrete" if it takes more steps than there is room to record'
    if not torch.is_grad_enabled():
        return "autograd is off, so nothing has to be kept for a gradient"
    return None


def _by_one_of(by_discrete: Callable[[SolveSpec], R], by_adjoint: Callable[[SolveSpec], R], request: SolveSpec) -> R:
    if request.adjoint.params is not None:  # both may read them
        named = tuple(request.adjoint.params)
        request = request._replace(adjoint=request.adjoint._replace(params=named))
    why = why_not_discrete(request)
    if why is None:
        checkpoints = "auto" if request.checkpoints is None else request.checkpoints
        try:
            return by_discrete(request._replace(checkpoints=checkpoints))
        except AnswersByChance:
            # Found in the first evaluation, so that no step is lost. It was a warning before this was the default.
            why = "func is non-deterministic: a second call at the same t and y differs"
        request.stats.checkpoint_slots = None
        assert isinstance(request.problem.field, VectorField)
        request.problem.field.watch_again()
    request.stats.why_gradient = why
    return by_adjoint(request)
