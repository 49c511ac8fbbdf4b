"""The memory of a loop's iterations is allocated before the loop, unless it goes from one iteration to the next."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from node_cuda.native import allocation

pytestmark = pytest.mark.usefixtures("compiled_solves")


def _node(name: str, size: int = 32) -> Any:
    layout = SimpleNamespace(storage_size=lambda: size)
    return SimpleNamespace(get_name=lambda: name, get_layout=lambda: layout, get_dtype=lambda: torch.float32)


def _line(kind: str, name: str = "", **more: Any) -> Any:
    """Return a line of torch's compiler, without its registration in a graph."""
    from torch._inductor.codegen import wrapper

    line = object.__new__(getattr(wrapper, kind))
    vars(line).update(node=_node(name, **more))
    return line


def _enter() -> Any:
    return _line("EnterSubgraphLine")


def _leave() -> Any:
    return _line("ExitSubgraphLine")


def _part(name: str, whole: str) -> Any:
    line = _line("ReinterpretLine", whole)
    line.reused_as = _node(name)
    return line


def _graph(*returned: str) -> Any:
    return SimpleNamespace(graph_outputs=[_node(name) for name in returned])


def _moved(lines: list[Any], *returned: str) -> list[Any]:
    return allocation._moved(lines, _graph("go"), _graph(*returned))


def test_what_an_iteration_does_not_return_is_allocated_before_the_loop_and_not_freed_in_it() -> None:
    go, hidden, y = (_line("AllocateLine", name) for name in ("go", "hidden", "y"))
    free = _line("FreeIfNotReusedLine", "hidden")
    a, b, c, d = _enter(), _leave(), _enter(), _leave()
    lines = ["before", "while (1) {", a, go, "if (!go) break;", b, c, hidden, y, "compute", free, d, "}"]
    moved = ["before", hidden, "while (1) {", a, go, "if (!go) break;", b, c, y, "compute", d, "}"]
    assert _moved(lines, "y") == moved


def test_a_part_of_a_moved_tensor_goes_with_it_and_a_part_of_a_returned_one_stays() -> None:
    go, row, y = (_line("AllocateLine", name) for name in ("go", "row", "y"))
    of_row, of_y = _part("first", "row"), _part("second", "y")
    lines = ["while (1) {", go, row, of_row, y, of_y, _line("FreeIfNotReusedLine", "first"), "}"]
    assert _moved(lines, "y") == [row, of_row, "while (1) {", go, y, of_y, "}"]


def test_what_a_loop_inside_of_a_loop_returns_stays_in_it() -> None:
    go, y, inner_go, inner_y, hidden = (_line("AllocateLine", x) for x in ("go", "y", "inner_go", "inner_y", "hidden"))
    a, b, c, d, e, f, g, h = _enter(), _leave(), _enter(), _enter(), _leave(), _enter(), _leave(), _leave()
    inner = ["while (1) {", d, inner_go, e, f, inner_y, g, "}"]  # hidden was moved before it
    lines = ["while (1) {", a, go, b, c, hidden, *inner, y, h, "}"]
    assert _moved(lines, "y") == [hidden, "while (1) {", a, go, b, c, *inner, y, h, "}"]


def test_a_large_tensor_stays_and_is_freed_as_early_as_before() -> None:
    go, y = _line("AllocateLine", "go"), _line("AllocateLine", "y")
    large, free = _line("AllocateLine", "large", size=allocation.LARGEST), _line("FreeIfNotReusedLine", "large")
    lines = ["while (1) {", go, large, y, free, "}"]
    assert _moved(lines, "y") == lines


def test_nothing_is_moved_if_a_returned_tensor_may_be_a_view_of_another() -> None:
    lines = ["while (1) {", _line("AllocateLine", "go"), _line("AllocateLine", "hidden"), "}"]
    assert _moved(lines, "view_of_hidden") == lines


def test_the_compiler_is_as_before_after_a_compilation_that_failed() -> None:
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    before = CppWrapperCpu.codegen_while_loop
    with pytest.raises(RuntimeError, match="failed"), allocation.allocated_once():
        assert CppWrapperCpu.codegen_while_loop is not before
        raise RuntimeError("failed")
    assert CppWrapperCpu.codegen_while_loop is before
