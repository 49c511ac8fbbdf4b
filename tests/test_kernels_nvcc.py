"""nvcc compiles every kernel for every architecture that we build for, within a budget of registers and without spills.

The budget (kernel_budget.json) holds the most registers that any variant of a kernel may use on each architecture. To
raise or lower it: `python tests/test_kernels_nvcc.py`, which writes what nvcc says today; look at the difference.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
BUDGET = HERE / "kernel_budget.json"
# Two front ends, which is where the time goes: what one makes differs little within a row, and much between them.
FRONT_ENDS = {80: (80, 86, 89, 90), 100: (100, 120)}
ARCHITECTURES = tuple(a for row in FRONT_ENDS.values() for a in row)
# A thread: four blocks of 256 fill a multiprocessor's registers. From sm_100 on dense_eval alone takes more.
MOST_REGISTERS = 64
MORE_FROM_SM_100 = {"dense_eval_kernel": 80}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")


def compile_for_all(source: Path, folder: Path) -> str:
    """What ptxas says of this file's kernels on all architectures, PTX besides."""
    targets = []
    for virtual, real in FRONT_ENDS.items():
        codes = ",".join([*(f"sm_{a}" for a in real), f"compute_{virtual}"])
        targets += ["-gencode", f"arch=compute_{virtual},code=[{codes}]"]
    result = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings", "--threads", "2", "--resource-usage",
         *targets, "-c", str(source), "-o", str(folder / f"{source.stem}.o")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def kernels_in(report: str) -> list[tuple[str, str, int, int]]:
    """(kernel, architecture, registers, bytes of local memory: spilled, or copies of its arguments), a variant each."""
    entry = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+)'(.*?)Used (\d+) registers", re.DOTALL)
    found = []
    for mangled, architecture, between, registers in entry.findall(report):
        spilled = sum(map(int, re.findall(r"(\d+) bytes (?:spill|stack)", between)))
        found.append((_name(mangled), architecture, int(registers), spilled))
    return found


def _name(mangled: str) -> str:
    """rk_stage_kernel from _ZN9node_cuda15rk_stage_kernel..."""
    match = re.match(r"_ZN9node_cuda(\d+)", mangled)
    assert match, mangled
    return mangled[match.end() : match.end() + int(match[1])]


def measure(folder: Path) -> tuple[dict[str, dict[str, int]], list[str]]:
    """The most registers of each kernel on each architecture, and a sentence for each spill."""
    slow = (
        "rk_finish",
        "rk_stage",
        "dense_eval",
        "initial_step",
        "error_ratio",
    )  # these first, to share the cores well
    sources = sorted(CSRC.glob("*.cu"), key=lambda path: slow.index(path.stem) if path.stem in slow else len(slow))
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda source: compile_for_all(source, folder), sources))
    most: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    spills = []
    for kernel, architecture, registers, spilled in kernels_in("".join(reports)):
        most[kernel][architecture] = max(most[kernel][architecture], registers)
        if spilled:
            spills.append(f"{kernel} has {spilled} bytes in local memory on {architecture}")
    return {k: dict(sorted(most[k].items(), key=lambda x: int(x[0][3:]))) for k in sorted(most)}, spills


def test_registers_and_spills(tmp_path):
    measured, spills = measure(tmp_path)
    assert not spills
    budget = json.loads(BUDGET.read_text())
    assert measured.keys() == budget.keys(), "a kernel came or went: run `python tests/test_kernels_nvcc.py`"
    for kernel, registers in measured.items():
        assert set(registers) == {f"sm_{a}" for a in ARCHITECTURES}
        for architecture, count in registers.items():
            most = MOST_REGISTERS
            if int(architecture[3:]) >= 100:
                most = MORE_FROM_SM_100.get(kernel, most)
            assert count <= most, f"{kernel} on {architecture}"
            assert count <= budget[kernel][architecture], f"{kernel} on {architecture} uses more registers than before"


def test_the_report_is_understood():
    """A report with a spill, as nvcc 13.0 words it."""
    report = (
        "ptxas info    : Compiling entry function '_ZN9node_cuda15rk_stage_kernelIdLi7EEEvNS_5SplitE' for 'sm_80'\n"
        "ptxas info    : Function properties for _ZN9node_cuda15rk_stage_kernelIdLi7EEEvNS_5SplitE\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 0 barriers, 8 bytes cumulative stack size\n"
    )
    assert kernels_in(report) == [("rk_stage_kernel", "sm_80", 64, 24)]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        measured, spills = measure(Path(folder))
    lines = (f"  {json.dumps(kernel)}: {json.dumps(counts)}" for kernel, counts in measured.items())
    BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    sys.exit("\n".join(spills) or None)
