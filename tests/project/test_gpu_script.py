"""bench/gpu.sh without a GPU: its checks run on the shim, and its stages run substitutes of the commands."""

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

import node_cuda
from node_cuda.cuda_graphs import cache as graphs
from node_cuda.extension import loading as extension

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
CPU = torch.device("cpu")
MACHINE = {
    "device": "Some GPU", "driver": "1.2", "cuda": "13.0", "capability": "9.0", "python": "3.12.3",
    "torch": "2.11.0+cu130", "commit": "abc", "dirty": None, "date": "2026-01-01T00:00:00", "cores": 2, "threads": 1,
    "node_cuda": "0.1.0", "torchdiffeq": None,
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/ by its name."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


# ---- smoke


@pytest.fixture
def smoke(bench, eager, shim_module, monkeypatch):
    """Return smoke.py, with the shim on the CPU instead of a GPU. Work that would be captured runs again."""
    smoke = bench("smoke")

    @contextlib.contextmanager
    def users_graph(device):
        with monkeypatch.context() as inside:
            inside.setattr(graphs, "capturing", lambda device: True)
            yield

    for owner, name, value in (
        (smoke, "ROWS", (1, 5)),
        (smoke, "TIMES", torch.tensor([0.0, 1.0], dtype=torch.float64)),
        (smoke, "TIGHT", dict(rtol=1e-6, atol=1e-6)),
        (smoke, "LOOSE", dict(rtol=1e-2, atol=1e-2)),
        (smoke, "STEP_COUNTS", (2, 4)),
        (smoke, "another_stream", lambda device: contextlib.nullcontext()),
        (smoke, "users_graph", users_graph),
        (smoke.about, "live_path", lambda: smoke.about.LivePath(smoke.about.FUSED, "it is the shim", None)),
        (smoke.about, "report", lambda: "python      3.12\nself-check  rk_stage: passed"),
        (smoke.machine, "chosen", lambda name: CPU),
        (smoke.faulthandler, "register", lambda *signal, chain: None),
    ):
        monkeypatch.setattr(owner, name, value)
    return smoke


@pytest.mark.slow
def test_every_check_of_smoke_passes_on_the_shim(smoke):
    lines = {name: smoke.checked(name, CPU) for name in smoke.CHECKS}
    assert all(line.startswith(f"ok {name}: ") for name, line in lines.items()), lines
    assert re.search(r"\d+ steps, off by \d", lines["dopri5"])
    assert re.search(r"us a step by batches, .* us a step by while", lines["step-times"])
    assert 'loop_backward "eager" (why_backward: None)' in lines["adjoint-default-stream"]


def test_smoke_reports_what_is_wrong(smoke, shim, monkeypatch):
    """A launch that fails, other bits, a host that repeats, a solve that is not refused."""
    shim.lib.shim_fail_next_launch(1)
    assert smoke.checked("rk4", CPU).startswith("FAILED rk4: RuntimeError: ")
    solve = node_cuda.solve

    def spoiled(*arguments, options=None, **more):
        found = solve(*arguments, options=options, **more)
        if options and found.ys.requires_grad:
            found.ys.register_hook(lambda gradient: gradient * (1 + 1e-9))
        elif options:
            found.ys[-1] += 1e-9
        return found

    monkeypatch.setattr(smoke, "solve", spoiled)
    assert "the first solve of 8 numbers has other bits, off by" in smoke.checked("batches", CPU)
    assert "has other bits" in smoke.checked("while", CPU)
    assert "the first gradient is off by" in smoke.checked("discrete-default-stream", CPU)
    monkeypatch.setattr(smoke, "solve", lambda *arguments, options=None, **more: solve(*arguments, **more))
    line = smoke.checked("discrete-pool-stream", CPU)
    assert line.startswith('FAILED discrete-pool-stream: loop "host" (why: None), loop_backward "host" (why_backward')
    assert smoke.checked("while", CPU) == 'FAILED while: the loop was "host", not "while": None'
    monkeypatch.setattr(smoke, "users_graph", lambda device: contextlib.nullcontext())
    assert "was not refused" in smoke.checked("users-graph", CPU)
    monkeypatch.setattr(smoke.about, "report", lambda: "self-check  jump: in float32 disagrees: off by 1")
    line = "FAILED report: the self-check of 1 kernels did not pass: jump: in float32 disagrees: off by 1"
    assert smoke.checked("report", CPU) == line
    monkeypatch.setattr(smoke.about, "live_path", lambda: smoke.about.LivePath("another", "it is so", None))
    assert smoke.checked("report", CPU) == "FAILED report: another: it is so"


def test_smoke_prints_a_line_a_check_and_ends_with_an_error_if_one_failed(smoke, monkeypatch, capsys):
    for names, code in ((["rk4", "report"], False), (["users-graph"], True), (["rk5"], 2)):
        if code is True:
            monkeypatch.setattr(smoke, "users_graph", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(sys, "argv", ["smoke.py", *names])
        with pytest.raises(SystemExit) as ended:
            smoke.main()
        assert ended.value.code == code
        printed = capsys.readouterr()
        if code == 2:
            assert "there is no check rk5; there are report, dopri5" in printed.err
        else:
            lines = importlib.import_module("parts.gpu.processes").CHECK.findall(printed.out)
            assert [(outcome, name) for outcome, name, _ in lines] == [("FAILED" if code else "ok", n) for n in names]


def test_gpu_sh_runs_every_check_of_smoke_and_no_other(bench, tmp_path):
    found = bench("parts.gpu.items").items(tmp_path, tmp_path, diffrax=True)["smoke"]
    listed = [name for item in found for name in item.checks]
    assert listed == list(bench("smoke").CHECKS)


# ---- stages


@pytest.fixture
def stages(bench, monkeypatch, tmp_path):
    """Run gpu_stages.py with these items on a machine that reports a GPU. Return the exit status, gpu.json and the
    output."""
    stages = bench("gpu_stages")
    monkeypatch.setattr(stages, "asked", lambda work: dict(MACHINE))
    monkeypatch.setattr(stages, "put_in_place", lambda machine: None)
    for name, value in (("SAVING", 0.0), ("LEAST", 0.2)):
        monkeypatch.setattr(stages, name, value)
    monkeypatch.setattr(bench("parts.gpu.processes"), "GIVE_UP", 5.0)

    def run(*arguments, **items):
        monkeypatch.setattr(sys, "argv", ["gpu_stages.py", *arguments, "--out", str(tmp_path / "out")])
        monkeypatch.setattr(stages, "items", lambda results, scratch, diffrax: items)
        with pytest.raises(SystemExit) as ended:
            stages.main()
        found = json.loads((tmp_path / "out" / "gpu.json").read_text())
        return ended.value.code, {line["name"]: line for line in found["lines"]}

    return run


def item(bench, name, script, seconds=10.0, **more):
    return bench("parts.gpu.items").Item(name, seconds, ("sh", "-c", script), **more)


def test_a_check_that_fails_crashes_or_hangs_has_its_line_and_the_stage_goes_on(bench, stages, capsys):
    found = [
        item(bench, "a, b", "echo 'ok a: fine: 1'; echo 'FAILED b: ValueError: no'; exit 1", checks=("a", "b")),
        item(bench, "c, d, e", "echo 'ok c: '; echo 'Fatal: it broke'; kill -SEGV $$", checks=("c", "d", "e")),
        item(bench, "f", "echo begun; sleep 9", seconds=0.4, checks=("f",)),
        item(bench, "g", "trap '' TERM; sleep 9", seconds=0.2),
        item(bench, "h", "echo a row; echo 3 of 4 met; echo Written: x"),
        item(bench, "i", "exit 3"),
        item(bench, "j", "true", needs=("no_such_module",)),
        bench("parts.gpu.items").Item("k", 9.0, ("no-such-program",)),
        bench("parts.gpu.items").Item("l", 9.0, (sys.executable, "bench/no_such_file.py")),
    ]
    code, lines = stages("smoke", "prove", smoke=found, prove=[item(bench, "never", "true")])
    told = {name: (line["outcome"], line["detail"]) for name, line in lines.items()}
    assert code == 1
    assert told.pop("l")[1].startswith("exit status 2: ") and lines["l"]["outcome"] == "FAILED"
    assert told == {
        "a": ("ok", "fine: 1"),
        "b": ("FAILED", "ValueError: no"),
        "c": ("ok", ""),
        "d": ("FAILED", "ended by SIGSEGV: Fatal: it broke"),
        "e": ("FAILED", "not reached, because of d"),
        "f": ("FAILED", "stopped after 0 s: begun"),
        "g": ("FAILED", "stopped after 2 s: it printed nothing"),
        "h": ("ok", "3 of 4 met"),
        "i": ("FAILED", "exit status 3: it printed nothing"),
        "j": ("skipped", "not installed: no_such_module"),
        "k": ("skipped", "not installed: no-such-program"),
        "prove": ("skipped", "not begun: smoke must pass first"),
    }
    last = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert [line.split(" (")[0] for line in last[:3]] == ["ok a", "FAILED b", "ok c"]
    assert last[-1].startswith("3 ok, 7 FAILED, 3 skipped; ")


def test_stages_end_at_the_deadline_and_return_the_results_so_far(bench, stages, tmp_path):
    results = tmp_path / "results"
    found = [
        item(bench, "first", "echo well"),
        item(bench, "cut", "echo 7 rows; sleep 9"),
        item(bench, "late", "echo no"),
    ]
    begun = time.monotonic()
    code, lines = stages("measure", "--deadline", "0.9", measure=found)
    assert time.monotonic() - begun < 3 and code == 0
    assert [line["outcome"] for line in lines.values()] == ["ok", "stopped", "stopped"]
    assert lines["cut"]["detail"] == "stopped after 1 s: 7 rows"
    assert lines["late"]["detail"] == "not begun, because of the deadline"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu.json", "gpu.tgz"}
    with tarfile.open(tmp_path / "out" / "gpu.tgz") as tar:
        log = tar.extractfile("logs/measure-cut.txt")
        assert log is not None and log.read() == b"7 rows\n"
    assert not results.exists()


PYTEST = """tests/test_a.py::test_one PASSED [ 50%]
[gw1] [100%] FAILED tests/test_a.py::test_two[x]
=========================== short test summary info ============================
FAILED tests/test_a.py::test_two[x] - AssertionError: no
"""


def test_a_line_of_tests_counts_them_and_names_those_that_failed(bench):
    processes = bench("parts.gpu.processes")
    tests = bench("parts.gpu.items").Item("tests", 9.0, (), needs=("pytest",))

    def line(log, status):
        return processes.of_process("prove", tests, processes.Ended(status, 5.0, log), "FAILED")

    failed = line(PYTEST + "==== 1 failed, 1 passed in 0.12s ====", 1)
    assert failed.outcome == "FAILED" and failed.detail == "1 failed, 1 passed in 0.12s"
    assert failed.more == ("FAILED tests/test_a.py::test_two[x] - AssertionError: no",)
    stopped = line("\n".join(PYTEST.splitlines()[:2]), None)
    assert stopped.detail.startswith("stopped after 5 s: ") and stopped.detail.endswith("; 1 had passed")
    assert stopped.more == ("[gw1] [100%] FAILED tests/test_a.py::test_two[x]",)
    assert line("==== 12 skipped in 0.12s ====", 0).outcome == "FAILED"  # all of them need a GPU
    assert line("==== 2 passed, 1 skipped in 65.12s (0:01:05) ====", 0).outcome == "ok"
    assert line("==== no tests ran in 0.12s ====", 5).outcome == "FAILED"
    many = processes.failed_tests([f"FAILED tests/test_a.py::test_{n}" for n in range(20)])
    assert len(many) == processes.NAMED + 1 and many[-1] == f"and {20 - processes.NAMED} more, in the log"


def test_the_budgets_are_small_enough_and_all_lines_fit_into_the_returned_output(bench, tmp_path):
    """Only the last 12000 characters of a call's output may be returned."""
    stages, make = bench("gpu_stages"), bench("parts.gpu.items").items
    found = make(tmp_path, tmp_path, diffrax=True)
    assert found.keys() == stages.BUDGETS.keys() and sum(stages.BUDGETS.values()) <= 530
    first, *_, last = found["measure"]
    assert (first.name, last.name) == ("device-loop", "diffrax")
    assert make(tmp_path, tmp_path, diffrax=False)["measure"] == found["measure"][:-1]
    lines = sum(len(each.checks) or 1 for each in (*found["smoke"], *found["prove"]))
    assert lines * 0.5 * bench("parts.gpu.processes").LENGTH < 12_000
    for each in (item for items in found.values() for item in items):
        scripts = [str(word) for word in each.command if str(word).startswith(("bench/", "tests/"))]
        assert scripts and all((ROOT / script).is_file() for script in scripts), each.name


# ---- before it begins, and after its end


def gpu_sh(*arguments, **environment):
    return subprocess.run(
        [str(BENCH / "gpu.sh"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    "arguments, environment, code, sentence",
    [
        (
            ["smoke"],
            {},
            1,
            r"needs an NVIDIA GPU and a CUDA build of torch; torch \S+ finds none\.",
        ),
        (["smok"], {}, 2, "invalid choice: 'smok' .*smoke"),
        (["smoke", "--dead", "x"], {}, 2, "--deadline: invalid float value: 'x'"),
        ([], {}, 2, "required: STAGE"),
        (["smoke"], {"PYTHON": "/no/python"}, 1, "There is no /no/python here"),
    ],
)
def test_gpu_sh_explains_a_missing_gpu_and_a_wrong_argument(arguments, environment, code, sentence, tmp_path):
    run = gpu_sh(*arguments, "--out", str(tmp_path / "out"), **environment)
    assert run.returncode == code and re.search(sentence, run.stderr), run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "out").exists()


def test_a_carried_build_is_used_if_it_is_complete_and_of_these_sources(bench, monkeypatch, tmp_path):
    stages = bench("gpu_stages")
    root, carry = tmp_path / "checkout", bench("build_for_gpu").carried("3.12", "2.11.0", "9.0")
    assert carry == ROOT / "build" / "gpu-py312-torch2.11-sm90" / "carry"
    (root / "node_cuda" / "extension").mkdir(parents=True)
    shutil.copy(ROOT / "node_cuda" / "extension" / "build.py", root / "node_cuda" / "extension")
    shutil.copytree(ROOT / "csrc", root / "csrc")
    carry = root / "carry"
    monkeypatch.setattr(stages, "ROOT", root)
    monkeypatch.setattr(stages, "carried", lambda *about: carry if about == ("3.12", "2.11.0", "9.0") else None)

    def refused(match):
        with pytest.raises(SystemExit, match=match) as refusal:
            stages.put_in_place(MACHINE)
        assert "bench/build_for_gpu.py --python 3.12 --torch 2.11.0 --arch 9.0`" in str(refusal.value)
        assert not list((root / "node_cuda").glob("_C*"))

    refused(r"carry/node_cuda/_C\.\*\.so is missing")
    (carry / "node_cuda").mkdir(parents=True)
    (carry / "node_cuda" / "_C.so").touch()
    note = carry / "node_cuda" / "_build.json"
    for name in ("_C.cpython-312.so", "_build.json"):
        (carry / "node_cuda" / name).write_text('{"sources": "other"}')
    refused("carry was compiled from other sources than those in csrc/")
    note.write_text(json.dumps({"sources": extension.build.digest(ROOT / "csrc")}))
    stages.put_in_place(MACHINE)
    assert {path.name for path in (root / "node_cuda").glob("_*")} == {"_C.cpython-312.so", "_build.json"}


def test_returned_results_are_unpacked_and_shown(bench, stages, tmp_path, monkeypatch):
    written = 'mkdir -p "$0"; echo \'{"benchmark": "kernels", "device": "cuda"}\' > "$0/kernels-cuda.json"'
    gpu_stages = bench("gpu_stages")
    session = gpu_stages.Session

    class WithRow(session):
        def run(self, stage, item):
            super().run(stage, item._replace(command=(*item.command, self.results)))

    monkeypatch.setattr(gpu_stages, "Session", WithRow)
    found = [item(bench, "kernels", written + "; echo 1 of 2 | met"), item(bench, "bad", "exit 1")]
    stages("prove", prove=found)
    results = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["gpu_unpack.py", str(tmp_path / "out"), "--out", str(results)])
    bench("gpu_unpack").main()
    assert {path.name for path in results.iterdir()} == {"kernels-cuda.json", "gpu-prove.json"}
    block = bench("parts.pages").block("gpu", results)
    assert "`bench/gpu.sh prove` (Some GPU, driver 1.2" in block and "commit abc" in block
    assert "| bad | FAILED | 0 | exit status 1: it printed nothing |" in block
    monkeypatch.setattr(sys, "argv", ["gpu_unpack.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"There is no gpu\.json in"):
        bench("gpu_unpack").main()


# ---- the build


def test_the_build_reports_what_is_missing(bench, monkeypatch, tmp_path):
    build = bench("build_for_gpu")
    monkeypatch.setattr(build, "told", lambda *command: None)
    arguments = type("Arguments", (), {"python": "3.12", "torch": "2.11.0", "interpreter": None})
    with pytest.raises(SystemExit, match=r"Python 3\.12 is needed, and python3\.12 on the PATH is not that version"):
        build.interpreter(arguments)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**30}))
    with pytest.raises(SystemExit, match=r"torch needs 8 GiB of disk, and 1\.0 GiB are free"):
        build.environment(tmp_path / "env", arguments)
    with pytest.raises(SystemExit, match=r"it is so\nCould not compile\. The whole output is in "):
        build.run_step("compile", ["sh", "-c", "echo it is so; exit 1"], tmp_path / "log.txt", os.environ)
    assert (tmp_path / "log.txt").read_text() == "it is so\n"


def test_the_build_prints_what_to_carry_and_what_to_type(bench, monkeypatch, tmp_path):
    build = bench("build_for_gpu")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "told", lambda *command: "abc" if "rev-parse" in command else "")
    (tmp_path / "build" / "carry").mkdir(parents=True)
    (tmp_path / "build" / "carry" / "_C.so").write_bytes(b"x" * 2**20)
    text = build.instructions(tmp_path / "build" / "carry", 60.0)
    assert "build/carry/_C.so  1.00 MiB" in text and "Copy the checkout and build/carry (1.0 MiB)." in text
    assert "  NODE_CUDA_COMMIT=abc bench/gpu.sh smoke prove --out FOLDER" in text and "committed" not in text
