"""nvcc compiles every kernel for every architecture of the build: registers, spills, and accesses of 16 bytes.

`make test` compiles one source, and `make test-builds` all of them.

`broken_rules` lists the rules that always hold. The budget (kernel_budget.json) is the last output of nvcc: the most
registers of any variant of a kernel on each architecture, and the spills that the rules allow, by name and bytes. To
write it again run `python tests/kernels/test_kernels_nvcc.py`, and check the difference.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
BUDGET = HERE / "kernel_budget.json"
# Two front ends, which take most of the time. Their outputs differ little within a row, and much between rows.
FRONT_ENDS = {80: (80, 86, 89, 90), 100: (100, 120)}
ARCHITECTURES = tuple(f"sm_{a}" for row in FRONT_ENDS.values() for a in row)

MOST_REGISTERS = 64  # for each thread: four blocks of 256 threads use all registers of a multiprocessor
MOST_REGISTERS_OTHERWISE = 96  # complex types, and more than 7 stages
NO_SPILLS = ("sm_80", "sm_90")
COUNTED_UP_TO_7 = ("rk_stage_kernel", "rk_finish_kernel")  # one variant for each count, and "0" for more

NO_STATE = (
    "grid_control_kernel", "resume_kernel", "set_condition_kernel", "begin_reverse_kernel", "stage_time_kernel",
    "start_control_kernel", "step_control_kernel", "load_step_kernel", "advance_reverse_kernel",
)  # fmt: skip
ONLY_READ = ("error_ratio_kernel", "initial_change_kernel", "initial_norms_kernel", "sums_ratio_kernel")

TYPES = {
    "f": "float",
    "d": "double",
    "6__half": "half",
    "13__nv_bfloat16": "bfloat16",
    "NS_7ComplexIfEE": "complex<float>",
    "NS_7ComplexIdEE": "complex<double>",
}


@dataclass(frozen=True)
class Variant:
    """A kernel, or an instantiation of its template."""

    kernel: str
    type: str | None = None
    count: int | None = None  # number of terms; 0: any

    @classmethod
    def of(cls, mangled: str) -> Variant:
        """rk_stage_kernel<double, 7> of _ZN9node_cuda15rk_stage_kernelIdLi7EEEv..."""
        match = re.match(r"_ZN9node_cuda(\d+)", mangled)
        assert match, mangled
        end = match.end() + int(match[1])
        arguments = re.match(rf"I({'|'.join(TYPES)})(?:Li(\d+)E)?E", mangled[end:])
        if arguments is None:
            assert not mangled[end:].startswith("I"), mangled
            return cls(mangled[match.end() : end])
        count = int(arguments[2]) if arguments[2] else None
        return cls(mangled[match.end() : end], TYPES[arguments[1]], count)

    def __str__(self) -> str:
        arguments = ", ".join(str(x) for x in (self.type, self.count) if x is not None)
        return f"{self.kernel}<{arguments}>" if arguments else self.kernel

    @property
    def most_registers(self) -> int:
        real = self.type is None or not self.type.startswith("complex")
        up_to_7_stages = self.count != 0 or self.kernel not in COUNTED_UP_TO_7
        return MOST_REGISTERS if real and up_to_7_stages else MOST_REGISTERS_OTHERWISE


@dataclass(frozen=True)
class Usage:
    """The output of ptxas for a variant."""

    variant: Variant
    architecture: str
    registers: int
    local: int = 0  # bytes: the stack frame (spilled registers or copies of arguments), spill stores and loads

    def __str__(self) -> str:
        return f"{self.variant} on {self.architecture}"


def usages_in(report: str) -> list[Usage]:
    entry = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+)'(.*?)Used (\d+) registers", re.DOTALL)
    found = []
    for mangled, architecture, between, registers in entry.findall(report):
        local = sum(map(int, re.findall(r"(\d+) bytes (?:spill|stack)", between)))
        found.append(Usage(Variant.of(mangled), architecture, int(registers), local))
    return found


def broken_rules(usages: Iterable[Usage]) -> list[str]:
    """Return the broken rules: no spills on sm_80 and sm_90; at most 64 registers for real types up to 7 stages, else
    96."""
    broken = []
    for usage in usages:
        if usage.registers > usage.variant.most_registers:
            broken.append(f"{usage} takes {usage.registers} registers, {usage.variant.most_registers} at most")
        if usage.local and usage.architecture in NO_SPILLS:
            broken.append(f"{usage} spills: {usage.local} bytes")
    return broken


def budget_of(usages: Iterable[Usage]) -> dict[str, dict]:
    registers: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(ARCHITECTURES, 0))
    for usage in usages:
        most = registers[usage.variant.kernel]
        most[usage.architecture] = max(most[usage.architecture], usage.registers)
    spills = {str(usage): usage.local for usage in usages if usage.local}
    return {"registers": dict(sorted(registers.items())), "spills": spills}


def over_budget(usages: Iterable[Usage], budget: dict[str, dict]) -> list[str]:
    """Return sentences on the variants that are new, are gone, or grew since the budget was written."""
    now, over = budget_of(usages), []
    if now["registers"].keys() != budget["registers"].keys():
        over.append("a kernel came or went: run `python tests/kernels/test_kernels_nvcc.py`")
    for kernel in sorted(now["registers"].keys() & budget["registers"].keys()):
        for architecture, count in now["registers"][kernel].items():
            before = budget["registers"][kernel][architecture]
            if count > before:
                over.append(f"{kernel} on {architecture} takes {count} registers, {before} before")
    for usage, local in now["spills"].items():
        if local > budget["spills"].get(usage, 0):
            over.append(f"{usage} spills: {local} bytes, {budget['spills'].get(usage, 0)} before")
    return over


def narrow_access_in(ptx: str) -> list[str]:
    """Return the variants that never read, or never write, 16 bytes of a tensor at a time. (ptxas keeps the PTX
    accesses.)"""
    wide = re.compile(r"\b(ld|st)(?:\.global)?(?:\.(?:nc|cg|cs|wb))?\.(?:v4\.[bfu]32|v2\.[bfu]64)\b")
    narrow = []
    for mangled, body in re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.DOTALL):
        variant = Variant.of(mangled)
        if variant.kernel in NO_STATE or variant.type == "complex<double>":  # an element has 16 bytes
            continue
        wanted = {"ld": "read"} if variant.kernel in ONLY_READ else {"ld": "read", "st": "write"}
        missing = wanted.keys() - set(wide.findall(body))
        narrow += [f"{variant} does not {wanted[x]} 16 bytes at a time" for x in sorted(missing)]
    return narrow


def compile_for_all(source: Path, folder: Path) -> tuple[str, list[str]]:
    """Return the output of ptxas for this file's kernels on all architectures, and the PTX of both front ends."""
    folder = folder / source.stem
    folder.mkdir()
    targets = []
    for virtual, real in FRONT_ENDS.items():
        codes = ",".join([*(f"sm_{a}" for a in real), f"compute_{virtual}"])
        targets += ["-gencode", f"arch=compute_{virtual},code=[{codes}]"]
    result = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings", "--threads", "2", "--resource-usage",
         "--keep", "--keep-dir", str(folder), *targets, f"-I{CSRC}", "-c", str(source),
         "-o", str(folder / "kernels.o")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    ptx = [(folder / f"{source.stem}.compute_{virtual}.ptx").read_text() for virtual in FRONT_ENDS]
    return result.stdout + result.stderr, ptx


def compile_everything(folder: Path) -> tuple[str, list[str]]:
    """Return the output of ptxas, and the PTX."""
    slow = (
        "rk_finish",
        "rk_stage",
        "dense_eval",
        "initial_step",
        "error_ratio",
    )  # these first, to use all cores to the end
    sources = sorted(CSRC.rglob("*.cu"), key=lambda path: slow.index(path.stem) if path.stem in slow else len(slow))
    with ThreadPoolExecutor(2) as pool:
        reports, ptx = zip(*pool.map(lambda source: compile_for_all(source, folder), sources), strict=True)
    return "".join(reports), [text for both in ptx for text in both]


def kept(folder: Path) -> Path:
    """Return the result of `compile_everything`, stored in a file of the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        (folder / "said.json").write_text(json.dumps(compile_everything(Path(scratch))))
    return folder / "said.json"


has_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")


def keeps_the_rules(report: str, ptx: list[str], budget: dict[str, dict]) -> None:
    usages = usages_in(report)
    assert {usage.architecture for usage in usages} == set(ARCHITECTURES)
    assert broken_rules(usages) == []
    assert over_budget(usages, budget) == []
    assert [sentence for text in ptx for sentence in narrow_access_in(text)] == []


@pytest.mark.slow
@has_nvcc
def test_a_kernel_for_all_types_keeps_registers_spills_and_width_of_access(tmp_path):
    budget = json.loads(BUDGET.read_text())
    budget["registers"] = {"jump_kernel": budget["registers"]["jump_kernel"]}
    keeps_the_rules(*compile_for_all(CSRC / "kernels" / "jump.cu", tmp_path), budget)


def test_the_budget_names_every_kernel():
    kernel = re.compile(r"__global__[^;{]*?\b(\w+_kernel)\(")
    named = [name for source in CSRC.rglob("*.cu") for name in kernel.findall(source.read_text())]
    assert sorted(named) == sorted(json.loads(BUDGET.read_text())["registers"])


@pytest.mark.builds
@has_nvcc
def test_registers_spills_and_width_of_access():
    """nvcc takes a minute or two. Its output is kept as long as the sources, this file and nvcc do not change."""
    from shim.library import built  # if this file runs as a program, this cannot be imported

    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    report, ptx = json.loads(built("nvcc", kept, Path(__file__).read_text() + version).read_text())
    keeps_the_rules(report, ptx, json.loads(BUDGET.read_text()))


@pytest.mark.parametrize(
    ("mangled", "most"),
    [
        ("_ZN9node_cuda15rk_stage_kernelIfLi7EEEvNS_5SplitE", 64),
        ("_ZN9node_cuda16rk_finish_kernelI13__nv_bfloat16Li1EEEvNS_5SplitE", 64),
        ("_ZN9node_cuda15rk_stage_kernelIdLi0EEEvNS_5SplitE", 96),
        ("_ZN9node_cuda17dense_eval_kernelI6__halfLi0EEEvNS_5SplitE", 64),  # also with 1, 2, 3 and 5 terms
        ("_ZN9node_cuda11jump_kernelIdEEvNS_5SplitE", 64),
        ("_ZN9node_cuda11jump_kernelINS_7ComplexIdEEEEvNS_5SplitE", 96),
        ("_ZN9node_cuda13commit_kernelENS_5SplitE", 64),
    ],
)
def test_too_many_registers_or_a_spill_break_the_rules(mangled, most):
    variant = Variant.of(mangled)
    assert broken_rules([Usage(variant, "sm_120", most, local=8)]) == []
    assert broken_rules([Usage(variant, "sm_120", most + 1)]) == [
        f"{variant} on sm_120 takes {most + 1} registers, {most} at most"
    ]
    for architecture in ("sm_80", "sm_90"):
        assert broken_rules([Usage(variant, architecture, 1, local=8)]) == [
            f"{variant} on {architecture} spills: 8 bytes"
        ]


def test_a_variant_that_grows_is_over_budget():
    variant = Variant("jump_kernel", "float")
    before = [Usage(variant, "sm_90", 40), Usage(variant, "sm_120", 64, local=8)]
    budget = json.loads(json.dumps(budget_of(before)))
    assert budget["spills"] == {"jump_kernel<float> on sm_120": 8}
    assert over_budget(before, budget) == []
    assert over_budget([Usage(variant, "sm_90", 39), Usage(variant, "sm_120", 60)], budget) == []
    assert over_budget([Usage(variant, "sm_90", 41), Usage(variant, "sm_120", 64, local=9)], budget) == [
        "jump_kernel on sm_90 takes 41 registers, 40 before",
        "jump_kernel<float> on sm_120 spills: 9 bytes, 8 before",
    ]
    assert over_budget([], budget) == ["a kernel came or went: run `python tests/kernels/test_kernels_nvcc.py`"]


def test_scalar_access_is_found_in_ptx():
    ptx = (
        ".visible .entry _ZN9node_cuda11jump_kernelIfEEvPf(\n)\n{{\n\tld.global.v4.f32 \t{{%f1}}, [%rd1];\n\t{}\n}}\n"
        ".visible .entry _ZN9node_cuda19step_control_kernelEPNS_3CtlE(\n)\n{{\n\tst.global.f64 \t[%rd1], %fd1;\n}}\n"
    )
    assert narrow_access_in(ptx.format("st.global.wb.v4.u32 [%rd2], {%r1};")) == []
    for store in ("st.global.f32 [%rd2], %f1;", "st.global.v2.f32 [%rd2], {};", "st.shared.v4.f32 [%rd2], {};"):
        assert narrow_access_in(ptx.format(store)) == ["jump_kernel<float> does not write 16 bytes at a time"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        report, _ = compile_everything(Path(folder))
    usages = usages_in(report)
    tables = []
    for name, table in budget_of(usages).items():
        lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items()]
        tables.append(f"  {json.dumps(name)}: " + ("{\n" + ",\n".join(lines) + "\n  }" if lines else "{}"))
    BUDGET.write_text("{\n" + ",\n".join(tables) + "\n}\n")
    sys.exit("\n".join(broken_rules(usages)) or None)
