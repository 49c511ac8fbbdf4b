"""The gradient modes that the benchmarks compare: a table with one row for each mode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from parts.common import libraries
from parts.common.libraries import OURS, RIVAL

LIMIT = {"max_num_steps": 20_000}  # of a forward or a backward solve, so that a solve that cannot end fails in seconds
# The name of a gradient mode in the tables.
BACKPROP, ADJOINT, SEMINORM = "backprop", "adjoint", "adjoint, seminorm"
DISCRETE, CHECKPOINTED = "discrete", "discrete, 8 checkpoints"


class Mode(NamedTuple):
    """A library's function and the arguments that choose how it differentiates.

    gradient: the name of the mode, unique within the library. library: as in `libraries.function`.
    """

    gradient: str
    library: str
    function: str
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """`gradient`, after the library's name where that is not node_cuda."""
        return self.gradient if self.library == OURS else f"{self.library} {self.gradient}"

    @property
    def replays(self) -> bool:
        """Whether the backward pass replays the steps of the forward solve (and may recompute more of them)."""
        return self.arguments.get("gradient") == "discrete"

    @property
    def solver(self) -> Callable[..., Any]:
        """The function with these arguments; raises SystemExit where its library is not installed."""
        return functools.partial(libraries.function(self.library, self.function), **self.arguments)


MODES = {
    mode.name: mode
    for mode in (
        Mode(ADJOINT, RIVAL, "odeint_adjoint", {}),
        Mode(BACKPROP, RIVAL, "odeint", {}),
        Mode(BACKPROP, OURS, "odeint", {}),
        Mode(ADJOINT, OURS, "odeint_adjoint", {}),
        Mode(SEMINORM, OURS, "odeint_adjoint", {"adjoint_options": {"norm": "seminorm", **LIMIT}}),
        Mode(DISCRETE, OURS, "odeint_adjoint", {"gradient": "discrete"}),
        Mode(CHECKPOINTED, OURS, "odeint_adjoint", {"gradient": "discrete", "checkpoints": 8}),
    )
}


def mode(library: str, gradient: str) -> Mode:
    """A mode by its library and name. library: may have a second word, the path of node_cuda."""
    name = gradient if library.partition(" ")[0] == OURS else f"{library} {gradient}"
    return MODES[name]._replace(library=library)


def of_library(library: str, gradients: Iterable[str]) -> list[Mode]:
    """The modes with these names that the library has."""
    names = {mode.gradient for mode in MODES.values() if mode.library == library.partition(" ")[0]}
    return [mode(library, gradient) for gradient in gradients if gradient in names]


def installed(names: Iterable[str]) -> list[str]:
    """The modes with an installed library."""
    return [name for name in names if libraries.installed(MODES[name].library)]
