"""Complex numbers as pairs of real ones: a graph is made one without complex tensors, for which native code exists.

The tracer has written autograd's operations into the graph before, so that the gradients follow torch's convention. What
is not in the tables below is refused by its name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from node_cuda.native.tracing import Refused, graph_of, refusals, while_loop

aten = torch.ops.aten


class Pair(NamedTuple):
    """The two parts of something complex. A part that is None is zero."""

    re: Any
    im: Any


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
    """Return the graph with inputs and results `as_reals`, and a function that makes its results complex again.

    Raises Refused.
    """
    shown = [x.is_complex() for x in examples]
    results = [node.meta["val"].is_complex() for node in graph.graph.output_node().args[0]]  # pyright: ignore

    def run(*inputs: Tensor) -> list[Tensor]:
        given = [_parts(x) if pair else x for x, pair in zip(inputs, shown, strict=True)]
        return [torch.stack(x, -1) if isinstance(x, Pair) else x for x in _InPairs(graph).run(*given)]

    def again(found: Sequence[Tensor]) -> list[Tensor]:
        return [torch.view_as_complex(x) if pair else x for x, pair in zip(found, results, strict=True)]

    with refusals(), torch.no_grad():
        return graph_of(run, as_reals(examples)), again


class _InPairs(torch.fx.Interpreter):
    """Runs a graph with a Pair in the place of each complex tensor."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a constant, or a loop."""
        found = super().get_attr(target, args, kwargs)
        return _parts(torch.view_as_real(found)) if _complex(found) else found

    def run_node(self, n: torch.fx.Node) -> Any:
        """Return the result of one operation."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        target: Any = n.target
        if n.op != "call_function" or target is operator.getitem:
            return super().run_node(n)
        if "while_loop" in str(target):
            return _loop(*args, **kwargs)
        result = n.meta["val"]
        inside = [x.meta.get("val") for x in n.all_input_nodes]
        complex_ = any(map(_complex, tree_leaves([inside, args, kwargs, result])))
        written: Any = n.args[0] if target._schema.is_mutable else None
        if written is not None and written.op != "placeholder" and (complex_ or self._has_views()):
            raise Refused(f"func writes into a complex tensor in place ({target}): use torch.stack or torch.cat")
        if not complex_ and target.overloadpacket is not aten._neg_view:
            return target(*args, **kwargs)
        if _complex(result):
            real = result.dtype.to_real()
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(real) if x.is_floating_point() else x, (args, kwargs))
        rule = RULES.get(target.overloadpacket)
        if rule is None and target.overloadpacket not in EACH:
            raise Refused(f"func uses {target} on complex numbers, for which there is no native code")
        found = rule(*args, **kwargs) if rule is not None else _of_each(target, args, kwargs)
        return tree_map(_whole, found, result, is_leaf=lambda x: isinstance(x, Pair))

    def _has_views(self) -> bool:
        return any(node.target in VIEWS for node in self.module.graph.nodes)  # pyright: ignore


def _complex(x: Any) -> bool:
    return x.is_complex() if isinstance(x, Tensor) else isinstance(x, complex)


def _parts(x: Tensor) -> Pair:
    """Return the parts of a tensor whose last dimension is 2, each with the numbers side by side."""
    re, im = x.unbind(-1)
    return Pair(re.clone(), im.clone())


def _whole(found: Any, result: Any) -> Any:
    """Return a result in the shape and dtype of the complex one."""
    if not isinstance(found, Pair):
        return found
    shape, real = result.shape, result.dtype.to_real()
    return Pair(*(torch.zeros(shape, dtype=real) if x is None else x.to(real).expand(shape) for x in found))


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


# ------------------------------------------------------------------ each part by itself
def _of_each(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Do an operation on the real parts, and on the imaginary ones. What is real has zeros there."""
    values = {x.name for x in target._schema.arguments if x.name not in PLACES and str(x.type) in VALUES}
    names = [x.name for x in target._schema.arguments]

    def of(part: int) -> Any:
        def chosen(x: Any) -> Any:
            if isinstance(x, Pair):
                return x[part]
            if isinstance(x, Tensor):
                return x if part == 0 else torch.zeros_like(x)
            return (complex(x).real, complex(x).imag)[part] if isinstance(x, (int, float, complex)) else x

        def argument(name: str, x: Any) -> Any:
            if name in values:
                return tree_map(chosen, x, is_leaf=lambda y: isinstance(y, Pair))
            return x.to_real() if isinstance(x, torch.dtype) and x.is_complex else x

        return target(
            *(argument(name, x) for name, x in zip(names, args, strict=False)),
            **{name: argument(name, x) for name, x in kwargs.items()},
        )

    return tree_map(Pair, of(0), of(1))


PLACES = ("index", "mask", "condition", "alpha")
"""Arguments that are the same for both parts."""

VALUES = ("Tensor", "List[Tensor]", "Optional[Tensor]", "number")
"""The types of arguments that may be complex."""

VIEWS = (aten.view_as_real.default, aten.view_as_complex.default, aten._conj.default, aten._neg_view.default)
"""Views of the same numbers in other forms. Here they are copies, so that nothing may be written into them."""

EACH = {
    getattr(aten, name)
    for name in (
        "alias cat clone constant_pad_nd cumsum detach diag_embed diagonal diagonal_backward empty empty_like expand "
        "flip full full_like gather index index_add index_copy index_copy_ index_put index_select lift_fresh_copy "
        "masked_fill mean nan_to_num neg new_empty new_full new_ones new_zeros ones ones_like permute repeat roll "
        "scalar_tensor scatter_add select select_backward select_scatter slice slice_backward slice_scatter split "
        "split_with_sizes squeeze stack sum t transpose tril triu unbind unsqueeze _unsafe_view view where zeros "
        "zeros_like"
    ).split()
}
"""Operations that treat the real and the imaginary parts alike."""


# ------------------------------------------------------------------ arithmetic
def _pair(x: Any) -> Pair:
    if isinstance(x, Pair):
        return x
    return Pair(x.real or None, x.imag or None) if isinstance(x, complex) else Pair(x, None)


def _sum(x: Any, y: Any, sign: int = 1) -> Any:
    """Return x + y, or x - y."""
    if y is None:
        return x
    if x is None:
        return y if sign > 0 else -y
    return x + y if sign > 0 else x - y


def _added(sign: int) -> Callable[..., Pair]:
    def rule(x: Any, y: Any, alpha: Any = 1) -> Pair:
        y = y if alpha == 1 else _times(y, alpha)
        return Pair(*(_sum(a, b, sign) for a, b in zip(_pair(x), _pair(y), strict=True)))

    return rule


def _product(of: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Pair]:
    def times(a: Any, b: Any) -> Any:
        return None if a is None or b is None else of(a, b)

    def rule(x: Any, y: Any) -> Pair:
        (a, b), (c, d) = _pair(x), _pair(y)
        return Pair(_sum(times(a, c), times(b, d), -1), _sum(times(a, d), times(b, c)))

    return rule


_add, _subtract = _added(1), _added(-1)
_times = _product(operator.mul)


def _conj(x: Any) -> Any:
    return Pair(x.re, -x.im) if isinstance(x, Pair) else x.conjugate()


def _div(x: Any, y: Any) -> Pair:
    """Return x / y. y is scaled, so that its square does not overflow."""
    c, d = _pair(y)
    if d is None:
        return Pair(*(None if part is None else part / c for part in _pair(x)))
    if c is None:
        return _times(_div(x, d), -1j)
    scale = abs(complex(c, d)) if isinstance(c, float) else torch.maximum(c.abs(), d.abs())
    c, d = c / scale, d / scale
    re, im = _times(x, Pair(c, -d))
    size = (c * c + d * d) * scale
    return Pair(re / size, im / size)


def _power(x: Pair, exponent: Any) -> Pair:
    if exponent == 0.5:
        return _sqrt(x)
    if exponent not in range(1, 9):
        raise Refused(f"func uses complex numbers to the power {exponent}, for which there is no native code")
    found = x
    for _ in range(int(exponent) - 1):
        found = _times(found, x)
    return found


def _plus_product(of: Callable[[Any, Any], Any]) -> Callable[..., Pair]:
    product = _product(of)
    return lambda b, x, w, *, beta=1, alpha=1: _add(
        b if beta == 1 else _times(b, beta), product(x, w) if alpha == 1 else _times(product(x, w), alpha)
    )


# ------------------------------------------------------------------ functions
def _abs(x: Pair) -> Tensor:
    return torch.hypot(x.re, x.im)


def _sgn(x: Pair) -> Pair:
    size = _abs(x)
    return Pair(*(torch.where(size == 0, 0.0, part / size) for part in x))


def _exp(x: Pair) -> Pair:
    size = x.re.exp()
    return Pair(size * x.im.cos(), size * x.im.sin())


def _sqrt(x: Pair) -> Pair:
    root = ((x.re.abs() + _abs(x)) / 2).sqrt()
    other = torch.where(root == 0, 0.0, x.im.abs() / (2 * root))
    right = x.re >= 0
    return Pair(torch.where(right, root, other), torch.copysign(torch.where(right, other, root), x.im))


def _tanh(x: Pair) -> Pair:
    """Return tanh x, with u = exp(-2 |re x|), which does not overflow."""
    size = x.re.abs()
    less, u = torch.expm1(-2 * size), 4 * torch.exp(-2 * size)
    sine, cosine = x.im.sin(), x.im.cos()
    below = less * less + u * cosine * cosine
    return Pair(torch.copysign(torch.expm1(-4 * size), x.re) / below, u * sine * cosine / below)


def _norm(x: Pair, *args: Any, **kwargs: Any) -> Tensor:
    return aten.linalg_vector_norm.default(_abs(x), *args, **kwargs)


def _equal(x: Any, y: Any) -> Tensor:
    (a, b), (c, d) = ((0.0 if part is None else part for part in _pair(z)) for z in (x, y))
    return (a == c) & (b == d)


def _to_copy(x: Any, **kwargs: Any) -> Any:
    dtype = kwargs.get("dtype")
    re, im = _pair(x)
    if dtype is not None and not dtype.is_complex:
        return re.to(dtype)
    return Pair(re, im)


RULES: dict[Any, Callable[..., Any]] = {
    aten.add: _add,
    aten.sub: _subtract,
    aten.rsub: lambda x, y, alpha=1: _subtract(y, x, alpha),
    aten.mul: _times,
    aten.div: _div,
    aten.reciprocal: lambda x: _div(1.0, x),
    aten.pow: _power,
    aten.mm: _product(torch.mm),
    aten.bmm: _product(torch.bmm),
    aten.mv: _product(torch.mv),
    aten.dot: _product(torch.dot),
    aten.vdot: lambda x, y: _product(torch.dot)(_conj(x), y),
    aten.addmm: _plus_product(torch.mm),
    aten.addmv: _plus_product(torch.mv),
    aten.baddbmm: _plus_product(torch.bmm),
    aten._conj: _conj,
    aten.conj_physical: _conj,
    aten._conj_physical: _conj,
    aten._neg_view: torch.neg,
    aten.view_as_real: lambda x: torch.stack(x, -1),
    aten.view_as_complex: _parts,
    aten.complex: Pair,
    aten.polar: lambda size, angle: Pair(size * angle.cos(), size * angle.sin()),
    aten._to_copy: _to_copy,
    aten.abs: _abs,
    aten.angle: lambda x: torch.atan2(x.im, x.re),
    aten.sgn: _sgn,
    aten.exp: _exp,
    aten.log: lambda x: Pair(_abs(x).log(), torch.atan2(x.im, x.re)),
    aten.sqrt: _sqrt,
    aten.sin: lambda x: Pair(x.re.sin() * x.im.cosh(), x.re.cos() * x.im.sinh()),
    aten.cos: lambda x: Pair(x.re.cos() * x.im.cosh(), -x.re.sin() * x.im.sinh()),
    aten.sinh: lambda x: Pair(x.re.sinh() * x.im.cos(), x.re.cosh() * x.im.sin()),
    aten.cosh: lambda x: Pair(x.re.cosh() * x.im.cos(), x.re.sinh() * x.im.sin()),
    aten.tanh: _tanh,
    aten.tanh_backward: lambda g, y: _times(g, _conj(_subtract(1.0, _times(y, y)))),
    aten.sigmoid: lambda x: _div(1.0, _add(1.0, _exp(Pair(-x.re, -x.im)))),
    aten.sigmoid_backward: lambda g, y: _times(g, _conj(_times(y, _subtract(1.0, y)))),
    aten.linalg_vector_norm: _norm,
    aten.eq: _equal,
    aten.ne: lambda x, y: ~_equal(x, y),
    aten.isnan: lambda x: x.re.isnan() | x.im.isnan(),
    aten.isinf: lambda x: x.re.isinf() | x.im.isinf(),
}
