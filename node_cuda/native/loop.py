"""The forward loop, as a function of tensors alone that can be traced: one call goes to the end of the solve.

Each step that contains an output is recorded, and the outputs are computed after the loop. If the record is full the
call ends before, and the next call continues. A record of all steps, for the discrete adjoint, is kept in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from node_cuda._typing import Row
from node_cuda.methods.interpolation import HERMITE, HERMITE_END, dense_of
from node_cuda.methods.registry import Method
from node_cuda.methods.tableau import DenseOutput, Tableau
from node_cuda.native import step as formulas
from node_cuda.native.numbers import FIRST, Form, Given, Point, Settings, given_in, packed, point_in
from node_cuda.native.step import Cut, Law, Norm, beside, combine, cut, judge, proposed, weighted
from node_cuda.native.tracing import once, while_loop
from node_cuda.options import AdaptiveOptions, FixedOptions
from node_cuda.status import Status

Evaluate = Callable[[Tensor, Tensor], Tensor]
"""dy/dt at a solver time and a state."""

Field = Callable[[Any, Tensor, Tensor, Sequence[Tensor]], Tensor]
"""dy/dt at a solver time and a state, of the settings before them and func's tensors after them."""

K = TypeVar("K")  # a stage
Z = TypeVar("Z")  # a state


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
        return self.tableau.err_row or ()

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

    def first_time(self, t0: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the time of the stage at t0, the start of a step on a grid. dtype: of the state."""
        return beside(t0, 1.0, dtype.to_real()) if self.inside else t0

    def last_time(self, t1: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the time of the stages at t1, the end of a step."""
        return beside(t1, -1.0, dtype.to_real()) if self.inside else t1


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
    scheme: Scheme,
    c: Settings,
    f: Evaluate,
    t0: Tensor,
    t1: Tensor,
    h: Tensor,
    y0: Tensor,
    k1: Tensor,
    *,
    last: bool = True,
) -> Step:
    """Compute a step from (t0, y0). last: also the stage at y1 of an FSAL method."""
    signed = c.direction * h
    end = scheme.last_time(t1, y0.dtype)
    k, y1 = stages(scheme, t0, h, end, k1, lambda k, row: combine(y0, k, row, signed), f, last=last)
    return Step(t0, t1, h, signed, y0, y1, k)


def stages(
    scheme: Scheme,
    t0: Tensor,
    h: Tensor,
    end: Tensor,
    k1: K,
    add: Callable[[Sequence[K], Row], Z],
    evaluate: Callable[[Tensor, Z], K],
    *,
    last: bool = True,
) -> tuple[list[K], Z]:
    """Return the stages of an explicit Runge-Kutta step, and the state at its end.

    end: the time of the stages at node 1. add: the state at the start plus the stages so far with a row of weights.
    evaluate: a stage from its time and state. last: also the stage at the end of an FSAL method.
    """
    tableau = scheme.tableau
    known = tableau.stages - tableau.fsal
    k = [k1]
    for node, row in zip(tableau.nodes[1:known], tableau.rows[1:known], strict=True):
        k.append(evaluate(end if node == 1.0 else t0 + node * h, add(k, row)))
    z1 = add(k, tableau.b_row)
    if tableau.fsal and last:
        k.append(evaluate(end, z1))
    return k, z1


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


def fixed_in(
    form: Form, per_element: tuple[bool, bool], sizes: tuple[int, ...] | None, fixed: Sequence[Tensor]
) -> tuple[Given, Norm, Sequence[Tensor]]:
    """Return what a loop reads and does not change: the settings and the times, the norm, func's tensors.

    fixed: the numbers; rtol and atol, if they are tensors; func's tensors. per_element: whether rtol, and atol, is a
    tensor. sizes: the segments of y.
    """
    numbers, *rest = fixed
    rtol, atol = (rest.pop(0) if is_tensor else None for is_tensor in per_element)
    return given_in(form, numbers), Norm(rtol, atol, sizes), rest


class ForwardLoop:
    """The forward loop, as a function that can be traced.

    order: of the method, for the first step size. sizes, per_element: see `fixed_in`.
    """

    def __init__(
        self,
        scheme: Scheme,
        order: int,
        sizes: tuple[int, ...] | None,
        room: Room,
        field: Field,
        form: Form,
        per_element: tuple[bool, bool],
    ) -> None:
        self.scheme, self.order, self.sizes, self.room = scheme, order, sizes, room
        self.field, self.form, self.per_element = field, form, per_element
        self.n_tape = 0 if not room.steps else 3 if scheme.keeps_k1 else 2

    def __call__(self, numbers: Tensor, y: Tensor, k1: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Return the point, y, k1, the outputs, and the record of steps if there is one.

        rest: rtol and atol, if they are tensors; func's tensors. Of the outputs, the rows in this call are set. The
        record of steps: their y0, their (t0, h, t1, time of k1, whether k1 is that of the step before), and their k1
        if it is kept.
        """
        fixed = (numbers, *rest)
        given, _, _ = self._fixed_in(fixed)
        p = point_in(numbers[:FIRST])
        p = p._replace(**dict.fromkeys(("calls", "rows", "steps"), torch.zeros((), dtype=torch.int64)))
        k1 = k1.clone()
        if self.scheme.adaptive:
            p, k1 = self._begin(given.c, p, y, k1, fixed)
        room, columns = self.room, 2 + len(self.scheme.used)
        record, ends = y.new_zeros(room.outputs, columns, *y.shape), numbers.new_zeros(room.outputs, 3)
        tape = [y.new_zeros(room.steps, *y.shape), numbers.new_zeros(room.steps, 5), y.new_zeros(room.steps, *y.shape)]
        tape = tape[: self.n_tape]
        written = range(2 + self.n_tape)
        carried = [packed(p), y.clone(), k1]
        point, y1, k1 = while_loop(self._going, self._body, carried, [record, ends, *tape, *fixed], written)
        outputs = _outputs(self.scheme, given.times, record, ends, point_in(point).rows, y)
        return point, y1, k1, outputs, *tape

    def _fixed_in(self, fixed: Sequence[Tensor]) -> tuple[Given, Norm, Sequence[Tensor]]:
        return fixed_in(self.form, self.per_element, self.sizes, fixed)

    def _evaluate(self, c: Settings, tensors: Sequence[Tensor]) -> Evaluate:
        """Return the field with its settings and func's tensors."""
        return lambda s, y: self.field(c, s, y, tensors)

    # ------------------------------------------------------------------ before the first step
    def _begin(self, c: Settings, p: Point, y: Tensor, k1: Tensor, fixed: Sequence[Tensor]) -> tuple[Point, Tensor]:
        """Find k1 and the first step size where they are not known. Each is a loop of one iteration, or of none."""
        p, k1 = self._first_stage(p, y, k1, fixed)
        p, k1 = self._first_step(p, y, k1, fixed)
        return proposed(c, p, p.attempts == 0), k1

    def _first_stage(self, p: Point, y: Tensor, k1: Tensor, fixed: Sequence[Tensor]) -> tuple[Point, Tensor]:
        """Evaluate k1 if it is not known."""

        def evaluate(go: Tensor, nfe: Tensor, _k1: Tensor, t_k1: Tensor, y: Tensor, *fixed: Tensor) -> list[Tensor]:
            given, _, tensors = self._fixed_in(fixed)
            return [go - 1, nfe + 1, self.field(given.c, t_k1, y, tensors)]

        carried = [(p.fresh > 0).long(), p.nfe, k1]
        _, nfe, k1 = while_loop(once, evaluate, carried, [p.t_k1, y, *fixed])
        return p._replace(nfe=nfe), k1

    def _first_step(self, p: Point, y: Tensor, k1: Tensor, fixed: Sequence[Tensor]) -> tuple[Point, Tensor]:
        """Find the first step size if it is not known."""

        def propose(*flat: Tensor) -> list[Tensor]:
            go, nfe, _, _, k1, t, y, *fixed = flat
            given, norm, tensors = self._fixed_in(fixed)
            f = self._evaluate(given.c, tensors)
            proposal, status = first_step_by(given.c, lambda s, x: [f(s, x[0])], norm, self.order, t, [y], [k1])
            return [go - 1, nfe + (status == 0).long(), proposal, status, k1.clone()]

        carried = [(p.fresh > 1).long(), p.nfe, p.proposal, p.status, k1]
        _, nfe, proposal, status, k1 = while_loop(once, propose, carried, [p.t, y, *fixed])
        return p._replace(nfe=nfe, proposal=proposal, status=status, fresh=torch.zeros_like(nfe)), k1

    # ------------------------------------------------------------------ the steps
    def _going(self, point: Tensor, _y: Tensor, _k1: Tensor, *rest: Tensor) -> Tensor:
        """Return whether there is another step to take in this call, and room to record it."""
        p, given = point_in(point), given_in(self.form, rest[2 + self.n_tape])
        go = (p.status == 0) & (p.output < len(given.times)) & (p.fresh == 0) & (p.calls < given.c.cap)
        go = go & (p.rows < self.room.outputs)
        return go & (p.steps < self.room.steps) if self.room.steps else go

    def _body(self, point: Tensor, y: Tensor, k1: Tensor, *rest: Tensor) -> list[Tensor]:
        """Take one step and write it into the records. Return the point, y and k1 after it."""
        (record, ends, *tape), fixed = rest[: 2 + self.n_tape], rest[2 + self.n_tape :]
        given, norm, tensors = self._fixed_in(fixed)
        before, f = point_in(point), self._evaluate(given.c, tensors)
        if self.scheme.adaptive:
            p, y1, k_next, step = self._attempt(given, norm, f, before, y, k1)
        else:
            p, y1, k_next, step = self._grid_step(given, f, before, y)
        holds = p.output > before.output
        k = self._slopes_if(holds, step, fixed[0], tensors)
        self._write_output(record, ends, before, step, k)
        if tape:
            self._write_step(tape, before, step)
        p = p._replace(
            rows=before.rows + holds.long(),
            steps=before.steps + (p.accepted - before.accepted),
            calls=before.calls + 1,
            nfe=p.nfe + holds.long() * extra_evaluations(self.scheme),
        )
        return [packed(p), y1, k_next]

    def _attempt(
        self, given: Given, norm: Norm, f: Evaluate, p: Point, y: Tensor, k1: Tensor
    ) -> tuple[Point, Tensor, Tensor, Step]:
        """Take a step whose error decides, and move if it is accepted."""
        at = cut(p, given.tstops, None)
        step = compute(self.scheme, given.c, f, p.t, at.t1, at.h, y, k1)
        error = weighted(step.k, self.scheme.b_err, step.signed)
        p, accept = judged(self.scheme, given, p, at, norm.ratio(given.c, error, y, step.y1), y.dtype)
        return p, torch.where(accept, step.y1, y), torch.where(accept, step.k[-1], k1), step

    def _grid_step(self, given: Given, f: Evaluate, p: Point, y: Tensor) -> tuple[Point, Tensor, Tensor, Step]:
        """Take the step to the next point of the grid."""
        t0, t1 = grid_interval(given, p)
        k1 = f(self.scheme.first_time(t0, y.dtype), y)
        step = compute(self.scheme, given.c, f, t0, t1, t1 - t0, y, k1)
        output = (given.times <= t1).sum()
        nfe = self.scheme.tableau.stages
        p = p._replace(t=t1, place=p.place + 1, accepted=p.accepted + 1, output=output, nfe=p.nfe + nfe)
        return p, step.y1, k1, step

    def _slopes_if(self, holds: Tensor, step: Step, numbers: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the slopes of the interpolant. Those that cost evaluations are computed only if there is an output."""
        scheme, n = self.scheme, len(step.k)
        fresh = extra_evaluations(scheme)
        if not fresh:
            return step.k

        def more(go: Tensor, *flat: Tensor) -> list[Tensor]:
            numbers, t0, t1, h, signed, y0, y1, *rest = flat[fresh:]
            f = self._evaluate(given_in(self.form, numbers).c, rest[n:])
            return [go - 1, *slopes(scheme, f, Step(t0, t1, h, signed, y0, y1, rest[:n]))[-fresh:]]

        zeros = [torch.zeros_like(step.y0) for _ in range(fresh)]
        _, *found = while_loop(once, more, [holds.long(), *zeros], [numbers, *step[:-1], *step.k, *tensors])
        return [*step.k[: 1 if scheme.hermite else n], *found]

    def _write_output(self, record: Tensor, ends: Tensor, p: Point, step: Step, k: Sequence[Tensor]) -> None:
        """Write a step with its slopes k. The next step writes over it if it holds no output."""
        row = torch.stack([step.y0, step.y1, *(k[j] for j in self.scheme.used)])
        record.index_copy_(0, p.rows.reshape(1), row.unsqueeze(0))
        ends.index_copy_(0, p.rows.reshape(1), torch.stack([step.t0, step.t1, step.signed]).unsqueeze(0))

    def _write_step(self, tape: Sequence[Tensor], p: Point, step: Step) -> None:
        """Write a step for a backward pass. The next step writes over it if it is rejected."""
        t_k1 = p.t_k1 if self.scheme.adaptive else self.scheme.first_time(step.t0, step.y0.dtype)
        times = torch.stack([step.t0, step.h, step.t1, t_k1, (t_k1 < step.t0).double()])
        for memory, x in zip(tape, (step.y0, times, step.k[0]), strict=False):
            memory.index_copy_(0, p.steps.reshape(1), x.unsqueeze(0))


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


def judged(scheme: Scheme, given: Given, p: Point, at: Cut, ratio: Tensor, dtype: torch.dtype) -> tuple[Point, Tensor]:
    """Judge a step by its error ratio. Return the point after it, and whether it is accepted. dtype: of the state."""
    law = judge(given.c, at.h, ratio, p)
    accept = law.accept & torch.isfinite(ratio)
    output = torch.where(accept, (given.times <= at.t1).sum(), p.output)
    return _moved(given, p, law, at, ratio, output, scheme.tableau.stages - 1, dtype.to_real()), accept


def _moved(
    given: Given, p: Point, law: Law, at: Cut, ratio: Tensor, output: Tensor, cost: int, dtype: torch.dtype
) -> Point:
    """Return the point after a step was judged, with the next step proposed, as `StepControl.judge_ratio`.

    output: the first output that is not reached. cost: the evaluations of the step.
    """
    active = output < len(given.times)
    finite = torch.isfinite(ratio)
    accept = law.accept & finite
    broken = law.accept & ~finite  # a step of min_step, whose error is no number
    jump = accept & (given.jumps == at.t1).any() if given.jumps is not None else torch.zeros_like(accept)
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
    return proposed(given.c, q, active)


def grid_interval(given: Given, p: Point) -> tuple[Tensor, Tensor]:
    """Return the next step of a fixed grid, from t0 to t1."""
    assert given.grid is not None
    t0, t1 = given.grid.index_select(0, torch.stack([p.place, p.place + 1])).unbind()
    return t0, t1


def _outputs(scheme: Scheme, times: Tensor, record: Tensor, ends: Tensor, rows: Any, y0: Tensor) -> Tensor:
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
