"""The libraries that are compared, by name: node_cuda on either of its paths, torchdiffeq, diffrax and torchode."""

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
TORCHODE = "torchode"
# The second word is the path of node_cuda (a backend); without it, node_cuda chooses.
FUSED, REFERENCE = f"{OURS} fused", f"{OURS} reference"


def installed(library: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(library) is not None


def function(contestant: str, name: str) -> Callable[..., Any]:
    """A function of a library by its name; raises SystemExit, with the install command, if the library is missing."""
    library = contestant.partition(" ")[0]
    if not installed(library):
        mend = "`pip install -e .` in the repository's root" if library == OURS else f"`pip install {library}`"
        raise SystemExit(f"{library} is needed here and is not installed in this Python: {mend}.")
    return getattr(importlib.import_module(library), name)


def path(contestant: str) -> contextlib.AbstractContextManager[Any]:
    """Context in which node_cuda uses the path in the contestant's name; it does nothing for other libraries."""
    chosen = contestant.partition(" ")[2]
    return importlib.import_module(OURS).backend(chosen) if chosen else contextlib.nullcontext()


def version(library: str) -> str | None:
    """The installed version, or None; for node_cuda that is not installed, the version of the checkout."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return importlib.import_module(OURS).__version__ if library == OURS else None
