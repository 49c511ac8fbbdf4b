"""The reverse loop of the discrete adjoint over recorded steps, as a function of tensors alone that can be traced.

    lam: the gradient by the state at the end of a step;   kappa: that by the last stage, where it is the next k1

Each step is computed again from its recorded y0, and autograd gives the gradients by y0, k1 and the parameters. The
outputs in a step are linear in y0, y1 and the slopes, and polynomials in x: the moments sum_o x_o^d g_o of their
gradients g_o are all that is needed of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from node_cuda.native.loop import Scheme, compute, slopes
from node_cuda.native.numbers import Form, Settings, given_in
from node_cuda.native.step import beside, real
from node_cuda.native.tracing import while_loop


class Shape(NamedTuple):
    """What is fixed in a reverse loop. steps: the rows of a tape. wanted: the tensors of func that get a gradient."""

    form: Form
    steps: int
    wanted: tuple[int, ...]


def reverse(
    scheme: Scheme, shape: Shape, field: Callable[[Any, Tensor, Tensor, Sequence[Tensor]], Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    """Return the reverse loop as a function of (numbers, count, g, end, lam, kappa, tape, func's tensors).

    numbers: as those of the forward loop. count: the recorded steps, a 0-d integer. g: dL/dy at the outputs. end: the
    state after the last step. It returns lam and kappa at the first step's start, and the gradients of `shape.wanted`.
    """
    tableau = scheme.tableau
    # The last stage of an FSAL method is the next step's first one, and its gradient is added there.
    defers = tableau.fsal and scheme.extra is None
    passes_on = defers and scheme.carries and tableau.stages - 1 in scheme.used
    degree = max([len(weights) for _, weights in scheme.rows] + [len(scheme.end)])
    n_tape, n_wanted = 3 if scheme.keeps_k1 else 2, len(shape.wanted)
    kinds = min(shape.form.times - 1, shape.steps) + 2  # no outputs, each step with outputs, outputs of other calls

    def leaves_of(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return func's tensors with leaves in the place of the wanted ones, and these leaves."""
        given = list(tensors)
        for i in shape.wanted:
            given[i] = given[i].detach().requires_grad_(True)
        return given, [given[i] for i in shape.wanted]

    def pulled(c: Settings, s: Tensor, y: Tensor, seed: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return seed^T df/dy at (s, y), and its gradients by the wanted tensors."""
        given, leaves = leaves_of(tensors)
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            return _vjp([field(c, s, y, given)], [seed], [y, *leaves])

    def if_asked(go: Tensor, lam: Tensor, sums: Sequence[Tensor], at: Sequence[Tensor], rest: Sequence[Tensor]) -> Any:
        """Add `pulled` of at = (s, y, seed) if go, a loop of one iteration or of none."""

        def more(go: Tensor, lam: Tensor, *flat: Tensor) -> list[Tensor]:
            sums, (s, y, seed, numbers, *tensors) = flat[:n_wanted], flat[n_wanted:]
            found = pulled(given_in(shape.form, numbers).c, s, y, seed, tensors)
            return [go - 1, *(a + b for a, b in zip((lam, *sums), found, strict=True))]

        _, lam, *sums = while_loop(lambda go, *_: go > 0, more, [go.long(), lam, *sums], [*at, *rest])
        return lam, sums

    def slope_seed(j: int, moments: Tensor, signed: Tensor) -> Tensor:
        """Return the gradient by slope j that the outputs of a step give."""
        weights = next(weights for i, weights in scheme.rows if i == j)
        total: Any = sum(w * moments[d + 1] for d, w in enumerate(weights) if w)
        return real(signed, moments) * total

    def body(i: Tensor, lam: Tensor, kappa: Tensor, *flat: Tensor) -> list[Tensor]:
        sums, rest = flat[:n_wanted], flat[n_wanted:]
        moments, kinds_of, numbers, *rest = rest
        tape, tensors = rest[:n_tape], rest[n_tape:]
        c: Any = given_in(shape.form, numbers).c
        (y0, at), m = (x.index_select(0, i.reshape(1)).squeeze(0) for x in tape[:2]), _row(moments, kinds_of, i)
        t0, h, t1, t_k1, _ = at.unbind()
        given, leaves = leaves_of(tensors)
        with torch.enable_grad():
            y0 = y0.detach().requires_grad_(True)

            def f(s: Tensor, y: Tensor) -> Tensor:
                return field(c, s, y, given)

            if scheme.keeps_k1:
                k1 = tape[2].index_select(0, i.reshape(1)).squeeze(0).detach().requires_grad_(True)
            else:
                k1 = f(t_k1, y0)
            step = compute(scheme, c, f, t0, t1, h, y0, k1, last=not defers)
            k = slopes(scheme, f, step)
            along: Any = sum(w * m[d + 1] for d, w in enumerate(scheme.end)) if scheme.end else None
            outputs, seeds = [step.y1], [lam if along is None else lam + along]
            for j in scheme.used:
                if not (defers and j == tableau.stages - 1):
                    outputs.append(k[j])
                    seeds.append(slope_seed(j, m, step.signed))
            if scheme.keeps_k1:
                outputs.append(step.k[-1])
                seeds.append(kappa)
            elif passes_on:
                # k1 is the last stage of the step before. Row 0 has no step before it in this tape.
                before = (i - 1).clamp_min(0)
                signed = c.direction * tape[1].index_select(0, before.reshape(1)).squeeze(0)[1]
                seed = slope_seed(tableau.stages - 1, _row(moments, kinds_of, before), signed)
                outputs.append(k1)
                seeds.append(torch.where(i > 0, seed, torch.zeros_like(seed)))
            wanted = [y0, k1] if scheme.keeps_k1 else [y0]
            found = _vjp(outputs, seeds, [*wanted, *leaves])
        lam = found[0] + (m[0] if along is None else m[0] - along)
        if scheme.keeps_k1:
            kappa = found[1]
        return [i - 1, lam, kappa.clone(), *(a + b for a, b in zip(sums, found[len(wanted) :], strict=True))]

    def run(numbers: Tensor, count: Tensor, g: Tensor, end: Tensor, lam: Tensor, kappa: Tensor, *rest: Tensor) -> Any:
        tape, tensors = rest[:n_tape], rest[n_tape:]
        times = given_in(shape.form, numbers).times
        c: Any = given_in(shape.form, numbers).c
        moments, kinds_of = _moments(times, g, tape[1], count, degree, kinds)
        lam, kappa, sums = lam.clone(), kappa.clone(), [torch.zeros_like(tensors[i]) for i in shape.wanted]
        last = count - 1
        fixed = [numbers, *tensors]
        if passes_on:
            # The last stage of the last step is no step's k1 here.
            at = tape[1].index_select(0, last.reshape(1)).squeeze(0)
            seed = slope_seed(tableau.stages - 1, _row(moments, kinds_of, last), c.direction * at[1])
            asked = kinds_of.index_select(0, last.reshape(1)).squeeze(0) > 0
            lam, sums = if_asked(asked, lam, sums, [beside(at[2], -1.0, end.dtype.to_real()), end, seed], fixed)
        carried = [last, lam, kappa, *sums]
        _, lam, kappa, *sums = while_loop(lambda i, *_: i >= 0, body, carried, [moments, kinds_of, numbers, *rest])
        if scheme.keeps_k1:
            # The first k1 is a stage of the step before, or the field at the start.
            first = tape[1][0]
            lam, sums = if_asked(first[4] == 0.0, lam, sums, [first[3], tape[0][0], kappa], fixed)
            kappa = torch.where(first[4] == 0.0, torch.zeros_like(kappa), kappa)
        return lam.clone(), kappa.clone(), *(x.clone() for x in sums)

    return run


def _vjp(outputs: Sequence[Tensor], seeds: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of sum_o <seed_o, output_o>, zeros where nothing depends on a tensor."""
    pairs = [(x, seed) for x, seed in zip(outputs, seeds, strict=True) if x.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in of]
    outs, gs = zip(*pairs, strict=True)
    found = torch.autograd.grad(outs, of, gs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, of, strict=True)]


def _row(moments: Tensor, kinds_of: Tensor, i: Tensor) -> Tensor:
    """Return the moments of step i, of shape (degree + 1, *y.shape)."""
    return moments.index_select(0, kinds_of.index_select(0, i.reshape(1))).squeeze(0)


def _moments(times: Tensor, g: Tensor, at: Tensor, count: Tensor, degree: int, kinds: int) -> tuple[Tensor, Tensor]:
    """Return sum_o x_o^d g_o for each step with outputs, and for each step the row of its moments: row 0 is zero."""
    steps = len(at)
    t0, _, t1, _, _ = at.unbind(1)
    last = torch.where(torch.arange(steps) < count, t1, torch.inf)
    i = torch.searchsorted(last, times[1:])
    here = (i < count) & (times[1:] > t0[0])
    i = i.clamp_max(steps - 1)
    has = torch.zeros(steps, dtype=torch.int64).index_add(0, i, here.long()) > 0
    kinds_of = torch.cumsum(has, 0) * has
    x = ((times[1:] - t0[i]) / (t1[i] - t0[i])).clamp_max(1.0)
    rows = torch.where(here, kinds_of[i], kinds - 1)
    wide = (-1, *[1] * (g.dim() - 1))
    moments = []
    power = torch.ones_like(x)
    for _ in range(degree + 1):
        zero = g.new_zeros(kinds, *g.shape[1:])
        moments.append(zero.index_add(0, rows, real(power, g).view(wide) * g[1:]))
        power = power * x
    return torch.stack(moments, 1), kinds_of
