"""The reverse loop of the discrete adjoint over recorded steps, as a function of tensors alone that can be traced.

    lam: the gradient by the state at the end of a step;   kappa: that by the last stage, where it is the next k1

Each step is computed again from its recorded y0, and autograd gives the gradients by y0, k1 and the parameters. The
outputs in a step are linear in y0, y1 and the slopes, and polynomials in x: the moments sum_o x_o^d g_o of their
gradients g_o are all that is needed of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from node_cuda.native.loop import Field, Scheme, Step, compute, slopes
from node_cuda.native.numbers import Form, Settings, given_in
from node_cuda.native.step import beside, real
from node_cuda.native.tracing import once, while_loop


class Shape(NamedTuple):
    """What is fixed in a reverse loop. steps: the rows of a tape. wanted: the tensors of func that get a gradient."""

    form: Form
    steps: int
    wanted: tuple[int, ...]


class Moments(NamedTuple):
    """The moments of the gradients of the outputs: the rows that differ, and the place of each step's row in them."""

    rows: Tensor
    places: Tensor

    def of(self, i: Tensor) -> Tensor:
        """Return sum_o x_o^d g_o over the outputs in step i, of shape (degree + 1, *y.shape)."""
        return self.rows.index_select(0, self.places.index_select(0, i.reshape(1))).squeeze(0)


class ReverseLoop:
    """The reverse loop, as a function that can be traced.

    defers: the last stage of an FSAL method is the next step's first one, and its cotangent is added there. passes_on:
    that cotangent comes from the outputs too. degree: of the interpolant. kinds: the number of rows of the moments.
    """

    def __init__(self, scheme: Scheme, shape: Shape, field: Field) -> None:
        self.scheme, self.shape, self.field = scheme, shape, field
        self.n_tape = 3 if scheme.keeps_k1 else 2
        self.last_stage = scheme.tableau.stages - 1
        self.defers = scheme.tableau.fsal and scheme.extra is None
        self.passes_on = self.defers and scheme.carries and self.last_stage in scheme.used
        self.degree = max([len(weights) for _, weights in scheme.rows] + [len(scheme.end)])
        # A row for no outputs, one for each step with outputs, one for outputs of other calls.
        self.kinds = min(shape.form.times - 1, shape.steps) + 2

    def __call__(
        self, numbers: Tensor, count: Tensor, g: Tensor, end: Tensor, lam: Tensor, kappa: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """Return lam and kappa at the first step's start, and the gradients of `shape.wanted`.

        numbers: as those of the forward loop. count: the recorded steps, a 0-d integer. g: dL/dy at the outputs. end:
        the state after the last step. lam, kappa: at the last step's end. rest: the tape, func's tensors.
        """
        tape, tensors = rest[: self.n_tape], rest[self.n_tape :]
        times = given_in(self.shape.form, numbers).times
        c = given_in(self.shape.form, numbers).c
        moments = _moments(times, g, tape[1], count, self.degree, self.kinds)
        lam, kappa, sums = lam.clone(), kappa.clone(), [torch.zeros_like(tensors[i]) for i in self.shape.wanted]
        last = count - 1
        fixed = [numbers, *tensors]
        if self.passes_on:
            # The last stage of the last step is no step's k1 here.
            at = _row(tape[1], last)
            cotangent = self._of_slope(self.last_stage, moments.of(last), c.direction * at[1])
            asked = _row(moments.places, last) > 0
            stage = [beside(at[2], -1.0, end.dtype.to_real()), end, cotangent]
            lam, sums = self._add_if(asked, lam, sums, stage, fixed)
        carried = [last, lam, kappa, *sums]
        _, lam, kappa, *sums = while_loop(lambda i, *_: i >= 0, self._body, carried, [*moments, numbers, *rest])
        if self.scheme.keeps_k1:
            # The first k1 is a stage of the step before, or the field at the start.
            first = tape[1][0]
            lam, sums = self._add_if(first[4] == 0.0, lam, sums, [first[3], tape[0][0], kappa], fixed)
            kappa = torch.where(first[4] == 0.0, torch.zeros_like(kappa), kappa)
        return lam.clone(), kappa.clone(), *(x.clone() for x in sums)

    def _body(self, i: Tensor, lam: Tensor, kappa: Tensor, *flat: Tensor) -> list[Tensor]:
        """Go back over step i: compute it again, and take one vjp with the cotangents of all that it gives."""
        scheme, n = self.scheme, len(self.shape.wanted)
        sums, moments, (numbers, *rest) = flat[:n], Moments(*flat[n : n + 2]), flat[n + 2 :]
        tape, tensors = rest[: self.n_tape], rest[self.n_tape :]
        c = given_in(self.shape.form, numbers).c
        m, y0 = moments.of(i), _row(tape[0], i)
        times = _row(tape[1], i).unbind()
        given, leaves = leaves_of(tensors, self.shape.wanted)
        with torch.enable_grad():
            y0 = y0.detach().requires_grad_(True)
            k1 = _row(tape[2], i).detach().requires_grad_(True) if scheme.keeps_k1 else None
            step, k = self._again(c, times, y0, k1, given)
            along = self._of_difference(m)
            pairs = [(step.y1, lam if along is None else lam + along)]
            kept = [j for j in scheme.used if not (self.defers and j == self.last_stage)]
            pairs += [(k[j], self._of_slope(j, m, step.signed)) for j in kept]
            if scheme.keeps_k1:
                pairs.append((step.k[-1], kappa))
            elif self.passes_on:
                pairs.append((step.k[0], self._of_k1(c, i, moments, tape[1])))
            inputs = [y0] if k1 is None else [y0, k1]
            found = vjp(pairs, [*inputs, *leaves])
        lam = found[0] + (m[0] if along is None else m[0] - along)
        if scheme.keeps_k1:
            kappa = found[1]
        return [i - 1, lam, kappa.clone(), *(a + b for a, b in zip(sums, found[len(inputs) :], strict=True))]

    def _again(
        self, c: Settings, times: Sequence[Tensor], y0: Tensor, k1: Tensor | None, tensors: Sequence[Tensor]
    ) -> tuple[Step, list[Tensor]]:
        """Return a recorded step and the slopes of its interpolant, computed again. k1: None if it is f at y0."""
        t0, h, t1, t_k1, _ = times

        def f(s: Tensor, y: Tensor) -> Tensor:
            return self.field(c, s, y, tensors)

        k1 = f(t_k1, y0) if k1 is None else k1
        step = compute(self.scheme, c, f, t0, t1, h, y0, k1, last=not self.defers)
        return step, slopes(self.scheme, f, step)

    # ------------------------------------------------------------------ cotangents of a step
    def _of_difference(self, moments: Tensor) -> Any:
        """Return the cotangent of y1 - y0 that the outputs of a step give, or None if they do not depend on it."""
        end = self.scheme.end
        return sum(w * moments[d + 1] for d, w in enumerate(end)) if end else None

    def _of_slope(self, j: int, moments: Tensor, signed: Tensor) -> Tensor:
        """Return the cotangent of slope j that the outputs of a step give."""
        weights = next(weights for i, weights in self.scheme.rows if i == j)
        total: Any = sum(w * moments[d + 1] for d, w in enumerate(weights) if w)
        return real(signed, moments) * total

    def _of_k1(self, c: Settings, i: Tensor, moments: Moments, times: Tensor) -> Tensor:
        """Return the cotangent that k1 of step i has as the last stage of the step before."""
        before = (i - 1).clamp_min(0)  # step 0 has no step before it in this tape
        signed = c.direction * _row(times, before)[1]
        cotangent = self._of_slope(self.last_stage, moments.of(before), signed)
        return torch.where(i > 0, cotangent, torch.zeros_like(cotangent))

    def _add_if(
        self, go: Tensor, lam: Tensor, sums: Sequence[Tensor], stage: Sequence[Tensor], fixed: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Add the vjp of a stage to lam and the sums if go. stage: its time, its state, and its cotangent."""
        n = len(sums)

        def more(go: Tensor, lam: Tensor, *flat: Tensor) -> list[Tensor]:
            sums, (s, y, cotangent, numbers, *tensors) = flat[:n], flat[n:]
            c = given_in(self.shape.form, numbers).c
            given, leaves = leaves_of(tensors, self.shape.wanted)
            with torch.enable_grad():
                y = y.detach().requires_grad_(True)
                found = vjp([(self.field(c, s, y, given), cotangent)], [y, *leaves])
            return [go - 1, *(a + b for a, b in zip((lam, *sums), found, strict=True))]

        _, lam, *sums = while_loop(once, more, [go.long(), lam, *sums], [*stage, *fixed])
        return lam, sums


def leaves_of(tensors: Sequence[Tensor], wanted: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Return func's tensors with leaves in the place of the wanted ones, and these leaves."""
    given = list(tensors)
    for i in wanted:
        given[i] = given[i].detach().requires_grad_(True)
    return given, [given[i] for i in wanted]


def vjp(pairs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of sum_o <cotangent_o, output_o> by the inputs, zeros where nothing depends on one.

    pairs: (output, cotangent).
    """
    recorded = [(x, cotangent) for x, cotangent in pairs if x.requires_grad]
    if not recorded:
        return [torch.zeros_like(x) for x in inputs]
    outputs, cotangents = zip(*recorded, strict=True)
    found = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def _row(x: Tensor, i: Tensor) -> Tensor:
    """Return x[i]. i: a 0-d integer of the graph."""
    return x.index_select(0, i.reshape(1)).squeeze(0)


def _moments(times: Tensor, g: Tensor, at: Tensor, count: Tensor, degree: int, kinds: int) -> Moments:
    """Return the moments of the gradients g of the outputs. Row 0 is zero, for the steps without outputs.

    at: the times of the recorded steps. kinds: the number of rows.
    """
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
    return Moments(torch.stack(moments, 1), kinds_of)
