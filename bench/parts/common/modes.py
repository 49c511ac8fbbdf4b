"""The ways to a gradient that the benchmarks compare: one table, one row a way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from parts.common import libraries
from parts.common.libraries import OURS, RIVAL

LIMIT = {"max_num_steps": 20_000}  # of a forward or a backward solve: a failure takes seconds, not hours
# How a solve is differentiated, in a word.
BACKPROP, ADJOINT, SEMINORM = "backprop", "adjoint", "adjoint, seminorm"
DISCRETE, CHECKPOINTED = "discrete", "discrete, 8 checkpoints"


class Mode(NamedTuple):
    """A library's function and the arguments that choose how it differentiates.

    gradient: how, in a word, which no other mode of this library has. library: as in `libraries.function`.
    """

    gradient: str
    library: str
    function: str
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Of ours the word alone."""
        return self.gradient if self.library == OURS else f"{self.library} {self.gradient}"

    @property
    def replays(self) -> bool:
        """The backward pass takes the steps of the forward one once more, and others to get there."""
        return self.arguments.get("gradient") == "discrete"

    @property
    def solver(self) -> Callable[..., Any]:
        """The function with these arguments; where its library is not installed, the program ends and says so."""
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
    """A library's mode by its word; of ours by the path that the library's second word chooses, if there is one."""
    name = gradient if library.partition(" ")[0] == OURS else f"{library} {gradient}"
    return MODES[name]._replace(library=library)


def of_library(library: str, gradients: Iterable[str]) -> list[Mode]:
    """The modes for these words, of those that the library has."""
    names = {mode.gradient for mode in MODES.values() if mode.library == library.partition(" ")[0]}
    return [mode(library, gradient) for gradient in gradients if gradient in names]


def installed(names: Iterable[str]) -> list[str]:
    """Those of the modes whose library is there."""
    return [name for name in names if libraries.installed(MODES[name].library)]
