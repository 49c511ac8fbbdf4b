"""The solvers under comparison, found by name: node_cuda by either of its paths, and others where installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any

OURS = "node_cuda"
RIVAL = "torchdiffeq"
DIFFRAX = "diffrax"
# A second word chooses the path that computes our steps; without one, node_cuda chooses by itself.
FUSED, REFERENCE = f"{OURS} fused", f"{OURS} reference"


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def function(contestant: str, name: str) -> Callable[..., Any]:
    """A function of a library by its name; where it is not installed, the program ends and says so."""
    library = contestant.partition(" ")[0]
    if not installed(library):
        mend = "`pip install -e .` in the repository's root" if library == OURS else f"`pip install {library}`"
        raise SystemExit(f"{library} is needed here and is not installed in this Python: {mend}.")
    return getattr(importlib.import_module(library), name)


def path(contestant: str) -> contextlib.AbstractContextManager[Any]:
    """Inside it, node_cuda computes by the path in the contestant's name. Other libraries do not notice."""
    chosen = contestant.partition(" ")[2]
    return importlib.import_module(OURS).backend(chosen) if chosen else contextlib.nullcontext()


def version(library: str) -> str | None:
    """The installed version; of ours, where a checkout is used as it is, its own; None if there is none."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return importlib.import_module(OURS).__version__ if library == OURS else None
