"""README.md and the pages in docs/ are true: their examples print what their comments say, and their links resolve."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import F64, Counting, is_adaptive, linspace

from node_cuda import METHODS, TABLEAUS, solve
from node_cuda.gradients.registry import GRADIENTS
from node_cuda.methods.adams import MAX_ORDER, MIN_ORDER
from node_cuda.methods.implicit.tableau import Rosenbrock
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS
from node_cuda.options import AdamsOptions

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "bench" / "README.md", ROOT / "bench" / "results" / "README.md"]
README, METHODS_PAGE = PAGES[0].read_text(), (ROOT / "docs" / "methods.md").read_text()
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def table(first: str, page: str) -> list[list[str]]:
    """Return the body of the table whose first column has this heading: a list of cells for each row."""
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


METHOD_ROWS = {row[0]: row[1:] for row in table("name", METHODS_PAGE)}


# ------------------------------------------------------------------ the examples
def agrees(printed: str, promised: str) -> bool:
    """Return whether two texts have the same words, and the same numbers up to one unit of the last promised digit."""
    if NUMBER.sub("#", printed).split() != NUMBER.sub("#", promised).split():
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(promised), strict=True)
    return all(abs(float(a) - float(b)) <= 1.01 * 10.0 ** -len(b.partition(".")[2]) * ("." in b) for a, b in pairs)


def examples(page: str) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def registry_put_back():
    """Restore the registries afterwards, because an example may add a gradient mode or a method."""
    registries: tuple[dict[str, Any], ...] = (GRADIENTS, TABLEAUS)
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def torchdiffeq_put_back(monkeypatch):
    """Let an example import torchdiffeq as if it was not imported before, and restore it afterwards."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torchdiffeq"}
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "torchdiffeq"]:
        del sys.modules[name]
    sys.modules.update(before)


RUN = [page.relative_to(ROOT).as_posix() for page in PAGES if examples(page.relative_to(ROOT).as_posix())]


@pytest.mark.usefixtures("registry_put_back", "torchdiffeq_put_back", "interpreted")
@pytest.mark.parametrize("page", RUN)
def test_the_examples_of_a_page_print_what_their_comments_say(page):
    """One after another, with the names of those before."""
    names = {"__name__": "page"}
    for example in examples(page):
        promised = re.findall(r"^ *print\(.*\) +# (.*)$", example, re.MULTILINE)
        assert len(promised) == example.count("print(")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(example, names)
        lines = printed.getvalue().splitlines()
        assert len(lines) == len(promised)
        for line, promise in zip(lines, promised, strict=True):
            assert agrees(line, promise), f"printed {line!r}, promised {promise!r}"


def test_there_is_an_example_of_at_most_twelve_statements():
    (example,) = examples("README.md")
    assert len([line for line in example.splitlines() if line.strip() and "import" not in line]) <= 12


# ------------------------------------------------------------------ the table of methods
def test_the_table_lists_every_method_in_the_order_of_the_registry():
    assert tuple(METHOD_ROWS) == METHODS


@pytest.mark.parametrize("name", TABLEAUS)
def test_a_row_of_the_table_is_what_the_tableau_says(name):
    tableau = TABLEAUS[name]
    order, embedded, stages, _, interpolant, kind = METHOD_ROWS[name]
    assert order == str(tableau.order)
    assert embedded == ("" if tableau.embedded_order is None else str(tableau.embedded_order))
    assert stages == str(tableau.stages)
    assert kind == ("adaptive" if tableau.adaptive else "fixed grid")
    if not tableau.adaptive:
        assert interpolant == "linear (cubic)"
        return
    accurate = tableau.accurate
    if accurate is not None and accurate.extra:
        assert interpolant == f"order {tableau.dense.order} (order {accurate.order}, {accurate.extra} extra)"
    else:
        assert interpolant == f"order {accurate.order} (torchdiffeq's: order {tableau.dense.order})"


@pytest.mark.parametrize("name", IMPLICIT_TABLEAUS)
def test_a_row_of_an_implicit_method_is_what_its_tableau_says(name):
    tableau = IMPLICIT_TABLEAUS[name]
    order, embedded, stages, _, interpolant, kind = METHOD_ROWS[name]
    dense_order = tableau.dense_order if isinstance(tableau, Rosenbrock) else tableau.dense.order
    assert (order, stages) == (str(tableau.order), str(tableau.stages))
    if tableau.adaptive:
        assert embedded == str(tableau.embedded_order)
        assert (interpolant, kind) == (f"order {dense_order}", "adaptive, implicit")
    else:
        assert embedded == ""
        assert (interpolant, kind) == (f"linear (order {dense_order})", "fixed grid, implicit")


def evaluations_of_one_more_step(name: str) -> int:
    """Return the evaluations of one step: the difference between two solves that differ by one step."""

    def nfe(steps: int) -> int:
        func = Counting(lambda t, y: -y)
        options = {"step_size": 0.125}
        if is_adaptive(name):
            options = {"first_step": 0.125, "min_step": 0.125, "max_step": 0.125}
        result = solve(func, torch.ones(2, dtype=F64), linspace(0.0, 0.125 * steps, 2), method=name, options=options)
        assert result.stats.accepted == steps and result.stats.rejected == 0
        return func.nfe

    return nfe(9) - nfe(8)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "scipy_solver"])
def test_a_step_costs_the_evaluations_of_the_table(name):
    low, _, high = METHOD_ROWS[name][3].partition(" to ")
    assert int(low) <= evaluations_of_one_more_step(name) <= int(high or low)


def test_the_rows_of_the_adams_methods_are_their_options():
    assert METHOD_ROWS["explicit_adams"][0] == str(MIN_ORDER)
    for name in ("implicit_adams", "fixed_adams"):
        assert METHOD_ROWS[name][0] == f"up to {MAX_ORDER}"
        assert METHOD_ROWS[name][3] == f"2 to {1 + AdamsOptions().max_iters}"
    assert f"`max_order` ({MIN_ORDER} to {MAX_ORDER})" in METHODS_PAGE


def test_the_table_of_gradient_modes_is_the_registry():
    rows = [row[0] for row in table("`gradient=`", README)]
    assert sorted(rows) == sorted(f'`"{name}"`' for name in GRADIENTS)


# ------------------------------------------------------------------ links and commands
def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_their_anchors_resolve(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}#{anchor}"


def test_the_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^    make (\w+)", README, re.MULTILINE)
    assert commands
    for target in commands:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_pages_have_the_markers_that_the_report_fills(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from parts import pages

    names = {found["name"] for found in pages.BLOCK.finditer(README)}
    assert names == {"memory-short", "speed-short", "compiled-sentence"}
    assert names <= set(pages.BLOCKS)
