"""docs/public_names.md lists what a program may rely on: it and the code have the same names, keys and fields."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import node_cuda
from node_cuda import _parse_options, options
from node_cuda.gradients.registry import GRADIENTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "public_names.md").read_text()


def named(text: str) -> set[str]:
    """Return what stands between single backticks."""
    return set(re.findall(r"`([^`]+)`", text))


def section(title: str) -> str:
    """Return the text below a heading of the page."""
    return re.split(r"^## ", PAGE, flags=re.MULTILINE)[[*re.findall(r"^## (.*)$", PAGE, re.MULTILINE)].index(title) + 1]


def rows(text: str) -> dict[str, set[str]]:
    """Return the names of each row of a table, by its first column."""
    found = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): named(cells[1]) for cells in found}


def test_the_page_lists_the_names_of_the_package() -> None:
    listed = set().union(*rows(section("`node_cuda`")).values())
    assert listed == {*node_cuda.__all__, "compile"}, "change docs/public_names.md with the code"
    assert all(hasattr(node_cuda, name) for name in listed)


def test_the_page_lists_the_arguments_and_gradient_modes() -> None:
    arguments, modes = re.findall(r"^(?:Arguments|Values) of .*?:(.*?)\.$", PAGE, re.MULTILINE | re.DOTALL)
    assert named(arguments) == set(_parse_options.ARGUMENTS)
    assert named(modes) == set(GRADIENTS)


FAMILIES: dict[str, tuple[type, type | None]] = {
    "all": (options.Common, None),
    "adaptive (dopri5, tsit5, ...)": (options.AdaptiveOptions, options.Common),
    "implicit (rodas5p, ...), with those of adaptive methods": (options.ImplicitOptions, options.AdaptiveOptions),
    "fixed grids (rk4, euler, ...)": (options.FixedOptions, options.Common),
    "Adams, with those of fixed grids": (options.AdamsOptions, options.FixedOptions),
    "scipy_solver": (options.ScipyOptions, options.Common),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_lists_the_keys_of_options(family: str) -> None:
    kind, below = FAMILIES[family]
    known = {f.name for f in dataclasses.fields(kind)}
    inherited = set() if below is None else {f.name for f in dataclasses.fields(below)}
    assert rows(section("Keys of `options`"))[family] == known - inherited, "change docs/public_names.md with the code"


def test_the_page_lists_the_fields_of_results() -> None:
    listed = rows(section("Fields"))
    public = {name for name in dir(node_cuda.Solution) if not name.startswith("_")}
    assert listed["`Solution`"] == public | {f.name for f in dataclasses.fields(node_cuda.Solution)}
    error = node_cuda.SolveError(node_cuda.Status.MAX_STEPS, 0.0, node_cuda.Stats())
    assert all(hasattr(error, name) for name in listed["`SolveError`"])
