"""The registry of the gradient modes, one line for each."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from node_cuda._typing import EventFunc
from node_cuda.gradients import auto, by_adjoint, forward
from node_cuda.gradients.discrete import mode as discrete
from node_cuda.loop.request import SolveSpec
from node_cuda.status import Status


class Mode(NamedTuple):
    """A gradient mode. outputs returns (y at the problem's times, status), event returns (event_t, y0 and y there)."""

    outputs: Callable[[SolveSpec], tuple[Tensor, Status]]
    event: Callable[[SolveSpec, EventFunc], tuple[Tensor, Tensor]]


GRADIENTS = {
    "auto": Mode(auto.outputs, auto.event),
    "backprop": Mode(forward.outputs, forward.event),
    "adjoint": Mode(by_adjoint.outputs, by_adjoint.event),
    "discrete": Mode(discrete.outputs, discrete.event),
}
