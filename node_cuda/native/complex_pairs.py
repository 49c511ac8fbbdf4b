"""From a graph with complex tensors to one with pairs of real ones, for which the compiler has native code.

Each operation of the graph is done on pairs (`native.pairs`) while the graph is traced again. An operation that has no
rule there is refused by its name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from node_cuda.native.pairs import EACH, Pair, done, parts_of, without_writing
from node_cuda.native.tracing import Refused, graph_of, refusals, while_loop

aten = torch.ops.aten

VIEWS = (aten.view_as_real.default, aten.view_as_complex.default, aten._conj.default, aten._neg_view.default)
"""Views of the same numbers in other forms. Here they are copies, so that nothing may be written into them."""


def has_complex(graph: torch.fx.GraphModule) -> bool:
    """Return whether there is a complex tensor in a graph or in a loop in it."""
    graphs = [x for x in graph.modules() if isinstance(x, torch.fx.GraphModule)]
    return any(_complex(x) for g in graphs for n in g.graph.nodes for x in tree_leaves(n.meta.get("val")))


def as_reals(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with real ones in the place of the complex ones, with a last dimension of 2."""
    return [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in inputs]


def without_complex(
    graph: torch.fx.GraphModule, examples: Sequence[Tensor]
) -> tuple[torch.fx.GraphModule, Callable[[Sequence[Tensor]], list[Tensor]]]:
    """Return the graph with inputs `as_reals` and with the parts of its results, and a function that joins the parts.

    Raises Refused.
    """
    shown = [x.is_complex() for x in examples]
    results = [node.meta["val"].is_complex() for node in graph.graph.output_node().args[0]]  # pyright: ignore

    def run(*inputs: Tensor) -> list[Tensor]:
        given = [parts_of(x) if pair else x for x, pair in zip(inputs, shown, strict=True)]
        # The parts are not joined here: the compiler would move that to before the loop that writes into a record.
        return [part for x in _InPairs(graph).run(*given) for part in (x if isinstance(x, Pair) else (x,))]

    def again(found: Sequence[Tensor]) -> list[Tensor]:
        rest = iter(found)
        return [torch.complex(next(rest), next(rest)) if pair else next(rest) for pair in results]

    with refusals(), torch.no_grad():
        return graph_of(run, as_reals(examples)), again


class _InPairs(torch.fx.Interpreter):
    """Runs a graph with a Pair in the place of each complex tensor."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # it would be added to the reason for a refusal
        self._seen_as_other = {_storage(n) for n in graph.graph.nodes if n.target in VIEWS}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a constant, or a loop."""
        found = super().get_attr(target, args, kwargs)
        with unset_fake_temporarily(), disable_proxy_modes_tracing():
            return parts_of(torch.view_as_real(found)) if _complex(found) else found

    def run_node(self, n: torch.fx.Node) -> Any:
        """Return the result of one operation."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        target: Any = n.target
        if n.op != "call_function" or target is operator.getitem:
            return super().run_node(n)
        if "while_loop" in str(target):
            return _loop(*args, **kwargs)
        writes, result = target._schema.is_mutable, n.meta["val"]
        if writes and _storage(n) in self._seen_as_other:
            raise Refused(f"func writes ({target}) into a tensor that it sees as complex and as real, or as conjugate")
        inside = [x.meta.get("val") for x in n.all_input_nodes]
        if not any(map(_complex, tree_leaves([inside, args, kwargs, result]))) and target not in VIEWS:
            return target(*args, **kwargs)
        if _complex(result):
            real = result.dtype.to_real()
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(real) if x.is_floating_point() else x, (args, kwargs))
        if writes and target.overloadpacket not in EACH:
            found = done(without_writing(target), args, kwargs)
            for part, new in zip(args[0], found, strict=True):
                part.copy_(new)
            return args[0]
        found = done(target, args, kwargs)
        if isinstance(found, Pair) and not _complex(result):
            raise Refused(
                f"func uses {target} on complex numbers with a real result, for which there is no native code"
            )
        return tree_map(_whole, found, result, is_leaf=lambda x: isinstance(x, Pair))


def _storage(n: torch.fx.Node) -> torch.fx.Node:
    """Return the node whose memory this one shows, as a view of it, or after it was written into."""
    while n.op == "call_function" and n.all_input_nodes:
        target: Any = n.target
        returns = getattr(getattr(target, "_schema", None), "returns", ())
        if target is not operator.getitem and not any(x.alias_info for x in returns):
            break
        n = n.all_input_nodes[0]
    return n


def _complex(x: Any) -> bool:
    return x.is_complex() if isinstance(x, Tensor) else isinstance(x, complex)


def _whole(found: Any, result: Any) -> Any:
    """Return a result in the shape and dtype of the complex one."""
    if not isinstance(found, Pair):
        return found
    shape, real = result.shape, result.dtype.to_real()
    parts = (x.to(real) if isinstance(x, Tensor) else torch.full(shape, x or 0.0, dtype=real) for x in found)
    return Pair(*(x if x.shape == shape else x.expand(shape).contiguous() for x in parts))


def _loop(going: Any, body: Any, carried: Any, given: Any, mutated_arg_indices: str = "") -> list[Any]:
    """Do a loop whose tensors may be pairs."""

    def flat(xs: Sequence[Any]) -> list[Tensor]:
        return [part.contiguous() for x in xs for part in (x if isinstance(x, Pair) else (x,))]

    def of(like: Sequence[Any], xs: Sequence[Tensor]) -> list[Any]:
        rest = iter(xs)
        return [Pair(next(rest), next(rest)) if isinstance(x, Pair) else next(rest) for x in like]

    written = {int(i) - len(carried) for i in mutated_arg_indices.split(",") if i}
    places = [i in written for i, x in enumerate(given) for _ in (x if isinstance(x, Pair) else (x,))]
    every = [*carried, *given]
    found = while_loop(
        lambda *xs: _InPairs(going).run(*of(every, xs)),
        lambda *xs: flat(_InPairs(body).run(*of(every, xs))),
        flat(carried),
        flat(given),
        [i for i, writes in enumerate(places) if writes],
    )
    return of(carried, found)
