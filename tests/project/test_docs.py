"""The pages of the site say what the code says: every option, every failure, every public name; every page has a place.

What needs mkdocs (a strict build, anchors, links to the built pages) is `make docs`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import node_cuda
from node_cuda import Status, options, solve

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OPTIONS = (DOCS / "options.md").read_text()
FAMILIES = {
    "Every method": (options.Common, "dopri5"),
    "Step control": (options.AdaptiveOptions, "dopri5"),
    "Implicit methods": (options.EquationOptions, "rodas5p"),
    "Fixed grids": (options.FixedOptions, "rk4"),
    "Implicit methods on fixed grids": (options.FixedImplicitOptions, "trapezoid"),
    "Adams methods": (options.AdamsOptions, "implicit_adams"),
    "scipy_solver": (options.ScipyOptions, "scipy_solver"),
}
"""Heading of the page -> the class whose own fields stand there, and a method that has them."""


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table below this heading of the options page."""
    section = OPTIONS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def own(family: type) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields that this class adds to those of its bases."""
    bases = [base for base in family.__bases__ if dataclasses.is_dataclass(base)]
    inherited = {f.name for base in bases for f in dataclasses.fields(base)}
    return {f.name: f for f in dataclasses.fields(family) if f.name not in inherited}


@pytest.mark.parametrize("heading", FAMILIES)
def test_the_options_page_has_every_option_with_its_default(heading):
    found = {row[0].strip("`"): row[1].strip("`") for row in rows(heading)}
    fields = own(FAMILIES[heading][0])
    assert sorted(found) == sorted(fields)
    for name, shown in found.items():
        scope = {"torch": torch, "inf": float("inf")}
        assert eval(shown, scope) == fields[name].default, f"{name}: the page says {shown}"


EXAMPLES = [
    pytest.param(row[3].strip("`"), method, id=f"{heading}-{row[0].strip('`')}")
    for heading, (_, method) in FAMILIES.items()
    for row in rows(heading)
]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("example", "method"), EXAMPLES)
def test_an_example_of_an_option_solves(example, method):
    arguments = {"method": method, **eval(f"dict({example})", {"torch": torch})}
    y0 = torch.ones(3, 4, dtype=torch.float64) if "batch_dims" in example else torch.ones(4, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0] if "event_fn" in example else [0.0, 0.4, 1.0], dtype=torch.float64)
    solution = solve(lambda t, y: -y, y0, t, rtol=1e-5, atol=1e-7, **arguments)
    exact = torch.exp(-solution.ts).reshape(-1, *(1,) * y0.ndim) * y0
    torch.testing.assert_close(solution.ys, exact, rtol=2e-2, atol=0.0)  # interp="linear" between far points


# ------------------------------------------------------------------ failures
TROUBLE = (DOCS / "troubleshooting.md").read_text()


@pytest.mark.parametrize("status", Status, ids=lambda status: status.name)
def test_every_way_to_end_stands_in_the_troubleshooting_page(status):
    assert re.search(rf"^\| `{status.name}` \|", TROUBLE, re.MULTILINE)


EXCEPTIONS = [name for name in node_cuda.__all__ if isinstance(getattr(node_cuda, name), type)
              and issubclass(getattr(node_cuda, name), Exception)]  # fmt: skip


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_every_exception_and_warning_stands_in_the_troubleshooting_page(name):
    assert f"`{name}`" in TROUBLE


def test_every_warning_stands_in_the_troubleshooting_page():
    """The first words of a text that stands where the warning is raised."""
    for source in sorted((ROOT / "node_cuda").rglob("*.py")):
        for found in re.finditer(r'warnings\.warn\(\s*f?["\']([^\n]+?)["\'](?:\n|,)', source.read_text()):
            pieces = re.split(r"\{[^}]*\}", found[1])
            words = max((" ".join(piece.strip(" .:,").split()[:4]) for piece in pieces), key=len)
            assert words in TROUBLE, f"{source.name}: no row for {found[1]!r}"


# ------------------------------------------------------------------ the reference and the navigation
def test_every_public_name_stands_in_the_reference():
    shown = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    names = {name for name in [*node_cuda.__all__, "compile"] if not name.startswith("__")}
    assert names - set(re.findall(r"^::: node_cuda\.(?:\w+\.)*(\w+)$", shown, re.MULTILINE)) == set()


def nav() -> str:
    return (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]


def test_the_navigation_has_every_page_once():
    listed = re.findall(r": ([\w/]+\.md)$", nav(), re.MULTILINE)
    outside = re.findall(r'^    "(\w+\.md)": "', (ROOT / "tools" / "docs_site.py").read_text(), re.MULTILINE)
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted([*pages, *outside])


def test_every_example_has_its_picture_where_the_site_looks_for_it():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {path.stem for path in (DOCS / "images" / "examples").glob("*.png")}
    assert "](../images/examples/{name}.png)" in (ROOT / "tools" / "docs_site.py").read_text()


def test_the_site_asks_the_network_for_nothing():
    """Fonts of a server are off, and no page has a script or picture of one; a hook checks the built pages."""
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings and "extra_javascript" not in settings
    assert not re.search(r"https?://", settings + (DOCS / "site.css").read_text())
    for page in DOCS.rglob("*.md"):
        assert not re.search(r"!\[[^]]*\]\(https?:|<script|<img", page.read_text()), page
