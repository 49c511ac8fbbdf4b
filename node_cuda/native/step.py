"""The formulas of a step as operations on tensors alone, so that a loop over steps can be traced.

They are those of `kernels.reference` and `kernels.step_control`, with 0-d doubles in place of numbers. Both give the
same steps; results may differ in the last bit, because the compiler may join a product and a sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from node_cuda._typing import Row
from node_cuda.native.numbers import Point, Settings
from node_cuda.status import Status


class Norm(NamedTuple):
    """The scaled rms norm. rtol, atol: tensors like the state, or None for the numbers of the settings.

    sizes: the lengths of the segments of a flat state; None for a single one.
    """

    rtol: Tensor | None
    atol: Tensor | None
    sizes: tuple[int, ...] | None

    def scale(self, c: Settings, magnitude: Tensor) -> Tensor:
        """Return atol + rtol * magnitude."""
        rtol = real(c.rtol, magnitude) if self.rtol is None else self.rtol
        atol = real(c.atol, magnitude) if self.atol is None else self.atol
        return atol + rtol * magnitude

    def __call__(self, scaled: Tensor) -> Tensor:
        """Return the largest rms of a segment, a 0-d double."""
        return largest([rms(x) for x in (scaled.split(list(self.sizes)) if self.sizes else (scaled,)) if x.numel()])

    def ratio(self, c: Settings, error: Tensor, y0: Tensor, y1: Tensor) -> Tensor:
        """Return the norm of the error of a step from y0 to y1."""
        return self(error / self.scale(c, torch.maximum(y0.abs(), y1.abs())))


def rms(x: Tensor) -> Tensor:
    """Return the root mean square of x, a 0-d double."""
    return torch.linalg.vector_norm(x).double() / math.sqrt(x.numel())


def largest(values: Sequence[Tensor]) -> Tensor:
    """Return the largest of some 0-d doubles; NaN if one is NaN."""
    found = values[0]
    for value in values[1:]:
        found = torch.maximum(found, value)
    return found


def real(value: Any, like: Tensor) -> Tensor:
    """Return a 0-d double in the real dtype of a tensor."""
    return value.to(like.dtype.to_real())


def combine(y0: Tensor, k: Sequence[Tensor], row: Row, h: Any) -> Tensor:
    """Return y0 + h sum_j a_j k_j in the order of `reference.combine`: y0 is added last."""
    if not row:
        return y0
    first, pivot = row[0]
    total = k[first]
    for j, a in row[1:]:
        total = total + (a / pivot) * k[j]
    return y0 + real(h * pivot, y0) * total


def weighted(k: Sequence[Tensor], row: Row, h: Any) -> Tensor:
    """Return h sum_j e_j k_j."""
    total = None
    for j, e in row:
        term = real(h * e, k[j]) * k[j]
        total = term if total is None else total + term
    assert total is not None
    return total


def beside(s: Tensor, sign: float, dtype: torch.dtype) -> Tensor:
    """Return the number of this dtype just after (sign 1) or before (sign -1) the solver time s."""
    near = s.to(dtype)
    return torch.nextafter(near, torch.full_like(near, sign * math.inf)).double()


class Law(NamedTuple):
    """A judged step: whether it is accepted, the size of the next one, and the error ratios to remember."""

    accept: Tensor
    h_next: Tensor
    r0: Tensor
    r1: Tensor


def judge(c: Settings, h: Tensor, ratio: Tensor, p: Point) -> Law:
    """Judge a step by its error ratio, as `reference.step_control`."""
    finite = torch.isfinite(ratio)
    accept = (finite & (ratio <= 1.0) & (h <= c.max_step)) | (h <= c.min_step)
    keep = c.keep > 0.0
    factor = c.safety / ratio**c.e0 * p.r0**-c.e1 * p.r1**-c.e2
    least = torch.where(keep & (ratio < 1.0), 1.0, c.dfactor)
    most = torch.where(keep | accept, c.ifactor, 1.0)
    factor = torch.where(ratio == 0.0, c.ifactor, factor)
    factor = torch.where(finite, torch.minimum(most, torch.maximum(factor, least)), c.dfactor)
    h_next = within(c, h * factor)
    seen = torch.where(finite, ratio.clamp_min(1e-4), 1.0)
    return Law(accept, h_next, torch.where(accept, seen, p.r0), torch.where(accept, p.r0, p.r1))


def within(c: Settings, h: Tensor) -> Tensor:
    """Return a step size between min_step and max_step."""
    return torch.minimum(torch.maximum(h, c.min_step), c.max_step)


class Cut(NamedTuple):
    """A step to try: its end, its size, and the size that it had before it was cut to end at a stop, else 0."""

    t1: Tensor
    h: Tensor
    carried: Tensor


def cut(p: Point, tstops: Tensor | None, stop: Tensor | None) -> Cut:
    """Return the proposed step, which ends at the next of `tstops` or at `stop`, as `StepControl._cut`."""
    t: Any = p.t
    h: Any = p.proposal
    t1 = t + h
    carried = torch.zeros_like(t)
    landed = torch.zeros_like(t, dtype=torch.bool)
    if tstops is not None:
        following = torch.where(tstops > t, tstops, math.inf).amin()
        ulp = torch.nextafter(t1.abs(), torch.full_like(t1, math.inf)) - t1.abs()
        landed = following <= t1 + 4 * ulp
        t1 = torch.where(landed, following, t1)
        h = torch.where(landed, torch.minimum(t1 - t, h), h)
    if stop is not None:
        passes = t1 >= stop
        halves = ~passes & ~landed & (t + 2 * h > stop)
        short = passes | halves
        carried = torch.where(short, h, carried)
        t1 = torch.where(passes, stop, torch.where(halves, t + 0.5 * (stop - t), t1))
        h = torch.where(short, torch.minimum(t1 - t, h), h)
    return Cut(t1, h, carried)


def proposed(c: Settings, p: Point, active: Tensor) -> Point:
    """Return the point with its next step counted, or with the status that ends the solve, as `StepControl._propose`.

    active: the solve goes on.
    """
    t: Any = p.t
    status: Any = p.status
    fits = t + p.proposal > t
    small = torch.where(p.finite > 0, Status.STEP_UNDERFLOW.value, Status.NON_FINITE.value)
    many = p.attempts >= c.max_num_steps
    found = torch.where(fits, torch.where(many, Status.MAX_STEPS.value, 0), small)
    status = torch.where((status == 0) & active, found, status)
    attempts = torch.where((status == 0) & active, p.attempts + 1, p.attempts)
    return p._replace(status=status, attempts=attempts)
