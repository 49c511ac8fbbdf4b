"""`gradient="adjoint"`: for explicit methods y is reconstructed backwards, for implicit ones the solution is stored."""

from __future__ import annotations

from torch import Tensor

from node_cuda._typing import EventFunc
from node_cuda.gradients import stored_adjoint
from node_cuda.gradients.adjoint import mode as reconstructed
from node_cuda.loop.request import SolveSpec
from node_cuda.status import Status


def outputs(request: SolveSpec) -> tuple[Tensor, Status]:
    """Return y at the problem's times. Its gradient is computed by the adjoint method."""
    return (reconstructed if request.method.implicit is None else stored_adjoint).outputs(request)


def event(request: SolveSpec, event_fn: EventFunc) -> tuple[Tensor, Tensor]:
    """Return the event's time (no gradient), and y0 and y there. Their gradient is that of the adjoint method."""
    return (reconstructed if request.method.implicit is None else stored_adjoint).event(request, event_fn)
