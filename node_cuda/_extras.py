"""Packages that only one feature needs, and that pip does not install with this one."""

from __future__ import annotations

import importlib
from typing import Any


def extra(module: str, what: str, group: str) -> Any:
    """Return the module. Raises ImportError with the line to type if it is not installed.

    what: the feature that needs it. group: its name among the extras of pyproject.toml.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        if error.name not in (module, package):
            raise  # the package is there, and something that it needs is not
        raise ImportError(
            f"{what} needs {package}, which is not installed. Type `pip install {package}`, or `pip install "
            f'"node_cuda[{group}]"`.',
            name=package,
        ) from None
