"""The unit tests on several versions of Python and of torch: `make matrix`, or `python tools/matrix.py --help`.

Each pair has an environment in build/matrix/, which a second run uses again. On Linux, pip's torch brings CUDA with it,
and an environment takes about 6 GB: `--remove` deletes each one after its tests. What this machine does not have, and
what pip does not find, is skipped with a line that says so. A run fails if a test fails, or if no pair was tested.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.6", "newest")
NEEDED = ("numpy", "scipy", "pytest>=8", "pytest-xdist", "torchdiffeq==0.2.5", "tqdm", "matplotlib")
"""What the unit tests need beside torch."""

TESTS = ("-q", "-p", "no:cacheprovider", "-m", "not compiler and not slow", "tests/unit")


def interpreter(version: str) -> str | None:
    """Return the command of this Python, or None if the machine has none that starts: on PATH, or among pyenv's."""
    of_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for found in (shutil.which(f"python{version}"), *map(str, of_pyenv)):
        if found is not None:
            done = subprocess.run([found, "-c", code], capture_output=True, text=True)
            if done.stdout.strip() == version:
                return found
    return None


def torch_requirement(version: str) -> str:
    """Return what pip is asked for."""
    return "torch" if version == "newest" else f"torch=={version}.*"


def environment(folder: Path, python: str, torch: str) -> str | None:
    """Make the environment, or use the one that is there. Return the reason if that is not possible, else None."""
    done = folder / "complete"
    if done.exists():
        return None
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    for command in ([python, "-m", "venv", str(folder)], [*pip, torch_requirement(torch)], [*pip, *NEEDED]):
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            lines = [line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
            return errors[-1]
    done.touch()
    return None


def skips(output: str) -> list[str]:
    """Return a line for each reason of skipped tests, with their number, from the output of pytest."""
    counted = Counter[str]()
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+: (.*)$", output, re.MULTILINE):
        counted[reason] += int(count)
    return [f"  {count} skipped: {reason}" for reason, count in counted.most_common()]


def tested(python: Path, arguments: list[str]) -> tuple[str, str]:
    """Run the tests, print those that failed and why others were skipped, and return (version of torch, last line)."""
    code = "import torch; print(torch.__version__)"
    version = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    if version.returncode:
        return "no torch", version.stderr.strip().splitlines()[-1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [str(python), "-m", "pytest", *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    for line in (*failed, *skips(done.stdout)):
        print(line, flush=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode > 1:  # 0: all passed, 1: some failed
        last = f"stopped before its end, with code {done.returncode}: {last}"
    return version.stdout.strip(), last


def main() -> int:
    """Run all pairs, print a table, and return 1 if a test failed or no pair was tested."""
    parser = argparse.ArgumentParser("python tools/matrix.py", description="The unit tests on several versions.")
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, help="default: %(default)s")
    parser.add_argument("--torches", nargs="+", default=TORCHES, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix", help="where the environments lie")
    parser.add_argument("--workers", default="auto", help="test processes for each environment")
    parser.add_argument("--remove", action="store_true", help="delete each environment after its tests")
    given = parser.parse_args()
    rows, good, ran = [], True, False
    for name in given.pythons:
        python = interpreter(name)
        for torch in given.torches:
            if python is None:
                rows.append((name, torch, f"skipped: this machine has no python{name}"))
                continue
            folder = given.folder / f"python{name}-torch{torch}"
            print(f"Python {name}, torch {torch}: in {folder}", flush=True)
            why = environment(folder, python, torch)
            if why is not None:
                rows.append((name, torch, f"skipped: {why}"))
                continue
            version, line = tested(folder / "bin" / "python", ["-n", given.workers, *TESTS])
            if given.remove:
                shutil.rmtree(folder)
            ran = True
            rows.append((name, version, line))
            good = good and " passed" in line and not any(w in line for w in ("stopped", " failed", " error"))
    print(f"{'python':8}{'torch':16}unit tests")
    for name, torch, line in rows:
        print(f"{name:8}{torch:16}{line}")
    if not ran:
        print("no pair was tested")
    return 0 if good and ran else 1


if __name__ == "__main__":
    sys.exit(main())
