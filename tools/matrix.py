"""The unit tests on several versions of Python and of torch: `make matrix`, or `python tools/matrix.py --help`.

Each pair has an environment in build/matrix/, which a second run uses again. What this machine does not have, and what
pip does not find, is skipped with a line that says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
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
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    for wanted in ([torch_requirement(torch)], list(NEEDED)):
        ran = subprocess.run([*pip, *wanted], capture_output=True, text=True)
        if ran.returncode:
            lines = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            return lines[-1]
    done.touch()
    return None


def tested(python: Path, arguments: list[str]) -> tuple[str, str]:
    """Run the tests, and return (the version of torch, the last line of pytest)."""
    code = "import torch; print(torch.__version__)"
    version = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    if version.returncode:
        return "no torch", version.stderr.strip().splitlines()[-1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [str(python), "-m", "pytest", *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(*failed, sep="\n", flush=True)
    return version.stdout.strip(), (done.stdout.strip().splitlines() or ["no output"])[-1]


def main() -> int:
    """Run all pairs, print a table, and return 1 if a test failed."""
    parser = argparse.ArgumentParser("python tools/matrix.py", description="The unit tests on several versions.")
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, help="default: %(default)s")
    parser.add_argument("--torches", nargs="+", default=TORCHES, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix", help="where the environments lie")
    parser.add_argument("--workers", default="auto", help="test processes for each environment")
    given = parser.parse_args()
    rows, good = [], True
    for name in given.pythons:
        python = interpreter(name)
        for torch in given.torches:
            if python is None:
                rows.append((name, torch, f"skipped: this machine has no python{name}"))
                continue
            folder = given.folder / f"python{name}-torch{torch}"
            why = environment(folder, python, torch)
            if why is not None:
                rows.append((name, torch, f"skipped: {why}"))
                continue
            version, line = tested(folder / "bin" / "python", ["-n", given.workers, *TESTS])
            rows.append((name, version, line))
            good = good and " passed" in line and " failed" not in line and " error" not in line
    print(f"{'python':8}{'torch':16}unit tests")
    for name, torch, line in rows:
        print(f"{name:8}{torch:16}{line}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
