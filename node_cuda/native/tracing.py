"""Tracing: Python code becomes a graph of torch's operations, with loops in it, and with func's tensors as inputs."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from node_cuda._torch_modes import _functorch
from node_cuda.cuda_graphs.parts import parts
from node_cuda.problem.field import VectorField
from node_cuda.problem.problem import Problem

Parts = tuple[Tensor, ...]


class Refused(Exception):
    """A solve cannot be compiled. The message is the reason, as half a sentence."""


def graph_of(function: Callable[..., Any], examples: Sequence[Tensor]) -> torch.fx.GraphModule:
    """Return the graph of a function of tensors. It is not run with the examples: only their shapes matter."""
    from torch.fx.experimental.proxy_tensor import make_fx

    aten = torch.ops.aten
    rules: Any = {aten.mm.default: _small_product, aten.addmm.default: _small_product_and_sum}
    return make_fx(function, tracing_mode="fake", decomposition_table=rules)(*examples)


SMALL = 4096
"""A product of matrices with at most this many multiplications is computed in one loop with its neighbours: the call
of a library takes longer."""


def _small_product(x: Tensor, w: Tensor) -> Tensor:
    if x.shape[0] * x.shape[1] * w.shape[1] > SMALL or x.is_complex():
        return NotImplemented
    return (x.unsqueeze(2) * w.unsqueeze(0)).sum(1)


def _small_product_and_sum(b: Tensor, x: Tensor, w: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta != 1 or alpha != 1:
        return NotImplemented
    product = _small_product(x, w)
    return product if product is NotImplemented else product + b


def while_loop(
    going: Callable[..., Tensor],
    body: Callable[..., Sequence[Tensor]],
    carried: Sequence[Tensor],
    given: Sequence[Tensor] = (),
    writes: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    """Repeat `carried = body(*carried, *given)` as long as going(*carried, *given), in a graph that is being traced.

    writes: the places in `given` of the tensors that the body writes into. The body is traced by itself before, because
    inside of a loop autograd is not available to the tracer.
    """
    from torch._higher_order_ops.while_loop import while_loop_op
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        examples = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (*carried, *given)]
        graphs = graph_of(going, examples), graph_of(lambda *x: tuple(body(*x)), examples)
    mutated = ",".join(str(len(carried) + i) for i in writes)
    # The inputs of a loop must not be views of each other. Nothing is copied that is not such a view.
    carried, given = ([x.clone() if x.dim() == 0 else x for x in xs] for xs in (carried, given))
    repeat: Any = while_loop_op
    return repeat(*graphs, tuple(carried), tuple(given), mutated_arg_indices=mutated)


def once(go: Tensor, *_: Tensor) -> Tensor:
    """Return the condition of a loop of one iteration, or of none if go is 0. The body returns go - 1."""
    return go > 0


class TracedField:
    """func as a loop calls it while it is traced: with the loop's inputs in place of the tensors that func reaches.

    tensors: those tensors. clips: func is evaluated between two user's times only.
    """

    def __init__(self, problem: Problem, tensors: Sequence[Tensor]) -> None:
        self.direction, self.dtype = problem.direction, problem.time_dtype
        self.clips = problem.bounds is not None
        self.tensors = tensors
        self._field = VectorField(problem.func, problem.layout, None, problem.ends)
        self._field.probes = 0
        self._problem = problem

    def probe(self) -> None:
        """Evaluate func twice as it is. Raises InvalidField, and Refused if its code is not all that it depends on.

        From then on func gets a copy of its argument if it writes into that.
        """
        problem, field = self._problem, self._field
        field.probes = field.nfe + 2
        kept, versions = parts(problem.func)[1], [x._version for x in self.tensors]
        random_before = _random_states()
        with torch.no_grad():
            t = problem.t[0].detach().to(problem.y0.device, problem.time_dtype)
            first, second = (field(t, problem.y0.detach()) for _ in range(2))
        if not _same_states(random_before, _random_states()):
            torch.set_rng_state(random_before[0])
            raise Refused("func draws random numbers, which a compiled loop would not, or in another order")
        if [x._version for x in self.tensors] != versions:
            raise Refused("func writes into a tensor that it keeps, such as a running mean")
        now = parts(problem.func)[1]
        changed = next((name for name in (*now, *kept) if now.get(name) is not kept.get(name)), None)
        if changed is not None:
            raise Refused(f"func keeps a tensor of each evaluation, {changed!r}, which a compiled loop would not set")
        if not torch.equal(torch.nan_to_num(first), torch.nan_to_num(second)):
            raise Refused("func answers differently at the same t and y: it counts its calls, or draws random numbers")
        field.copies_output = False  # a buffer that func keeps is refused when it is traced

    def __call__(self, c: Any, s: Tensor, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return dy/dt at the solver time s. c: the settings of the loop."""
        t = c.direction * s
        if self.clips:
            t = torch.minimum(torch.maximum(t, c.low), c.high)
        with _InPlaceOf(dict(zip(map(id, self.tensors), tensors, strict=True))):
            out = self._field(t.to(self.dtype), y).contiguous()  # what a loop carries has one layout
        whole = out._base if out._is_view() else out
        # A loop returns none of its inputs: func may return y, or a tensor that it keeps.
        return out.clone() if any(whole is x for x in (y, *tensors)) else out


def _random_states() -> tuple[Tensor, Any, Any]:
    """Return the states of the random generators of torch, Python and numpy."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _same_states(a: tuple[Tensor, Any, Any], b: tuple[Tensor, Any, Any]) -> bool:
    same_numpy = all(np.array_equal(x, y) for x, y in zip(a[2], b[2], strict=True))
    return torch.equal(a[0], b[0]) and a[1] == b[1] and same_numpy


class _InPlaceOf(TorchFunctionMode):
    """Replaces tensors, by their identity, in every call of a torch function."""

    def __init__(self, replacements: dict[int, Tensor]) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map_only(Tensor, self._of, args), **tree_map_only(Tensor, self._of, kwargs or {}))

    def _of(self, x: Tensor) -> Tensor:
        found = self._replacements.get(id(x))
        if found is not None:
            return found
        if type(x) in (Tensor, torch.nn.Parameter) and not _functorch.is_functorch_wrapped_tensor(x):
            raise Refused(f"func uses a tensor of shape {tuple(x.shape)} that cannot be found in its attributes")
        return x


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn what the tracer raises for code that depends on numbers into Refused, with the reason."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a cached weight would be one of the graph's
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as error:
        words = str(error).strip().split("\n")[0]
        why = f"func reads numbers from its tensors, by `if`, float(...) or .item() ({words:.80}): use torch.where"
        raise Refused(why) from None
    except Refused:
        raise
    except Exception as error:
        words = str(error).strip().split("\n")[0]
        raise Refused(f"torch cannot trace func: {type(error).__name__}: {words:.160}") from None
    finally:
        torch.set_autocast_cache_enabled(cached)


def check(graph: torch.fx.GraphModule, inputs: Sequence[int]) -> None:
    """Raise Refused if a graph draws random numbers, writes into one of these inputs, or would lose precision."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    kept = {placeholders[i] for i in inputs}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if "while_loop" in str(node.target):
            carried, given = node.args[2], node.args[3]
            below = [len(carried) + i for i, x in enumerate(given) if x in kept]
            for name in node.args[:2]:
                check(getattr(graph, name.target), below)
            continue
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise Refused(
                f"func draws random numbers ({node.target}), which a compiled loop would draw in another order"
            )
        if node.target is torch.ops.aten._local_scalar_dense.default and _is_double(node.args[0]):
            raise Refused(
                "func reads a number from a float64 tensor (`float(...)` or `.item()`), and torch's compiler rounds it "
                "to float32: compute with the tensor itself"
            )
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        for argument, x in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and x in kept:
                raise Refused("func writes into a tensor that it keeps, such as a running mean")


def _is_double(node: torch.fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.float64, torch.complex128)
