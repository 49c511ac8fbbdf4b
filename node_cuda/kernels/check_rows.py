"""The rows of the self-check: one function for each primitive, which is run on two sides and compared.

One side is the device: the objects that solves use (`Fused`, `FusedGradientAccumulator`, `DeviceStepControl`,
`StepLog`), on small tensors. The other side is the host: the same calls of `Arithmetic` and `GradientAccumulator`
(which use kernels/reference.py), on the same numbers in double. For step control the row itself holds the expected
values.

A new primitive needs a function here, with the cases for which it runs. Every tensor has new numbers, so that memory
that still holds the result of an earlier call does not pass as a correct result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from node_cuda._typing import Row, Tolerance
from node_cuda.kernels import reference
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.control import DeviceStepControl
from node_cuda.kernels.fused import DTYPES, Fused, Launch
from node_cuda.kernels.norms import HALF, ErrorNorm
from node_cuda.kernels.reference import ControllerParams
from node_cuda.kernels.stage_times import HERE, JUST_AFTER, JUST_BEFORE, Clock
from node_cuda.kernels.step_control import ControlSpec
from node_cuda.kernels.step_log import StepLog
from node_cuda.status import Status

Value = Tensor | float
"""A result. Tensors must agree up to rounding in their dtype, floats up to rounding in the state's; int and bool
exactly."""


class Case(NamedTuple):
    """A size, and the number of elements by which its tensors are misaligned for vector loads."""

    size: int
    shift: int


MANY = 6151  # several blocks of every kernel, two chunks of a sum, a remainder for every vector width
ONE, LARGE, ODD = Case(1, 0), Case(MANY, 0), Case(MANY, 1)
CASES = (Case(0, 0), ONE, LARGE, ODD)

_RTOL, _ATOL, _ORDER = 0.3, 0.2, 5
_T0, _H = 0.5, 0.25  # a step from 1/2 to 3/4: all times in it are exact in every dtype
# With a ratio of 1 the step size does not change.
_STEADY = ControllerParams((1.0, 0.0, 0.0), 1.0, 4.0, 0.25, False, 0.0, math.inf)


class Side:
    """The side on which a row runs. module, on: set for the device; None for the host, where numbers are double."""

    def __init__(self, dtype: torch.dtype, device: torch.device, module: ModuleType | None, on: Launch | None) -> None:
        self.dtype = dtype
        self.device = device
        self.half = dtype in HALF
        self.case = ONE
        self.taken = 0
        self._module, self._on = module, on
        # no random numbers, so that the generators do not change
        i = torch.arange(2**14, dtype=torch.float64, device="cpu")
        self._numbers = torch.complex(torch.sin(0.37 * i * i), torch.sin(0.61 * i * i))
        self._rows: dict[torch.dtype, Tensor] = {}

    def tensor(self, case: Case, dtype: torch.dtype) -> Tensor:
        """Return a tensor with other numbers than in earlier calls, exact in this dtype; on the host as double."""
        if dtype not in self._rows:
            row = (self._numbers if dtype.is_complex else self._numbers.real).to(dtype)
            self._rows[dtype] = row.to(_double(dtype)) if self._module is None else row.to(self.device, copy=True)
        row = self._rows[dtype]
        self.taken += 1
        start = 16 * (self.taken % ((len(row) - case.size - case.shift) // 16)) + case.shift
        return row[start : start + case.size]

    def take(self, count: int) -> list[Tensor]:
        """Return tensors like a state of the case."""
        return [self.tensor(self.case, self.dtype) for _ in range(count)]

    def arithmetic(
        self,
        y0: Tensor | None = None,
        norm: ErrorNorm | None = None,
        times: Sequence[float] = (0.0, 1.0),
        direction: float = -1.0,
    ) -> Any:
        """Return the primitives for such a state."""
        y0, norm = self.take(1)[0] if y0 is None else y0, norm or ErrorNorm(_RTOL, _ATOL)
        if self._module is not None and self._on is not None:
            return Fused(self._module, self._on, y0, direction, norm, times)
        a = Arithmetic(y0, direction, norm, times)
        a.clock = Clock(direction, self.dtype.to_real(), self.device)  # "just before t1" depends on the dtype
        return a

    def step(self, *args: Any, **given: Any) -> tuple[Any, Any]:
        """Return the primitives for such a state, and the step."""
        a = self.arithmetic(*args, **given)
        return a, a.interval(_T0, _T0 + _H, _H)

    def doubles(self, *values: float) -> Tensor:
        """Return numbers in double; as results they must agree up to rounding in double."""
        return torch.tensor(values, dtype=torch.float64, device=self.device)


def sides(module: ModuleType, on: Launch, device: torch.device, dtype: torch.dtype) -> tuple[Side, Side]:
    """Return the side of the device and the side of the host."""
    return Side(dtype, device, module, on), Side(dtype, torch.device("cpu"), None, None)


def _double(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _control(
    a: Any, law: ControllerParams = _STEADY, *, pauses: bool = False, tape: StepLog | None = None, **given: Any
) -> Any:
    """Return step control on the device; None on the host."""
    spec = ControlSpec(law, _ORDER, **{"max_num_steps": 100, **given})
    return a.control(spec, pauses=pauses, tape=tape) if isinstance(a, Fused) else None


def _judged(side: Side, control: DeviceStepControl, ratio: float) -> None:
    """Judge a step with this ratio; it is then the last step that the control has judged."""
    control.start(_T0, _H)
    control.judge_ratio(side.doubles(ratio))


class Primitive(NamedTuple):
    """A row of the check. run: a function that yields its results on one side, for each of the cases."""

    name: str
    run: Callable[[Side], Iterator[Value]]
    cases: tuple[Case, ...]


ROWS: list[Primitive] = []


def _row(*cases: Case) -> Callable[[Callable[[Side], Iterator[Value]]], None]:
    return lambda run: ROWS.append(Primitive(run.__name__[1:], run, cases))


# ----------------------------------------------------------------------------------------------------- times and stages
def _weights(count: int, seed: int = 0) -> list[float]:
    """Return this number of coefficients, none of them zero."""
    return [(-1.0) ** j * (0.3 + 0.1 * ((j + seed) % 7)) for j in range(count)]


def _entries(count: int, seed: int = 0, without: Sequence[int] = ()) -> Row:
    """Return them as the row of a stage, without some of the stages."""
    return [(j, weight) for j, weight in enumerate(_weights(count, seed)) if j not in without]


@_row(ONE)
def _stage_times(side: Side) -> Iterator[Value]:
    for direction, side_of in ((1.0, JUST_BEFORE), (-1.0, HERE), (1.0, JUST_AFTER)):
        a = side.arithmetic(direction=direction)
        for t0 in (_T0, -2.0, 0.0):
            yield from (t.double() for t in a.times(a.interval(t0, t0 + _H, _H), (0.0, 0.5, 1.0), side_of))


@_row(*CASES)
def _rk_stage(side: Side) -> Iterator[Value]:
    y0, *k = side.take(10)
    a, at = side.step(y0, direction=-1.0 if side.case.shift else 1.0)
    for count in range(10):  # there is one kernel for each number of terms up to 7
        node, side_of = ((0.5, HERE), (0.0, JUST_AFTER))[count % 2]
        (t,) = a.slots(at, (node,), side_of)
        yield from (a.rk_stage(a.stage(_entries(count), node, side_of), at, y0, k, t), t.double())


@_row(*CASES)
def _rk_finish(side: Side) -> Iterator[Value]:
    y0, *k = side.take(10)
    a, at = side.step(y0, direction=-1.0 if side.case.shift else 1.0)
    for count in range(1, 10):
        (t,) = a.slots(at, (1.0,), (HERE, JUST_BEFORE)[count % 2])
        rows = _entries(count, without=(1,)), _entries(count, seed=3, without=(2,))
        yield from a.rk_finish(a.last_stage(*rows, 1.0, (HERE, JUST_BEFORE)[count % 2]), at, y0, k, t)
        yield t.double()
    yield a.rk_finish(a.last_stage(_entries(5), None, 1.0, HERE), at, y0, k, None)[0]


@_row(*CASES)
def _combine(side: Side) -> Iterator[Value]:
    y0, *k = side.take(5)
    yield side.arithmetic(y0).combine(y0, k, _entries(4, without=(2,)), -0.7)


@_row(*CASES)
def _adjoint_stage(side: Side) -> Iterator[Value]:
    base, *x = side.take(10 if side.half else 24)  # a row that is longer than one launch allows needs several launches
    a, at = side.step(base)
    row = [0.0, *_weights(len(x) - 1)]
    yield from (a.adjoint_stage(None, x, row, at), a.adjoint_stage(base, x[:3], row[:3], None))


# ----------------------------------------------------------------------------------------------------- errors and norms
def _norms(side: Side) -> Iterator[ErrorNorm]:
    """Return norms with tolerances as numbers, and as tensors for three segments.

    One of the segments is empty, and one is shorter than a vector.
    """
    yield ErrorNorm(_RTOL, _ATOL)
    if side.case.size > 1:
        each: list[Tolerance] = [x.real.abs().clamp(min=0.25) for x in side.take(2)]
        yield ErrorNorm(*each, sizes=(3, 0, side.case.size - 3))


@_row(*CASES)
def _scaled_error(side: Side) -> Iterator[Value]:
    for norm in _norms(side):
        y0, y1, last, error = side.take(4)
        a, at = side.step(y0, norm)
        for stage in (None, (last, 0.6)):
            if isinstance(a, Fused):
                yield a.scaled_error(at, error.to(a.acc_dtype, copy=True), stage, y0, y1)
            else:
                whole = error if stage is None else error + at.signed * stage[1] * last
                yield whole / norm.scale(torch.maximum(y0.abs(), y1.abs()))


@_row(*CASES)
def _error_ratio(side: Side) -> Iterator[Value]:
    for norm in _norms(side):
        y0, y1, last, error = side.take(4)
        a, at = side.step(y0, norm)
        control = _control(a)
        for stage, also in ((None, ()), ((last, 0.6), ()), ((last, 0.6), (0.5, 7.5))):
            if control is not None:
                control.start(_T0, _H)
                a.judge(at, error.to(a.acc_dtype), stage, y0, y1, side.doubles(*also) if also else None)
                now = control.read()
                yield from (now.ratio, bool(now.accept), now.proposal)
            else:
                ratio = a.error_ratio(at, error.clone(), stage, y0, y1, [side.doubles(x) for x in also])
                judged = reference.step_control(_STEADY, _H, ratio, (1.0, 1.0))
                yield from (ratio, judged.accept, judged.h_next)


@_row(*CASES)
def _initial_step(side: Side) -> Iterator[Value]:
    for norm in _norms(side):
        y0, f0, f1 = side.take(3)
        a = side.arithmetic(y0, norm, direction=1.0)
        control = _control(a)
        if control is not None:
            control.start(_T0, None)
            control.initial_norms(y0, f0)
            probe = control.read()
            control.initial_change(y0, f0, f1)
            yield from (probe.norm_0, probe.norm_1, probe.h, control.read().proposal)
        else:
            d0, d1 = reference.initial_norms(y0, f0, norm)
            h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
            d2 = reference.initial_change(y0, f0, f1, norm) / h0
            h1 = 1e-6 if d1 <= 1e-15 and d2 <= 1e-15 else (0.01 / max(d1, d2)) ** (1.0 / _ORDER)
            yield from (d0, d1, h0, min(100 * h0, h1))


# --------------------------------------------------------------------------------------------------------- step control
_JUDGED = (
    (
        1.0,
        ControllerParams((0.2, -0.08, 0.04), 0.9, 10.0, 0.2, False, 1e-3, 2.0),
        (0.5, 3.0, math.nan, 0.1, 0.0, 0.7, 40.0),
    ),
    (
        -1.0,
        ControllerParams((0.25, 0.0, 0.0), 0.8, 5.0, 0.1, True, 1e-3, 2.0),
        (0.5, 3.0, math.nan, 0.1, 0.0, 0.7, 40.0),
    ),
    (1.0, ControllerParams((0.2, 0.0, 0.0), 0.9, 10.0, 0.2, False, 0.2, 0.4), (0.0, 40.0, 40.0, 0.5)),
)
"""Directions, parameters and error ratios: of steps that are good, too large, not finite, without error; the largest
and the smallest step."""


def _script(
    side: Side, control: DeviceStepControl | None, calls: Sequence[Callable[[Any], Any]], expected: Sequence[Any]
) -> Iterator[Value]:
    """Yield the state of the control after each call: (t0, t1, dt, proposal), accepted, status, active, jump, paused,
    and the outputs in the step."""
    for call, (times, *flags) in zip(calls, expected, strict=True):
        if control is not None:
            call(control)
            now: Any = control.read()
            times = now.t0, now.t1, now.dt, now.proposal
            flags = now.accepted, now.status, now.active, now.jump, now.paused, now.next_output - now.first_output
        yield side.doubles(*times)
        yield from flags


@_row(ONE)
def _step_control(side: Side) -> Iterator[Value]:
    for direction, law, ratios in _JUDGED:
        a = side.arithmetic(direction=direction)
        t, h, history, good = _T0, _H, (1.0, 1.0), 0
        calls: list[Any] = [lambda c: c.start_at(side.doubles(_T0), _H)]
        expected = [((t, t + h, direction * h, h), 0, 0, 1, 0, 0, 0)]
        for ratio in ratios:
            calls.append(lambda c, ratio=ratio: c.judge_ratio(side.doubles(0.0, ratio)))
            accept, h_next, history = reference.step_control(law, h, ratio, history)
            t, h, good = (t + h, h_next, good + 1) if accept else (t, h_next, good)
            expected.append(((t, t + h, direction * h, h), good, 0, 1, 0, 0, 0))
        yield from _script(side, _control(a, law), calls, expected)


@_row(ONE)
def _tstops(side: Side) -> Iterator[Value]:
    """Steps that are shortened: on a discontinuity, before and on a stop, at outputs, where the solve waits, and at its
    end."""
    a = side.arithmetic(times=(0.0, 0.4375, 1.0), direction=1.0)
    given: dict[str, Any] = dict(tstops=(0.25, 1.0), jumps=frozenset((0.25,)), stops=(0.625,), pauses=True)
    start, judge = (lambda c: c.start(0.0, 0.4)), (lambda c: c.judge_ratio(side.doubles(1.0)))
    expected = (
        ((0.0, 0.25, 0.25, 0.4), 0, 0, 1, 0, 0, 0),
        ((0.25, 0.4375, 0.1875, 0.25), 1, 0, 1, 1, 0, 0),
        ((0.4375, 0.4375, 0.0, 0.25), 2, 0, 0, 0, 1, 1),
        ((0.4375, 0.625, 0.1875, 0.25), 2, 0, 1, 0, 0, 1),
        ((0.625, 0.875, 0.25, 0.25), 3, 0, 1, 0, 0, 0),
        ((0.875, 1.0, 0.125, 0.25), 4, 0, 1, 0, 0, 0),
        ((1.0, 1.0, 0.0, 0.125), 5, 0, 0, 0, 0, 1),
    )
    calls = start, judge, judge, DeviceStepControl.resume, judge, judge, judge
    yield from _script(side, _control(a, ends=True, **given), calls, expected)
    end = (0.8, 0.8, 0.0, 0.4), 2, Status.MAX_STEPS.value, 0, 0, 0, 0
    expected = ((0.0, 0.4, 0.4, 0.4), 0, 0, 1, 0, 0, 0), ((0.4, 0.8, 0.4, 0.4), 1, 0, 1, 0, 0, 0), end
    yield from _script(side, _control(a, max_num_steps=2), (start, judge, judge), expected)


@_row(ONE)
def _grid(side: Side) -> Iterator[Value]:
    """Steps from point to point of a grid, with a wait at an output."""
    points = (0.0, 0.25, 0.75, 1.0)
    for wait in (1, 2):
        a = side.arithmetic(times=(0.0, points[wait], 1.0))
        calls: list[Any] = [lambda c: (c.start(0.0, None), c.next_of_grid()), *[DeviceStepControl.next_of_grid] * 3]
        calls.insert(wait + 1, DeviceStepControl.resume)
        expected = [
            ((t0, t1, t0 - t1, 0.0), i, 0, 1, 0, 0, int(i == wait)) for i, (t0, t1) in enumerate(pairwise(points))
        ]
        expected.insert(wait, ((points[wait], points[wait], 0.0, 0.0), wait, 0, 0, 0, 1, 1))
        expected.append(((1.0, 1.0, 0.0, 0.0), 3, 0, 0, 0, 0, 1))
        yield from _script(side, a.grid_control(points, pauses=True) if isinstance(a, Fused) else None, calls, expected)


@_row(*CASES)
def _commit(side: Side) -> Iterator[Value]:
    """Copies after an accepted step, and no copies after a rejected one."""
    source, to = side.take(2), [x.clone() for x in side.take(2)]
    a = side.arithmetic(source[0])
    control = _control(a)
    for ratio in (2.0, 1.0):
        if control is not None:
            _judged(side, control, ratio)
            a.commit(to, source)
        elif ratio == 1.0:
            to = source
        yield from (x.clone() for x in to)


# ------------------------------------------------------------------------------------------------- outputs and adjoints
def _polynomials(a: Any, count: int, with_end: bool) -> Any:
    rows = [(j, tuple(0.5 - 0.1 * ((3 * j + d) % 9) for d in range(4))) for j in range(count)]
    return a.polynomials(rows, (0.25, -0.5, 0.75, 0.125) if with_end else ())


def _output_times(case: Case) -> tuple[float, ...]:
    """Return the start, one time before the step, and those in it with its end, for one element more than one pass
    handles."""
    count = 70 if case.size == 1 else 3
    return (0.0, 0.375, *(_T0 + _H * (i + 1) / count for i in range(count)))


@_row(*CASES)
def _dense_eval(side: Side) -> Iterator[Value]:
    y0, y1, *k = side.take(9)
    times = _output_times(side.case)
    a, at = side.step(y0, times=times)
    interpolants = (3, False), (4, False), (6, False), (7, False), (5, True)  # there are kernels for 4, 6 and 7
    for interpolant in interpolants[-2 if side.case.size == 1 else 0 :]:
        out = y0.new_empty((len(times) - 2, side.case.size))
        a.dense_outputs(_polynomials(a, *interpolant), at, y0, y1, k, 2, out)
        yield out


@_row(*CASES)
def _dense_adjoint(side: Side) -> Iterator[Value]:
    if side.half:
        return  # plain PyTorch computes this case
    times = _output_times(side.case)
    lam, *gradients = side.take(len(times) - 1)
    a, at = side.step(lam, times=times)
    for interpolant in ((5, True), (8, False)):
        found = a.dense_adjoint(_polynomials(a, *interpolant), at, lam, 2, torch.stack(gradients))
        yield from (found.lam, found.start, *found.extra)


@_row(*CASES)
def _pack_adjoint(side: Side) -> Iterator[Value]:
    f, vjp = side.take(2)
    a = side.arithmetic(f)
    yield from (a.pack_adjoint(f, vjp), a.pack_adjoint(f, None))


@_row(*CASES)
def _real_dot(side: Side) -> Iterator[Value]:
    g, f = side.take(2)
    # the rounding error grows by this factor
    yield float(side.arithmetic(g).real_dot(g, f)) / math.sqrt(1 + side.case.size)


# ---------------------------------------------------------------------------------------------------- lists of tensors
_MIXED = [(case, dtype) for dtype in DTYPES for case in (ONE, CASES[0], Case(5, 1))]
_LISTS = _MIXED, *([(Case(MANY, shift), dtype)] for shift, dtype in enumerate(DTYPES))
"""Lists of tensors: all dtypes and several sizes together, and each dtype alone."""


def _tensors(side: Side, those: Sequence[tuple[Case, torch.dtype]]) -> list[Tensor]:
    return [side.tensor(*each) for each in those]


@_row(ONE)
def _accumulate(side: Side) -> Iterator[Value]:
    a, at = side.step()
    norm = ErrorNorm(_RTOL, _ATOL)
    for those in _LISTS:
        sums = a.sums(_tensors(side, those), with_error=True)
        steps = ((0.7, 0.3), (-0.4, 0.2)), ((0.5, 0.0), (-0.3, 0.6))
        for weights in steps if len(those) > 1 else steps[:1]:
            sums.begin()
            for i, both in enumerate(weights):
                given = [None if (i + j) % 4 == 3 else x for j, x in enumerate(_tensors(side, those))]
                sums.add(given, *both, at if i else None)
            coarsest = max(sums.dtypes, key=lambda d: torch.finfo(d).eps).to_real()
            yield from (sums.device_ratio(norm).to(coarsest, copy=True), *sums.scaled_errors(norm))
            sums.commit()
            yield from (x.clone() for x in sums.total)


@_row(ONE)
def _long_list(side: Side) -> Iterator[Value]:
    """Return more tensors than one launch takes."""
    many = side.tensor(Case(450, 0), side.dtype).split(1)
    sums = side.arithmetic().sums(many, with_error=False)
    sums.begin()
    sums.add(many, 0.7, 0.0)
    sums.commit()
    yield torch.cat(sums.total)


@_row(ONE)
def _sums_on_device(side: Side) -> Iterator[Value]:
    """Sums and copies in a captured loop, which count only if the device accepted the step."""
    those = [*_MIXED, *((LARGE, dtype) for dtype in DTYPES)]
    like, kept, later, added = (_tensors(side, those) for _ in range(4))
    a = side.arithmetic()
    sums, control = a.sums(like, with_error=False), _control(a)
    if control is None:
        total = [0.5 * x + y for x, y in zip(later, added, strict=True)]
        yield from (*kept, *(torch.zeros_like(x) for x in kept), *total)
        yield from (x + 0.5 * y for x, y in zip(total, kept, strict=True))
        return
    at, memory = a.current(), sums.keep(kept)
    yield from (x.clone() for x in memory)
    for ratio in (2.0, 1.0):
        _judged(side, control, ratio)
        sums.begin()
        sums.keep_if_accepted(later, at)
        sums.add(memory, 0.5, 0.0)
        sums.add(added, 1.0, 0.0)
        sums.commit_if_accepted(at)
        yield from (x.clone() for x in sums.total)
    sums.begin()
    sums.add(kept, 0.5, 0.0)
    sums.commit()
    yield from (x.clone() for x in sums.total)


# ----------------------------------------------------------------------------------------------- the loop on the device
@_row(LARGE)
def _current_step(side: Side) -> Iterator[Value]:
    """Kernels that read their step from the control: a step, its outputs, and no change after the end."""
    y0, *k = side.take(8)
    a, at = side.step(y0, times=(0.0, _T0 + _H / 2, _T0 + _H))
    control = _control(a, ends=True)
    if control is not None:
        control.start(_T0, _H)
        at = a.current()
    (t,) = a.slots(at, (0.5,), HERE)
    yield from (a.rk_stage(a.stage(_entries(6), 0.5, HERE), at, y0, k, t), t)
    y1, error = a.rk_finish(a.last_stage(_entries(7), _entries(6, seed=3), 1.0, HERE), at, y0, k, None)
    yield from (y1, error, *a.times(at, (0.0, 1.0), HERE), a.adjoint_stage(None, k, _weights(7), at))
    sums = a.sums([y0], with_error=False)
    sums.begin()
    sums.add([k[1]], 0.25, 0.0)  # so that memory that holds the right sum by chance is not taken for the result
    sums.add([k[0]], 0.5, 0.0, at)
    sums.commit()
    yield from sums.total
    # The error is so small that the step is accepted. It is the last step.
    error, last, ratio = 0.01 * error, (k[6], 0.01), 0.0
    if control is None:
        ratio = a.error_ratio(at, error, last, y0, y1)
    else:
        a.judge(at, error, last, y0, y1, None)
        ratio = control.read().ratio
    out = torch.full((2, MANY), 0.5, dtype=y0.dtype, device=side.device)
    a.dense_outputs(_polynomials(a, 6, False), at, y0, y1, k, 1, out)
    yield from (ratio, out)
    now = (1, 0, 0)
    if control is not None:
        a.judge(at, error, last, y0, y1, None)  # after the end of the solve
        now = control.read().accepted, control.read().accept, control.read().active
    yield from now


@_row(LARGE)
def _tape(side: Side) -> Iterator[Value]:
    """Three recorded steps, and the reverse pass over them, with an output in the first step."""
    times, starts = (0.0, 0.125, 1.0), (0.0, 0.25, 0.5)
    lam, *gradients = side.take(3)
    rows = torch.stack(gradients)
    walk, solve = (side.arithmetic(x, times=times, direction=1.0) for x in (lam, lam[:1]))
    interpolant = _polynomials(walk, 6, False)
    tape = StepLog(solve.module, side.device, 4, first=0, carries=False) if isinstance(solve, Fused) else None
    control, back = _control(solve, ends=True, tape=tape), None
    steps = [(t0, t0 + 0.25, 0.25) for t0 in starts]
    if control is not None and tape is not None:
        control.start(0.0, 0.25)
        for _ in starts:
            control.judge_ratio(side.doubles(1.0))
        steps = [step[:3] for step in tape.read(3)]
        back = walk.grid_control(())
        back.start(0.0, 0.0)
        back.begin_reverse(tape)
    yield from (side.doubles(*step) for step in steps)
    for row, t0 in reversed(list(enumerate(starts))):
        at, given, now = walk.interval(t0, t0 + 0.25, 0.25), rows[: row == 0], (row, t0, t0, t0 + 0.25, int(row > 0))
        if back is not None and tape is not None:
            at, given = walk.current(), rows
            (time,) = walk.slots(at, (0.0,), HERE)
            back.load_step(tape, time)
            now = int(tape.row.item()), time.item(), back.read().t0, back.read().t1
        if not side.half:  # the kernels have no cotangents of outputs in half precision
            found = walk.dense_adjoint(interpolant, at, lam, 1, given)
            yield from (found.lam, found.start, *found.extra)
        if back is not None and tape is not None:
            back.advance_reverse(tape)
            now = *now, back.read().active
        yield from now


# -------------------------------------------------------------------------------------------------------- comparing
def difference(row: Primitive, device: Side, host: Side) -> str | None:
    """Return how the device differs from the host, as half a sentence, or None if only by rounding."""
    device.taken = host.taken = max(device.taken, host.taken)
    for case in row.cases:
        device.case = host.case = case
        got = [x.cpu() if isinstance(x, Tensor) else x for x in row.run(device)]
        for result, (x, expected) in enumerate(zip(got, row.run(host), strict=True)):
            if isinstance(x, Tensor) and isinstance(expected, Tensor):
                wrong = _distance(x, expected, x.dtype)
            elif isinstance(x, int):
                wrong = None if x == expected else f"{x} came, and {expected} is right"
            else:
                wrong = _distance(host.doubles(float(x)), host.doubles(float(expected)), host.dtype)
            if wrong is not None:
                return f"{wrong} (result {result} of {row.name}, of the size {case.size})"
    return None


def _distance(x: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """Return how x differs from the expected value by more than rounding in this dtype, or None."""
    if x.shape != expected.shape:
        return f"the shape {tuple(x.shape)} came, and {tuple(expected.shape)} is right"
    if x.numel() == 0:
        return None
    x, expected = x.to(_double(x.dtype)), expected.to(_double(expected.dtype))
    size = expected.abs()
    # The sums have about twenty terms, none larger than 1 or than the result. Then they are rounded to the dtype.
    rounding = 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * max(1.0, float(size.max()))
    allowed = torch.finfo(dtype).eps * size + rounding
    off = (x - expected).abs()
    bad = ~(off <= allowed)  # NaN counts as different
    if not bool(bad.any()):
        return None
    i = int(torch.where(bad, off.nan_to_num(math.inf, math.inf), -1.0).argmax())
    value, right, limit = (each.reshape(-1)[i].item() for each in (x, expected, allowed))
    return f"element {i} of {x.numel()} is {value:.9g}, {right:.9g} is right, and rounding allows {limit:.2g}"
