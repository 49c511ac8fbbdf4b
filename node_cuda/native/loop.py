"""The forward loop, as a function of tensors alone that can be traced: one call goes to the end of the solve.

Each step that contains an output is recorded, and the outputs are computed after the loop. If the record is full the
call ends before, and the next call continues. A record of all steps, for the discrete adjoint, is kept in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from node_cuda.methods.interpolation import HERMITE, HERMITE_END, dense_of
from node_cuda.methods.registry import Method
from node_cuda.methods.tableau import DenseOutput, Tableau
from node_cuda.native import step as formulas
from node_cuda.native.numbers import FIRST, Form, Given, Point, Settings, given_in, packed, point_in
from node_cuda.native.step import Norm, beside, combine, cut, judge, proposed, weighted
from node_cuda.native.tracing import while_loop
from node_cuda.options import AdaptiveOptions, FixedOptions
from node_cuda.status import Status

Evaluate = Callable[[Tensor, Tensor], Tensor]
"""dy/dt at a solver time and a state."""

Field = Callable[[Any, Tensor, Tensor, Sequence[Tensor]], Tensor]
"""dy/dt at a solver time and a state, of the settings before them and func's tensors after them."""


class Scheme(NamedTuple):
    """The method of a loop: what is fixed in its code.

    inside: the ends of a step are evaluated one rounding inside it. rows, end: the interpolant (see `Polynomials`).
    extra: stages that it adds. hermite: its slopes are those at the two ends.
    """

    tableau: Tableau
    adaptive: bool
    inside: bool
    rows: tuple[tuple[int, tuple[float, ...]], ...]
    end: tuple[float, ...]
    extra: DenseOutput | None
    hermite: bool

    @property
    def b_err(self) -> tuple[tuple[int, float], ...]:
        """The nonzero weights of the error estimate."""
        row = self.tableau.b_err or ()
        return tuple((j, float(e)) for j, e in enumerate(row) if e)

    @property
    def carries(self) -> bool:
        """The last stage of a step is the first of the next."""
        return self.adaptive

    @property
    def used(self) -> list[int]:
        """The slopes that the interpolant refers to."""
        return sorted({j for j, _ in self.rows})

    @property
    def keeps_k1(self) -> bool:
        """The first stage of a step is not a function of its y0."""
        return self.adaptive and not self.tableau.fsal


def scheme_of(method: Method) -> Scheme:
    """Return the scheme of an explicit Runge-Kutta method with these options."""
    options, tableau = method.options, method.tableau
    assert tableau is not None
    if isinstance(options, AdaptiveOptions):
        dense = dense_of(tableau, options.dense)
        return Scheme(tableau, True, True, dense.weight_rows, (), dense if dense.extra else None, False)
    assert isinstance(options, FixedOptions)
    # On a grid that is t itself each output is the end of a step, and the slopes there are not needed.
    between = options.perturb or options.step_size is not None or options.grid_constructor is not None
    cubic = options.interp == "cubic" and between
    rows, end = (HERMITE, HERMITE_END) if cubic else ((), (1.0,))
    return Scheme(tableau, False, options.perturb, rows, end, None, cubic)


class Step(NamedTuple):
    """A step that was computed: its end, its signed size, its stages."""

    t0: Tensor
    t1: Tensor
    h: Tensor
    signed: Tensor
    y0: Tensor
    y1: Tensor
    k: list[Tensor]


def compute(
    scheme: Scheme, c: Any, f: Evaluate, t0: Any, t1: Any, h: Any, y0: Tensor, k1: Tensor, *, last: bool = True
) -> Step:
    """Compute a step from (t0, y0). last: also the stage at y1 of an FSAL method."""
    tableau = scheme.tableau
    signed = c.direction * h
    end = beside(t1, -1.0, y0.dtype.to_real()) if scheme.inside else t1
    known = tableau.stages - tableau.fsal
    k = [k1]
    for node, row in zip(tableau.nodes[1:known], tableau.rows[1:known], strict=True):
        k.append(f(end if node == 1.0 else t0 + node * h, combine(y0, k, row, signed)))
    y1 = combine(y0, k, tableau.b_row, signed)
    if tableau.fsal and last:
        k.append(f(end, y1))
    return Step(t0, t1, h, signed, y0, y1, k)


def slopes(scheme: Scheme, f: Evaluate, step: Step) -> list[Tensor]:
    """Return the slopes that the interpolant's rows refer to."""
    if scheme.hermite:
        return [step.k[0], f(step.t1, step.y1)]
    k = list(step.k)
    if scheme.extra is not None:
        end = beside(step.t1, -1.0, step.y0.dtype.to_real())
        for node, row in zip(scheme.extra.nodes, scheme.extra.rows, strict=True):
            t = end if node == 1.0 else step.t0 + node * step.h
            k.append(f(t, combine(step.y0, k, row, step.signed)))
    return k


def extra_evaluations(scheme: Scheme) -> int:
    """Return how many evaluations a step with outputs costs beyond those of a step."""
    return 1 if scheme.hermite else 0 if scheme.extra is None else scheme.extra.extra


class Room(NamedTuple):
    """The rows of the records. outputs: of the steps with outputs. steps: of all steps, 0 for none."""

    outputs: int
    steps: int


def forward(
    scheme: Scheme,
    order: int,
    sizes: tuple[int, ...] | None,
    room: Room,
    field: Callable[[Any, Tensor, Tensor, Sequence[Tensor]], Tensor],
    form: Form,
    per_element: tuple[bool, bool],
) -> Callable[..., tuple[Tensor, ...]]:
    """Return the forward loop as a function of (numbers, y, k1, rtol and atol as far as tensors, func's tensors).

    per_element: whether rtol, and atol, is a tensor. It returns the point, y, k1, the outputs (of which the rows from
    the first to before the last output of this call hold), and with a record of steps: their y0, their (t0, h, t1, time
    of k1, carried), and their k1 if it is kept.
    """
    used = scheme.used
    n_tape = 0 if not room.steps else 3 if scheme.keeps_k1 else 2
    n_tols = sum(per_element)

    def told(rest: Sequence[Tensor]) -> tuple[Given, Norm, Sequence[Tensor]]:
        """Return what stays the same, from (numbers, tolerances, func's tensors)."""
        tols = iter(rest[1 : 1 + n_tols])
        rtol, atol = (next(tols) if is_tensor else None for is_tensor in per_element)
        norm = Norm(rtol, atol, sizes)
        return given_in(form, rest[0]), norm, rest[1 + n_tols :]

    def going(point: Tensor, *rest: Tensor) -> Tensor:
        p, given = point_in(point), given_in(form, rest[2 + 2 + n_tape])
        c: Any = given.c
        go = (p.status == 0) & (p.output < len(given.times)) & (p.fresh == 0) & (p.calls < c.cap)
        go = go & (p.rows < room.outputs)
        return go & (p.steps < room.steps) if room.steps else go

    def body(point: Tensor, y: Tensor, k1: Tensor, *rest: Tensor) -> list[Tensor]:
        record, ends, tape, fixed = rest[0], rest[1], rest[2 : 2 + n_tape], rest[2 + n_tape :]
        given, norm, tensors = told(fixed)
        c, before = given.c, point_in(point)
        f = _with(field, c, tensors)
        if scheme.adaptive:
            p, y1, k_next, step = _attempt(scheme, c, f, norm, before, y, k1, given)
        else:
            p, y1, k_next, step = _grid_step(scheme, c, f, before, y, given)
        holds = p.output > before.output
        k = _slopes_if(scheme, field, holds, step, fixed[0], tensors, form)
        counts = {name: getattr(before, name) for name in ("rows", "steps", "calls")}
        row = torch.stack([step.y0, step.y1, *(k[j] for j in used)])
        record.index_copy_(0, counts["rows"].reshape(1), row.unsqueeze(0))
        ends.index_copy_(0, counts["rows"].reshape(1), torch.stack([step.t0, step.t1, step.signed]).unsqueeze(0))
        if tape:
            t_k1 = before.t_k1 if scheme.adaptive else _start(scheme, step)
            of_step = torch.stack([step.t0, step.h, step.t1, t_k1, (t_k1 < step.t0).double()])
            for memory, x in zip(tape, (y, of_step, k1), strict=False):
                memory.index_copy_(0, counts["steps"].reshape(1), x.unsqueeze(0))
        p = p._replace(
            rows=counts["rows"] + holds.long(),
            steps=counts["steps"] + (p.accepted - before.accepted),
            calls=counts["calls"] + 1,
            nfe=p.nfe + holds.long() * extra_evaluations(scheme),
        )
        return [packed(p), y1, k_next]

    def run(numbers: Tensor, y: Tensor, k1: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        fixed = (numbers, *rest)
        given, norm, _ = told(fixed)
        p = point_in(numbers[:FIRST])
        p = p._replace(**dict.fromkeys(("calls", "rows", "steps"), torch.zeros((), dtype=torch.int64)))
        slope = k1.clone()
        if scheme.adaptive:
            p, slope = _begin(given, field, norm, order, p, y, slope, fixed, told)
        record, ends = y.new_zeros(room.outputs, 2 + len(used), *y.shape), numbers.new_zeros(room.outputs, 3)
        tape = [y.new_zeros(room.steps, *y.shape), numbers.new_zeros(room.steps, 5), y.new_zeros(room.steps, *y.shape)]
        tape = tape[:n_tape]
        written = range(2 + n_tape)
        carried = [packed(p), y.clone(), slope]
        point, y1, slope = while_loop(going, body, carried, [record, ends, *tape, *fixed], written)
        outputs = _outputs(scheme, used, given.times, record, ends, point_in(point).rows, y)
        return point, y1, slope, outputs, *tape

    return run


def _with(field: Any, c: Settings, tensors: Sequence[Tensor]) -> Evaluate:
    return lambda s, y: field(c, s, y, tensors)


def _start(scheme: Scheme, step: Step) -> Tensor:
    """Return the time of a grid step's first stage."""
    return beside(step.t0, 1.0, step.y0.dtype.to_real()) if scheme.inside else step.t0


def _begin(
    given: Given,
    field: Any,
    norm: Norm,
    order: int,
    p: Point,
    y: Tensor,
    k1: Tensor,
    fixed: Sequence[Tensor],
    told: Callable[[Sequence[Tensor]], tuple[Given, Norm, Sequence[Tensor]]],
) -> tuple[Point, Tensor]:
    """Find k1 and the first step size where they are not known. Each is a loop of one iteration, or of none."""

    def slope(*flat: Tensor) -> list[Tensor]:
        go, nfe, _, t_k1, y, *rest = flat
        given, _, tensors = told(rest)
        return [go - 1, nfe + 1, field(given.c, t_k1, y, tensors)]

    start = [(p.fresh > 0).long(), p.nfe, k1]
    _, nfe, k1 = while_loop(lambda go, *_: go > 0, slope, start, [p.t_k1, y, *fixed])

    def first_step(*flat: Tensor) -> list[Tensor]:
        go, nfe, _, _, k1, t, y, *rest = flat
        given, norm, tensors = told(rest)
        f = _with(field, given.c, tensors)
        proposal, status = first_step_by(given.c, lambda s, x: [f(s, x[0])], norm, order, t, [y], [k1])
        return [go - 1, nfe + (status == 0).long(), proposal, status, k1.clone()]

    start = [(p.fresh > 1).long(), nfe, p.proposal, p.status, k1]
    _, nfe, proposal, status, k1 = while_loop(lambda go, *_: go > 0, first_step, start, [p.t, y, *fixed])
    p = p._replace(nfe=nfe, proposal=proposal, status=status, fresh=torch.zeros_like(nfe))
    return proposed(given.c, p, p.attempts == 0), k1


def first_step_by(
    c: Any,
    f: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]],
    norm: Norm,
    order: int,
    t: Any,
    y: Sequence[Tensor],
    k1: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the first step size by Hairer's rule, and the status, as `StepControl` does it.

    y, k1: the parts of the state, and of its slope. The norm is the largest of the parts.
    """
    scales = [norm.scale(c, x.abs()) for x in y]

    def size(parts: Sequence[Tensor]) -> Tensor:
        return formulas.largest([norm(x / scale) for x, scale in zip(parts, scales, strict=True)])

    d0, d1 = size(y), size(k1)
    bad = ~(torch.isfinite(d0) & torch.isfinite(d1))
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    h0 = torch.minimum(h0, c.limit - t)
    f1 = f(t + h0, [x + formulas.real(c.direction * h0, x) * k for x, k in zip(y, k1, strict=True)])
    d2 = size([x - k for x, k in zip(f1, k1, strict=True)]) / h0
    h1 = torch.where(
        (d1 <= 1e-15) & (d2 <= 1e-15), (h0 * 1e-3).clamp_min(1e-6), (0.01 / torch.maximum(d1, d2)) ** (1.0 / order)
    )
    h = torch.where(torch.isfinite(h1), torch.minimum(100 * h0, h1), h0)
    return formulas.within(c, h), torch.where(bad, Status.NON_FINITE.value, 0)


def _attempt(
    scheme: Scheme, c: Any, f: Evaluate, norm: Norm, p: Point, y: Tensor, k1: Tensor, given: Given
) -> tuple[Point, Tensor, Tensor, Step]:
    """Take a step whose error decides, and move if it is accepted."""
    at = cut(p, given.tstops, None)
    step = compute(scheme, c, f, p.t, at.t1, at.h, y, k1)
    error = weighted(step.k, scheme.b_err, step.signed)
    ratio = norm(error / norm.scale(c, torch.maximum(y.abs(), step.y1.abs())))
    law = judge(c, at.h, ratio, p)
    accept = law.accept & torch.isfinite(ratio)
    output = torch.where(accept, (given.times <= at.t1).sum(), p.output)
    active = output < len(given.times)
    p = moved(c, p, law, at, ratio, y.dtype.to_real(), output, active, given.jumps, scheme.tableau.stages - 1)
    return p, torch.where(accept, step.y1, y), torch.where(accept, step.k[-1], k1), step


def moved(
    c: Any,
    p: Point,
    law: Any,
    at: Any,
    ratio: Tensor,
    dtype: torch.dtype,
    output: Tensor,
    active: Tensor,
    jumps: Tensor | None,
    cost: int,
) -> Point:
    """Return the point after a step was judged, with the next step proposed, as `StepControl.judge_ratio`."""
    finite = torch.isfinite(ratio)
    accept = law.accept & finite
    broken = law.accept & ~finite  # a step of min_step, whose error is no number
    jump = accept & (jumps == at.t1).any() if jumps is not None else torch.zeros_like(accept)
    t_k1 = torch.where(jump, beside(at.t1, 1.0, dtype), beside(at.t1, -1.0, dtype))
    q = p._replace(
        t=torch.where(accept, at.t1, p.t),
        proposal=torch.where(accept, torch.maximum(law.h_next, at.carried), law.h_next),
        r0=law.r0,
        r1=law.r1,
        t_k1=torch.where(accept, t_k1, p.t_k1),
        fresh=(jump & active).long(),
        finite=finite.long(),
        attempts=torch.where(output > p.output, 0, p.attempts),
        accepted=p.accepted + accept.long(),
        rejected=p.rejected + (~law.accept).long(),
        status=torch.where(broken, Status.NON_FINITE.value, p.status),
        output=output,
        nfe=p.nfe + cost,
    )
    return proposed(c, q, active)


def _grid_step(
    scheme: Scheme, c: Any, f: Evaluate, p: Point, y: Tensor, given: Given
) -> tuple[Point, Tensor, Tensor, Step]:
    """Take the step to the next point of the grid."""
    grid: Any = given.grid
    place: Any = p.place
    t0, t1 = grid.index_select(0, torch.stack([place, place + 1])).unbind()
    start = beside(t0, 1.0, y.dtype.to_real()) if scheme.inside else t0
    k1 = f(start, y)
    step = compute(scheme, c, f, t0, t1, t1 - t0, y, k1)
    output = (given.times <= t1).sum()
    p = p._replace(t=t1, place=place + 1, accepted=p.accepted + 1, output=output, nfe=p.nfe + scheme.tableau.stages)
    return p, step.y1, k1, step


def _slopes_if(
    scheme: Scheme, field: Any, holds: Tensor, step: Step, numbers: Tensor, tensors: Sequence[Tensor], form: Form
) -> list[Tensor]:
    """Return the slopes of the interpolant. Those that cost evaluations are computed only if there is an output."""
    fresh = extra_evaluations(scheme)
    if not fresh:
        return step.k
    n = len(step.k)

    def more(*flat: Tensor) -> list[Tensor]:
        go, rest = flat[0], flat[1 + fresh :]
        c, tensors = given_in(form, rest[0]).c, rest[7 + n :]
        t0, t1, h, signed, y0, y1 = rest[1:7]
        again = Step(t0, t1, h, signed, y0, y1, list(rest[7 : 7 + n]))
        return [go - 1, *slopes(scheme, _with(field, c, tensors), again)[-fresh:]]

    zeros = [torch.zeros_like(step.y0) for _ in range(fresh)]
    fixed = [numbers, step.t0, step.t1, step.h, step.signed, step.y0, step.y1, *step.k, *tensors]
    _, *found = while_loop(lambda go, *_: go > 0, more, [holds.long(), *zeros], fixed)
    return [*step.k[: 1 if scheme.hermite else n], *found]


def _outputs(
    scheme: Scheme, used: Sequence[int], times: Tensor, record: Tensor, ends: Tensor, rows: Any, y0: Tensor
) -> Tensor:
    """Return y at all times, from the recorded steps. Rows of times that these do not hold have no meaning."""
    t0, t1, signed = ends.unbind(1)
    last = torch.where(torch.arange(len(t1)) < rows, t1, torch.inf)
    i = torch.searchsorted(last, times[1:]).clamp_max(len(t1) - 1)
    x = ((times[1:] - t0[i]) / (t1[i] - t0[i])).clamp_max(1.0)
    wide = (-1, *[1] * y0.dim())
    start, end = record[i, 0], record[i, 1]
    total = torch.zeros_like(start)
    for place, (_, weights) in enumerate(scheme.rows):
        total = total + formulas.real(signed[i] * polynomial(weights, x), y0).view(wide) * record[i, 2 + place]
    if scheme.end:
        total = total + formulas.real(polynomial(scheme.end, x), y0).view(wide) * (end - start)
    inner = start + total
    at_end = (times[1:] == t1[i]).view(wide)
    return torch.cat([y0.unsqueeze(0), torch.where(at_end, end, inner)])


def polynomial(weights: Sequence[float], x: Tensor) -> Tensor:
    """Return sum_d weights[d] x^(d + 1)."""
    value = torch.zeros_like(x)
    for weight in reversed(weights):
        value = (value + weight) * x
    return value
