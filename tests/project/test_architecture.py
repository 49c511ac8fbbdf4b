"""The layers of the package: every module is in one layer, and imports, including lazy ones, only point down."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

from layers import LAYERS, PACKAGE, PAGES, drawn  # noqa: E402

PLACE = {name: (level, i) for level, layer in enumerate(LAYERS) for i, name in enumerate(layer)}


def modules(package: Path) -> dict[str, Path]:
    """Dotted name below the package ("" for the package itself) -> file."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path, name: str, path: Path) -> set[str]:
    """Return every module that a file names in an import statement, at any place, as a full dotted name.

    Imports in functions and under `if TYPE_CHECKING` count too, because a reader has to know those modules as well.
    """
    here = [package.name, *name.split(".")] if name else [package.name]
    folder = here if path.name == "__init__.py" else here[:-1]
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            targets.update(f"{origin}.{alias.name}" for alias in node.names)
    return targets


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module -> the package's modules that it imports; `from m import x` is m.x if a module, else m."""
    known = modules(package)
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        graph[name] = set()
        for target in imports(package, name, path):
            root, _, inner = target.partition(".")
            if root == package.name:
                graph[name].add(inner if inner in known else inner.rpartition(".")[0])
    return graph


def misplaced(package: Path, place: dict[str, tuple[int, int]]) -> list[str]:
    """Return a sentence for every module without a layer, and for every import that does not point down."""
    sentences = []
    for module, imported in import_graph(package).items():
        full = f"{package.name}.{module}".rstrip(".")
        if module not in place:
            lowest = max((place[name][0] for name in imported if name in place), default=0)
            sentences.append(
                f"{full} has no layer: add {module!r} to LAYERS in tools/layers.py, in the lowest "
                f"layer that fits its job; its imports allow layer {lowest} and above"
            )
            continue
        for name in sorted(imported - {module}):
            if name in place and place[name] >= place[module]:
                sentences.append(
                    f"{full} (layer {place[module][0]}) imports {package.name}.{name}".rstrip(".")
                    + f" (layer {place[name][0]}): move the shared part below both"
                )
    return sentences


def test_imports_only_point_down_and_every_module_has_a_layer() -> None:
    sentences = misplaced(PACKAGE, PLACE)
    assert not sentences, "\n" + "\n".join(sentences)


def test_every_place_in_the_layers_belongs_to_a_module() -> None:
    gone = sorted(set(PLACE) - set(modules(PACKAGE)))
    assert not gone, f"no such module any more: {', '.join(gone)}; take them out of LAYERS"


def test_no_module_has_two_places() -> None:
    assert len(PLACE) == sum(len(layer) for layer in LAYERS)


def test_only_declared_dependencies_are_imported() -> None:
    declared = {"torch", "numpy", "scipy", PACKAGE.name}
    declared.add("typing_extensions")  # torch depends on it
    for name, path in modules(PACKAGE).items():
        roots = {target.partition(".")[0] for target in imports(PACKAGE, name, path)}
        foreign = roots - declared - sys.stdlib_module_names
        assert not foreign, f"{path.name} imports {foreign}, which pyproject.toml does not declare"


def definitions(path: Path) -> set[str]:
    """The functions and classes of a file, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef))
    return names


@pytest.mark.parametrize("page", PAGES)
def test_the_picture_of_the_layers_is_up_to_date(page: str) -> None:
    text = (ROOT / page).read_text()
    assert "<!-- layers -->" in text and drawn(text) == text, "`python tools/layers.py` draws it anew"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_function_that_a_page_names_exists(page: Path) -> None:
    """Pages name code as `gradients/adjoint/mode.py::function`, below node_cuda/."""
    for file, name in re.findall(r"`([\w/]+\.py)::([\w.]+)`", page.read_text()):
        assert (PACKAGE / file).is_file(), f"{page.name} names {file}, which is not in node_cuda/"
        assert name in definitions(PACKAGE / file), f"{page.name} names {name}, which is not in {file}"


@pytest.mark.parametrize(
    "line",
    [
        "from package.top import x",
        "import package.top",
        "from . import top",
        "from .top import x",
        "def f():\n    from package import top",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .top import x",
    ],
)
def test_an_import_that_points_up_is_found_in_every_form_of_import(tmp_path: Path, line: str) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "top.py").write_text("x = 1")
    (package / "bottom.py").write_text(line)
    (sentence,) = misplaced(package, {"bottom": (0, 0), "top": (1, 0), "": (2, 0)})
    assert sentence == "package.bottom (layer 0) imports package.top (layer 1): move the shared part below both"


def test_a_relative_import_out_of_a_subpackage_is_resolved(tmp_path: Path) -> None:
    inner = tmp_path / "package" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").write_text("")
    (inner / "__init__.py").write_text("from .part import x")
    (inner / "part.py").write_text("from ..top import y\nfrom .. import top")
    (tmp_path / "package" / "top.py").write_text("y = 1")
    assert import_graph(tmp_path / "package") == {
        "": set(),
        "inner": {"inner.part"},
        "inner.part": {"top"},
        "top": set(),
    }


def test_the_message_for_a_module_without_a_layer_names_the_possible_layers(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low.py").write_text("x = 1")
    (package / "new.py").write_text("from package.low import x")
    (sentence,) = misplaced(package, {"low": (3, 0), "": (4, 0)})
    assert sentence.startswith("package.new has no layer: add 'new' to LAYERS")
    assert sentence.endswith("layer 3 and above")
