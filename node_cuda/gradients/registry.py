"""The registry of the gradient modes, one line for each."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from node_cuda._typing import EventFunc
from node_cuda.gradients import auto, forward, stored_adjoint
from node_cuda.gradients.adjoint import mode as adjoint
from node_cuda.gradients.discrete import mode as discrete
from node_cuda.loop.request import SolveSpec
from node_cuda.status import Status


class Mode(NamedTuple):
    """A gradient mode. outputs returns (y at the problem's times, status), event returns (event_t, y0 and y there)."""

    outputs: Callable[[SolveSpec], tuple[Tensor, Status]]
    event: Callable[[SolveSpec, EventFunc], tuple[Tensor, Tensor]]


def _adjoint_outputs(request: SolveSpec) -> tuple[Tensor, Status]:
    return (adjoint if request.method.implicit is None else stored_adjoint).outputs(request)


def _adjoint_event(request: SolveSpec, event_fn: EventFunc) -> tuple[Tensor, Tensor]:
    return (adjoint if request.method.implicit is None else stored_adjoint).event(request, event_fn)


GRADIENTS = {
    "auto": Mode(auto.outputs, auto.event),
    "backprop": Mode(forward.outputs, forward.event),
    "adjoint": Mode(_adjoint_outputs, _adjoint_event),
    "discrete": Mode(discrete.outputs, discrete.event),
}
