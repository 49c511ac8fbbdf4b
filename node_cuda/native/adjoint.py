"""The backward loop of the adjoint method over one interval between outputs, as a function of tensors alone.

    dy/dt = f,   da/dt = -a^T df/dy,   dL/dtheta = int a^T df/dtheta dt

y and a are stepped together, and dL/dtheta is summed with the weights of the method. The host sets y and a at each
output, and calls the loop for the next interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from node_cuda.native.loop import Scheme, first_step_by, moved
from node_cuda.native.numbers import FIRST, Form, Given, Point, given_in, packed, point_in
from node_cuda.native.step import Norm, beside, combine, cut, judge, largest, proposed, real, rms, weighted
from node_cuda.native.tracing import while_loop


class Shape(NamedTuple):
    """What is fixed in a backward loop.

    wanted: the tensors of func that get a gradient. per_element: whether rtol, and atol, is a tensor. sizes: the
    segments of y. sums_in_norm: the errors of the sums take part in the norm.
    """

    form: Form
    wanted: tuple[int, ...]
    per_element: tuple[bool, bool]
    sizes: tuple[int, ...] | None
    sums_in_norm: bool


class Slope(NamedTuple):
    """dy/dt, da/dt, and a^T df/dtheta."""

    y: Tensor
    a: Tensor
    sums: list[Tensor]


def backward(
    scheme: Scheme, order: int, shape: Shape, field: Callable[[Any, Tensor, Tensor, Sequence[Tensor]], Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    """Return the loop as a function of tensors: numbers, y, a, their k1, k1 of the sums, the sums, tolerances, func's.

    The numbers hold one output time, the end of the interval. It returns the point and all that changes.
    """
    tableau, n = scheme.tableau, len(shape.wanted)
    b = [float(x) for x in tableau.b]
    e = [float(x) for x in tableau.b_err or [0.0] * tableau.stages]
    n_tols = sum(shape.per_element)

    def told(rest: Sequence[Tensor]) -> tuple[Given, Norm, Sequence[Tensor]]:
        tols = iter(rest[1 : 1 + n_tols])
        rtol, atol = (next(tols) if is_tensor else None for is_tensor in shape.per_element)
        norm = Norm(rtol, atol, shape.sizes)
        return given_in(shape.form, rest[0]), norm, rest[1 + n_tols :]

    def slope(c: Any, s: Tensor, y: Tensor, a: Tensor, tensors: Sequence[Tensor], *, sums: bool = True) -> Slope:
        """Return the slopes at the solver time s."""
        given = list(tensors)
        for i in shape.wanted:
            given[i] = given[i].detach().requires_grad_(True)
        leaves = [given[i] for i in shape.wanted] if sums else []
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            f = field(c, s, y, given)
            found: Sequence[Tensor | None] = [None] * (1 + len(leaves))
            if f.requires_grad:
                found = torch.autograd.grad(f, [y, *leaves], a, allow_unused=True)
        da, *of_leaves = (torch.zeros_like(x) if g is None else g for g, x in zip(found, [y, *leaves], strict=True))
        return Slope(f.detach(), -da, of_leaves)

    def summed(k: Sequence[Slope], weights: Sequence[float], signed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Return -signed sum_i w_i a^T df/dtheta_i: the minus turns the integral round, as it runs backwards."""
        totals = [torch.zeros_like(x) for x in like]
        for w, at in zip(weights, k, strict=True):
            if w:
                totals = [t + real(-signed * w, g) * g for t, g in zip(totals, at.sums, strict=True)]
        return totals

    def step(given: Given, t0: Any, t1: Any, h: Any, y: Tensor, a: Tensor, k1: Slope, tensors: Sequence[Tensor]) -> Any:
        """Compute a step. Return its signed size, y1, a1 and the slopes."""
        c: Any = given.c
        signed = c.direction * h
        end = beside(t1, -1.0, y.dtype.to_real()) if scheme.inside else t1
        known, k = tableau.stages - tableau.fsal, [k1]
        for i in range(1, known):
            ys, as_ = [x.y for x in k], [x.a for x in k]
            node, row = tableau.nodes[i], tableau.rows[i]
            s = end if node == 1.0 else t0 + node * h
            k.append(slope(c, s, combine(y, ys, row, signed), combine(a, as_, row, signed), tensors))
        y1 = combine(y, [x.y for x in k], tableau.b_row, signed)
        a1 = combine(a, [x.a for x in k], tableau.b_row, signed)
        if tableau.fsal:
            k.append(slope(c, end, y1, a1, tensors))
        return signed, y1, a1, k

    def ratio_of(
        given: Given, norm: Norm, signed: Any, y: Tensor, a: Tensor, y1: Tensor, a1: Tensor, k: Any, sums: Any
    ) -> Tensor:
        """Return the norm of the error."""
        c: Any = given.c
        values = []
        for x0, x1, slopes in ((y, y1, [x.y for x in k]), (a, a1, [x.a for x in k])):
            error = weighted(slopes, scheme.b_err, signed)
            values.append(norm(error / norm.scale(c, torch.maximum(x0.abs(), x1.abs()))))
        if shape.sums_in_norm:
            after = [x + d for x, d in zip(sums, summed(k, b, signed, sums), strict=True)]
            for x0, x1, error in zip(sums, after, summed(k, e, signed, sums), strict=True):
                if x0.numel():
                    scale = real(c.atol_sums, x0) + real(c.rtol_sums, x0) * torch.maximum(x0.abs(), x1.abs())
                    values.append(rms(error / scale))
        return largest(values)

    def body(point: Tensor, y: Tensor, a: Tensor, k1y: Tensor, k1a: Tensor, *flat: Tensor) -> list[Tensor]:
        k1 = Slope(k1y, k1a, list(flat[:n]))
        sums, rest = flat[n : 2 * n], flat[2 * n :]
        given, norm, tensors = told(rest)
        p: Any = point_in(point)
        if not scheme.adaptive:
            grid: Any = given.grid
            t0, t1 = grid.index_select(0, torch.stack([p.place, p.place + 1])).unbind()
            start = beside(t0, 1.0, y.dtype.to_real()) if scheme.inside else t0
            k1 = slope(given.c, start, y, a, tensors)
            signed, y1, a1, k = step(given, t0, t1, t1 - t0, y, a, k1, tensors)
            p = p._replace(
                t=t1,
                place=p.place + 1,
                accepted=p.accepted + 1,
                output=(given.times <= t1).sum(),
                nfe=p.nfe + tableau.stages,
                calls=p.calls + 1,
            )
            after = [x + d for x, d in zip(sums, summed(k, b, signed, sums), strict=True)]
            return [packed(p), y1, a1, k1y.clone(), k1a.clone(), *(x.clone() for x in flat[:n]), *after]
        at = cut(p, given.tstops, given.times[0])
        signed, y1, a1, k = step(given, p.t, at.t1, at.h, y, a, k1, tensors)
        ratio = ratio_of(given, norm, signed, y, a, y1, a1, k, sums)
        law = judge(given.c, at.h, ratio, p)
        accept = law.accept & torch.isfinite(ratio)
        output = torch.where(accept, (given.times <= at.t1).sum(), p.output)
        dtype = y.dtype.to_real()
        q = moved(given.c, p, law, at, ratio, dtype, output, output < 1, given.jumps, tableau.stages - 1)
        q = q._replace(calls=p.calls + 1)
        after = [x + d for x, d in zip(sums, summed(k, b, signed, sums), strict=True)]
        pairs = [(y1, y), (a1, a), (k[-1].y, k1.y), (k[-1].a, k1.a)]
        pairs += [*zip(k[-1].sums, k1.sums, strict=True), *zip(after, sums, strict=True)]
        return [packed(q), *(torch.where(accept, new, old) for new, old in pairs)]

    def going(point: Tensor, *flat: Tensor) -> Tensor:
        p: Any = point_in(point)
        c: Any = given_in(shape.form, flat[4 + 2 * n]).c
        return (p.status == 0) & (p.output < 1) & (p.fresh == 0) & (p.calls < c.cap)

    def begun(
        p: Any, y: Tensor, a: Tensor, k1: Sequence[Tensor], fixed: Sequence[Tensor]
    ) -> tuple[Point, list[Tensor]]:
        """Find k1 and the first step size where they are not known. Each is a loop of one iteration, or of none."""

        def first(go: Tensor, nfe: Tensor, *flat: Tensor) -> list[Tensor]:
            t_k1, y, a, *rest = flat[2 + n :]
            given, _, tensors = told(rest)
            found = slope(given.c, t_k1, y, a, tensors)
            return [go - 1, nfe + 1, found.y, found.a, *found.sums]

        state = [(p.fresh > 0).long(), p.nfe, *k1]
        _, nfe, *k1 = while_loop(lambda go, *_: go > 0, first, state, [p.t_k1, y, a, *fixed])

        def size(go: Tensor, nfe: Tensor, *flat: Tensor) -> list[Tensor]:
            t, y, a, k1y, k1a, *rest = flat[2:]
            given, norm, tensors = told(rest)

            def f(s: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
                found = slope(given.c, s, parts[0], parts[1], tensors, sums=False)
                return [found.y, found.a]

            proposal, status = first_step_by(given.c, f, norm, order, t, [y, a], [k1y, k1a])
            return [go - 1, nfe + (status == 0).long(), proposal, status]

        state = [(p.fresh > 1).long(), nfe, p.proposal, p.status]
        _, nfe, proposal, status = while_loop(lambda go, *_: go > 0, size, state, [p.t, y, a, k1[0], k1[1], *fixed])
        p = p._replace(nfe=nfe, proposal=proposal, status=status, fresh=torch.zeros_like(nfe))
        return proposed(told(fixed)[0].c, p, p.attempts == 0), list(k1)

    def run(numbers: Tensor, y: Tensor, a: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        k1, sums, fixed = list(rest[: 2 + n]), rest[2 + n : 2 + 2 * n], [numbers, *rest[2 + 2 * n :]]
        p = point_in(numbers[:FIRST])
        p = p._replace(calls=torch.zeros((), dtype=torch.int64))
        k1 = [x.clone() for x in k1]
        if scheme.adaptive:
            p, k1 = begun(p, y, a, k1, fixed)
        carried = [packed(p), y.clone(), a.clone(), *k1, *(x.clone() for x in sums)]
        return tuple(x.clone() for x in while_loop(going, body, carried, fixed))

    return run
