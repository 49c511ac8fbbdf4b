"""The solvers under comparison, found by name: node_cuda, and torchdiffeq where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any

OURS = "node_cuda"
RIVAL = "torchdiffeq"
FUNCTIONS = {"odeint": "backprop", "odeint_adjoint": "adjoint"}  # and the word for how each differentiates


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def function(library: str, name: str) -> Callable[..., Any]:
    """`odeint` or `odeint_adjoint` of a library; where it is not installed, the program ends and says so."""
    if not installed(library):
        mend = "`pip install -e .` in the repository's root" if library == OURS else f"`pip install {library}`"
        raise SystemExit(f"{library} is needed here and is not installed in this Python: {mend}.")
    return getattr(importlib.import_module(library), name)


def version(library: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
