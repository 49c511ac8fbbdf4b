"""Every way to install the package, each in a new folder, and the compilation at the first use.

Sources that are slow to compile are replaced by a few lines, except in tests of csrc/ itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from installs import DECIDING, SETTINGS, checkout, clean, contents, pip, run, write_csrc

from node_cuda._version import __version__
from node_cuda.extension import build
from node_cuda.extension import loading as extension

ROOT = Path(__file__).resolve().parents[2]
TOOLKIT = build.find_toolkit()

has_compiler = pytest.mark.skipif(build.missing_compiler() is not None, reason=build.missing_compiler() or "")


def compiler(test: Callable[..., None]) -> Callable[..., None]:
    """The test needs a C++ compiler."""
    return pytest.mark.compiler(has_compiler(test))


nvcc = pytest.mark.skipif(TOOLKIT is None, reason="no CUDA toolkit on this machine")
cpu_torch = pytest.mark.skipif(torch.version.cuda is not None, reason="this is about a torch without CUDA")

# A module with build information, and a kernel.
STAND_IN = """
#include <Python.h>
#ifdef NODE_CUDA_WITH_KERNELS
extern "C" int launch_nothing();
#endif
static PyObject* build_info(PyObject*, PyObject*) {
#ifdef NODE_CUDA_WITH_KERNELS
  return Py_BuildValue("{s:s,s:O,s:s,s:s,s:i}", "torch", NODE_CUDA_TORCH, "kernels", Py_True, "cuda", "13.0", "archs",
                       NODE_CUDA_ARCHS, "code", launch_nothing());
#else
  return Py_BuildValue("{s:s,s:O,s:O,s:s}", "torch", NODE_CUDA_TORCH, "kernels", Py_False, "cuda", Py_None, "archs",
                       "");
#endif
}
static PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "stand_in", nullptr, -1, methods};
#define JOIN(name) PyInit_##name
#define INIT(name) JOIN(name)
PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&module); }
"""
KERNEL = """
#include "common/launch.h"
__global__ void nothing() {}
extern "C" int launch_nothing() { nothing<<<1, 1>>>(); return static_cast<int>(cudaGetLastError()); }
"""
HEADER = "#include <cuda_runtime.h>\n"
WITH_KERNEL = {"bind/bind.cpp": STAND_IN, "kernels/nothing.cu": KERNEL, "common/launch.h": HEADER}
BROKEN = "#error this does not compile\n"


def ask(target: Path, code: str, **environ: str) -> str:
    """Return what Python prints, with an installed package first on the path, and without this checkout.

    Otherwise a package without a compiled module would use that of an editable install of the checkout.
    """
    alone = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '_EditableFinder' not in repr(f)]"
    done = run(sys.executable, "-c", f"{alone}\n{code}", cwd=target, PYTHONPATH=str(target), **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def report(target: Path, code: str) -> tuple[list[str], dict[str, str]]:
    """Return the lines that Python prints, and the rows of `python -m node_cuda`. One process imports torch once."""
    asks = "import runpy; print('---'); runpy.run_module('node_cuda', run_name='__main__')"
    printed, _, rows = ask(target, f"{code}\n{asks}").partition("---\n")
    return printed.splitlines(), {key: rest for key, _, rest in (row.partition(" ") for row in rows.splitlines())}


def note(package: Path) -> dict[str, str]:
    return json.loads((package / build.NOTE).read_text())


INFO = "import torch, node_cuda._C; print(node_cuda._C.__file__, *node_cuda._C.build_info().values(), sep='|')"


# --- wheels ----------------------------------------------------------------------------------------------------------


def in_fresh_environment(wheel: Path, folder: Path, code: str) -> str:
    """Install the wheel in a new environment, which has this one's torch and nothing of this checkout."""
    done = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    done = run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    # The folder of torch alone: an editable install of this checkout has its line in another .pth file there.
    (packages / "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    done = run(python, "-c", code, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SOLVES = """
import math, sys, torch, node_cuda
assert node_cuda.__file__.startswith(sys.prefix), node_cuda.__file__
y = node_cuda.odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]))
assert abs(y[-1].item() - math.exp(-1)) < 1e-5
from node_cuda.extension import build
print(node_cuda.__version__, build.read_note().setting)
"""


@pytest.mark.slow
def test_a_pure_wheel_is_for_every_machine_and_solves_in_a_fresh_environment(
    installed: Callable[[str], Path], tmp_path: Path
) -> None:
    (wheel,) = (installed("python").parent / "wheel_python").iterdir()
    assert wheel.name == f"node_cuda-{__version__}-py3-none-any.whl"
    assert in_fresh_environment(wheel, tmp_path / "env", SOLVES) == f"{__version__} python"


@pytest.mark.slow
@compiler
def test_a_compiled_wheel_is_for_this_machine_and_solves_in_a_fresh_environment(
    installed: Callable[[str], Path], tmp_path: Path
) -> None:
    (wheel,) = (installed("cpu").parent / "wheel_cpu").iterdir()
    python = "cp{}{}".format(*sys.version_info)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"node_cuda-{__version__}-{python}-{python}-{platform}.whl"
    code = f"{SOLVES}import node_cuda._C; print(node_cuda._C.build_info()['kernels'])"
    assert in_fresh_environment(wheel, tmp_path / "env", code).split() == [__version__, "cpu", "False"]


# --- the three settings ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@compiler
@nvcc
@cpu_torch
def test_force_cuda_builds_a_kernel_against_a_cpu_torch_and_the_report_says_so(tmp_path: Path) -> None:
    """The next test builds all kernels."""
    source, target = checkout(tmp_path / "source", WITH_KERNEL), tmp_path / "target"
    done = pip(source, target, **SETTINGS["cuda"])
    assert done.returncode == 0, done.stdout + done.stderr
    (info,), rows = report(target, INFO)
    is_built_with_kernels(target, info, rows)


def is_built_with_kernels(target: Path, info: str, rows: dict[str, str]) -> None:
    """info: what INFO prints. rows: of `python -m node_cuda`."""
    file, version, kernels, _, archs, *_ = info.split("|")
    assert file.startswith(str(target))
    assert (version, kernels, archs) == (str(torch.__version__), "True", "8.0")
    assert "was compiled at installation" in rows["because"]
    assert "sees no CUDA device" in rows["because"]


@pytest.mark.builds
@compiler
@nvcc
@cpu_torch
def test_force_cuda_builds_the_kernels_against_a_cpu_torch_and_each_explains_a_missing_driver(
    installed: Callable[[str], Path],
) -> None:
    assert TOOLKIT is not None
    target = installed("cuda")
    calls = (
        "_C = node_cuda._C\n"
        "for call in (lambda: _C.step_control(0, 0, 0, 0, (0, 0)), lambda: _C.stage_time(0, 0, 0, 0, (0, 0))):\n"
        "    try:\n"
        "        call()\n"
        "    except (RuntimeError, ValueError) as error:\n"
        "        print(type(error).__name__, error)\n"
        "print(*dir(_C))"
    )
    (info, launch, argument, bound), rows = report(target, f"{INFO}\n{calls}")
    is_built_with_kernels(target, info, rows)
    assert info.split("|")[3] == "{}.{}".format(*TOOLKIT.version)
    assert launch.startswith("RuntimeError node_cuda: step_control failed: cudaError")
    assert argument.startswith("ValueError node_cuda: the address of a struct")
    declared = re.findall(r"^int launch_(\w+)\(", (ROOT / "csrc" / "launchers.h").read_text(), re.MULTILINE)
    assert len(declared) > 10
    assert set(declared) <= set(bound.split())


USED = """
import sys, torch, node_cuda
from node_cuda.extension import build
y0 = torch.linspace(0.1, 2.0, 7, requires_grad=True)
y = node_cuda.odeint(lambda t, y: torch.sin(t) - y * y, y0, torch.tensor([0.0, 0.3, 1.0]))
y.sum().backward()
print(y.detach().numpy().tobytes().hex(), y0.grad.numpy().tobytes().hex(), 'node_cuda._C' in sys.modules)
print(build.find_csrc())
"""


@pytest.fixture(scope="session")
def used(installed: Callable[[str], Path]) -> Callable[[str], tuple[list[str], dict[str, str]]]:
    """Return what a process tells that solves by the install in one of the settings. One process serves all tests."""
    known: dict[str, tuple[list[str], dict[str, str]]] = {}

    def of(setting: str) -> tuple[list[str], dict[str, str]]:
        if setting not in known:
            known[setting] = report(installed(setting), USED if setting == "python" else USED + INFO)
        return known[setting]

    return of


@pytest.mark.slow
def test_a_pure_python_install_has_no_compiled_module_and_says_why(installed: Callable[[str], Path], used) -> None:
    target = installed("python")
    assert not [*target.rglob("*.so")]
    (_, found), rows = used("python")
    assert "is not installed (NODE_CUDA_BUILD=python is set)" in rows["because"]
    assert Path(found) == target / "node_cuda" / "csrc"


def test_csrc_is_in_the_source_archive_and_in_the_install_so_that_kernels_can_be_compiled_later(
    installed: Callable[[str], Path],
) -> None:
    target = installed("python")
    checked_out = contents(ROOT / "csrc")
    compiled = {name for name in checked_out if name.endswith((".cpp", ".cu"))}
    assert len(compiled) > 15
    (unpacked,) = (target.parent / "unpacked_python").iterdir()
    for csrc in (unpacked / "csrc", target / "node_cuda" / "csrc"):
        assert contents(csrc) == checked_out
        assert {Path(path).relative_to(csrc).as_posix() for path in build.sources(csrc, kernels=True)} == compiled


@pytest.mark.compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which the shim is for")
def test_the_sources_in_a_pure_python_install_include_only_headers_in_it(
    installed: Callable[[str], Path], tmp_path: Path
) -> None:
    """g++ lists what they include, with the shim's headers in place of CUDA's; other tests compile the same files."""
    csrc = installed("python") / "node_cuda" / "csrc"
    own = build.include_folders(build.Recipe("cuda", ""), csrc)
    torchs = Path(torch.__file__).parent / "include"
    folders = [*own, str(ROOT / "tests" / "support" / "shim"), sysconfig.get_path("include"), str(torchs)]
    for source in build.sources(csrc, kernels=True):  # one by one: each source must include everything that it needs
        flags = ["-x", "c++", "-std=c++20", "-MM", "-DNODE_CUDA_WITH_KERNELS", *(f"-I{folder}" for folder in folders)]
        done = run("g++", *flags, source, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@compiler
def test_the_c_plus_plus_part_builds_against_a_cpu_torch_and_says_that_it_has_no_kernels(
    installed: Callable[[str], Path], used
) -> None:
    target = installed("cpu")
    (_, _, info), rows = used("cpu")
    file, version, kernels, cuda, archs = info.split("|")
    assert file.startswith(str(target))
    assert (version, kernels, cuda, archs) == (str(torch.__version__), "False", "None", "")
    assert "is installed without kernels (NODE_CUDA_BUILD=cpu is set)" in rows["because"]
    assert "reference" in rows["live"]


@pytest.mark.slow
@compiler
def test_a_solve_on_the_cpu_imports_no_compiled_module_and_has_the_same_bits(used) -> None:
    (without, _), _ = used("python")
    (solved, _, _), _ = used("cpu")
    assert solved == without
    assert without.endswith("False")


@pytest.mark.slow
@compiler
def test_an_editable_install_builds_in_place_and_a_later_pure_python_one_removes_the_module(
    tmp_path: Path,
) -> None:
    source = checkout(tmp_path / "source", {"bind/bind.cpp": STAND_IN})
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    (packages,) = venv.glob("lib/*/site-packages")
    (packages / "torch.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))

    def install(setting: str) -> None:
        options = ["--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed"]
        command = [sys.executable, "-m", "pip", "--python", python, "install", *options, "-e", source]
        done = run(*command, cwd=tmp_path, NODE_CUDA_BUILD=setting)
        assert done.returncode == 0, done.stdout + done.stderr

    install("cpu")
    done = run(python, "-c", INFO, cwd=tmp_path)
    assert done.stdout.startswith(f"{source / 'node_cuda' / '_C'}"), done.stdout + done.stderr
    install("python")
    assert not [*(source / "node_cuda").glob("_C*")]
    assert note(source / "node_cuda")["setting"] == "python"


# --- builds that fail --------------------------------------------------------------------------------------------


def test_a_build_that_cannot_import_torch_is_pure_python_and_warns_in_one_line(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('No module named torch')")
    source = checkout(tmp_path / "source", {"bind/bind.cpp": STAND_IN})
    done = pip(source, tmp_path / "target", PYTHONPATH=str(hidden))
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in (done.stdout + done.stderr).splitlines() if "***" in line)
    assert "installed as pure Python, without CUDA kernels: the build cannot import torch" in line
    assert "--no-build-isolation" in line
    assert "the build cannot import torch" in note(tmp_path / "target" / "node_cuda")["why"]


@compiler
def test_a_build_that_requires_kernels_and_cannot_make_them_explains_its_failure(tmp_path: Path) -> None:
    source = checkout(tmp_path / "source", {"bind/bind.cpp": STAND_IN})
    done = pip(source, tmp_path / "target", FORCE_CUDA="1", CUDA_HOME="/nowhere")
    assert done.returncode != 0
    sentence = "*** node_cuda: FORCE_CUDA=1 asks for kernels, but CUDA_HOME=/nowhere has not a CUDA toolkit"
    assert sentence in done.stdout + done.stderr
    assert not (tmp_path / "target").exists()


@pytest.mark.slow
@compiler
@cpu_torch
def test_sources_that_do_not_compile_give_pure_python_and_a_warning_unless_kernels_are_required(
    tmp_path: Path,
) -> None:
    source = checkout(tmp_path / "source", {"bind/bind.cpp": BROKEN})
    done = run(sys.executable, "setup.py", "bdist_wheel", cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    said = "*** node_cuda: installed as pure Python, without CUDA kernels: node_cuda._C did not compile"
    assert said in done.stdout + done.stderr
    (built,) = (source / "build").glob("lib*")
    assert note(built / "node_cuda")["setting"] == "python"
    done = run(sys.executable, "setup.py", "build_ext", cwd=source, NODE_CUDA_BUILD="cpu")
    assert done.returncode != 0


# --- the decision ----------------------------------------------------------------------------------------------------


def test_an_unknown_setting_is_an_error_with_an_explanation() -> None:
    with pytest.raises(build.BuildError, match="NODE_CUDA_BUILD must be one of auto, python, cpu, cuda; got gpu"):
        build.choose({"NODE_CUDA_BUILD": "gpu"})


@compiler
@cpu_torch
def test_kernels_for_a_torch_without_cuda_must_be_forced() -> None:
    with pytest.raises(
        build.BuildError, match="NODE_CUDA_BUILD=cuda asks for kernels, but this torch is built without"
    ):
        build.choose(clean(NODE_CUDA_BUILD="cuda"))
    assert build.choose(clean()).setting == "cpu"


def test_without_a_compiler_a_build_is_pure_python_and_one_that_requires_kernels_fails() -> None:
    recipe = build.choose({"CXX": "no-such-compiler", "PATH": "/nowhere"})
    assert recipe.setting == "python"
    assert "no-such-compiler is not on the PATH" in recipe.why
    with pytest.raises(build.BuildError, match="NODE_CUDA_BUILD=cpu asks for a compiled module, but there is no C"):
        build.choose({"NODE_CUDA_BUILD": "cpu", "CXX": "no-such-compiler", "PATH": "/nowhere"})


def fake_toolkit(home: Path, version: int = 13000) -> Path:
    for folder in ("bin", "include", "lib64"):
        (home / folder).mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={home}/bin/..'\n")
    (home / "bin" / "nvcc").chmod(0o755)
    (home / "include" / "cuda_runtime.h").touch()
    (home / "include" / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    return home


def test_the_toolkit_that_a_wrapper_calls_is_found_and_the_wrapper_is_not_used_as_a_toolkit(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda-13.1", 13010)
    wrapper = tmp_path / "local" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    toolkit = build.find_toolkit({"PATH": str(wrapper.parent)})
    assert toolkit is not None
    assert (toolkit.home, toolkit.version) == (home, (13, 1))


def test_if_cuda_home_is_set_no_other_place_is_searched(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    toolkit = build.find_toolkit({"CUDA_HOME": str(home)})
    assert toolkit is not None and toolkit.home == home
    assert build.find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": str(home / "bin")}) is None


def test_a_toolkit_of_another_major_version_than_torchs_is_an_error_with_an_explanation(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda", 13000)
    lacking, toolkit = build.missing_kernels("12.8", {"CUDA_HOME": str(home)})
    assert toolkit is None
    assert "torch is built for CUDA 12.8 and the toolkit is CUDA 13.0" in lacking
    assert build.missing_kernels("13.2", {"CUDA_HOME": str(home)})[0] == ""


def test_architectures_are_the_requested_ones_else_the_visible_ones_else_all_of_the_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit = build.toolkit_at(fake_toolkit(tmp_path / "cuda"))
    assert toolkit is not None
    monkeypatch.setattr(build, "_known_archs", lambda toolkit: {"8.0", "8.6", "9.0"})
    assert build.choose_archs(toolkit, [(9, 0)], {"TORCH_CUDA_ARCH_LIST": "8.6"}) == "8.6"
    assert build.choose_archs(toolkit, [(9, 0), (8, 6)], {}) == "8.6;9.0+PTX"
    assert build.choose_archs(toolkit, [], {}) == "8.0;8.6;9.0+PTX"
    assert build.choose_archs(toolkit, [(12, 0)], {}) == "8.0;8.6;9.0+PTX"  # the GPU compiles the PTX


@nvcc
def test_the_toolkit_of_this_machine_compiles_for_the_default_architectures() -> None:
    assert TOOLKIT is not None
    archs = build.choose_archs(TOOLKIT, [], {})
    assert archs.startswith("8.0;")
    assert archs.endswith("+PTX")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("8.0;9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("8.0;12.0+PTX", (10, 0), False),
        ("Ampere", (7, 5), True),  # cannot be parsed: the launch decides
    ],
)
def test_code_for_an_architecture_runs_on_some_gpus(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert build.fits(archs, capability) is runs


def test_flags_for_architectures_are_nvccs_and_torch_makes_them_for_architectures_with_names() -> None:
    assert build.gencode("8.0 9.0a+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    assert build.gencode("8.0;Hopper") == []


@pytest.mark.parametrize("other", ["bind/plan.cu", "kernels/plan.cu", "graphs/plan.cpp"])
def test_two_sources_of_one_name_are_an_error_in_one_folder_and_in_two(tmp_path: Path, other: str) -> None:
    csrc = write_csrc(tmp_path / "csrc", {"bind/bind.cpp": "", "bind/plan.cpp": "", "common/plan.h": ""})
    names = [Path(path).relative_to(csrc).as_posix() for path in build.sources(csrc, kernels=True)]
    assert names == ["bind/bind.cpp", "bind/plan.cpp"]
    write_csrc(csrc, {other: ""})
    with pytest.raises(build.BuildError, match=f"share a name.*: bind/plan.cpp, {other}. Rename one"):
        build.sources(csrc, kernels=True)


def test_a_changed_or_moved_header_changes_the_digest_of_the_sources_and_every_compiler_command(
    tmp_path: Path,
) -> None:
    csrc = write_csrc(tmp_path / "csrc", WITH_KERNEL)
    recipe = build.Recipe("cuda", "")

    def known_by() -> tuple[str, object]:
        return build.digest(csrc), build.macros(recipe, csrc)  # ninja compiles again if a command changes

    seen = [known_by()]
    write_csrc(csrc, {"common/launch.h": f"{HEADER}// changed"})
    seen.append(known_by())
    (csrc / "common").rename(csrc / "control")
    seen.append(known_by())
    assert len({digest for digest, _ in seen}) == 3
    assert len({str(macros) for _, macros in seen}) == 3


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
@pytest.mark.parametrize("change", ["edit", "remove"])
def test_make_installs_again_after_a_change_in_a_folder_of_csrc(tmp_path: Path, change: str) -> None:
    source = checkout(tmp_path / "source", WITH_KERNEL)
    shutil.copy(ROOT / "Makefile", source)
    stamp = source / ".venv" / ".installed"
    write_csrc(stamp.parent, {"bin/python": "", stamp.name: ""})
    header = source / "csrc" / "common" / "launch.h"
    before = time.time() - 100
    for path in source.rglob("*"):
        os.utime(path, (before, before))
    os.utime(stamp, (before + 1, before + 1))

    def due() -> bool:
        return {0: False, 1: True}[run("make", "-q", "install", cwd=source).returncode]

    assert not due()
    if change == "edit":
        header.write_text(f"{HEADER}// changed")
    else:
        header.unlink()
    assert due()


# --- the first CUDA solve --------------------------------------------------------------------------------------------


@pytest.fixture
def first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Pretend that this process has no kernels and has not searched for them yet. Call it with the files of csrc/."""
    for name in DECIDING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, build.MODULE, None)
    monkeypatch.setattr(build, "read_note", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(extension, "_found", {})
    monkeypatch.setattr(extension, "_compiled", None)

    def with_sources(files: Mapping[str, str]) -> None:
        csrc = write_csrc(tmp_path / "csrc", files)
        monkeypatch.setattr(build, "find_csrc", lambda: csrc)
        monkeypatch.setenv("FORCE_CUDA", "1")
        monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda")))

    yield with_sources


def stand_in(**facts: str) -> types.ModuleType:
    """Return a substitute of a compiled module."""
    module = types.ModuleType(build.MODULE)
    info = {"torch": str(torch.__version__), "kernels": True, "cuda": "13.0", "archs": "8.0+PTX", **facts}
    module.__dict__["build_info"] = lambda: info
    return module


@cpu_torch
def test_if_kernels_cannot_be_compiled_the_first_use_warns_once_and_gives_none(first_use) -> None:
    with pytest.warns(RuntimeWarning, match="this torch is built without CUDA") as caught:
        assert extension.kernels() is None
    assert len(caught) == 1
    assert build.COMMAND in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extension.kernels() is None


@compiler
def test_a_compilation_that_fails_warns_once_with_the_compilers_line_and_all_threads_continue(first_use, capfd) -> None:
    first_use({"bind/bind.cpp": BROKEN})
    results: list[object] = []
    with pytest.warns(RuntimeWarning) as caught:
        threads = [threading.Thread(target=lambda: results.append(extension.kernels())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [None] * 4
    assert len(caught) == 1
    assert "this does not compile" in str(caught[0].message)
    assert build.COMMAND in str(caught[0].message)
    assert capfd.readouterr().err.count("compiling the CUDA kernels") == 1


@pytest.mark.parametrize("setting", ["python", "cpu"])
def test_a_user_who_declined_kernels_gets_no_warning_and_no_compilation(first_use, monkeypatch, setting: str) -> None:
    first_use({"bind/bind.cpp": BROKEN})
    monkeypatch.setenv("NODE_CUDA_BUILD", setting)
    assert extension.kernels() is None
    assert not extension.forecast().possible


def test_a_module_that_was_built_with_another_torch_is_not_used(first_use, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, build.MODULE, stand_in(torch="2.6.0"))
    found = extension.installed()
    assert found.module is None
    assert f"was built with torch 2.6.0, and this is torch {torch.__version__}" in found.why


def test_a_module_that_was_compiled_before_its_sources_changed_is_not_used(first_use, monkeypatch) -> None:
    first_use({"bind/bind.cpp": STAND_IN, "common/step.h": ""})
    monkeypatch.setitem(sys.modules, build.MODULE, stand_in())
    sources = build.digest(build.find_csrc())
    monkeypatch.setattr(build, "read_note", lambda: build.Note("cuda", "", sources))
    assert extension.installed().module is not None
    (build.find_csrc() / "common" / "step.h").write_text("// another layout")
    assert "was compiled from other sources" in extension.installed().why


def test_kernels_for_another_gpu_are_not_used(first_use, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, build.MODULE, stand_in(archs="8.0"))
    assert extension.installed((8, 6)).module is not None
    assert "this GPU has compute capability 9.0" in extension.installed((9, 0)).why


@pytest.mark.slow
@compiler
@nvcc
@cpu_torch
def test_the_first_use_compiles_once_and_a_later_process_takes_it_from_the_cache(tmp_path: Path) -> None:
    """torch's loader links two libraries that a CPU torch does not have: empty ones stand in for them."""
    assert TOOLKIT is not None
    csrc = write_csrc(tmp_path / "csrc", WITH_KERNEL)
    for name in ("c10_cuda", "torch_cuda"):
        subprocess.run(["ar", "rcs", f"lib{name}.a"], cwd=tmp_path, check=True)
    code = (
        "from pathlib import Path\n"
        "from node_cuda.extension import build, loading\n"
        f"build.find_csrc = lambda: Path({str(csrc)!r})\n"
        "print(loading.kernels().build_info()['archs'], loading.forecast().why)"
    )
    environ = {
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "8.0",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"),
        "LIBRARY_PATH": str(tmp_path),
        "LD_LIBRARY_PATH": str(TOOLKIT.lib),
        "PYTHONPATH": str(ROOT),
    }
    first = run(sys.executable, "-c", code, cwd=tmp_path, **environ)
    assert first.stdout.startswith("8.0 it was compiled on an earlier first use"), first.stdout + first.stderr
    assert first.stderr.count("compiling the CUDA kernels, once") == 1
    second = run(sys.executable, "-c", code, cwd=tmp_path, **environ)
    assert second.stdout == first.stdout, second.stderr
    assert second.stderr == ""
