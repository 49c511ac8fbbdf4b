"""Compiles the module for bench/gpu.sh on a machine without a GPU, so that the GPU machine compiles nothing.

    python bench/build_for_gpu.py [--python 3.12] [--torch 2.11.0] [--arch 9.0] [--interpreter PATH]

It needs this version of Python with its headers, and a CUDA toolkit of the major version with which torch was built
(CUDA_HOME names it). The first run needs several GB of disk, because pip installs torch into an environment beside the
results. The program makes the folder build/gpu-pyXY-torchX.Y-smXY/carry, with the compiled module and its note for
node_cuda/. It checks that the module loads without a driver, and prints what to copy and what to type on the GPU
machine.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from parts.common.paths import ROOT
from parts.gpu.carried import carried

PACKAGES = ("setuptools>=77", "ninja", "numpy", "scipy")  # for the build, and to import node_cuda
ENVIRONMENT_BYTES = 8 * 2**30  # torch with the CUDA libraries, and temporary files of pip
LIMIT_BYTES = 64 * 2**20  # of the files to copy

LOAD = """
import importlib.util, sys
import torch
module, arch = sys.argv[1:]
spec = importlib.util.spec_from_file_location("_C", module)
loaded = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loaded)
info = loaded.build_info()
if (info["torch"], info["kernels"], info["archs"]) != (str(torch.__version__), True, arch):
    sys.exit(f"{module} says of itself {info}")
print(f"It loads with torch {torch.__version__}, which sees {torch.cuda.device_count()} GPUs here.")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="Python of the GPU machine (default: 3.12)")
    parser.add_argument("--torch", default="2.11.0", help="torch of the GPU machine (default: 2.11.0)")
    parser.add_argument("--arch", default="9.0", help="compute capability of its GPU (default: 9.0)")
    parser.add_argument("--interpreter", help="path of this Python (default: pythonX.Y on the PATH, or pyenv's)")
    arguments = parser.parse_args()
    for name, form, such in (("torch", r"\d+\.\d+(\.\d+)?", "2.11.0"), ("arch", r"\d+\.\d", "9.0")):
        if not re.fullmatch(form, given := getattr(arguments, name)):
            parser.error(f"--{name} must be a version such as {such}; got {given!r}.")
    begun = time.perf_counter()
    carry = carried(arguments.python, arguments.torch, arguments.arch)
    python = environment(carry.parent / "env", arguments)
    shutil.rmtree(carry, ignore_errors=True)
    carry.mkdir(parents=True)
    log = carry.parent / "log.txt"
    log.unlink(missing_ok=True)
    folders = ["--build-temp", str(carry.parent / "objects"), "--build-lib", str(carry)]
    step = functools.partial(run_step, log=log, environment=variables(arguments.arch))
    step("compile the module", [python, "setup.py", "build_ext", *folders])
    (module,) = (carry / "node_cuda").glob("_C.*.so")
    print(step("load it", [python, "-c", LOAD, module, arguments.arch]))
    print(instructions(carry, time.perf_counter() - begun))


def environment(folder: Path, arguments: argparse.Namespace) -> Path:
    """The Python of an environment with this torch, which is made if it does not exist."""
    python = folder / "bin" / "python"
    ask = "import ninja, numpy, scipy, setuptools, torch; print(torch.__version__.partition('+')[0])"
    if python.exists() and told(python, "-c", ask) == arguments.torch:
        return python
    if (free := shutil.disk_usage(ROOT).free) < ENVIRONMENT_BYTES:
        raise SystemExit(
            f"torch needs {ENVIRONMENT_BYTES / 2**30:.0f} GiB of disk, and {free / 2**30:.1f} GiB are free."
        )
    subprocess.run([interpreter(arguments), "-m", "venv", "--clear", folder], check=True)
    install = [python, "-m", "pip", "install", f"torch=={arguments.torch}", *PACKAGES]
    if subprocess.run(install, check=False).returncode:
        raise SystemExit(f"pip could not install torch {arguments.torch} for Python {arguments.python}: see above.")
    return python


def interpreter(arguments: argparse.Namespace) -> str:
    """A Python of the requested version. Raises SystemExit if there is none."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{arguments.python}.*/bin/python"))
    given = arguments.interpreter
    for candidate in [given] if given else [f"python{arguments.python}", *map(str, pyenv)]:
        if told(candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])") == arguments.python:
            return candidate
    where = given or f"python{arguments.python} on the PATH"
    raise SystemExit(
        f"Python {arguments.python} is needed, and {where} is not that version. Name one with --interpreter PATH."
    )


def told(*command: str | Path) -> str | None:
    """The output of a command; None if the command does not exist or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def variables(arch: str) -> dict[str, str]:
    """The environment variables for the compilers and for a Python that imports this checkout."""
    home = os.environ.get("CUDA_HOME")
    return {
        **os.environ,
        "NODE_CUDA_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": arch,
        "PYTHONPATH": str(ROOT),
        **({"PATH": os.pathsep.join([f"{home}/bin", os.environ.get("PATH", "")])} if home else {}),
    }


def run_step(what: str, command: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> str:
    """Runs a command in the checkout, logs its output, returns the last line. Raises SystemExit if it fails."""
    print(f"{what} ...", flush=True)
    run = subprocess.run(
        list(command), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with log.open("a") as file:
        file.write(run.stdout)
    lines = run.stdout.splitlines() or [""]
    if run.returncode:
        raise SystemExit("\n".join([*lines[-15:], f"Could not {what}. The whole output is in {log}."]))
    return lines[-1]


def instructions(carry: Path, seconds: float) -> str:
    """What was made, what to copy, and what to type on the GPU machine."""
    files = sorted(path for path in carry.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    lines = [f"\nMade in {seconds:.0f} s:"]
    lines += [f"  {path.relative_to(ROOT)}  {path.stat().st_size / 2**20:.2f} MiB" for path in files]
    if total > LIMIT_BYTES:
        lines.append(f"  {total / 2**20:.0f} MiB to copy, more than {LIMIT_BYTES / 2**20:.0f}.")
    commit = told("git", "-C", ROOT, "rev-parse", "--short=12", "HEAD")
    if told("git", "-C", ROOT, "status", "--porcelain", "--", ".", ":(exclude)bench/results", ":(exclude)*.md"):
        lines.append("  There are uncommitted changes. Commit them, as the results name the commit.")
    named = f"NODE_CUDA_COMMIT={commit} " if commit else ""
    lines += [
        f"Copy the checkout and {carry.relative_to(ROOT)} ({total / 2**20:.1f} MiB). There, in the checkout, type:",
        f"  {named}bench/gpu.sh smoke prove --out FOLDER",
        f"  {named}bench/gpu.sh measure --out FOLDER",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
