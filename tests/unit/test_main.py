"""`python -m node_cuda`: the report of what is installed and which path is live."""

from __future__ import annotations

import os
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch

from node_cuda import __main__ as environment
from node_cuda.as_torchdiffeq import run as running
from node_cuda.as_torchdiffeq.startup import VARIABLE
from node_cuda.extension import build
from node_cuda.extension import loading as extension


def compiled_module(**facts: object) -> types.ModuleType:
    """Return a substitute of node_cuda._C."""
    module = types.ModuleType(build.MODULE)
    info = {"torch": str(torch.__version__), "kernels": True, "cuda": "13.0", "archs": "8.0+PTX", **facts}
    module.__dict__["build_info"] = lambda: info
    return module


def install(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType | None) -> None:
    """Make the import of node_cuda._C return this module, or raise ModuleNotFoundError."""
    monkeypatch.setitem(sys.modules, build.MODULE, module)
    monkeypatch.setattr(build, "read_note", lambda: None)


def see_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_without_compiled_kernels_the_reference_is_live_and_the_report_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = environment.live_path()
    assert "reference" in path.name
    assert "not installed" in path.why
    assert path.mend is not None and "pip install -v --no-build-isolation" in path.mend


def test_with_kernels_and_a_gpu_the_kernels_are_live(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, compiled_module())
    see_a_gpu(monkeypatch)
    path = environment.live_path()
    assert path.name.startswith("fused kernels")
    assert "compiled at installation (CUDA 13.0, for 8.0+PTX)" in path.why
    assert path.mend is None


def test_kernels_that_the_environment_switches_off_are_not_reported_as_live(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, compiled_module())
    see_a_gpu(monkeypatch)
    monkeypatch.setenv("NODE_CUDA_BACKEND", "reference")
    path = environment.live_path()
    assert "reference" in path.name
    assert "NODE_CUDA_BACKEND=reference is set" in path.why
    assert path.mend == "unset NODE_CUDA_BACKEND"


def test_with_a_gpu_and_a_toolkit_the_report_says_that_the_first_solve_compiles_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, None)
    see_a_gpu(monkeypatch)
    coming = extension.Forecast(True, "the first CUDA solve compiles it, once")
    monkeypatch.setattr(extension, "forecast", lambda: coming)
    path = environment.live_path()
    assert path.name.startswith("fused kernels")
    assert path.why.endswith(coming.why)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"kernels": False}, "is installed without kernels"),
        ({"torch": "2.6.0"}, "was built with torch 2.6.0"),
        ({"archs": "12.0"}, "this GPU has compute capability 9.0"),
    ],
)
def test_a_module_that_cannot_be_used_on_this_gpu_is_a_line_of_the_report(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, object], why: str
) -> None:
    install(monkeypatch, compiled_module(**facts))
    see_a_gpu(monkeypatch)
    monkeypatch.setattr(extension, "forecast", lambda: extension.Forecast(False, "no nvcc"))
    path = environment.live_path()
    assert "reference" in path.name
    assert why in path.why


def test_with_kernels_but_no_gpu_the_reference_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, compiled_module())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = environment.live_path()
    assert "reference" in path.name
    assert "sees no CUDA device" in path.why


def test_kernels_that_do_not_load_are_a_line_of_the_report_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> types.ModuleType:
        raise ImportError("libc10.so: undefined symbol")

    monkeypatch.setattr(extension.importlib, "import_module", broken)
    assert "undefined symbol" in environment.report()
    assert "reference" in environment.live_path().name


def test_a_driver_that_does_not_answer_is_a_line_of_the_report_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", broken)
    assert "driver too old" in environment.report()


def test_a_backend_that_there_is_not_is_a_line_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_CUDA_BACKEND", "fusd")
    (line,) = [line for line in environment.report().splitlines() if line.startswith("backend")]
    assert "every solve will fail: NODE_CUDA_BACKEND must be one of" in line and "Did you mean 'fused'?" in line
    monkeypatch.delenv("NODE_CUDA_BACKEND")
    assert "backend     auto" in environment.report()


@pytest.mark.filterwarnings("ignore:'node_cuda.__main__' found in sys.modules")
def test_an_argument_is_refused_and_not_ignored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, words in (("--chek", "got '--chek'."), ("rnu", "got 'rnu'. Did you mean 'run'?")):
        monkeypatch.setattr(sys, "argv", ["node_cuda", given])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("node_cuda", run_name="__main__")
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert f"the only command is run; {words}" in printed.err and not printed.out


# ------------------------------------------------------------------ run
def test_run_gets_the_program_and_all_of_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(environment, "run", ran.append)
    program = tmp_path / "train.py"
    program.touch()
    for given in ([str(program), "--lr", "1", "-h"], ["-m", "package.train", "-v"]):
        monkeypatch.setattr(sys, "argv", ["node_cuda", "run", *given])
        environment.main()
        assert ran.pop() == given


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["nofile.py"], "run needs a program; got 'nofile.py', which is no file"),
        ([], "python -m node_cuda run PROGRAM.py [ARGUMENTS]"),
        ([], "run needs a program"),
        (["-m"], "run -m needs the name of a module"),
    ],
)
def test_run_without_a_program_says_what_it_needs(
    given: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["node_cuda", "run", *given])
    with pytest.raises(SystemExit) as ended:
        environment.main()
    assert ended.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("given", [["-h"], ["run", "-h"], ["run", "--help"]])
def test_help_shows_how_to_run_a_program(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["node_cuda", *given])
    with pytest.raises(SystemExit) as ended:
        environment.main()
    assert ended.value.code == 0 and "node_cuda run PROGRAM.py [ARGUMENTS]" in capsys.readouterr().out


def test_run_takes_the_name_of_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(running, "install_as_torchdiffeq", lambda: None)
    monkeypatch.setattr(sys, "argv", [])
    for name in ("PYTHONPATH", VARIABLE):
        monkeypatch.setenv(name, "")
    with pytest.raises(SystemExit):
        running.run(["-m", "json.tool", "-h"])
    assert "--sort-keys" in capsys.readouterr().out
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(running.STARTUP)
    assert (Path(os.environ[VARIABLE]) / "node_cuda" / "nn").is_dir()
