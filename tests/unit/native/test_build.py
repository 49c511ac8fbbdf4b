"""Where native code is kept, what its name depends on, and what is said if the compiler fails."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from native import Timed, reason, start
from problems import F64, linspace

from node_cuda import Unsupported, solve
from node_cuda.native import build
from node_cuda.native.tracing import graph_of

T = linspace(0.0, 1.0, 3)
X = torch.ones(3)


def graph(function=lambda x: 2 * x, x=X):
    return graph_of(function, [x])


class Runner:
    """Stands in for torch's runner of a compiled graph."""

    def __init__(self, path, count):
        self.path = path

    def run(self, inputs):
        return [self.path, *inputs]


@pytest.fixture
def compiler(compiled_solves, monkeypatch, tmp_path):
    """Stand in for the compiler; return the list of its calls. Results are kept in tmp_path."""
    calls = []

    def aot_compile(graph, examples, options):
        calls.append(options)
        with open(options["aot_inductor.output_path"], "w") as file:
            file.write("code")
        return options["aot_inductor.output_path"]

    monkeypatch.setattr(torch._inductor, "aot_compile", aot_compile)
    monkeypatch.setattr(torch._C._aoti, "AOTIModelContainerRunnerCpu", Runner)
    monkeypatch.setenv("NODE_CUDA_CACHE", str(tmp_path / "kept"))
    return calls


def test_a_graph_is_compiled_once_and_found_on_disk_afterwards(compiler, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(build, "compilations", 0)
    with caplog.at_level(logging.WARNING, "node_cuda"):
        run = build.native(graph(), [X], "the solve of a test")
    assert len(compiler) == build.compilations == 1
    (kept,) = (tmp_path / "kept").iterdir()  # nothing else is left there
    assert kept.suffix == ".so" and kept.read_text() == "code"
    assert run([X])[0] == str(kept)
    told = [record.getMessage() for record in caplog.records if record.name == "node_cuda"]
    assert "Compiling the solve of a test" in told[0] and str(tmp_path) in told[0]
    assert told[1].startswith("Compiled the solve of a test in ")
    build.native(graph(), [X], "the solve of a test")
    assert len(compiler) == build.compilations == 1


def test_another_graph_or_other_inputs_have_another_name(compiler):
    builds = [
        (graph(), X),
        (graph(lambda x: 3 * x), X),
        (graph(), torch.ones(4)),
        (graph(), X.double()),
        (graph(), torch.ones(6)[::2]),
        (graph(lambda x: x + torch.tensor([1.0, 1.0, 1.0])), X),
        (graph(lambda x: x + torch.tensor([1.0, 1.0, 2.0])), X),
    ]
    for i, (made, x) in enumerate(builds):
        build.native(made, [x], "")
        assert len(compiler) == i + 1
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        build.native(graph(), [X], "")
    finally:
        torch.set_num_threads(threads)
    assert len(compiler) == len(builds) + 1


FAILURES = {
    "no g++": (
        RuntimeError("InvalidCxxCompiler: No working C++ compiler found"),
        "the C\\+\\+ compiler failed .*: install g\\+\\+ 10 or later, or set CXX",
    ),
    "an error of torch": (KeyError("a bug\nwith a long text"), "torch's compiler failed: KeyError"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_compiler_that_fails_is_a_reason_and_the_host_solves(compiler, monkeypatch, caplog, case):
    error, why = FAILURES[case]

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(torch._inductor, "aot_compile", fails)
    with torch.no_grad(), pytest.raises(ValueError, match=why):
        solve(Timed(), start(), T, method="midpoint", options=dict(compile="require"))
    with torch.no_grad():
        assert re.search(why, reason(Timed(), start(), T, method="midpoint"))
    assert re.search(f"Not compiled, the solve by midpoint of Timed: {why}", caplog.text)


def test_operations_that_the_code_would_call_through_python_are_a_reason(compiler, monkeypatch, tmp_path):
    with_stub = torch._inductor.aot_compile

    def aot_compile(graph, examples, options):
        made = with_stub(graph, examples, options)
        nodes = [{"node": {"target": "my::operator"}}] * 2
        Path(made).with_name("code.wrapper.json").write_text(json.dumps({"nodes": nodes}))
        return made

    monkeypatch.setattr(torch._inductor, "aot_compile", aot_compile)
    with torch.no_grad():
        why = reason(Timed(), start(), T, method="midpoint")
    assert why == "torch's compiler has no native code for my::operator"
    assert not list((tmp_path / "kept").glob("*"))


def test_the_compiler_knows_copies_of_views_while_it_runs(compiler, monkeypatch):
    from torch._inductor.decomposition import decompositions

    before, during = dict(decompositions), {}
    with_stub = torch._inductor.aot_compile
    monkeypatch.setattr(
        torch._inductor, "aot_compile", lambda *x, **k: during.update(decompositions) or with_stub(*x, **k)
    )
    build.native(graph(), [X], "")
    copies, x = torch.ops.aten, torch.arange(6.0).reshape(2, 3)
    assert torch.equal(during[copies.slice_copy.Tensor](x, 1, 1, 3), x[:, 1:3])
    assert torch.equal(during[copies.select_copy.int](x, 1, 2), x[:, 2])
    assert [part.tolist() for part in during[copies.split_copy.Tensor](x, 1)] == [[[0, 1, 2]], [[3, 4, 5]]]
    assert decompositions == before


def test_a_folder_that_cannot_be_written_is_a_reason(compiler, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NODE_CUDA_CACHE", str(tmp_path / "file"))
    with torch.no_grad():
        why = reason(Timed(), start(), T, method="midpoint")
    assert f"cannot be kept in {tmp_path / 'file'}" in why and "set NODE_CUDA_CACHE" in why


def test_code_that_cannot_be_loaded_is_a_reason(compiler, monkeypatch):
    def broken(*_):
        raise RuntimeError("file too short")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelContainerRunnerCpu", broken)
    with torch.no_grad():
        why = reason(Timed(), start(), T, method="midpoint")
    assert "cannot be loaded (file too short): delete it" in why


def test_an_old_torch_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert build.why_not() == "torch 2.13 or later is needed to compile a solve, and this is 2.9.1+cpu"
    with torch.no_grad():
        assert "torch 2.13 or later is needed" in reason(Timed(), start(), T, method="midpoint")
        with pytest.raises(Unsupported, match=r"cannot be compiled: torch 2\.13 or later is needed"):
            solve(Timed(), start(), T, method="midpoint", options=dict(compile="require"))
    for version in ("2.13.0", "2.14.0.dev20260901", "3.0.1+cu130", "2.13.0a0+git123"):
        monkeypatch.setattr(torch, "__version__", version)
        assert build.why_not() is None


def test_an_interpreted_graph_needs_no_compiler(compiler, interpreted):
    (found,) = build.native(graph(lambda x: (2 * x,)), [X], "")([X])
    assert torch.equal(found, 2 * X) and not compiler


def test_the_seconds_of_the_compiler_are_told_by_the_solve_that_waited_for_it(interpreted):
    field = Timed(F64)
    with torch.no_grad():
        first, second = (solve(field, start(), T, method="midpoint", options=dict(compile=True)) for _ in range(2))
    assert first.stats.compile_seconds > 0 == second.stats.compile_seconds
