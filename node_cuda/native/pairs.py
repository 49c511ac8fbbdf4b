"""Operations on complex tensors as operations on pairs of real ones.

Each is one of torch's operations as they stand in a traced graph. Autograd's are among them, because the tracer has
written them into the graph: gradients follow torch's convention.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from node_cuda.native.tracing import Refused

aten = torch.ops.aten


class Pair(NamedTuple):
    """The two parts of something complex. A part that is None is zero."""

    re: Any
    im: Any


def parts_of(x: Tensor) -> Pair:
    """Return the parts of a tensor whose last dimension is 2, each with the numbers side by side."""
    re, im = x.unbind(-1)
    return Pair(re.clone(), im.clone())


def done(target: Any, args: Any, kwargs: Any) -> Any:
    """Do an operation on pairs."""
    rule = RULES.get(target.overloadpacket)
    if rule is not None:
        return rule(*args, **kwargs)
    if target.overloadpacket not in EACH or target is aten.view.dtype:
        raise Refused(f"func uses {target} on complex numbers, for which there is no native code")
    found = _of_each(target, args, kwargs)
    return Pair(found.re, None) if target.overloadpacket in ONES else found


def without_writing(target: Any) -> Any:
    """Return the operation that computes what this one writes, such as mul for mul_."""
    name = target.overloadpacket.__name__.removesuffix("_")
    return getattr(getattr(aten, name), target._overloadname)


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

ONES = {aten.eye, aten.ones, aten.ones_like, aten.new_ones}
"""Operations that make real numbers."""

NAMES = """
alias cat clone constant_pad_nd copy_ cumsum detach diag_embed diagonal diagonal_backward diagonal_copy empty empty_like
expand fill flip full full_like gather index index_add index_copy index_copy_ index_put index_select lift_fresh_copy
masked_fill mean nan_to_num neg new_empty new_full new_zeros permute repeat roll scalar_tensor scatter_add select
select_backward select_scatter slice slice_backward slice_scatter split split_with_sizes squeeze stack sum t transpose
tril triu unbind unsqueeze _unsafe_view view where zero_ zeros zeros_like
"""
EACH = {getattr(aten, name) for name in NAMES.split()} | ONES
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


def _power(x: Any, exponent: Any) -> Pair:
    if not isinstance(x, Pair):
        raise Refused("func computes a real number to a complex power, for which there is no native code")
    if not isinstance(exponent, (int, float)) or abs(exponent) not in range(9):
        return _exp(_times(_log(x), exponent))
    found = Pair(torch.ones_like(x.re), None)
    for _ in range(int(abs(exponent))):
        found = _times(found, x)
    return found if exponent >= 0 else _div(1.0, found)


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


def _log(x: Pair) -> Pair:
    return Pair(_abs(x).log(), torch.atan2(x.im, x.re))


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


def _equal(x: Any, y: Any) -> Any:
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
    aten.addcmul: lambda x, y, z, value=1: _add(x, _times(_times(y, z), value)),
    aten.baddbmm: _plus_product(torch.bmm),
    aten._conj: _conj,
    aten.conj_physical: _conj,
    aten._conj_physical: _conj,
    aten._neg_view: lambda x: Pair(-x.re, -x.im) if isinstance(x, Pair) else -x,
    aten.view_as_real: lambda x: torch.stack(x, -1),
    aten.view_as_complex: parts_of,
    aten.complex: Pair,
    aten.polar: lambda size, angle: Pair(size * angle.cos(), size * angle.sin()),
    aten._to_copy: _to_copy,
    aten.abs: _abs,
    aten.angle: lambda x: torch.atan2(x.im, x.re),
    aten.sgn: _sgn,
    aten.exp: _exp,
    aten.log: _log,
    aten.sqrt: _sqrt,
    aten.sin: lambda x: Pair(x.re.sin() * x.im.cosh(), x.re.cos() * x.im.sinh()),
    aten.cos: lambda x: Pair(x.re.cos() * x.im.cosh(), -x.re.sin() * x.im.sinh()),
    aten.sinh: lambda x: Pair(x.re.sinh() * x.im.cos(), x.re.cosh() * x.im.sin()),
    aten.cosh: lambda x: Pair(x.re.cosh() * x.im.cos(), x.re.sinh() * x.im.sin()),
    aten.tan: lambda x: _times(_tanh(_times(x, 1j)), -1j),
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
