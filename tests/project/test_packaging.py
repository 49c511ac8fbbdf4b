"""A user installs the package in the tree: it is complete, has one version, and installs no second torch."""

from __future__ import annotations

import email
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools
import torch

import node_cuda
from node_cuda import __main__ as environment
from tools import matrix

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(requirements: list[str]) -> set[str]:
    """Return the distributions that a list of requirement strings names."""
    return {re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


@pytest.fixture
def fresh_install(installed: Callable[[str], Path]) -> Path:
    """Return the folder of an install that is not editable. test_build.py has the other settings."""
    return installed("python")


def metadata(installed: Path):
    (folder,) = installed.glob("node_cuda-*.dist-info")
    return email.message_from_string((folder / "METADATA").read_text())


def test_an_install_holds_every_module_and_the_marker_of_its_types(fresh_install: Path) -> None:
    def files(root: Path) -> set[str]:
        found = {path.relative_to(root).as_posix() for path in root.rglob("*.py")}
        return found | {path.relative_to(root).as_posix() for path in root.rglob("py.typed")}

    shipped = files(fresh_install / "node_cuda")
    assert shipped == files(ROOT / "node_cuda")
    assert "py.typed" in shipped
    assert {f"{name}/__init__.py" for name in ("gradients", "kernels", "methods")} <= shipped


def test_an_install_brings_nothing_but_the_package(fresh_install: Path) -> None:
    assert {path.name.split("-")[0] for path in fresh_install.iterdir()} == {"node_cuda"}


def test_the_version_is_written_once(fresh_install: Path) -> None:
    assert metadata(fresh_install)["Version"] == node_cuda.__version__
    assert "version" not in PYPROJECT["project"]
    assert f'"{node_cuda.__version__}"' not in (ROOT / "node_cuda" / "__init__.py").read_text()


def test_the_changelog_names_the_version() -> None:
    assert node_cuda.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_without_torch_the_package_says_what_to_install() -> None:
    line = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_module('node_cuda', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "node_cuda needs PyTorch" in last and "`pip install torch`" in last


def test_the_citation_names_the_version_and_the_license() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"^([\w-]+): (.+)$", text, re.MULTILINE))
    assert fields["cff-version"] == "1.2.0" and fields["type"] == "software" and fields["title"] and fields["message"]
    assert fields["version"] == node_cuda.__version__ and fields["license"] == PYPROJECT["project"]["license"]


def test_each_feature_with_a_package_of_its_own_has_an_extra() -> None:
    """`_extras.extra` names the extra in its message."""
    named = {"plot": "matplotlib", "progress": "tqdm"}
    sources = "".join(path.read_text() for path in (ROOT / "node_cuda").rglob("*.py"))
    used = set(re.findall(r"""extra\("(\w+)[\w.]*", .*?, "(\w+)"\)""", sources))
    assert used == {(package, group) for group, package in named.items()}
    for group, package in named.items():
        assert package in names(PYPROJECT["project"]["optional-dependencies"][group])


def test_the_classifiers_and_the_workflow_name_no_python_that_the_package_refuses() -> None:
    rows = [row.rpartition(" :: ")[2] for row in PYPROJECT["project"]["classifiers"] if "Python :: 3." in row]
    workflow = (ROOT / ".github" / "workflows" / "cpu.yml").read_text()
    (listed,) = re.findall(r"python: (\[.*\])", workflow)
    lowest = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert rows and all(int(row.split(".")[1]) >= int(lowest.split(".")[1]) for row in rows)
    assert set(rows) <= set(eval(listed)) and lowest in eval(listed)


MISSING = "ERROR: No matching distribution found for torch==2.6.*"


@pytest.mark.parametrize("torches", [["2.6"], ["2.6", "newest"]])
def test_what_is_missing_is_a_line_of_the_matrix_which_fails_if_nothing_was_tested(torches, monkeypatch, capsys):
    argv = ["matrix.py", "--pythons", "3.99", "3.11", "--torches", *torches, "--folder", "x"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(matrix, "interpreter", lambda version: None if version == "3.99" else sys.executable)
    monkeypatch.setattr(matrix, "environment", lambda folder, python, torch: MISSING if torch == "2.6" else None)
    monkeypatch.setattr(matrix, "tested", lambda *_: ("2.13.0", "700 passed in 9s"))
    assert matrix.main() == (1 if torches == ["2.6"] else 0)
    output = capsys.readouterr().out.splitlines()
    assert "3.99    2.6             skipped: this machine has no python3.99" in output
    assert f"3.11    2.6             skipped: {MISSING}" in output
    assert ("no pair was tested" in output) == (torches == ["2.6"])


def test_a_pair_without_an_environment_has_the_message_of_what_failed(monkeypatch, tmp_path):
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho 'ensurepip is not available'\nexit 1\n")
    failing.chmod(0o755)
    assert matrix.environment(tmp_path / "made", str(failing), "2.6") == "ensurepip is not available"
    assert not (tmp_path / "made" / "complete").exists()


def test_the_matrix_counts_the_reasons_of_skipped_tests():
    output = "SKIPPED [2] tests/a.py:3: old torch: too old\nSKIPPED [1] tests/b.py:4: old torch: too old\n"
    output += "FAILED tests/a.py::test - SKIPPED [3]\nSKIPPED [1] tests/b.py:4: no GPU\n1 failed, 4 skipped"
    assert matrix.skips(output) == ["  3 skipped: old torch: too old", "  1 skipped: no GPU"]


@pytest.mark.parametrize("remove", [False, True])
def test_the_matrix_deletes_an_environment_only_if_told(remove, monkeypatch, tmp_path):
    argv = ["matrix.py", "--pythons", "3.11", "--torches", "2.6", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv + ["--remove"] * remove)
    monkeypatch.setattr(matrix, "interpreter", lambda version: sys.executable)
    monkeypatch.setattr(matrix, "environment", lambda folder, *_: folder.mkdir())
    monkeypatch.setattr(matrix, "tested", lambda *_: ("2.6.0", "700 passed in 9s"))
    assert matrix.main() == 0
    assert (tmp_path / "python3.11-torch2.6").exists() != remove


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("700 passed in 9s", 0),
        ("1 failed, 699 passed in 9s", 1),
        ("no output", 1),
        ("stopped before its end, with code 2: 700 passed in 9s", 1),
    ],
)
def test_a_test_that_fails_in_one_environment_fails_the_matrix(line, code, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--pythons", "3.11", "--torches", "newest", "--folder", "x"])
    monkeypatch.setattr(matrix, "interpreter", lambda version: sys.executable)
    monkeypatch.setattr(matrix, "environment", lambda *_: None)
    monkeypatch.setattr(matrix, "tested", lambda *_: ("2.13.0", line))
    assert matrix.main() == code
    assert capsys.readouterr().out.splitlines()[-1] == f"3.11    2.13.0          {line}"


def test_torch_is_a_dependency_but_not_a_build_requirement(fresh_install: Path) -> None:
    assert "torch" not in names(PYPROJECT["build-system"]["requires"])
    required = [row for row in metadata(fresh_install).get_all("Requires-Dist") if "extra ==" not in row]
    assert names(required) == {"torch", "numpy", "scipy"}


def test_an_older_setuptools_is_refused_with_the_command_to_type(monkeypatch) -> None:
    """Without build isolation the build runs with the setuptools of the environment."""
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"this Python has 65\.5\.0\. Type `pip install --upgrade setuptools`"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_the_installed_torch_satisfies_the_requirement_of_the_package() -> None:
    (lowest,) = (row for row in PYPROJECT["project"]["dependencies"] if row.startswith("torch"))
    assert torch.__version__.split("+")[0] >= torch.torch_version.TorchVersion(lowest.removeprefix("torch>="))


def test_python_dash_m_node_cuda_names_versions_devices_and_the_live_path() -> None:
    done = subprocess.run([sys.executable, "-m", "node_cuda"], capture_output=True, text=True, cwd=ROOT, check=True)
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    keys = [key for key, _ in rows]
    assert keys[:3] == ["node_cuda", "python", "torch"]
    assert "device" in keys
    assert node_cuda.__version__ in done.stdout
    assert torch.__version__ in done.stdout
    assert environment.live_path().name in done.stdout
    assert environment.live_path().why in done.stdout
