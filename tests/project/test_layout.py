"""The tests have the layout of the package: each module has a test file, or a line that names another test file."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, TESTS = ROOT / "node_cuda", ROOT / "tests"

# File -> modules that it tests. The rest have a file by their name in tests/unit/.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "compat/test_reported.py": ("gradients.adjoint.autonomy",),
    "kernels/test_captured.py": (
        "cuda_graphs.cache",
        "cuda_graphs.captured",
        "cuda_graphs.forward",
        "gradients.adjoint.cuda_graph",
        "gradients.leaves",
    ),
    "kernels/test_device_loop.py": ("cuda_graphs.device_loop",),
    "kernels/test_discrete_graphs.py": (
        "gradients.discrete.cuda_graph_forward",
        "gradients.discrete.cuda_graph_reverse",
    ),
    "kernels/test_first_run_check.py": ("cuda_graphs.first_run_check",),
    "kernels/test_fused.py": (
        "kernels.arithmetic",
        "kernels.backend",
        "kernels.fused",
        "kernels.fused_sums",
        "kernels.memory",
        "kernels.sums",
    ),
    "kernels/test_kernels_shim.py": ("kernels.control", "kernels.step_control"),
    "kernels/test_self_check.py": ("kernels.check_record", "kernels.check_rows", "kernels.self_check"),
    "kernels/test_tape.py": ("kernels.step_log",),
    "project/test_as_torchdiffeq.py": (
        "as_torchdiffeq.install",
        "as_torchdiffeq.run",
        "as_torchdiffeq.startup.sitecustomize",
    ),
    "project/test_build.py": ("extension.build", "extension.loading"),
    "project/test_packaging.py": ("_needs_torch", "_typing", "_version"),
    "project/test_readme.py": ("gradients.registry",),
    "unit/cuda_graphs/test_fingerprint.py": ("cuda_graphs.parts",),
    "unit/gradients/test_auto.py": ("gradients.by_adjoint",),
    "unit/gradients/adjoint/test_mode.py": (
        "gradients.adjoint.backward_solve",
        "gradients.adjoint.field",
    ),
    "unit/gradients/discrete/test_mode.py": (
        "gradients.discrete.checkpoints",
        "gradients.discrete.memory",
        "gradients.discrete.reverse_pass",
        "gradients.discrete.step_adjoint",
        "gradients.discrete.trajectory",
    ),
    "unit/gradients/test_autograd.py": (
        "_torch_modes",
        "gradients.context",
        "gradients.members",
    ),
    "unit/gradients/test_inspection.py": ("gradients.reached",),
    "unit/integrals/test_integral.py": ("integrals.regularized",),
    "unit/loop/test_events.py": ("event",),
    "unit/loop/test_progress.py": ("_extras",),
    "unit/loop/test_plain_grid.py": ("gradients.adjoint.plain_grid",),
    "unit/methods/implicit/test_tableaus.py": ("methods.implicit.tableau",),
    "unit/methods/test_explicit_rk.py": ("methods.evaluations", "methods.step"),
    "unit/methods/test_register.py": ("methods.order_conditions",),
    "unit/test_compiled.py": ("_eager",),
    "unit/test_mistakes.py": ("_arguments", "_parse_options"),
    "unit/test_odeint.py": ("loop.assemble", "loop.outputs", "loop.request", "options"),
    "unit/test_status.py": ("problem.problem",),
}


def file_of(module: Path) -> str:
    """Return the path of a module's tests below tests/. `_eager` and `__main__` lose their underscores."""
    return (Path("unit") / module.parent / f"test_{module.stem.strip('_')}.py").as_posix()


def without_tests(package: Path, tests: Path, elsewhere: dict[str, tuple[str, ...]]) -> list[str]:
    """Return a sentence for each module without a test file, and for each wrong line of the table."""
    listed = [name for names in elsewhere.values() for name in names]
    found = [path.relative_to(package) for path in sorted(package.rglob("*.py")) if path.name != "__init__.py"]
    modules = {".".join(path.with_suffix("").parts): file_of(path) for path in found}
    sentences = [f"{file} is not in tests/" for file in elsewhere if not (tests / file).is_file()]
    sentences += [f"there is no module {name}" for name in listed if name not in modules]
    sentences += [f"{name} is listed twice" for name in sorted(set(listed)) if listed.count(name) > 1]
    for name, file in modules.items():
        if (tests / file).is_file() and name in listed:
            sentences.append(f"{name} has tests/{file}: take it out of ELSEWHERE")
        elif not (tests / file).is_file() and name not in listed:
            sentences.append(f"{name} has no tests: write tests/{file}, or name its file in ELSEWHERE")
    return sentences


def test_every_module_has_a_test_file() -> None:
    sentences = without_tests(PACKAGE, TESTS, ELSEWHERE)
    assert not sentences, "\n" + "\n".join(sentences)


@pytest.mark.parametrize(
    ("tests", "elsewhere", "sentence"),
    [
        (
            [],
            {},
            "inner._part has no tests: write tests/unit/inner/test_part.py, or name its file in ELSEWHERE",
        ),
        (["unit/inner/test_part.py"], {}, ""),
        (["kernels/test_a.py"], {"kernels/test_a.py": ("inner._part",)}, ""),
        ([], {"kernels/test_a.py": ("inner._part",)}, "kernels/test_a.py is not in tests/"),
        (["unit/inner/test_part.py", "a.py"], {"a.py": ("gone",)}, "there is no module gone"),
        (
            ["unit/inner/test_part.py", "a.py"],
            {"a.py": ("inner._part",)},
            "inner._part has tests/unit/inner/test_part.py: take it out of ELSEWHERE",
        ),
        (["a.py", "b.py"], {"a.py": ("inner._part",), "b.py": ("inner._part",)}, "inner._part is listed twice"),
    ],
)
def test_a_module_without_a_test_file_and_a_wrong_line_are_found(
    tmp_path: Path, tests: list[str], elsewhere: dict[str, tuple[str, ...]], sentence: str
) -> None:
    for file in ("node_cuda/inner/_part.py", "node_cuda/inner/__init__.py", *(f"tests/{name}" for name in tests)):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert "\n".join(without_tests(tmp_path / "node_cuda", tmp_path / "tests", elsewhere)) == sentence
