"""The benchmarks run from end to end at their smallest settings, and their pages are made from their JSON.

A measurement that needs a GPU is tested up to the measurement: the launches of kernels.py run on the CPU by the shim,
and the reports are made from invented numbers. test_gpu_script.py tests gpu.sh.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shim import library as shim

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
MACHINE_FIELDS = {"date", "command", "commit", "dirty", "device", "cores", "threads", "torch", "node_cuda"}


def run_as_a_program(script: str, out: Path) -> dict:
    """Return the JSON that `bench/SCRIPT --quick` writes, in a new process, as a user runs it."""
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
def bench(monkeypatch):
    """Imports a module of bench/ by its name."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def run_quick(bench, monkeypatch, tmp_path):
    """Runs `bench/SCRIPT --quick` in this process, and returns the JSON that it writes into tmp_path."""
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def run(script: str) -> dict:
        monkeypatch.setattr(sys, "argv", [str(BENCH / f"{script}.py"), "--quick", "--out", str(tmp_path)])
        bench(script).main()
        return json.loads((tmp_path / f"{script}-cpu.json").read_text())

    return run


# From the bottom up: a folder or module of bench/parts/ imports only from itself and from the lines above its line.
LAYERS = (
    ("common",),
    ("solve",),
    (
        "speed",
        "memory",
        "gradients",
        "kernels",
        "device_loop",
        "endurance",
        "stiff",
        "methods",
        "peers",
        "examples",
        "compiled",
        "gpu",
    ),
    ("losses",),
    ("pages",),
    ("program",),
)


def test_imports_of_the_benchmarks_point_down_only():
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    parts = BENCH / "parts"
    assert {path.stem for path in parts.iterdir() if path.suffix in ("", ".py")} - {"__init__", "__pycache__"} == set(
        level
    )
    wrong = []
    for path in sorted(BENCH.rglob("*.py")):
        own = path.relative_to(parts).parts[0].removesuffix(".py") if parts in path.parents else None
        for package, module, names in re.findall(
            r"^ *from (parts|\w+)(?:\.(\w+)[\w.]*)? import (.+)", path.read_text(), re.MULTILINE
        ):
            if package != "parts":
                wrong += [f"{path} imports the program {package}"] * (BENCH / f"{package}.py").is_file()
                continue
            for name in [module] if module else names.split(", "):
                if own is not None and name != own and level[name] >= level[own]:
                    wrong.append(f"{path} imports {name}")
    assert not wrong


def test_every_python_file_at_the_top_of_bench_is_a_program():
    programs = sorted(BENCH.glob("*.py"))
    assert programs and all('if __name__ == "__main__":' in path.read_text() for path in programs)


@pytest.fixture
def report(bench):
    return bench("parts.pages")


@pytest.mark.slow
def test_memory_vs_steps_trains_measures_and_writes_its_results(tmp_path):
    for needed in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(needed)
    result = run_as_a_program("memory_vs_steps", tmp_path)
    assert result["machine"].keys() >= MACHINE_FIELDS
    assert result["training"]["test_accuracy"] > 0.1  # guessing gets a tenth of the digits right
    assert len(result["cells"]) == 8
    for cell in result["cells"]:
        assert cell["peak_mib"] > 0 and cell["seconds"] > 0, cell
        assert cell["nfe"] == 2 * cell["steps"]  # midpoint
    cells = {(cell["gradient"], cell["steps"]): cell for cell in result["cells"]}
    few, many = sorted({cell["steps"] for cell in result["cells"]})
    memory = {key: cell["peak_mib"] for key, cell in cells.items()}
    assert memory["backprop", many] > 2 * memory["backprop", few]
    assert memory["backprop", many] > max(memory["adjoint", many], memory["discrete", many])
    assert cells["discrete", many]["recompute"] == 0 < cells["discrete, 8 checkpoints", many]["recompute"] < 1
    assert "recompute" not in cells["backprop", many].keys() | cells["adjoint", many].keys()
    assert "peak memory" in result["sentence"] and "N steps taken again" in result["sentence"]
    assert (tmp_path / "memory_vs_steps-cpu.png").stat().st_size > 10_000


@pytest.mark.slow
def test_speed_compares_with_torchdiffeq_and_writes_its_results(run_quick):
    for needed in ("rich", "torchdiffeq"):
        pytest.importorskip(needed)
    result = run_quick("speed")
    assert result["machine"].keys() >= MACHINE_FIELDS
    forward, backward = result["rows"]
    for row in (forward, backward):
        assert len(row["ratio"]) == 3  # median and quartiles
        for library in ("node_cuda", "torchdiffeq"):
            assert row["libraries"][library].keys() >= {"milliseconds", "nfe", "nfe_backward", "error"}
    assert forward["libraries"]["node_cuda"]["nfe"] == forward["libraries"]["torchdiffeq"]["nfe"]
    assert backward["libraries"]["node_cuda"]["nfe_backward"] > 0
    small = {row["case"].rpartition(", ")[2]: row["contestants"] for row in result["small"]}
    assert small.keys() == {"no gradient", "backprop", "adjoint", "discrete"}
    for row in result["small"]:
        assert list(row["contestants"]) == ["node_cuda", "torchdiffeq", "loop by hand"][: 2 + ("step" in row["case"])]
        assert len({contestant["nfe"] for contestant in row["contestants"].values()}) == 1, row  # the same work
        for contestant in row["contestants"].values():
            assert contestant["error"] >= 0 and min(contestant["milliseconds"] + contestant["ratio"]) > 0
        assert row["contestants"]["node_cuda"]["ratio"] == [1.0, 1.0, 1.0]
    assert all(found["gradient"] == "backprop" and found["nfe_backward"] == 0 for found in small["backprop"].values())
    assert small["adjoint"]["node_cuda"]["nfe_backward"] == small["adjoint"]["torchdiffeq"]["nfe_backward"] > 0


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_a_loop_by_hand_takes_the_steps_of_the_method(method, bench):
    def field(t, y):
        return torch.sin(3.0 * t) - y * y

    loop = bench("parts.speed.loops").LOOPS[method]
    y0, t = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    expected = importlib.import_module("node_cuda").odeint(field, y0, t, method=method)[-1]
    torch.testing.assert_close(loop(field, y0, t[:-1], 0.25), expected, rtol=1e-14, atol=0.0)  # to rounding


def test_small_states_have_a_row_for_every_grid_dtype_and_gradient_mode(bench):
    cases = bench("parts.speed.small_cases").SMALL_CASES
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    modes = ["no gradient", "backprop", "adjoint", "discrete"]
    for method in ("euler", "midpoint", "rk4"):
        for steps in ("1 step", "10 steps", "50 steps"):
            for dtype in ("float32", "bfloat16"):
                assert {f"{method}, {steps}, {dtype}, {mode}" for mode in modes} <= set(names)
    others = [name for name in names if not name.startswith(("euler", "midpoint", "rk4"))]
    assert others[0] == "rollout, euler, 1000 steps, float32, no gradient"
    assert others[1:] == [
        f"{use}, float32, {mode}"
        for use in ("normalizing flow, dopri5, 2 outputs", "latent ODE, dopri5, 200 outputs")
        for mode in modes
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_result_of_a_small_state_is_not_timed(dtype, bench, monkeypatch):
    small, cases = bench("parts.speed.small"), bench("parts.speed.small_cases")
    monkeypatch.setattr(small, "by_library", lambda *case: lambda field, y0, t: torch.stack([y0, 2.0 * y0]))
    monkeypatch.setattr(small, "interleaved", lambda *runs, **limits: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=r"node_cuda misses the result of `euler, 1 step.* Nothing is timed"):
        small.measure_small(cases.grid("euler", 1, cases.FORWARD, dtype), torch.device("cpu"), 1)


def small_row(case, ratio, *names):
    """Return a row of small states in which node_cuda takes 2 ms and all others take `ratio` times as long."""
    spread = {name: [1.0] * 3 if name == "node_cuda" else [ratio] * 3 for name in names}
    return {
        "case": case,
        "contestants": {
            name: {"nfe": 4, "nfe_backward": 0, "error": 1e-7, "milliseconds": [2.0 * r for r in value], "ratio": value}
            for name, value in spread.items()
        },
    }


def test_the_rows_of_small_states_keep_those_that_lose_and_the_readme_counts_them(report, tmp_path):
    result = json.loads((BENCH / "results" / "speed-cpu.json").read_text())
    result["small"] = [
        small_row("euler", 0.5, "node_cuda", "torchdiffeq", "loop by hand"),
        small_row("flow", 1.5, "node_cuda", "torchdiffeq"),
    ]
    (tmp_path / "speed-cpu.json").write_text(json.dumps(result))
    block, sentence = report.block("speed-small", tmp_path), "in 1 of 2 rows; the smallest ratio is 0.5 (euler)."
    assert "| euler | 2 (2-2) | 1 (1-1) | 1 (1-1) | 0.5 (0.5-0.5) | 0.5 (0.5-0.5) | 4, 4, 4 | 1e-07, 1e-" in block
    assert "| flow | 2 (2-2) | 3 (3-3) |  | 1.5 (1.5-1.5) |  | 4, 4 | 1e-07, 1e-07 |" in block
    assert sentence in block and report.block("speed-short", tmp_path).endswith(sentence)


def test_results_without_small_states_leave_their_table_unmeasured_and_the_others_as_they_are(report, tmp_path):
    result = json.loads((BENCH / "results" / "speed-cpu.json").read_text())
    result.pop("small", None)
    (tmp_path / "speed-cpu.json").write_text(json.dumps(result))
    assert report.block("speed-small", tmp_path) == "Not measured yet."
    assert "small states" not in report.block("speed-short", tmp_path)


@pytest.mark.slow
def test_stiff_solves_beside_scipy_and_its_tables_hold_all_rows(tmp_path, report, run_quick):
    result = run_quick("stiff")
    methods = [row["method"] for row in result["work"]]
    assert methods == ["rodas5p", "kvaerno5", "SciPy Radau", "SciPy LSODA"]
    assert all(row["error"] < 5 and row["ms"] > 0 for row in result["work"])
    assert [row["status"] for row in result["batch"]] == ["SUCCESS"] * 2
    assert all(row["nfe_backward"] > 0 for row in result["gradients"] if row["gradient"] in ("discrete", "adjoint"))
    shown = report.block("stiff", tmp_path)
    assert shown.count("\n|") == sum(len(result[part]) + 2 for part in ("work", "batch", "gradients"))


# ---- work against precision, beside the peers


@pytest.mark.slow
def test_peers_measures_who_is_installed_and_says_who_is_left_out(tmp_path, report, run_quick):
    pytest.importorskip("torchdiffeq")
    result = run_quick("peers")
    assert result["complete"] and result["machine"].keys() >= MACHINE_FIELDS
    there = {name for name in ("torchdiffeq", "torchode", "diffrax") if importlib.util.find_spec(name)}
    assert result["peers"].keys() - {"jax"} == there
    assert len(result["left_out"]) == 3 - len(there)
    rows = {(row["problem"], row["by"]): row for row in result["rows"]}
    for row in rows.values():
        assert "failed" not in row and row["error"] < 0.02 and min(row["milliseconds"] + row["ratio"]) > 0, row
    for problem, ours, theirs in (
        ("spiral", "node_cuda backprop", "torchdiffeq backprop"),
        ("Van der Pol", "node_cuda", "torchdiffeq"),
    ):
        assert rows[problem, ours]["nfe"] == rows[problem, theirs]["nfe"] > 0
        # the same steps; torchdiffeq rounds the times to the dtype of the state
        assert rows[problem, ours]["error"] == pytest.approx(rows[problem, theirs]["error"], rel=0.1)
    assert rows["spiral", "node_cuda discrete"]["nfe_backward"] > 0
    block = report.block("peers", tmp_path)
    assert block.count("\n|") == len(rows) + 2 and all(sentence in block for sentence in result["left_out"])
    assert ("peers-cpu.png" in {path.name for path in tmp_path.iterdir()}) == bool(
        importlib.util.find_spec("matplotlib")
    )


def test_a_contestant_that_is_wrong_or_fails_keeps_its_row_and_is_not_timed(bench):
    peers, contestants = bench("peers"), bench("parts.peers.torch_contestants")
    problem = bench("parts.peers.problems").QUICK_PROBLEMS[0]
    expected = bench("parts.peers.problems").exact(problem)

    class Wrong(contestants.Ours):
        def forward(self, field, y0):
            ys, steps = super().forward(field, y0)
            return 2 * ys, steps

    makers = {
        "node_cuda": lambda: contestants.Ours(problem, 1e-3, "backprop"),
        "wrong": lambda: Wrong(problem, 1e-3, "backprop"),
        "lost": lambda: contestants.Ours(problem, 1e-3, "no such mode"),
    }
    found = peers.measure(problem, 1e-3, makers, expected, torch.device("cpu"), 3, 0.0)
    right, wrong, lost = found
    assert right["ratio"] == (1.0, 1.0, 1.0) and "milliseconds" not in wrong.keys() | lost.keys()
    assert "the relative error is" in wrong["failed"] and "no such mode" in lost["failed"]


def test_compiled_solves_take_part_but_in_a_quick_run(bench):
    contestants, problem = bench("parts.peers.torch_contestants"), bench("parts.peers.problems").QUICK_PROBLEMS[0]
    assert "node_cuda compiled" not in contestants.ours(problem, 1e-3, quick=True)
    made = contestants.ours(problem, 1e-3)["node_cuda compiled"]()
    assert made.arguments == {"gradient": "discrete", "options": {"compile": True}}


@pytest.mark.usefixtures("interpreted")
def test_the_evaluations_of_a_compiled_solve_are_those_of_its_statistics(bench):
    """Its native code calls no Python, and so the counter of calls has only those of the tracing."""
    contestants, problem = bench("parts.peers.torch_contestants"), bench("parts.peers.problems").QUICK_PROBLEMS[0]
    makers = contestants.ours(problem, 1e-3)
    compiled, eager = (makers[name]() for name in ("node_cuda compiled", "node_cuda discrete"))
    found, expected = compiled.solved(), eager.solved()
    assert compiled.stats.loop == "native" and found.nfe == expected.nfe > 12
    assert found.nfe_backward > 0


def test_every_problem_of_the_peers_has_a_field_in_jax_and_another_name(bench):
    problems, fields = bench("parts.peers.problems").PROBLEMS, bench("parts.peers.diffrax_contestant").FIELDS
    assert {problem.jax for problem in problems} == fields.keys()
    assert len({problem.name for problem in problems}) == len(problems) == 6


def peer_row(by, milliseconds, **more):
    return {
        "problem": "spiral", "rtol": 1e-3, "by": by, "nfe": 20, "nfe_backward": 19, "steps": 3, "error": 2e-4,
        "milliseconds": [milliseconds] * 3, "ratio": [milliseconds / 4.0] * 3,
    } | more  # fmt: skip


def test_the_report_of_the_peers_counts_where_they_win(report, tmp_path):
    rows = [
        peer_row("node_cuda discrete", 4.0),
        peer_row("node_cuda backprop", 2.0, nfe_backward=0),
        peer_row("torchdiffeq adjoint", 3.0),  # faster than one way of node_cuda, not than the fastest
        peer_row("diffrax", 1.0, nfe=None, nfe_backward=0),
        {"problem": "spiral", "rtol": 1e-3, "by": "torchode", "failed": "RuntimeError: out of memory"},
    ]
    peers = {"torchdiffeq": "0.2.5", "torchode": "1.0.1", "diffrax": "0.7.2"}
    result = {"machine": MACHINE, "complete": True, "peers": peers, "left_out": [], "rows": rows}
    (tmp_path / "peers-cpu.json").write_text(json.dumps(result))
    block = report.block("peers", tmp_path)
    assert "torchdiffeq is faster than the fastest way of node_cuda in 0 of 1 cases." in block
    assert "diffrax is faster than the fastest way of node_cuda in 1 of 1 cases." in block
    assert "torchode, spiral: RuntimeError: out of memory." in block
    assert "|  |  | diffrax | 1 (1-1) | 0.25 (0.25-0.25) | ~20 | 2e-04 |" in block
    assert "| spiral | 1e-03 | node_cuda discrete | 4 (4-4) | 1 (1-1) | 20+19 | 2e-04 |" in block


# ---- the examples in full


def test_the_examples_run_with_both_libraries_and_their_losses_stand_side_by_side(bench, report, monkeypatch, tmp_path):
    """The runs themselves are in test_examples.py."""
    examples, running = bench("examples"), bench("parts.examples.running")

    def run(name, library, picture, *, short, threads):
        picture.write_text("")
        if name == "jumps":
            return {"failed": "ValueError: no ground to bounce on here"}
        return running.read(f"epoch 1\nfound: loss={1.0 if library == 'node_cuda' else 1.25} nfe=20 seconds=2.0")

    names = ["jumps", "spiral", "stiff_kinetics"]
    monkeypatch.setattr(examples, "run", run)
    monkeypatch.setattr(examples, "installed", lambda library: True)
    monkeypatch.setattr(sys, "argv", ["examples.py", "--quick", "--out", str(tmp_path), "--only", *names])
    with pytest.raises(SystemExit, match=r"Failed: jumps\."):
        examples.main()
    found = json.loads((tmp_path / "examples-cpu.json").read_text())["examples"]
    assert {name: list(by) for name, by in found.items()} == {
        "jumps": ["node_cuda", "torchdiffeq"], "spiral": ["node_cuda", "torchdiffeq"], "stiff_kinetics": ["node_cuda"],
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "examples").iterdir()} == {f"{name}.png" for name in names}
    assert {path.name for path in tmp_path.iterdir()} == {"examples", "examples-cpu.json"}
    block = report.block("examples", tmp_path)
    assert "| spiral | 1 | 1.25 | 2e-01 | 2.0 | 2.0 | 1.00 | 20, 20 |" in block
    assert "| stiff_kinetics | 1 | cannot |  | 2.0 |  |  | 20 |" in block
    assert "jumps (node_cuda): ValueError: no ground to bounce on here." in block


@pytest.fixture
def report_memory(bench):
    return bench("parts.memory.report")


def test_a_cell_that_failed_is_a_value_in_the_table(report_memory):
    cells = [
        {"library": "node_cuda", "gradient": "backprop", "steps": 8, "peak_mib": 5.0, "seconds": 0.5},
        {"library": "node_cuda", "gradient": "backprop", "steps": 16, "failed": "out of memory"},
    ]
    cells.append({"library": "node_cuda", "gradient": "backprop", "steps": 32, "peak_mib": 9.0})  # its time was over
    shown = [row[1] for row in report_memory.memory_rows({"cells": cells})[1:]]
    assert shown == ["5.0 / 0.500", "failed", "9.0 / not timed"]


def memory_cells(growth, library="node_cuda", size=1.0):
    """Return a cell for each mode; its memory grows as this power of N."""
    return [
        {"library": library, "gradient": gradient, "steps": n, "peak_mib": size * n**power, "seconds": 0.5}
        for gradient, power in growth.items()
        for n in (4, 8)
    ]


def test_the_modes_that_recompute_steps_say_how_many(report_memory):
    cells = memory_cells({"backprop": 1.0, "discrete": 0.5, "discrete, 8 checkpoints": 0.0, "adjoint": 0.0})
    for cell in cells:
        if cell["gradient"].startswith("discrete"):
            cell["recompute"] = cell["steps"] / 8 if "8" in cell["gradient"] else 0.0
    sentence = report_memory.memory_sentence({"cells": cells})
    assert "as N^0.50 with the discrete adjoint (2 to 3 MiB), as N^0.00 with the discrete adjoint with 8" in sentence
    assert "takes 8 times less memory and 1.0 times the time, 1.0 times the N steps taken again; and the a" in sentence
    assert sentence.count("taken again") == 1
    head, *_, last = report_memory.memory_rows({"cells": cells})
    assert [title.splitlines()[-1] for title in head[1:]] == ["MiB / s", *["MiB / s / again"] * 2, "MiB / s"]
    assert last[1:] == ["8.0 / 0.500", "2.8 / 0.500 / 0.00", "1.0 / 0.500 / 1.00", "1.0 / 0.500"]


def test_a_page_is_filled_between_its_markers_and_nowhere_else(report, tmp_path):
    page = "before\n<!-- bench:speed -->\nold\n<!-- /bench -->\nafter\n"
    once = report.filled(page, tmp_path)
    assert once == "before\n<!-- bench:speed -->\n\nNot measured yet.\n\n<!-- /bench -->\nafter\n"
    assert report.filled(once, tmp_path) == once


def test_an_unknown_marker_is_an_error_that_names_the_known_ones(report, tmp_path):
    with pytest.raises(
        SystemExit,
        match="device-loop, endurance, examples, gpu, gradient-costs, gradients, grids, kernels, losses, "
        "memory, memory-short, methods, peers, solve, speed, speed-short, speed-small",
    ):
        report.filled("<!-- bench:sped -->\n<!-- /bench -->", tmp_path)


def test_every_page_shows_every_block_and_is_up_to_date(report):
    shown = {found["name"] for page in report.PAGES for found in report.BLOCK.finditer(page.read_text())}
    assert shown == set(report.BLOCKS)
    for page in report.PAGES:
        assert report.filled(page.read_text(), BENCH / "results") == page.read_text(), page


PROGRAMS = ("memory_vs_steps", "speed", "gradients", "endurance", "stiff", "methods", "solve", "kernels",
            "device_loop", "peers", "examples", "gpu_unpack")  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_results_go_where_git_ignores_them_unless_they_are_published(name, bench, monkeypatch, capsys):
    """`make test` after `make bench` finds every tracked file as it was."""
    program, given = bench("parts.program"), []
    script = bench(name)
    monkeypatch.setattr(program.argparse.ArgumentParser, "parse_args", lambda parser: given.append(parser) or stop())
    with pytest.raises(SystemExit):
        script.parse() if hasattr(script, "parse") else script.main()
    monkeypatch.undo()
    (parser,) = given
    beside = ["FOLDER"] if name == "gpu_unpack" else []
    assert parser.parse_args(beside).out == program.LOCAL == ROOT / "build" / "bench"
    assert "build/" in (ROOT / ".gitignore").read_text().splitlines()
    assert parser.parse_args(["--publish", *beside]).out == BENCH / "results"
    with pytest.raises(SystemExit):
        parser.parse_args(["--publish", "--out", "folder", *beside])
    assert "not allowed with argument" in capsys.readouterr().err


def stop():
    raise SystemExit


def test_the_pages_change_only_if_results_are_published(bench, report, monkeypatch, tmp_path):
    program = bench("parts.program")
    page = tmp_path / "page.md"
    page.write_text(behind := "<!-- bench:speed -->\n<!-- /bench -->\n")
    monkeypatch.setattr(report, "PAGES", (page,))
    assert program.written("a.json", program.LOCAL) == "Written: a.json" and page.read_text() == behind
    page = ROOT / "build" / "page.md"  # a page in the project, because messages name its path there
    page.parent.mkdir(exist_ok=True)
    page.write_text(behind)
    monkeypatch.setattr(report, "PAGES", (page,))
    try:
        assert program.written("a.json", program.PUBLISHED) == "Written: a.json; tables changed: build/page.md"
        assert page.read_text() == report.filled(behind, BENCH / "results") != behind
        assert program.written("a.json", program.PUBLISHED) == "Written: a.json; tables changed: none"
    finally:
        page.unlink()


def test_a_quick_run_is_not_published(bench):
    program = bench("parts.program")
    arguments = program.parser("", quick="").parse_args(["--quick", "--publish"])
    with pytest.raises(SystemExit, match="not for the pages"):
        program.begin(arguments)


@pytest.mark.parametrize("order", [("bench", "test"), ("test", "bench")])
def test_make_bench_and_make_test_do_not_affect_each_other(order):
    """Make prints the commands in either order. The benchmark publishes nothing, and tests may compile for long."""
    run = subprocess.run(["make", "-n", "-o", ".venv/.installed", *order], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if "bench/" in line or "pytest" in line]
    assert ["bench" if "bench/" in line else "test" for line in lines] == list(order)
    assert not any(word in run.stdout for word in ("--publish", "--out", "--write", "bench/results"))
    assert "takes about four minutes" in (BENCH / "memory_vs_steps.py").read_text()  # printed before it begins
    settings = (ROOT / "pyproject.toml").read_text()
    assert int(re.findall(r"faulthandler_timeout = (\d+)", settings)[0]) >= 600  # the limit of the whole suite


def test_the_sentence_on_memory_uses_the_first_path_of_ours(report_memory):
    """On CUDA there are two paths of ours. The kernels come first."""
    growth = {"backprop": 1.0, "adjoint": 0.0}
    cells = memory_cells(growth, "node_cuda fused") + memory_cells(growth, "node_cuda reference", 100.0)
    assert "(4 to 8 MiB)" in report_memory.memory_sentence({"cells": cells})
    assert [len(row) for row in report_memory.memory_rows({"cells": cells})] == [5, 5, 5]


def test_a_missing_gpu_is_an_error_with_an_explanation(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda needs an NVIDIA GPU"):
        bench("parts.common.machine").chosen("cuda")
    assert bench("parts.common.machine").chosen("cpu") == torch.device("cpu")


def test_a_copy_without_its_repository_reads_its_commit_from_the_environment(bench, monkeypatch):
    machine = bench("parts.common.machine")
    monkeypatch.setattr(machine, "git", lambda *arguments: None)
    monkeypatch.setenv("NODE_CUDA_COMMIT", "abc")
    about = machine.describe(torch.device("cpu"))
    assert (about["commit"], about["dirty"]) == ("abc", None)


def test_a_checkout_that_is_not_installed_has_its_version(bench, monkeypatch):
    libraries = bench("parts.common.libraries")

    def nothing(name):
        raise libraries.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(libraries.metadata, "version", nothing)
    assert libraries.version("node_cuda") == importlib.import_module("node_cuda").__version__
    assert libraries.version("torchdiffeq") is None


def test_rounds_are_at_least_three_and_each_begins_with_the_next_contestant(bench):
    order = []

    def run(name):
        return lambda: order.append(name) or float(ord(name))

    sample = bench("parts.common.timing").interleaved([run("a"), run("b"), run("c")], rounds=9, budget=0.0)
    assert sample == [tuple(map(float, b"abc"))] * 3
    assert "".join(order) == "abcbcacab"


# ---- the primitives


@pytest.fixture
def primitives(bench):
    return bench("parts.kernels.primitives")


def test_every_launcher_that_reads_the_state_has_a_row(primitives):
    launchers = set(re.findall(r"\blaunch_(\w+)\(", (ROOT / "csrc" / "launchers.h").read_text()))
    assert len(launchers) > 15
    assert {row.launcher for row in primitives.PRIMITIVES} == launchers - primitives.WITHOUT_STATE
    assert launchers >= primitives.WITHOUT_STATE
    assert len({row.name for row in primitives.PRIMITIVES}) == len(primitives.PRIMITIVES)


def test_structs_are_packed_as_csrc_lays_them_out(bench, primitives):
    launching = bench("parts.kernels.launching")
    headers = "".join((ROOT / "csrc" / name).read_text() for name in ("launchers.h", "control/control.h"))
    said = {name: int(size) for name, size in re.findall(r"sizeof\((\w+)\) == (\d+)", headers)}
    assert {name: struct.calcsize(layout) for name, layout in launching.LAYOUTS.items()} == {
        name: said[name] for name in launching.LAYOUTS
    }
    dtypes = re.search(r"enum Dtype : int \{(.*?)\}", headers)
    assert dtypes
    codes = dtypes[1]
    assert [code.split(" = ")[0].strip() for code in codes.split(",")] == [
        "FLOAT", "DOUBLE", "HALF", "BFLOAT16", "COMPLEX_FLOAT", "COMPLEX_DOUBLE",
    ]  # fmt: skip
    assert [int(code.split(" = ")[1]) for code in codes.split(",")] == list(range(len(launching.DTYPES)))


@pytest.fixture
def launchers(shim_library):
    """Return csrc/ with its bindings, compiled for the CPU."""
    return shim.import_module(shim_library)


def prepared(primitives, launchers, row, dtype=torch.float32, n=4096):
    return row.prepare(primitives.Workplace(launchers, (0, 0), torch.device("cpu"), dtype, n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_primitive_is_launched_as_its_formula_says(primitives, bench, launchers, dtype):
    kernels = bench("kernels")
    for row in primitives.PRIMITIVES:
        launch = prepared(primitives, launchers, row, dtype)
        with torch.no_grad():
            kernels.require_right(row, launch, dtype)
            launch.kernel()  # again, as in a timed run
        # Sums and errors of halves are float32.
        if dtype.itemsize >= 4:
            assert launch.bytes == row.sizes * 4096 * dtype.itemsize, row.name
        assert all(bool(result.double().isfinite().all()) for result in launch.results), row.name


def test_a_kernel_with_wrong_results_is_not_timed(primitives, bench, launchers):
    kernels = bench("kernels")
    for row in primitives.PRIMITIVES:
        launch = prepared(primitives, launchers, row)
        launch.results[-1].mul_(1.001)
        wrong = launch._replace(kernel=lambda: None)
        with pytest.raises(ValueError, match="is off by"), torch.no_grad():
            kernels.require_right(row, wrong, torch.float32)


def test_the_kernel_benchmark_needs_a_gpu_and_says_so(bench, monkeypatch):
    kernels = bench("kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, lacking in (("cpu", "this is no CUDA device"), ("cuda", "torch finds none here")):
        with pytest.raises(SystemExit, match=lacking):
            kernels.cuda_device(name)


def test_kernels_measures_every_row_and_writes_its_results(bench, primitives, launchers, report, monkeypatch, tmp_path):
    """The CPU runs the kernels by the shim instead of a GPU, and each call is made once."""
    kernels = bench("kernels")

    def once(calls, **_):
        for call in calls:
            call()
        return [1e-6] * 3

    stream = type("Stream", (), {"cuda_stream": 0})
    for module, name, value in (
        (kernels, "device_seconds", once),
        (kernels, "cuda_device", lambda name: torch.device("cpu", 0)),
        (kernels, "compiled_module", lambda device: launchers),
        (kernels, "TARGET_FROM", 2**15),
        (torch.cuda, "current_stream", lambda device: stream),
        (torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"L2_cache_size": 2**16})),
        (
            sys,
            "argv",
            ["kernels.py", "--compile-seconds", "0", "--sizes", str(2**15), str(2**10), "--out", str(tmp_path)],
        ),
    ):
        monkeypatch.setattr(module, name, value)
    kernels.main()
    result = json.loads((tmp_path / "kernels-cpu.json").read_text())
    assert [row["primitive"] for row in result["rows"]] == [row.name for row in primitives.PRIMITIVES] * 2
    assert not any("failed" in row for row in result["rows"])
    assert {row["compiled"]["failed"] for row in result["rows"]} == {"not compiled"}
    assert [row["target"] is None for row in result["rows"]] == sorted(row["target"] is None for row in result["rows"])
    assert [step["sizes"] for step in result["steps"]] == [37, 37]
    assert "| rk_finish | 32 KiB | 256 KiB |" in report.block("kernels", tmp_path)


MACHINE = {
    "command": "python bench/x.py", "device": "Some GPU", "driver": "1.2", "cuda": "13.0", "torch": "2.11", "cores": 2,
    "threads": 1, "node_cuda": "0.1.0", "torchdiffeq": None, "date": "2026-01-01T00:00:00", "commit": "abc",
    "dirty": False,
}  # fmt: skip
BIG = 64 * 2**20


def kernels_row(name, sizes, microseconds, **more):
    rate = sizes * BIG / microseconds * 1e6
    row = {
        "primitive": name, "launcher": name.split(",")[0], "state_bytes": BIG, "target": 0.85, "bytes": sizes * BIG,
        "microseconds": [microseconds] * 3, "bytes_per_second": rate, "of_copy": rate / 1e12,
        "plain": {"microseconds": [10 * microseconds] * 3}, "compiled": {"microseconds": [2 * microseconds] * 3},
    }  # fmt: skip
    return row | {"met": row["of_copy"] >= 0.85} | more


def kernels_result(kernels, rows):
    return {
        "machine": MACHINE,
        "settings": {"dtype": "float32"},
        "complete": True,
        "copies": [{"state_bytes": BIG, "bytes": 2 * BIG, "microseconds": [2 * BIG / 1e6] * 3}],
        "steps": [step for step in [kernels.whole_step(rows, BIG)] if step],
        "rows": rows,
    }


def test_the_report_of_the_kernels_says_what_is_met_and_what_is_not(bench, primitives, report, tmp_path):
    kernels = bench("kernels")
    sizes = {row.name: row.sizes for row in primitives.PRIMITIVES}
    rows = [kernels_row(name, sizes[name], sizes[name] * 70.0) for name in primitives.STEP]  # 0.96 of 1 TB/s
    rows.append(kernels_row("jump", 4, 400.0, compiled={"failed": "not compiled"}))
    rows.append({**kernels_row("commit", 4, 1.0), "met": None, "failed": "RuntimeError: commit failed with error 700"})
    (tmp_path / "kernels-cuda.json").write_text(json.dumps(kernels_result(kernels, rows)))
    block = report.block("kernels", tmp_path)
    assert "Some GPU, driver 1.2, CUDA 13.0, torch 2.11" in block and "torchdiffeq not installed" in block
    assert "A copy of 64 MiB moves 1000 GB/s." in block
    assert "The 7 launches of a step of dopri5 on 64 MiB move 37 times the state and take 2.59e+03 us" in block
    assert "7 of 9 primitives reach the target." in block
    assert "commit: RuntimeError: commit failed with error 700." in block
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in block.splitlines()}
    assert "| 96% | 0.85 |" in lines["rk_finish"]
    assert "| 67% | 0.85 (missed) |" in lines["jump"] and "not compiled |" in lines["jump"]
    assert "| failed |" in lines["commit"]


# ---- whole solves


@pytest.mark.slow
def test_solve_runs_without_a_gpu_and_writes_its_results(run_quick):
    pytest.importorskip("torchdiffeq")
    result = run_quick("solve")
    assert result["machine"].keys() >= MACHINE_FIELDS
    assert [row["case"].split(",")[0] for row in result["rows"]] == ["forward", "step"] * 2
    for row in result["rows"]:
        ours, theirs = row["by"]["node_cuda reference"], row["by"]["torchdiffeq"]
        assert ours["accepted"] == theirs["accepted"] > 0
        assert ours["nfe"] == theirs["nfe"] > 0
        assert len(ours["ratio"]) == 3 and "ratio" not in theirs
        assert row["by"].keys() == {"node_cuda reference", "torchdiffeq"}


def test_contestants_that_are_missing_or_wrong_keep_their_lines(bench, monkeypatch):
    solve, solving = bench("solve"), bench("parts.solve.solving")
    case = bench("parts.solve.cases").QUICK_SOLVE_CASES[2]
    solved = solving.TorchContestant.solved

    def wrong(self):
        found = solved(self)
        return found._replace(quantities=found.quantities._replace(ys=found.quantities.ys * 1.1))

    monkeypatch.setattr(solving.TorchContestant, "solved", wrong)
    monkeypatch.setattr(solve, "installed", lambda library: library == "node_cuda")
    names = ["node_cuda reference", "torchdiffeq", "diffrax"]
    row = solve.measure(case, names, torch.device("cpu"), rounds=3, budget=0.0)
    assert row["by"]["torchdiffeq"] == row["by"]["diffrax"] == {"failed": "not installed"}
    assert "misses the exact solution" in row["by"]["node_cuda reference"]["failed"]
    assert "milliseconds" not in row["by"]["node_cuda reference"]


def test_the_exact_solution_is_ours_if_torchdiffeq_is_not_installed(bench, monkeypatch):
    libraries, solving = bench("parts.common.libraries"), bench("parts.solve.solving")
    problem = solving.make_problem(bench("parts.solve.cases").QUICK_SOLVE_CASES[1], torch.device("cpu"))
    usual = solving.exact(problem)
    monkeypatch.setattr(libraries, "installed", lambda library: library == "node_cuda")
    assert solving.largest_error(solving.exact(problem), usual) < 1e-9


def test_the_report_of_the_solves_compares_the_kernels_with_the_promised_ratios(report, tmp_path):
    def record(milliseconds, **more):
        return {"nfe": 20, "nfe_backward": 0, "accepted": 3, "error": 1e-6, "milliseconds": [milliseconds] * 3} | more

    fast = {"node_cuda fused": record(1.0, ratio=[8.0] * 3, target=4.0, met=True), "torchdiffeq": record(8.0)}
    slow = {"node_cuda fused": record(4.0, ratio=[2.0] * 3, target=3.0, met=False), "diffrax": {"failed": "x" * 30}}
    alone = {"node_cuda fused": record(4.0, target=3.0, met=None), "torchdiffeq": {"failed": "not installed"}}
    rows = [{"case": name, "by": by} for name, by in (("one", fast), ("two", slow), ("three", alone))]
    (tmp_path / "solve-cuda.json").write_text(json.dumps({"machine": MACHINE, "complete": False, "rows": rows}))
    block = report.block("solve", tmp_path)
    assert "rows are missing. 1 of 3 promised ratios reached." in block
    assert f"diffrax: {'x' * 30}." in block
    assert "| one | node_cuda fused | 1 (1-1) | 8 (8-8) | 4 | 20 | 3 | 1e-06 |" in block
    assert "| 2 (2-2) | 3 (missed) |" in block
    assert "|  | torchdiffeq | not installed |" in block


# ---- the loop on the device


def test_the_benchmark_of_the_device_loop_needs_a_gpu_and_says_so(bench, monkeypatch, capsys):
    device_loop = bench("device_loop")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, lacking in (("cpu", "this is no CUDA device"), ("cuda", "torch finds none here")):
        with pytest.raises(SystemExit) as ended:
            device_loop.cuda_device(name)
        assert ended.value.code == 2 and lacking in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_loop, "kernels_for", lambda device: False)
    with pytest.raises(SystemExit):
        device_loop.cuda_device("cuda")
    assert "no compiled kernels" in capsys.readouterr().err


@pytest.fixture
def any_loop(bench, monkeypatch):
    """Use the host loop in plain PyTorch for all loops, because nothing can be captured here."""
    captured = bench("parts.device_loop.captured")
    for name in ("captured", "steps", "cell"):
        monkeypatch.setattr(bench(f"parts.device_loop.{name}"), "FUSED", "node_cuda reference")
    monkeypatch.setattr(captured.Loop, "require", lambda self, stats, gradient: None)
    return captured


def pretended(program, what, **asked):
    """Return the result of a cell without failures. The cell of memory in batches fails."""
    if what == "calls":
        waits = 2 * (asked["loop"] == "while")
        return {"calls": {"graphs": 2, "kernels": 0, "copies": 3, "fills": 0, "waits": waits, "others": 1}}
    if asked["loop"] == "batches":
        return {"failed": "RuntimeError: no such loop here"}
    return {"accepted": asked["steps"], "state_mib": 4.0, "owned_mib": [60.0, 62.0], "left_mib": [0.0, 0.0]}


def a_millisecond_a_step(runs, **_):
    """Run the loops with 32 and 128 steps. The real times of so few steps are noise on a busy machine."""
    for run in runs:
        run()
    return [(0.032, 0.128) * (len(runs) // 2)] * 3


@pytest.mark.slow
def test_device_loop_measures_every_section_and_writes_its_results(bench, any_loop, monkeypatch, tmp_path, report):
    pytest.importorskip("torchdiffeq")
    device_loop = bench("device_loop")
    monkeypatch.setattr(device_loop, "cuda_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(bench("parts.device_loop.cells"), "measured", pretended)
    monkeypatch.setattr(bench("parts.device_loop.steps"), "interleaved", a_millisecond_a_step)
    monkeypatch.setattr(sys, "argv", ["device_loop.py", "--quick", "--budget", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"calls of while, forward; .*memory of batches, forward") as ended:
        device_loop.main()
    assert "node_cuda" not in str(ended.value)
    result = json.loads((tmp_path / "device_loop-cpu.json").read_text())
    assert result["complete"] and result["machine"].keys() >= MACHINE_FIELDS
    (solves,), (training,), (steps,) = (result[section] for section in ("solves", "training", "steps"))
    ours = [f"node_cuda {loop}" for loop in any_loop.LOOPS]
    assert list(solves["by"]) == ["torchdiffeq", *ours]
    for name in ours:
        assert solves["by"][name]["nfe"] == solves["by"]["torchdiffeq"]["nfe"] > 0
        assert len(solves["by"][name]["ratios"]["torchdiffeq"]) == 3
    assert solves["by"]["node_cuda while"]["promises"]["torchdiffeq"] == {"target": 15.0, "met": False}
    for name, record in training["by"].items():
        assert record["nfe_backward"] > 0 and len(record["milliseconds"]) == 3, name
    assert list(steps["by"]) == ["host", "batches", "while"] and len(steps["while_over_batches_microseconds"]) == 3
    assert all(record["microseconds_a_step"] == pytest.approx([1000.0] * 3) for record in steps["by"].values())
    assert [row["met"] for row in result["calls"]] == [None, None, False, True, True, None]
    block = report.block("device-loop", tmp_path)
    assert "RuntimeError: no such loop here." in block and "in the WHILE node beyond what it takes" in block
    assert "| forward | while | 2 | 0 | 3 | 0 | 2 [1, missed] | 1 |" in block
    assert "| adjoint | while | 10 | 4.00 | 60.00 / 62.00 | 0.00 / 0.00 |" in block


def test_selected_sections_have_a_file_with_their_names_and_diffrax_takes_part_on_request(bench, monkeypatch, tmp_path):
    device_loop, asked = bench("device_loop"), []
    monkeypatch.setattr(device_loop, "cuda_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(bench("parts.device_loop.cells"), "measured", lambda *about, **cell: {"failed": "no CUPTI"})

    def measure(case, contestants, promises, against, **_):
        asked.append((list(contestants), against))
        return {"case": case.name, "against": against, "by": {}}

    monkeypatch.setattr(device_loop, "measure", measure)
    for sections in (["calls"], ["training", "solves"], ["solves", "--diffrax"]):
        monkeypatch.setattr(sys, "argv", ["device_loop.py", "--quick", "--out", str(tmp_path), "--only", *sections])
        with contextlib.suppress(SystemExit):  # the failed row
            device_loop.main()
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert {name: [section for section in device_loop.SECTIONS if found[name][section]] for name in found} == {
        "device_loop-calls-cpu.json": ["calls"],
        "device_loop-training-solves-cpu.json": ["training", "solves"],
        "device_loop-solves-cpu.json": ["solves"],
    }
    command = found["device_loop-calls-cpu.json"]["machine"]["command"]
    assert command.startswith("python bench/") and command.endswith(".py --quick --only calls")
    assert ["diffrax" in names and "diffrax" in against for names, against in asked] == [False, False, True]


def test_a_solve_by_the_wrong_loop_keeps_its_line(bench, monkeypatch):
    device_loop, captured = bench("device_loop"), bench("parts.device_loop.captured")
    monkeypatch.setattr(captured, "FUSED", "node_cuda reference")
    monkeypatch.setattr(device_loop, "installed", lambda library: library == "node_cuda")
    case, promises = device_loop.QUICK_SOLVE_CASES[0]
    by = device_loop.measure(
        case, device_loop.SOLVES, promises, ["torchdiffeq"], device=torch.device("cpu"), rounds=3, budget=0.0
    )["by"]
    assert "milliseconds" in by["node_cuda host"] and by["torchdiffeq"] == {"failed": "not installed"}
    assert by["node_cuda while"]["failed"].startswith('RuntimeError: the loop was "host", not "while": ')
    assert by["node_cuda while"]["promises"]["torchdiffeq"]["met"] is None
    stats = type("Stats", (), {"loop": "while", "loop_backward": "host", "why_backward": "it is so"})
    with pytest.raises(RuntimeError, match="the loop of the backward pass was on the host: it is so"):
        captured.LOOPS["while"].require(stats, "adjoint")
    captured.LOOPS["while"].require(stats, None)


def test_calls_are_counted_between_the_beginning_and_the_end_of_a_run(bench):
    cell = bench("parts.device_loop.cell")

    def event(name, ts, cat="cuda_runtime"):
        return {"name": name, "ts": ts, "cat": cat}

    mark = {**event(cell.MARK, 10.0, "user_annotation"), "dur": 20.0}
    inside = ["cudaGraphLaunch_v10000", "cudaGraphLaunch", "cuLaunchKernelEx", "cudaMemcpyAsync", "cudaEventQuery"]
    events = [mark, *(event(name, 15.0) for name in inside), event("cudaEventSynchronize", 30.0, "cuda_driver")]
    events += [event("cudaDeviceSynchronize", 31.0), event("cudaMalloc", 9.0), event("a kernel", 15.0, "kernel")]
    events += [event(cell.MARK, 12.0, "gpu_user_annotation"), {"ph": "M"}]
    assert cell.calls_of(events) == {
        "graphs": 2, "kernels": 1, "copies": 1, "fills": 0, "waits": 1, "others": 1,
        "names": {
            "cudaGraphLaunch": 2, "cuLaunchKernelEx": 1, "cudaMemcpyAsync": 1, "cudaEventQuery": 1,
            "cudaEventSynchronize": 1,
        },
    }  # fmt: skip
    with pytest.raises(SystemExit, match="saw no call"):
        cell.calls_of([mark, event("cudaMalloc", 9.0)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_cells_of_device_loop_run_without_a_gpu_as_far_as_they_can(bench, any_loop):
    cell, cpu = bench("parts.device_loop.cell"), torch.device("cpu")
    for gradient in (None, "adjoint", "discrete"):
        found = cell.memory(any_loop.LOOPS["while"], gradient, rows=2, steps=4, device=cpu)
        assert found["accepted"] == 4 and found["owned_mib"] == found["left_mib"] == [0.0, 0.0]
    with pytest.raises(SystemExit, match="saw no call"):
        cell.calls(any_loop.LOOPS["while, deferred"], None, rows=2, steps=4, device=cpu)


# ---- gradients


@pytest.mark.slow
def test_gradients_compares_its_modes_and_writes_its_results(tmp_path, report, run_quick):
    for needed in ("matplotlib", "torchdiffeq"):
        pytest.importorskip(needed)
    result = run_quick("gradients")
    assert result["machine"].keys() >= MACHINE_FIELDS and result["complete"]
    (times,), (errors,) = result["times"], result["problems"]
    theirs, ours = times["by"]["torchdiffeq adjoint"], times["by"]["discrete"]
    assert len(ours["milliseconds"]) == len(theirs["milliseconds"]) == len(ours["ratio"]) == 3
    assert ours["target"] == 3.0 and ours["met"] in (True, False) and "ratio" not in theirs
    assert ours["nfe"] == theirs["nfe"] > 0 and 0 < ours["nfe_backward"] < theirs["nfe_backward"]
    assert errors["by"]["discrete"]["error_same_steps"] < 1e-6 < errors["by"]["discrete"]["error"] < 1e-3
    assert errors["by"]["torchdiffeq adjoint"]["error_same_steps"] > 1e-6
    assert all(record["peak_mib"] >= 0 for record in errors["by"].values())
    assert (tmp_path / "gradients-cpu.png").stat().st_size > 10_000
    assert "of 1 promised ratios reached" in report.block("gradients", tmp_path)


def test_the_reference_of_the_same_steps_takes_the_steps_of_the_float32_solve(bench):
    problem, steps = bench("parts.gradients.problems").QUICK_PROBLEM, bench("parts.gradients.steps")
    device = torch.device("cpu")
    same, exact = (make(problem, device) for make in (steps.of_same_steps, steps.exact))
    backprop = steps.Step(problem, "backprop", device)()
    assert steps.difference(backprop, same) < 1e-6 < steps.difference(same, exact)


def test_the_flow_carries_the_exact_trace_with_and_without_a_tape(bench):
    field = bench("parts.common.fields").FlowField(2, 8).double()
    state, t = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)

    def move(z):
        return field.net(torch.cat([z, t.double().expand(1)]))

    traces = torch.stack([torch.autograd.functional.jacobian(move, z).trace() for z in state[:, :2]])
    with torch.no_grad():
        plain = field(t, state)
    taped = field(t, state.clone().requires_grad_())
    assert not plain.requires_grad and taped.requires_grad
    torch.testing.assert_close(plain[:, 2], -traces)
    torch.testing.assert_close(taped, plain)
    torch.testing.assert_close(plain[:, :2], torch.stack([move(z) for z in state[:, :2]]))


def test_the_loss_of_a_flow_that_does_nothing_is_that_of_the_normal_distribution(bench):
    problems = bench("parts.gradients.problems")
    starts = problems.eight_gaussians(64, 3, torch.Generator().manual_seed(1))
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = -normal.log_prob(starts[:, :2]).sum(1).mean()
    torch.testing.assert_close(problems.negative_log_likelihood(torch.stack([starts, starts])), expected)


def test_all_gradient_modes_and_all_problems_are_plotted(bench):
    problems, gradients, modes = bench("parts.gradients.problems"), bench("gradients"), bench("parts.common.modes")
    assert len({problem.name for problem in problems.PROBLEMS_PLOTTED}) == 4
    assert set(modes.MODES) >= {*gradients.TIMED, "adjoint, seminorm", "torchdiffeq backprop"}
    assert {mode.gradient for mode in modes.MODES.values()} == set(bench("parts.common.plotting").COLOURS)


def test_a_mode_that_fails_or_is_wrong_keeps_its_line(bench, monkeypatch, tmp_path, report):
    gradients, problems, table = bench("gradients"), bench("parts.gradients.problems"), bench("parts.common.modes")

    monkeypatch.setattr(table.libraries, "installed", lambda library: library == "node_cuda")
    arguments = type("Arguments", (), {"budget": 0.0, "jobs": 1, "threads": 1, "device": "cpu"})
    assert gradients.installed(gradients.TIMED) == ["adjoint", "discrete", "discrete, 8 checkpoints", "backprop"]
    wrong = table.Mode("adjoint", "node_cuda", "odeint", {"gradient": "no such"})
    monkeypatch.setitem(table.MODES, "adjoint", wrong)
    monkeypatch.setattr(gradients, "memory", lambda *key: {"peak_mib": 1.5})
    modes, cpu = ["adjoint", "discrete"], torch.device("cpu")
    times = gradients.measure_times(problems.QUICK_PROBLEM, modes, cpu, arguments)
    errors = gradients.measure_errors(problems.QUICK_PROBLEM, modes, cpu, arguments)
    assert times["by"]["adjoint"]["failed"].startswith("InvalidType") and times["by"]["discrete"]["met"] is None
    (tmp_path / "gradients-cpu.json").write_text(
        json.dumps({"machine": MACHINE, "complete": False, "times": [times], "problems": [errors]})
    )
    block = report.block("gradients", tmp_path)
    assert "rows are missing. 0 of 1 promised ratios reached. adjoint, quick: InvalidType" in block
    assert "| quick | adjoint | failed |  |  |  |" in block


# ---- methods, losses, the picture


def test_methods_compares_evaluations_and_errors(tmp_path, report, run_quick):
    result = run_quick("methods")
    assert {row["method"] for row in result["adaptive"]} == {"dopri5", "dopri8"} and len(result["grids"]) == 4
    for loose, tight in zip(result["adaptive"][::2], result["adaptive"][1::2], strict=True):
        assert loose["rtol"] > tight["rtol"] and loose["nfe"] < tight["nfe"] and loose["error"] > tight["error"]
    assert all(row["nfe"] <= row["budget"] + 1 for row in result["grids"])  # one more tells whether func is the user's
    assert report.block("methods", tmp_path).count("\n|") == 2 + 2
    assert report.block("grids", tmp_path).count("\n|") == 2 + 2


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_compiled_compares_with_the_others_and_writes_its_results(tmp_path, bench, report, run_quick, monkeypatch):
    """The graphs run without the compiler here, so that the time of the compiled solve is not its own."""
    pytest.importorskip("torchdiffeq")
    monkeypatch.setenv("NODE_CUDA_CACHE", "")  # which the program sets
    result = run_quick("compiled")
    assert result["machine"].keys() >= MACHINE_FIELDS
    (row,) = result["rows"]
    ours, eager = row["by"]["node_cuda compiled"], row["by"]["node_cuda eager"]
    assert (ours["loop"], ours["why"], eager["loop"]) == ("native", None, "host")
    assert ours["nfe"] == eager["nfe"] == row["by"]["torchdiffeq"]["nfe"] > 0
    for found in row["by"].values():
        assert "failed" not in found and 0 < found["error"] < 1e-3 and len(found["milliseconds"]) == 3
    assert ours["compile_seconds"] > eager["compile_seconds"] >= 0
    for library in ("torchode", "diffrax"):
        assert library in row["by"] or any(line.startswith(f"{library} is left out") for line in result["missing"])
    assert "| MLP 4x2 | forward | node_cuda compiled |" in report.block("compiled", tmp_path)
    assert "pays after" in report.block("compiled-short", tmp_path)
    assert report.block("compiled-sentence", tmp_path) == "Not measured yet."  # it is about another field
    row["case"] = "MLP 16x2"
    sentence = bench("parts.compiled.report").compiled_sentence(result)
    assert re.match(r"Compiled, with the field 16x2: a solve takes [\d.]+ ms \(node_cuda eager [\d.]+, torch", sentence)


@pytest.mark.parametrize(
    ("ours", "eager", "solves"), [(1.0, 3.0, 5000), (2.0, 3.0, 10000), (3.0, 3.0, None), (4.0, 3.0, None)]
)
def test_a_compiled_solve_pays_after_so_many_solves(bench, ours, eager, solves):
    found = bench("parts.compiled.report")
    by = {
        "node_cuda compiled": {"milliseconds": [ours] * 3, "ratio": [1.0] * 3, "compile_seconds": 10.0},
        "node_cuda eager": {"milliseconds": [eager] * 3, "ratio": [eager / ours] * 3},
        "diffrax": {"ratio": [0.5] * 3},
    }
    row = {"case": "a", "timed": "forward", "goal": 1.5, "by": by}
    assert found.solves_to_pay(row) == solves
    lost = found.lost({"rows": [row]})
    assert "a, forward: 2 times the time of diffrax, 1.5 was the limit" in lost
    assert len(lost) == (2 if ours > eager else 1)


def test_every_lost_row_is_listed_and_no_other(bench):
    losses = bench("parts.losses")
    row = {"case": "a", "target": None, "met": None}
    rows = [{**row, "ratio": [0.5]}, {**row, "case": "b", "ratio": [1.5]}]
    rows.append({**row, "case": "c", "ratio": [2.0], "target": 3.0, "met": False})
    result = {"benchmark": "speed", "machine": {"command": "python bench/speed.py"}, "rows": rows}
    assert losses.losses_block(result).splitlines()[2:] == [
        "- a: 0.5 times as fast as torchdiffeq",
        "- c: 2 times as fast as torchdiffeq, 3 was promised",
    ]
    assert losses.losses_block({**result, "rows": rows[1:2]}) == ""
    cells = [
        {"library": library, "gradient": "adjoint", "steps": 8, "seconds": seconds, "peak_mib": 1.0}
        for library, seconds in (("node_cuda", 2.0), ("torchdiffeq", 1.0))
    ]
    assert losses.of_memory({"cells": cells}) == ["adjoint, N = 8: 2 s against 1 of torchdiffeq"]


def test_the_picture_of_the_readme_is_drawn_from_the_results(bench, tmp_path):
    pytest.importorskip("matplotlib")
    bench("picture").draw(BENCH / "results", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


# ---- endurance


@pytest.mark.slow
def test_endurance_tests_every_gradient_mode_and_writes_its_results(tmp_path, report):
    pytest.importorskip("rich")
    result = run_as_a_program("endurance", tmp_path)
    assert result["machine"].keys() >= MACHINE_FIELDS and result["complete"]
    assert [row["gradient"] for row in result["rows"]] == [
        "backprop", "adjoint", "discrete", "discrete, 1 checkpoint", "event, adjoint",
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["grew"] == [] and row["samples"][-1]["solves"] == result["settings"]["solves"]
        assert all(sample["resident"] > 2**20 and sample["allocated"] is None for sample in row["samples"])
    assert "memory did not grow" in report.block("endurance", tmp_path)


def test_the_loops_recompute_steps_and_pass_an_event(bench):
    tiny = bench("parts.endurance.loops").Tiny(torch.device("cpu"))
    node_cuda = importlib.import_module("node_cuda")
    start, found = tiny.start.clone().requires_grad_(), []

    def solver(*arguments, **options):
        found.append(node_cuda.solve(*arguments, **options, gradient="discrete", checkpoints=1))
        return found[-1].ys

    tiny.outputs(solver)
    assert found[0].stats.accepted > 1 and found[0].stats.recomputed_steps > 0
    time, _ = node_cuda.odeint_event(tiny.field, start, tiny.t[0], event_fn=tiny.passed, rtol=1e-3, atol=1e-3)
    assert 0.0 < time.item() < tiny.t[1]


def test_endurance_ends_with_an_error_if_memory_grew(bench, monkeypatch, tmp_path):
    pytest.importorskip("rich")
    endurance, kept = bench("endurance"), []
    leak = {"a leak": lambda: kept.append(torch.zeros(1)), "none": lambda: torch.zeros(1)}
    monkeypatch.setattr(endurance, "SAMPLES", 2)  # each searches all objects of this large process
    monkeypatch.setattr(endurance, "loops", lambda device: leak)
    monkeypatch.setattr(endurance.program, "begin", lambda arguments: torch.device("cpu"))  # torch's threads stay
    monkeypatch.setattr(sys, "argv", ["endurance.py", "--quick", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"Memory grew: a leak\."):
        endurance.main()
    assert json.loads((tmp_path / "endurance-cpu.json").read_text())["complete"]


def test_memory_that_is_not_freed_counts_as_growth(bench, tmp_path, report):
    endurance, kept = bench("endurance"), []
    samples = endurance.repeated(lambda: kept.append(torch.zeros(1)), 10, torch.device("cpu"), lambda done: None)
    assert endurance.judged(samples)["grew"] == ["tensors"]
    many = [endurance.Sample(solves, 100 * solves, 6, 512) for solves in range(0, 20001, 1000)]
    row = endurance.judged(many)
    assert row["grew"] == ["resident"] and row["bytes_a_solve"] == pytest.approx(100.0)
    assert endurance.judged([each._replace(resident=50 * each.solves) for each in many])["grew"] == []
    assert endurance.judged([*many[:-1], many[-1]._replace(allocated=1024)])["grew"] == ["resident", "allocated"]
    result = {
        "machine": MACHINE, "device": "cuda", "complete": True, "settings": {"warm_up": 0.25},
        "rows": [{"gradient": "adjoint", "seconds": 2.0, **row}],
    }  # fmt: skip
    (tmp_path / "endurance-cuda.json").write_text(json.dumps(result))
    block = report.block("endurance", tmp_path)
    assert "memory grew: adjoint (resident memory)." in block and "+100.0 bytes a solve; 70 would" in block
    assert "| adjoint | 20000 | 0.1 | 0.5 to 1.9 | +100.0 | 6 to 6 | 0.5 to 0.5 |" in block
