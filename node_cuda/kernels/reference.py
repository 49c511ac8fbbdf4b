"""The primitives of a step in plain PyTorch. This is the CPU path; every other implementation must give the same
results.

Conventions. `y0` is the state at the start of the step. `k` is the list of stage derivatives, each a separate tensor of
the state's shape and dtype. `h` is the signed step size, a float, or a 0-d tensor where autograd records it. A row of
coefficients holds the nonzero entries `(j, a_j)`: a zero coefficient is never read, because 0 * inf is NaN. Half and
bfloat16 states accumulate in float32. Returned tensors are never written again. Every result starts as a new tensor,
and only this one is updated in place (out of place while autograd records).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from node_cuda._torch_modes import set_recording, transformed
from node_cuda._typing import Row
from node_cuda.kernels.norms import HALF, ErrorNorm


def combine(y0: Tensor, k: Sequence[Tensor], row: Row, h: float | Tensor, out: Tensor | None = None) -> Tensor:
    """Return y0 + h sum_j a_j k_j, as a new tensor of y0's shape and dtype, or written into `out`.

    The increment is summed first and y0 is added last, so that only one rounding error has the size of y0. With a_0 the
    first coefficient this is y0 + h a_0 (k_0 + sum_j a_j / a_0 k_j), with as many operations as the plain sum.
    """
    if not row:
        return y0.clone() if out is None else out.copy_(y0)
    half = y0.dtype in HALF
    first, pivot = row[0]
    scale: Any = h * pivot
    if len(row) == 1 and out is None and not half and not isinstance(scale, Tensor):
        return torch.add(y0, k[first], alpha=scale)  # the following gives the same and takes longer
    if half and torch.is_grad_enabled() and out is None and not (isinstance(scale, Tensor) or transformed()):
        out = recorded_sum(y0, k, row, h)
        set_recording(False)
        try:
            return combine(y0, k, row, h, out)
        finally:
            set_recording(True)
    start = y0.float() if half else y0
    if isinstance(scale, Tensor):  # autograd records h; here a weight may be zero, so there is no division by a_0
        acc = start + h * functools.reduce(torch.add, (a * k[j].to(start.dtype) for j, a in row))
        return acc.to(y0.dtype) if out is None else out.copy_(acc)
    if half and len(row) > 1:  # a single half tensor is widened by torch.add
        k = [x.float() if j == first else x for j, x in enumerate(k)]
    if torch.is_grad_enabled() or transformed():
        sum_, others = k[first], list[Any](row[1:])
        for j, a in others:
            sum_ = torch.add(sum_, k[j], alpha=a / pivot)
        acc = torch.add(start, sum_, alpha=scale)
    else:
        acc = add_sum(start, k, row, h, None if half else out)
    if half and (out is None or out.dtype is not y0.dtype):
        acc = acc.type_as(y0)  # takes two thirds of the time of `to`
    return acc if out is None or acc is out else out.copy_(acc)


def add_sum(start: Tensor, k: Sequence[Tensor], row: Any, h: Any, out: Tensor | None = None) -> Tensor:
    """Return start + h sum_j a_j k_j in start's dtype, written into `out` if given. Autograd must not record.

    row: nonzero numbers. The first k_j of several has start's dtype. Others, and a single one, may be half tensors.
    """
    first, pivot = row[0]
    sum_ = k[first]
    if len(row) > 1:
        j, a = row[1]
        sum_ = torch.add(sum_, k[j], alpha=a / pivot)
        sum_ = sum_.clone() if sum_._is_zerotensor() else sum_
        for j, a in row[2:]:
            sum_.add_(k[j], alpha=a / pivot)
        out = sum_ if out is None else out
    return torch.add(start, sum_, alpha=h * pivot, out=out)


def recorded_sum(y0: Tensor, k: Sequence[Tensor], row: Row, h: Any) -> Tensor:
    """Return a new half tensor with the graph of y0 + h sum_j a_j k_j. The caller sums in float32 into its memory.

    The graph is that of a sum of half tensors, which has no casts. Its gradients h a_j g are rounded once, as they
    would be with casts. Its own value is rounded in every addition.
    """
    for j, a in row:
        y0 = torch.add(y0, k[j], alpha=h * a)
    return y0


def compensated(y0: Tensor, k: Sequence[Tensor], row: Row, h: float | Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
    """Return y1 = y0 + h sum_j a_j k_j, and what its rounding lost, which is added in the next step (Kahan).

    lost: that of the step before; float32 for half states. The results for a constant `lost` have the gradients of the
    plain sum. Kahan 1965, doi 10.1145/363707.363723.
    """
    if y0.dtype in HALF:
        k = [x.float() for x in k]
    change = combine(lost, k, row, h)
    y1 = (y0 + change).to(y0.dtype)
    return y1, (change - (y1.to(change.dtype) - y0)).detach()


def nothing_lost(y0: Tensor) -> Tensor:
    """Return the `lost` of `compensated` at the start of a solve."""
    return torch.zeros_like(y0, dtype=torch.float32 if y0.dtype in HALF else y0.dtype)


def rk_finish(
    y0: Tensor, k: Sequence[Tensor], b: Row, b_err: Row | None, h: float | Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return (y1, partial error) from the stages in `k`, in one pass over y0 and k.

    y1 = y0 + h sum_j b_j k_j, which is the argument of the last stage if the method is FSAL. The partial error is h
    sum_j (b - b_hat)_j k_j over the stages in `k`; `error_ratio` adds the last stage. It is float32 for half states,
    and None if `b_err` is None.
    """
    y1 = combine(y0, k, b, h)
    if b_err is None:
        return y1, None
    with torch.no_grad():
        step = float(h.detach()) if isinstance(h, Tensor) else h
        return y1, _weighted_sum(k, [(j, float(e)) for j, e in b_err if j < len(k)], step, like=y0)


def _weighted_sum(k: Sequence[Tensor], row: Sequence[tuple[int, float]], h: float, like: Tensor) -> Tensor:
    """Return h sum_j e_j k_j as a new tensor, float32 for half states."""
    dtype = torch.float32 if like.dtype in HALF else like.dtype
    if not row:
        return torch.zeros_like(like, dtype=dtype)
    (j, e), *rest = row
    acc = torch.mul(k[j].to(dtype), h * e)
    for j, e in rest:
        acc.add_(k[j], alpha=h * e)
    return acc


def error_ratio(
    error: Tensor,
    last: tuple[Tensor, float] | None,
    y0: Tensor,
    y1: Tensor,
    norm: ErrorNorm,
    also: Sequence[Tensor] = (),
) -> float:
    """Return the norm of (error + w k_last) / (atol + rtol max(|y0|, |y1|)); the step is good if it is at most 1.

    `error` is the partial error of this step, and is overwritten. `last` is the last stage and its weight h (b -
    b_hat), or None. `also`: further errors, already scaled, that take part in the norm. One host read.
    """
    with torch.no_grad():
        if last is not None:
            error.add_(last[0], alpha=last[1])
        return norm(error.div_(norm.scale(torch.maximum(y0.abs(), y1.abs()))), also)


class InitialNorms(NamedTuple):
    """The first two norms of Hairer's starting step: d0 of y0, d1 of f0."""

    d0: float
    d1: float


def initial_norms(y0: Tensor, f0: Tensor, norm: ErrorNorm) -> InitialNorms:
    """Return d0 = |y0 / scale|, d1 = |f0 / scale| with scale = atol + rtol |y0|."""
    with torch.no_grad():
        scale = norm.scale(y0.abs())
        return InitialNorms(norm(y0 / scale), norm(f0 / scale))


def initial_change(y0: Tensor, f0: Tensor, f1: Tensor, norm: ErrorNorm) -> float:
    """Return |(f1 - f0) / scale| with scale = atol + rtol |y0|; f1 is the field after the Euler step."""
    with torch.no_grad():
        if y0.dtype in HALF:
            f0, f1 = f0.float(), f1.float()  # in half precision the quotient overflows long before the norm does
        return norm((f1 - f0).div_(norm.scale(y0.abs())))


class ControllerParams(NamedTuple):
    """The constants of step-size control, which give the next step from the last errors.

    factor = safety * r_n^-e0 * r_{n-1}^-e1 * r_{n-2}^-e2, clipped to [dfactor, ifactor]; e = (e0, e1, e2) are the
    controller's coefficients divided by the order of the method. keep: the step is never made smaller after an accepted
    step.
    """

    exponents: tuple[float, float, float]
    safety: float
    ifactor: float
    dfactor: float
    keep: bool
    min_step: float
    max_step: float


class Judgement(NamedTuple):
    """The result of step control: whether the step is accepted, the size of the next one, and the errors to
    remember."""

    accept: bool
    h_next: float
    history: tuple[float, float]


def step_control(law: ControllerParams, h: float, ratio: float, history: tuple[float, float]) -> Judgement:
    """Judge a step of size h > 0 with error ratio `ratio`, in double. history: the ratios of the last accepted steps.

    A ratio that is not finite rejects the step, and shrinks it as far as one rejection may, because the field may be
    defined only for smaller steps. (diffrax does this too; torchdiffeq raises an error at once.) A step of min_step is
    always accepted.
    """
    finite = math.isfinite(ratio)
    accept = (finite and ratio <= 1.0 and h <= law.max_step) or h <= law.min_step
    if not finite:
        factor = law.dfactor
    elif ratio == 0.0:
        factor = law.ifactor
    else:
        e0, e1, e2 = law.exponents
        factor = law.safety / ratio**e0
        if e1:
            factor *= history[0] ** -e1
        if e2:
            factor *= history[1] ** -e2
        least = 1.0 if law.keep and ratio < 1.0 else law.dfactor
        most = law.ifactor if law.keep or accept else 1.0
        factor = min(most, max(factor, least))
    h_next = min(max(h * factor, law.min_step), law.max_step)
    if accept:
        # An error of zero would make the next factor infinite or zero.
        history = (max(ratio, 1e-4) if finite else 1.0, history[0])
    return Judgement(accept, h_next, history)


def polynomial(weights: Sequence[float], x: float | Tensor) -> float | Tensor:
    """Return sum_d weights[d] x^(d + 1)."""
    value: float | Tensor = 0.0
    for weight in reversed(weights):
        value = (value + weight) * x
    return value


def dense_eval(y0: Tensor, k: Sequence[Tensor], weights: Row, h: float | Tensor, out: Tensor | None = None) -> Tensor:
    """Return an output inside the step, y0 + h sum_i B_i(x) k_i, from the values B_i(x); written into `out` if
    given."""
    if not any(isinstance(w, Tensor) for _, w in weights):
        weights = _largest_first(weights)
    return combine(y0, k, weights, h, out)


def _largest_first(row: Iterable[tuple[int, Any]]) -> Row:
    """Return the nonzero entries, largest first: `combine` divides by the first, and polynomials nearly vanish near
    t0."""
    return sorted((entry for entry in row if entry[1] != 0.0), key=lambda entry: -abs(entry[1]))


def adjoint_stage(base: Tensor | None, x: Sequence[Tensor], row: Sequence[float], h: float) -> Tensor:
    """Return kappa = base + h sum_j a_j x_j, the cotangent of a stage. base None: 0. Half states accumulate in float32.

    In the discrete adjoint x is lam with b_i, then the mu_j of later stages with a_ji. Zero coefficients are never
    read.
    """
    entries = [(j, a) for j, a in enumerate(row) if a != 0.0]
    if base is not None:
        return combine(base, x, entries, h)
    return _weighted_sum(x, entries, h, like=x[0]).to(x[0].dtype)


class DenseCotangents(NamedTuple):
    """The cotangents that the outputs in a step give: of y1 (added to the given one), of y0, and one for each stage."""

    lam: Tensor
    start: Tensor
    extra: list[Tensor]


def dense_adjoint(
    lam: Tensor,
    inner: Sequence[Tensor],
    of_end: Sequence[float],
    weights: Sequence[Sequence[float]],
    last: Sequence[Tensor],
    h: float,
) -> DenseCotangents:
    """Return the transpose of y0 + P(x_o) (y1 - y0) + h sum_j B_j(x_o) k_j over the outputs o of a step.

    inner: the outputs' gradients g_o, in the order of time. of_end: their P(x_o). weights: for each j their B_j(x_o).
    last: the gradients of the outputs at the end of the step, which are y1 itself. lam: the cotangent of y1 so far.

        lam + sum_o P(x_o) g_o + sum last,   sum_o (1 - P(x_o)) g_o,   h sum_o B_j(x_o) g_o

    All results are new tensors of lam's shape and dtype, which must not be half precision; zeros if the step has no
    output. Reads lam and the gradients, writes two tensors and one for each j.
    """
    zero = torch.zeros_like(lam)
    start = combine(zero, inner, _largest_first(enumerate(1.0 - p for p in of_end)), 1.0)
    extra = [combine(zero, inner, _largest_first(enumerate(row)), h) for row in weights]
    lam = combine(lam, inner, _largest_first(enumerate(of_end)), 1.0)
    for g in last:
        lam = lam + g
    return DenseCotangents(lam, start, extra)


def accumulate(
    total: list[Tensor], tensors: Sequence[Tensor], weight: float, dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """Add total_i += weight x_i over a whole list of tensors; return a new list if `total` is empty.

    One launch for a list of any length. Half and bfloat16 accumulate in float32 (dtypes: the dtypes of the sums).
    """
    if not tensors:
        return total
    if not total:
        wide = [x if x.dtype is d else x.to(d) for x, d in zip(tensors, dtypes, strict=True)]
        return list(torch._foreach_mul(wide, weight))
    torch._foreach_add_(total, list(tensors), alpha=weight)
    return total


def scaled_sums(error: list[Tensor], theta0: list[Tensor], theta1: list[Tensor], norm: ErrorNorm) -> list[Tensor]:
    """Return error_i / (atol + rtol max(|theta0_i|, |theta1_i|)) for a list of accumulated gradients, for
    `error_ratio`."""
    size = torch._foreach_maximum(torch._foreach_abs(theta0), torch._foreach_abs(theta1))
    torch._foreach_mul_(size, norm.rtol)
    torch._foreach_add_(size, norm.atol)
    return list(torch._foreach_div(error, size))


def real_dot(g: Tensor, f: Tensor) -> Tensor:
    """Return Re sum conj(g) f, which is dL for a change f of y where dL/dy = g."""
    return torch.vdot(g.reshape(-1), f.reshape(-1).to(g.dtype)).real
