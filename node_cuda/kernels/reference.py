"""The primitives of a step in plain PyTorch: the CPU path, and what every other implementation must equal.

Conventions. `y0` is the state at the start of the step and `k` the list of stage derivatives, each a separate tensor
of the state's shape and dtype. `h` is the signed step size, a float, or a 0-d tensor where the tape must see it. A
row of coefficients is its non-zero entries `(j, a_j)`: a zero coefficient is never read, because 0 * inf is NaN.
Half and bfloat16 states accumulate in float32. Nothing that was handed out is written again: every result starts as
a fresh tensor, and only that one is updated in place (out of place while autograd records).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from node_cuda._torch_modes import transformed
from node_cuda._typing import Row
from node_cuda.kernels.norms import ErrorNorm

_HALF = (torch.float16, torch.bfloat16)


def combine(y0: Tensor, k: Sequence[Tensor], row: Row, h: float | Tensor, out: Tensor | None = None) -> Tensor:
    """y0 + h sum_j a_j k_j, as a fresh tensor of y0's shape and dtype, or written to `out`.

    The increment is summed first and y0 is added last, so that one rounding only is of y0's size: with a_0 the first
    coefficient, y0 + h a_0 (k_0 + sum_j a_j / a_0 k_j), which takes as many operations as adding term by term.
    """
    if not row:
        return y0.clone() if out is None else out.copy_(y0)
    half = y0.dtype in _HALF
    start = y0.float() if half else y0
    first, pivot = row[0]
    scale: Any = h * pivot
    if isinstance(scale, Tensor):  # on the tape, where a weight may be zero, and is no unit
        acc = start + h * functools.reduce(torch.add, (a * k[j].to(start.dtype) for j, a in row))
        return acc.to(y0.dtype) if out is None else out.copy_(acc)
    sum_ = k[first].float() if half else k[first]
    others: list[tuple[int, Any]] = [(j, a / pivot) for j, a in row[1:]]
    if torch.is_grad_enabled() or transformed():
        for j, a in others:
            sum_ = torch.add(sum_, k[j], alpha=a)
        acc = torch.add(start, sum_, alpha=scale)
    else:
        ours = half  # sum_ is memory that this function made, and may write
        for j, a in others:
            if ours:
                sum_.add_(k[j], alpha=a)
            else:
                sum_ = torch.add(sum_, k[j], alpha=a)
                ours = not sum_._is_zerotensor()
        to = None if half else out if out is not None or not ours else sum_
        acc = torch.add(start, sum_, alpha=scale, out=to)
    if half:
        acc = acc.to(y0.dtype)
    return acc if out is None or acc is out else out.copy_(acc)


def rk_stage(y0: Tensor, k: Sequence[Tensor], row: Row, h: float | Tensor) -> Tensor:
    """The argument of a stage, z_i = y0 + h sum_j a_ij k_j.  Reads y0 and the k_j with a_ij != 0, writes z_i."""
    return combine(y0, k, row, h)


def rk_finish(
    y0: Tensor, k: Sequence[Tensor], b: Row, b_err: Row | None, h: float | Tensor
) -> tuple[Tensor, Tensor | None]:
    """The end of a step as far as the stages in `k` reach: (y1, partial error), in one pass over y0 and k.

    y1 = y0 + h sum_j b_j k_j, which is the last stage's argument where the method is FSAL. The partial error is
    h sum_j (b - b_hat)_j k_j over the stages in `k`, to which `error_ratio` adds the last one; float32 for half
    states; None if `b_err` is.
    """
    y1 = combine(y0, k, b, h)
    if b_err is None:
        return y1, None
    with torch.no_grad():
        step = float(h.detach()) if isinstance(h, Tensor) else h
        return y1, _weighted_sum(k, [(j, float(e)) for j, e in b_err if j < len(k)], step, like=y0)


def _weighted_sum(k: Sequence[Tensor], row: Sequence[tuple[int, float]], h: float, like: Tensor) -> Tensor:
    """h sum_j e_j k_j as a fresh tensor, float32 for half states."""
    dtype = torch.float32 if like.dtype in _HALF else like.dtype
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
    """The norm of (error + w k_last) / (atol + rtol max(|y0|, |y1|)); the step is good if it is at most 1.

    `error` is this step's own partial error and is used up; `last` is the last stage and its weight h (b - b_hat), or
    None. `also`: further errors, already scaled, that take part in the norm. One host read.
    """
    with torch.no_grad():
        if last is not None:
            error.add_(last[0], alpha=last[1])
        return norm(error.div_(norm.scale(torch.maximum(y0.abs(), y1.abs()))), also)


class InitialNorms(NamedTuple):
    """The norms that Hairer's starting step begins with: d0 of y0, d1 of f0."""

    d0: float
    d1: float


def initial_norms(y0: Tensor, f0: Tensor, norm: ErrorNorm) -> InitialNorms:
    """d0 = |y0 / scale|, d1 = |f0 / scale| with scale = atol + rtol |y0|."""
    with torch.no_grad():
        scale = norm.scale(y0.abs())
        return InitialNorms(norm(y0 / scale), norm(f0 / scale))


def initial_change(y0: Tensor, f0: Tensor, f1: Tensor, norm: ErrorNorm) -> float:
    """|(f1 - f0) / scale| with scale = atol + rtol |y0|; f1 is the field after the probing Euler step."""
    with torch.no_grad():
        if y0.dtype in _HALF:
            f0, f1 = f0.float(), f1.float()  # the quotient overflows in half precision long before the norm does
        return norm((f1 - f0).div_(norm.scale(y0.abs())))


class ControllerParams(NamedTuple):
    """The constants of step control, and how the next step follows from the last errors.

    factor = safety * r_n^-e0 * r_{n-1}^-e1 * r_{n-2}^-e2, clipped to [dfactor, ifactor]; e = (e0, e1, e2) are the
    controller's coefficients over the order of the method. keep: an accepted step is never followed by a smaller one.
    """

    exponents: tuple[float, float, float]
    safety: float
    ifactor: float
    dfactor: float
    keep: bool
    min_step: float
    max_step: float


class Judgement(NamedTuple):
    """What step control says: is the step good, how large is the next one, and the errors to remember."""

    accept: bool
    h_next: float
    history: tuple[float, float]


def step_control(law: ControllerParams, h: float, ratio: float, history: tuple[float, float]) -> Judgement:
    """Judge a step of size h > 0 with error ratio `ratio`, in double. history: the ratios of the last accepted steps.

    A ratio that is not finite rejects, and shrinks the step as far as one rejection may: the field may only be
    defined nearer by (some do so: diffrax; torchdiffeq gives up at once). A step of min_step is always accepted.
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
        # A vanishing error would make the next factor infinite or zero.
        history = (max(ratio, 1e-4) if finite else 1.0, history[0])
    return Judgement(accept, h_next, history)


def polynomial(weights: Sequence[float], x: float | Tensor) -> float | Tensor:
    """sum_d weights[d] x^(d + 1)."""
    value: float | Tensor = 0.0
    for weight in reversed(weights):
        value = (value + weight) * x
    return value


def dense_eval(y0: Tensor, k: Sequence[Tensor], weights: Row, h: float | Tensor, out: Tensor | None = None) -> Tensor:
    """One output inside the step, y0 + h sum_i B_i(x) k_i, the weights B_i(x) already evaluated; to `out` if given."""
    if not any(isinstance(w, Tensor) for _, w in weights):
        weights = _largest_first(weights)
    return combine(y0, k, weights, h, out)


def _largest_first(row: Iterable[tuple[int, Any]]) -> Row:
    """The entries that are not zero: `combine` counts in units of the first, and polynomials nearly vanish near t0."""
    return sorted((entry for entry in row if entry[1] != 0.0), key=lambda entry: -abs(entry[1]))


def adjoint_stage(base: Tensor | None, x: Sequence[Tensor], row: Sequence[float], h: float) -> Tensor:
    """kappa = base + h sum_j a_j x_j, the cotangent of a stage; base None: 0. Half states accumulate in float32.

    In the discrete adjoint x is lam with b_i, then the mu_j of later stages with a_ji (a zero is never read).
    """
    entries = [(j, a) for j, a in enumerate(row) if a != 0.0]
    if base is not None:
        return combine(base, x, entries, h)
    return _weighted_sum(x, entries, h, like=x[0]).to(x[0].dtype)


class DenseCotangents(NamedTuple):
    """What the outputs in a step give back: of y1 together with what it had, of y0, and of stages, one each."""

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
    """The transpose of y0 + P(x_o) (y1 - y0) + h sum_j B_j(x_o) k_j over the outputs o of a step.

    inner: the outputs' gradients g_o, in the order of time; of_end: their P(x_o); weights: for each j their B_j(x_o);
    last: the gradients of those at the end of the step, which are y1 itself. lam: the cotangent of y1 so far.

        lam + sum_o P(x_o) g_o + sum last,   sum_o (1 - P(x_o)) g_o,   h sum_o B_j(x_o) g_o

    All fresh, of lam's shape and dtype, which is no half precision; zeros where no output lies in the step.  Reads lam
    and the gradients, writes two tensors and one for each j.
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
    """total_i += weight x_i over a whole list of tensors; a fresh list where `total` is empty.

    One launch, whatever the length of the list. Half and bfloat16 accumulate in float32 (dtypes: those of the sums).
    """
    if not tensors:
        return total
    if not total:
        return list(torch._foreach_mul([x.to(d) for x, d in zip(tensors, dtypes, strict=True)], weight))
    torch._foreach_add_(total, list(tensors), alpha=weight)
    return total


def scaled_sums(error: list[Tensor], theta0: list[Tensor], theta1: list[Tensor], norm: ErrorNorm) -> list[Tensor]:
    """error_i / (atol + rtol max(|theta0_i|, |theta1_i|)) over a list of accumulated gradients, for `error_ratio`."""
    size = torch._foreach_maximum(torch._foreach_abs(theta0), torch._foreach_abs(theta1))
    torch._foreach_mul_(size, norm.rtol)
    torch._foreach_add_(size, norm.atol)
    return list(torch._foreach_div(error, size))


def real_dot(g: Tensor, f: Tensor) -> Tensor:
    """Re sum conj(g) f, which is dL for a change f of y where dL/dy = g."""
    return torch.vdot(g.reshape(-1), f.reshape(-1).to(g.dtype)).real
