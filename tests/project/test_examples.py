"""Every example runs as it stands in its short form, draws its picture and says what it found."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
BOTH = [name for name in NAMES if 'choices=["node_cuda", "torchdiffeq"]' in (EXAMPLES / f"{name}.py").read_text()]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs an example in this process, as `python examples/NAME.py --short ARGUMENTS` would, in an empty folder.

    Returns what it found. A warning is an error here, as in every test.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(name: str, *arguments: str) -> dict[str, float]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--short", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return found(capsys.readouterr().out)

    yield run
    sys.modules["matplotlib.pyplot"].close("all")


def found(output: str) -> dict[str, float]:
    """The numbers in the line `found: NAME=NUMBER ...`, the last of an example."""
    last = output.strip().splitlines()[-1]
    assert last.startswith("found: "), output
    return {name: float(number) for name, number in re.findall(r"(\w+)=(\S+)", last)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_draws_and_finds_the_loss_of_torchdiffeq(name, run, tmp_path):
    pytest.importorskip("sklearn")
    ours = run(name)
    assert ours.keys() >= {"loss", "nfe", "seconds"}
    assert all(map(math.isfinite, ours.values())) and ours["nfe"] > 0
    (picture,) = tmp_path.iterdir()
    assert picture.name == f"{name}.png" and picture.stat().st_size > 5_000
    if name in BOTH and importlib.util.find_spec("torchdiffeq"):
        theirs = run(name, "--library", "torchdiffeq")
        # after a few steps of Adam, which enlarge the difference of the two gradients
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)


def test_the_page_of_the_examples_has_each_of_them_with_its_picture():
    page = (EXAMPLES / "README.md").read_text()
    for name in NAMES:
        assert f"]({name}.py)" in page and f"](../docs/images/examples/{name}.png)" in page, name
    pictures = {path.stem: path.stat().st_size for path in (ROOT / "docs" / "images" / "examples").iterdir()}
    assert pictures.keys() == set(NAMES)
    assert max(pictures.values()) < 60_000


@pytest.mark.slow
def test_two_processes_find_the_loss_of_one(run, tmp_path):
    alone = run("several_processes")
    program = [str(EXAMPLES / "several_processes.py"), "--short", "--out", str(tmp_path / "two.png")]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    started = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
    )
    assert started.returncode == 0, started.stderr
    together = found(started.stdout)
    assert together["processes"] == 2 and alone["processes"] == 1
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-3)  # the steps of each part of the batch differ
