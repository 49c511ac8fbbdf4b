"""From a graph to native code: torch's AOTInductor and the C++ compiler, with the results kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from node_cuda._version import __version__
from node_cuda.kernels.check_record import VARIABLE
from node_cuda.kernels.check_record import folder as cache_folder
from node_cuda.native import allocation
from node_cuda.native.allocation import allocated_once
from node_cuda.native.complex_pairs import as_reals, has_complex, without_complex
from node_cuda.native.tracing import Refused, check, graph_of, refusals

_log = logging.getLogger("node_cuda")

Native = Callable[[list[Tensor]], list[Tensor]]
"""A compiled graph: from the list of its inputs to the list of its results."""

OPTIONS = {
    # A loop that runs no iteration returns the memory of its inputs. The compiler does not know that, and would use
    # that memory again.
    "allow_buffer_reuse": False,
    "inplace_buffers": False,
    # The numbers of a point are one vector: one allocation, and not one for each.
    "max_pointwise_cat_inputs": 64,
    # Otherwise a layer with few inputs, whose weights lie apart, is computed without vector instructions.
    "cpp.enable_tiling_heuristics": False,
}
NEEDED = (2, 13)
"""The first torch whose compiler was tested with these loops."""

interpreted = False
"""Run graphs as they are, without the compiler. For tests of what the graphs compute."""

compilations = 0
"""How many graphs were compiled in this process."""


def why_not() -> str | None:
    """Return why this torch cannot compile, or None."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < NEEDED:
        return f"torch {NEEDED[0]}.{NEEDED[1]} or later is needed to compile a solve, and this is {torch.__version__}"
    return None


def traced(run: Callable[..., Any], examples: Sequence[Tensor], of_func: int, what: str) -> Native:
    """Return a function of tensors as native code. of_func: how many of the last inputs are func's tensors.

    what: as for `native`. Raises Refused if func or the compiler does not allow it.
    """
    with refusals(), torch.no_grad():
        graph = graph_of(run, examples)
    check(graph, range(len(examples) - of_func, len(examples)))
    if not has_complex(graph):
        return native(graph, examples, what)
    reals, again = without_complex(graph, examples)
    call = native(reals, as_reals(examples), what)
    return lambda inputs: again(call(as_reals(inputs)))


def native(graph: torch.fx.GraphModule, examples: Sequence[Tensor], what: str) -> Native:
    """Return the compiled graph. what: what is compiled, for the message.

    Raises Refused if the compiler cannot.
    """
    global compilations
    if interpreted:
        return lambda inputs: list(graph(*inputs))
    folder = cache_folder()
    path = folder / f"{_digest(graph, examples)}.so"
    try:
        if not path.exists():
            _log.warning("Compiling %s: mostly 10 to 60 seconds, once. It is kept in %s.", what, folder)
            start = time.perf_counter()
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = _compiled(graph, examples, os.path.join(scratch, "solve.so"))
                os.replace(made, path)  # two processes may do this at once
            compilations += 1
            _log.warning("Compiled %s in %.0f seconds.", what, time.perf_counter() - start)
    except Refused as refusal:
        _log.warning("Not compiled, %s: %s.", what, refusal)
        raise
    except OSError as error:
        why = f"native code cannot be kept in {folder} ({error.strerror}): set {VARIABLE} to a folder for it"
        raise Refused(why) from None
    try:
        runner: Any = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)  # pyright: ignore[reportAttributeAccessIssue]
    except RuntimeError as error:
        words = str(error).strip().split("\n")[0]
        raise Refused(f"the native code in {path} cannot be loaded ({words:.160}): delete it") from None
    return runner.run


def _compiled(graph: torch.fx.GraphModule, examples: Sequence[Tensor], path: str) -> str:
    options = {**OPTIONS, "aot_inductor.package": False, "aot_inductor.output_path": path}
    try:
        with _alone, _copies_of_views(), allocated_once(), torch.no_grad(), warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            made = str(torch._inductor.aot_compile(graph, tuple(examples), options=options))
    except Exception as error:
        words = str(error).strip().split("\n")[0]
        if "CxxCompiler" in f"{type(error).__name__} {words}" or "g++" in str(error):
            raise Refused(f"the C++ compiler failed ({words:.160}): install g++ 10 or later, or set CXX") from None
        raise Refused(f"torch's compiler failed: {type(error).__name__}: {words:.160}") from None
    called = [node["node"]["target"] for file in Path(path).parent.glob("*.wrapper.json") for node in _nodes(file)]
    if called:  # the code would call them through Python, which is not there
        raise Refused(f"torch's compiler has no native code for {', '.join(sorted(set(called)))}")
    return made


def _nodes(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["nodes"]


_alone = threading.Lock()


@contextlib.contextmanager
def _copies_of_views() -> Iterator[None]:
    """Tell torch's compiler what copies of views are, which it makes in a loop inside of a loop and does not know."""
    from torch._inductor.decomposition import decompositions

    aten = torch.ops.aten
    rules: Any = {
        aten.slice_copy.Tensor: aten.slice.Tensor,
        aten.select_copy.int: aten.select.int,
        aten.split_copy.Tensor: aten.split.Tensor,
        aten.detach_copy.default: aten.detach.default,
        aten.view_as_real_copy.default: aten.view_as_real.default,
        aten.view_as_complex_copy.default: aten.view_as_complex.default,
    }
    added: Any = {op: _copied(view) for op, view in rules.items() if op not in decompositions}
    decompositions.update(added)
    try:
        yield
    finally:
        for op in added:
            del decompositions[op]


def _copied(view: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: tree_map(torch.clone, view(*arguments, **options))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let torch's compiler log errors only."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _digest(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> str:
    """Return a name for the native code of this graph, which depends on everything that the code depends on."""
    found = hashlib.sha256()
    for file in (__file__, allocation.__file__):  # the way in which it is compiled
        found.update(Path(file).read_bytes())
    capability = torch.backends.cpu.get_cpu_capability()
    told = (__version__, torch.__version__, platform.machine(), platform.node(), capability, torch.get_num_threads())
    for word in (*told, sorted(OPTIONS.items()), [(x.shape, x.stride(), x.dtype) for x in examples]):
        found.update(repr(word).encode())
    for name, module in graph.named_modules():
        found.update(name.encode())
        if isinstance(module, torch.fx.GraphModule):
            found.update(module.code.encode())
    for name, x in sorted(_constants(graph).items()):
        found.update(name.encode() + repr((x.shape, x.dtype)).encode())
        found.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def _constants(graph: torch.fx.GraphModule) -> dict[str, Tensor]:
    """Return the tensors that are constants of a graph or of a loop in it."""
    return {
        f"{prefix}.{name}": x
        for prefix, module in graph.named_modules()
        for name, x in vars(module).items()
        if isinstance(x, Tensor)
    } | dict(graph.named_buffers())
