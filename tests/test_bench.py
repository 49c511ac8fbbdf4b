"""The benchmarks run from end to end at their smallest settings, and their pages are made from their JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
MACHINE_FIELDS = {"date", "command", "commit", "dirty", "device", "cores", "threads", "torch", "node_cuda"}


def run_quick(script: str, out: Path) -> dict:
    """The JSON that `bench/SCRIPT --quick` writes."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run(
        [sys.executable, str(BENCH / f"{script}.py"), "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr or run.stdout
    return json.loads((out / f"{script}-cpu.json").read_text())


@pytest.fixture
def report(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(str(BENCH))
    import report

    return report


def test_memory_vs_steps_trains_measures_and_writes_its_results(tmp_path):
    for needed in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(needed)
    result = run_quick("memory_vs_steps", tmp_path)
    assert result["machine"].keys() >= MACHINE_FIELDS
    assert result["training"]["test_accuracy"] > 0.1  # guessing gets a tenth of the digits right
    assert len(result["cells"]) == 4
    for cell in result["cells"]:
        assert cell["peak_mib"] > 0 and cell["seconds"] > 0, cell
        assert cell["nfe"] == 2 * cell["steps"]  # midpoint
    memory = {(cell["function"], cell["steps"]): cell["peak_mib"] for cell in result["cells"]}
    few, many = sorted({cell["steps"] for cell in result["cells"]})
    assert memory["odeint", many] > 2 * memory["odeint", few]
    assert memory["odeint", many] > memory["odeint_adjoint", many]
    assert "peak memory" in result["sentence"]
    assert (tmp_path / "memory_vs_steps-cpu.png").stat().st_size > 10_000


def test_speed_compares_with_torchdiffeq_and_writes_its_results(tmp_path):
    for needed in ("rich", "torchdiffeq"):
        pytest.importorskip(needed)
    result = run_quick("speed", tmp_path)
    assert result["machine"].keys() >= MACHINE_FIELDS
    forward, backward = result["rows"]
    for row in (forward, backward):
        assert len(row["ratio"]) == 3  # median and quartiles
        for library in ("node_cuda", "torchdiffeq"):
            assert row["libraries"][library].keys() >= {"milliseconds", "nfe", "nfe_backward", "error"}
    assert forward["libraries"]["node_cuda"]["nfe"] == forward["libraries"]["torchdiffeq"]["nfe"]
    assert backward["libraries"]["node_cuda"]["nfe_backward"] > 0


def test_the_slope_of_a_power_law_is_its_exponent(report):
    assert report.slope({n: 3.0 * n**0.75 for n in (8, 16, 64)}) == pytest.approx(0.75)


def test_a_cell_that_failed_is_a_value_in_the_table(report):
    cells = [
        {"library": "node_cuda", "function": "odeint", "steps": 8, "peak_mib": 5.0, "seconds": 0.5},
        {"library": "node_cuda", "function": "odeint", "steps": 16, "failed": "out of memory"},
    ]
    assert [row[1] for row in report.memory_rows({"cells": cells})[1:]] == ["5.0 / 0.500", "failed"]


def test_a_page_is_filled_between_its_markers_and_nowhere_else(report, tmp_path):
    page = "before\n<!-- bench:speed -->\nold\n<!-- /bench -->\nafter\n"
    once = report.filled(page, tmp_path)
    assert once == "before\n<!-- bench:speed -->\n\nNot measured yet.\n\n<!-- /bench -->\nafter\n"
    assert report.filled(once, tmp_path) == once


def test_an_unknown_marker_is_an_error_that_names_the_known_ones(report, tmp_path):
    with pytest.raises(SystemExit, match="memory, memory-short, speed, speed-short"):
        report.filled("<!-- bench:sped -->\n<!-- /bench -->", tmp_path)
