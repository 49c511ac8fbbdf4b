"""How the memory of a loop's iterations is allocated: once before the loop, instead of in each iteration.

torch's compiler allocates each intermediate tensor where it is computed. In a loop of small tensors that takes longer
than the arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

LARGEST = 2**16
"""The size in bytes up to which a tensor is kept from one iteration to the next. A larger one takes longer to compute
than to allocate, and is freed as early as possible."""


@contextlib.contextmanager
def allocated_once() -> Iterator[None]:
    """Let torch's compiler allocate the intermediate tensors of loops before the loops."""
    from torch._inductor.codegen import cpp_wrapper_cpu

    compiler: Any = cpp_wrapper_cpu.CppWrapperCpu
    original = compiler.codegen_while_loop

    def codegen_while_loop(wrapper: Any, loop: Any, *more: Any, **options: Any) -> None:
        start = len(wrapper.lines)
        original(wrapper, loop, *more, **options)
        wrapper.lines[start:] = _moved(wrapper.lines[start:], loop.cond_subgraph.graph, loop.body_subgraph.graph)

    compiler.codegen_while_loop = codegen_while_loop
    try:
        yield
    finally:
        compiler.codegen_while_loop = original


def _moved(lines: list[Any], condition: Any, body: Any) -> list[Any]:
    """Return the lines of a loop, with the allocations of its iterations before it. condition, body: its graphs.

    What an iteration returns is the input of the next one, so that it needs new memory each time. If a returned tensor
    is not allocated in the loop, it may be a view of another one, and nothing is moved. What is allocated in a loop
    inside of this one is returned there, or was moved before that loop already.
    """
    from torch._inductor.codegen import wrapper as of

    first = lines.index("while (1) {")
    returned = {x.get_name() for x in (*condition.graph_outputs, *body.graph_outputs)}
    found: set[str] = set()
    moved: dict[str, Any] = {}
    depth = 0
    for line in lines[first:]:
        depth += isinstance(line, of.EnterSubgraphLine) - isinstance(line, of.ExitSubgraphLine)
        if depth > 1:
            continue
        if isinstance(line, of.AllocateLine):
            name = line.node.get_name()
            found.add(name)
            if name not in returned and _bytes(line.node) <= LARGEST:
                moved[name] = line
        elif isinstance(line, of.ReinterpretLine) and line.node.get_name() in moved:  # a part of a moved tensor
            moved[line.reused_as.get_name()] = line
    if not returned <= found:
        return lines
    lines_of_moved = {id(line) for line in moved.values()}
    kept = [
        line
        for line in lines[first:]
        if id(line) not in lines_of_moved
        and not (isinstance(line, of.FreeIfNotReusedLine) and line.node.get_name() in moved)
    ]
    return [*lines[:first], *moved.values(), *kept]


def _bytes(node: Any) -> int:
    return int(node.get_layout().storage_size()) * node.get_dtype().itemsize
