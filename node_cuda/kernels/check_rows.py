"""What the self-check runs: a row for each primitive, as one function that is run on two sides and compared.

One side is the device: the objects that solves use (`Fused`, `FusedSums`, `Control`, `Tape`) on small tensors of the
state's dtype. The other side is the host: the same calls of `Arithmetic` and `Sums`, so kernels/reference.py, on the
same numbers in double. What only the device has (step control) the host side computes in Python.

A new primitive is a function here and a line in ROWS. Every tensor is made of other numbers, so that memory that held
the right result of an earlier call is not right again.
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
from node_cuda.kernels.clock import HERE, JUST_AFTER, JUST_BEFORE, Clock
from node_cuda.kernels.control import Control
from node_cuda.kernels.fused import DTYPES, Fused, On
from node_cuda.kernels.fused_sums import FusedSums
from node_cuda.kernels.reference import ControlLaw
from node_cuda.kernels.sums import Sums
from node_cuda.kernels.tape import Tape
from node_cuda.norms import ErrorNorm

MANY = 6151
"""Elements of a large tensor: several blocks of every kernel, two chunks of a sum, a tail for every vector width."""

Value = Tensor | float
"""A result. Tensors are equal to a rounding of their dtype, floats to one of the state's; int and bool are equal."""


class Case(NamedTuple):
    """A size, and by how many elements its tensors miss the address from which vectors can be read."""

    size: int
    shift: int


CASES = (Case(0, 0), Case(1, 0), Case(MANY, 0), Case(MANY, 1))


class Side:
    """Where a row runs. numbers: two rows, of the state's dtype and of numbers that every dtype holds exactly.

    on: the device's stream; None on the host, where numbers are double.
    """

    def __init__(self, dtype: torch.dtype, numbers: tuple[Tensor, Tensor], module: ModuleType | None, on: On | None):
        self.dtype = dtype
        self.numbers, self.exact_numbers = numbers
        self.module = module
        self.on = on
        self.device = self.numbers.device
        self._taken = 0

    def begin(self, row: int) -> None:
        """The tensors to come are those of this row."""
        self._taken = 97 * row

    def take(self, case: Case) -> Tensor:
        """Other numbers than the calls before gave."""
        start = self._place(len(self.numbers), case)
        return self.numbers[start : start + case.size]

    def exact(self, case: Case, dtype: torch.dtype) -> Tensor:
        """The same in another dtype, on the host in double of it."""
        width = 2 if dtype.is_complex else 1
        size, shift = width * case.size, width * case.shift
        start = self._place(len(self.exact_numbers), Case(size, 0))
        x = self.exact_numbers[start : start + size]
        x = torch.view_as_complex(x.reshape(-1, 2)) if dtype.is_complex else x
        room = torch.empty(case.size + shift, dtype=_double(dtype) if self.on is None else dtype, device=self.device)
        return room[shift:].copy_(x)

    def _place(self, room: int, case: Case) -> int:
        """Where the next window begins: a multiple of 16 elements and the shift."""
        self._taken += 1
        return 16 * (self._taken % ((room - case.size - case.shift) // 16)) + case.shift

    def arithmetic(
        self, y0: Tensor, norm: ErrorNorm | None = None, times: Sequence[float] = (0.0, 1.0), direction: float = 1.0
    ) -> Arithmetic:
        """The primitives for such a state."""
        norm = ErrorNorm(_RTOL, _ATOL) if norm is None else norm
        if self.on is None:
            a = Arithmetic(y0, direction, norm, times)
            a.clock = Clock(direction, self.dtype.to_real(), self.device)  # just before t1 is a matter of the dtype
            return a
        assert self.module is not None
        return Fused(self.module, self.on, y0, direction, norm, times)

    def control(self, a: Arithmetic, *, law: ControlLaw, outputs: bool = False, **given: Any) -> Control | None:
        """Step control on the device; None on the host."""
        if not isinstance(a, Fused):
            return None
        none: dict[str, Any] = dict(max_num_steps=100, landings=(), jumps=frozenset(), stops=(), pauses=False)
        return a.control(law, _ORDER, outputs=outputs, **(none | given))


_RTOL, _ATOL, _ORDER = 0.3, 0.2, 5
_T0, _H = 0.5, 0.25  # a step from 1/2 to 3/4: all times in it are exact in every dtype
_STEADY = ControlLaw((1.0, 0.0, 0.0), 1.0, 4.0, 0.25, False, 0.0, math.inf)  # with a ratio of 1 the step stays as it is


def sides(module: ModuleType, on: On, device: torch.device, dtype: torch.dtype) -> tuple[Side, Side]:
    """The device's and the host's. Draws no random numbers: the state of no generator moves."""
    i = torch.arange(2**14, dtype=torch.float64, device="cpu")
    spread, other = torch.sin(0.37 * i * i), torch.sin(0.61 * i * i)
    exact = torch.round(128 * spread) / 128  # seven bits: bfloat16 has eight
    own = (torch.complex(spread, other) if dtype.is_complex else spread).to(dtype)
    there = own.to(device, copy=True), exact.to(device, copy=True)
    return Side(dtype, there, module, on), Side(dtype, (own.to(_double(dtype)), exact), None, None)


def _double(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _weights(count: int, seed: int = 0) -> list[float]:
    """So many coefficients, none of them zero."""
    return [(-1.0) ** j * (0.3 + 0.1 * ((j + seed) % 7)) for j in range(count)]


def _row(count: int, seed: int = 0, without: Sequence[int] = ()) -> Row:
    """The same as a row of so many stages, but for some of them."""
    return [(j, weight) for j, weight in enumerate(_weights(count, seed)) if j not in without]


def _doubles(*values: float) -> Tensor:
    """Numbers that are equal to a rounding in double."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


# ----------------------------------------------------------------------------------------------------- times and stages
def _stage_times(side: Side) -> Iterator[Value]:
    for direction, side_of in ((1.0, JUST_BEFORE), (-1.0, HERE), (1.0, JUST_AFTER)):
        a = side.arithmetic(side.take(Case(1, 0)), direction=direction)
        for t0 in (_T0, -2.0, 0.0):
            at = a.interval(t0, t0 + _H, _H)
            yield from (t.double() for t in a.times(at, (0.0, 0.5, 1.0), side_of))


def _rk_stage(side: Side) -> Iterator[Value]:
    for case in CASES:
        y0, k = side.take(case), [side.take(case) for _ in range(9)]
        a = side.arithmetic(y0, direction=-1.0 if case.shift else 1.0)
        at = a.interval(_T0, _T0 + _H, _H)
        for count in range(10):  # each number of terms up to 7 is a kernel
            node, side_of = ((0.5, HERE), (0.0, JUST_AFTER))[count % 2]
            (t,) = a.slots(at, (node,), side_of)
            yield a.rk_stage(a.stage(_row(count), node, side_of), at, y0, k, t)
            yield t.double()


def _rk_finish(side: Side) -> Iterator[Value]:
    for case in CASES:
        y0, k = side.take(case), [side.take(case) for _ in range(9)]
        a = side.arithmetic(y0, direction=-1.0 if case.shift else 1.0)
        at = a.interval(_T0, _T0 + _H, _H)
        for count in range(1, 10):
            side_of = (HERE, JUST_BEFORE)[count % 2]
            (t,) = a.slots(at, (1.0,), side_of)
            err_row = _row(count, seed=3, without=(2,))
            y1, error = a.rk_finish(a.last_stage(_row(count, without=(1,)), err_row, 1.0, side_of), at, y0, k, t)
            assert error is not None
            yield from (y1, error, t.double())
        y1, _ = a.rk_finish(a.last_stage(_row(5), None, 1.0, HERE), at, y0, k, None)
        yield y1


def _combine(side: Side) -> Iterator[Value]:
    for case in CASES:
        y0, k = side.take(case), [side.take(case) for _ in range(4)]
        yield side.arithmetic(y0).combine(y0, k, _row(4, without=(2,)), -0.7)


def _adjoint_stage(side: Side) -> Iterator[Value]:
    half = side.dtype in (torch.float16, torch.bfloat16)
    count = 9 if half else 23  # a longer row than a launch takes rounds in between
    for case in CASES:
        base, x = side.take(case), [side.take(case) for _ in range(count)]
        a = side.arithmetic(base, direction=-1.0)
        at = a.interval(_T0, _T0 + _H, _H)
        row = [0.0, *_weights(count - 1)]
        yield a.adjoint_stage(None, x, row, at)
        yield a.adjoint_stage(base, x[:3], row[:3], None)


# ----------------------------------------------------------------------------------------------------- errors and norms
def _norms(side: Side, case: Case) -> Iterator[ErrorNorm]:
    """Tolerances as numbers, and as tensors for three segments, one of them empty and one without a whole vector."""
    yield ErrorNorm(_RTOL, _ATOL)
    if case.size > 1:
        each: list[Tolerance] = [x.real.abs().clamp(min=0.25) for x in (side.take(case), side.take(case))]
        yield ErrorNorm(*each, sizes=(3, 0, case.size - 3))


def _scaled_error(side: Side) -> Iterator[Value]:
    for case in CASES:
        for norm in _norms(side, case):
            y0, y1, last, error = (side.take(case) for _ in range(4))
            a = side.arithmetic(y0, norm, direction=-1.0)
            at = a.interval(_T0, _T0 + _H, _H)
            for stage in (None, (last, 0.6)):
                if isinstance(a, Fused):
                    yield a.scaled_error(at, error.to(a.acc_dtype, copy=True), stage, y0, y1)
                else:
                    whole = error if stage is None else error + at.signed * stage[1] * last
                    yield whole / norm.scale(torch.maximum(y0.abs(), y1.abs()))


def _error_ratio(side: Side) -> Iterator[Value]:
    for case in CASES:
        for norm in _norms(side, case):
            y0, y1, last, error = (side.take(case) for _ in range(4))
            a = side.arithmetic(y0, norm, direction=-1.0)
            control = side.control(a, law=_STEADY)
            at = a.interval(_T0, _T0 + _H, _H)
            for stage, also in ((None, None), ((last, 0.6), None), ((last, 0.6), 7.5)):
                if control is not None:
                    assert isinstance(a, Fused)
                    control.start(_T0, _H)
                    norms = None if also is None else torch.tensor([0.5, also], dtype=torch.float64, device=side.device)
                    a.judge(at, error.to(a.acc_dtype), stage, y0, y1, norms)
                    now = control.read()
                    ratio, accept, h = now.ratio, bool(now.accept), now.proposal
                else:
                    ratio = a.error_ratio(at, error.clone(), stage, y0, y1, () if also is None else (_doubles(also),))
                    accept, h, _ = reference.step_control(_STEADY, _H, ratio, (1.0, 1.0))
                yield from (ratio, accept, h)


def _initial_step(side: Side) -> Iterator[Value]:
    for case in CASES:
        for norm in _norms(side, case):
            y0, f0, f1 = (side.take(case) for _ in range(3))
            a = side.arithmetic(y0, norm)
            control = side.control(a, law=_STEADY)
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
    (1.0, ControlLaw((0.2, -0.08, 0.04), 0.9, 10.0, 0.2, False, 1e-3, 2.0), (0.5, 3.0, math.nan, 0.1, 0.0, 0.7, 40.0)),
    (-1.0, ControlLaw((0.25, 0.0, 0.0), 0.8, 5.0, 0.1, True, 1e-3, 2.0), (0.5, 3.0, math.nan, 0.1, 0.0, 0.7, 40.0)),
    (1.0, ControlLaw((0.2, 0.0, 0.0), 0.9, 10.0, 0.2, False, 0.2, 0.4), (0.0, 40.0, 40.0, 0.5)),
)
"""Directions, laws and error ratios: of steps that are good, too large, not finite, without error; the largest and the
smallest step."""


def _step_control(side: Side) -> Iterator[Value]:
    for direction, law, ratios in _JUDGED:
        a = side.arithmetic(side.take(Case(1, 0)), direction=direction)
        control = side.control(a, law=law)
        if control is not None:
            start = torch.tensor([_T0], dtype=torch.float64, device=side.device)
            control.start_at(start, _H)
            for ratio in ratios:
                control.judge_ratio(torch.tensor([0.0, ratio], dtype=torch.float64, device=side.device))
                now = control.read()
                yield _doubles(now.t0, now.t1, now.dt, now.last_t1, now.proposal)
                yield from (now.accepted, now.rejected, now.attempts, now.accept, now.finite, now.active)
        else:
            t, h, history, good, bad = _T0, _H, (1.0, 1.0), 0, 0
            for ratio in ratios:
                end = t + h
                accept, h, history = reference.step_control(law, h, ratio, history)
                t, good, bad = (end, good + 1, bad) if accept else (t, good, bad + 1)
                yield _doubles(t, t + h, direction * h, end, h)
                yield from (good, bad, good + bad + 1, int(accept), int(math.isfinite(ratio)), 1)


def _landings(side: Side) -> Iterator[Value]:
    """Steps that are cut: on a jump, before and on a stop, at outputs, where the solve waits and where it ends."""
    a = side.arithmetic(side.take(Case(1, 0)), times=(0.0, 0.4375, 1.0))
    given = dict(landings=(0.25, 1.0), jumps=frozenset((0.25,)), stops=(0.625,), pauses=True)
    control = side.control(a, law=_STEADY, outputs=True, **given)
    one = torch.ones(1, dtype=torch.float64, device=side.device)
    # (t0, t1, proposal), then jump, active, paused, outputs in the step; after each step, and after the wait.
    expected = (
        ((0.0, 0.25, 0.4), 0, 1, 0, 0),
        ((0.25, 0.4375, 0.25), 1, 1, 0, 0),
        ((0.4375, 0.4375, 0.25), 0, 0, 1, 1),
        ((0.4375, 0.625, 0.25), 0, 1, 0, 1),
        ((0.625, 0.875, 0.25), 0, 1, 0, 0),
        ((0.875, 1.0, 0.25), 0, 1, 0, 0),
        ((1.0, 1.0, 0.125), 0, 0, 0, 1),
    )
    if control is None:
        for times, *flags in expected:
            yield _doubles(*times)
            yield from flags
        yield 3
        return
    control.start(0.0, 0.4)
    for i in range(len(expected)):
        if i == 3:
            control.resume()
        elif i:
            control.judge_ratio(one)
        now = control.read()
        yield _doubles(now.t0, now.t1, now.proposal)
        yield from (now.jump, now.active, now.paused, now.next_output - now.first_output)
    limited = side.control(a, law=_STEADY, max_num_steps=2)
    assert limited is not None
    limited.start(0.0, 0.4)
    limited.judge_ratio(one)
    limited.judge_ratio(one)
    yield limited.read().status  # more steps than are allowed


def _grid(side: Side) -> Iterator[Value]:
    """From point to point, with a wait at an output."""
    points = (0.0, 0.25, 0.75, 1.0)
    for pause in points[1:3]:
        a = side.arithmetic(side.take(Case(1, 0)), times=(0.0, pause, 1.0), direction=-1.0)
        if isinstance(a, Fused):
            control, paused = a.grid_control(points, pauses=True), 0
            control.start(0.0, None)
            for _ in range(len(points) + 1):
                control.resume() if paused else control.next_of_grid()
                now = control.read()
                paused = now.paused
                yield _doubles(now.t0, now.t1, now.dt)
                yield from (now.accepted, now.active, now.next_output - now.first_output)
        else:
            outputs = 0
            for i, (t0, t1) in enumerate(pairwise(points)):
                yield _doubles(t0, t1, t0 - t1)
                yield from (i, 1, outputs)
                outputs = int(t1 == pause)
                if outputs:
                    yield _doubles(pause, pause, 0.0)
                    yield from (i + 1, 0, 1)
            yield _doubles(1.0, 1.0, 0.0)
            yield from (3, 0, 1)


def _commit(side: Side) -> Iterator[Value]:
    """Copies behind a step that was accepted, and none behind one that was not."""
    for case in CASES:
        source, to = ([side.take(case) for _ in range(2)] for _ in range(2))
        to = [x.clone() for x in to]
        a = side.arithmetic(source[0])
        control = side.control(a, law=_STEADY)
        for ratio, accepted in ((2.0, False), (1.0, True)):
            if control is not None:
                assert isinstance(a, Fused)
                _judged(control, ratio)
                a.commit(to, source)
            elif accepted:
                to = source
            yield from (x.clone() for x in to)


def _judged(control: Control, ratio: float) -> None:
    """A step was judged by this ratio: the last one of the control, from here on."""
    control.start(_T0, _H)
    control.judge_ratio(torch.full((1,), ratio, dtype=torch.float64, device=control.state.device))


# ------------------------------------------------------------------------------------------------------------- outputs
_INTERPOLANTS = tuple((count, False) for count in (3, 4, 6, 7)) + ((5, True),)  # 4, 6 and 7 are kernels


def _polynomials(a: Arithmetic, count: int, with_end: bool) -> Any:
    rows = [(j, tuple(0.5 - 0.1 * ((3 * j + d) % 9) for d in range(4))) for j in range(count)]
    return a.polynomials(rows, (0.25, -0.5, 0.75, 0.125) if with_end else ())


def _output_times(case: Case) -> tuple[float, ...]:
    """The start, one before the step, and those in it with its end; for one element more than a pass takes."""
    count = 70 if case.size == 1 else 3
    return (0.0, 0.375, *(_T0 + _H * (i + 1) / count for i in range(count)))


def _dense_eval(side: Side) -> Iterator[Value]:
    for case in CASES:
        y0, y1, k = side.take(case), side.take(case), [side.take(case) for _ in range(7)]
        times = _output_times(case)
        a = side.arithmetic(y0, times=times, direction=-1.0)
        at = a.interval(_T0, _T0 + _H, _H)
        for count, with_end in _INTERPOLANTS[-2 if case.size == 1 else 0 :]:
            out = y0.new_empty((len(times) - 2, case.size))
            a.dense_outputs(_polynomials(a, count, with_end), at, y0, y1, k, 2, out)
            yield out


def _dense_adjoint(side: Side) -> Iterator[Value]:
    if side.dtype in (torch.float16, torch.bfloat16):
        return  # plain PyTorch computes it
    for case in CASES:
        times = _output_times(case)
        lam, gradients = side.take(case), torch.stack([side.take(case) for _ in times[2:]])
        a = side.arithmetic(lam, times=times, direction=-1.0)
        at = a.interval(_T0, _T0 + _H, _H)
        for count, with_end in ((5, True), (8, False)):
            found = a.dense_adjoint(_polynomials(a, count, with_end), at, lam, 2, gradients)
            yield from (found.lam, found.start, *found.extra)


# ----------------------------------------------------------------------------------------------- adjoint and parameters
def _pack_adjoint(side: Side) -> Iterator[Value]:
    for case in CASES:
        f, vjp = side.take(case), side.take(case)
        a = side.arithmetic(f)
        yield a.pack_adjoint(f, vjp)
        yield a.pack_adjoint(f, None)


def _real_dot(side: Side) -> Iterator[Value]:
    for case in CASES:
        g, f = side.take(case), side.take(case)
        yield float(side.arithmetic(g).real_dot(g, f))


def _sums_of(side: Side, like: Sequence[Tensor], *, with_error: bool) -> tuple[Arithmetic, Sums]:
    a = side.arithmetic(side.take(Case(1, 0)), direction=-1.0)
    return a, a.sums(like, with_error=with_error)


Parameters = Sequence[tuple[torch.dtype, Case]]


def _tensors(side: Side, parameters: Parameters) -> list[Tensor]:
    return [side.exact(case, dtype) for dtype, case in parameters]


def _parameters() -> Iterator[Parameters]:
    """Lists of tensors: of all dtypes and several sizes at once, and each dtype alone."""
    yield [(dtype, case) for dtype in DTYPES for case in (CASES[1], CASES[0], Case(5, 1))]
    yield from ([(dtype, Case(MANY, shift))] for shift, dtype in enumerate(DTYPES))


def _accumulate(side: Side) -> Iterator[Value]:
    for parameters in _parameters():
        a, sums = _sums_of(side, _tensors(side, parameters), with_error=True)
        at = a.interval(_T0, _T0 + _H, _H)
        norm = ErrorNorm(_RTOL, _ATOL)
        steps = ((0.7, 0.3), (-0.4, 0.2)), ((0.5, 0.0), (-0.3, 0.6))
        for weights in steps if len(parameters) > 1 else steps[:1]:
            sums.begin()
            for i, (weight, error_weight) in enumerate(weights):
                tensors = enumerate(_tensors(side, parameters))
                given = [None if (i + j) % 4 == 3 else x for j, x in tensors]
                sums.add(given, weight, error_weight, at if i else None)
            ratio = sums.device_ratio(norm)
            assert ratio is not None
            yield ratio.to(max(sums.dtypes, key=lambda d: torch.finfo(d).eps).to_real(), copy=True)
            yield from sums.scaled_errors(norm)
            sums.commit()
            yield from (x.clone() for x in sums.total)


def _long_list(side: Side) -> Iterator[Value]:
    """More tensors than a launch takes."""
    many = side.exact(Case(450, 0), side.dtype).split(1)
    if side.on is None:
        yield 0.7 * torch.cat(many)
        return
    _, sums = _sums_of(side, many, with_error=False)
    sums.begin()
    sums.add(many, 0.7, 0.0)
    sums.commit()
    yield torch.cat(sums.total)


def _sums_on_device(side: Side) -> Iterator[Value]:
    """What a captured loop adds and keeps: if the device accepted the step."""
    parameters = [(dtype, case) for dtype in DTYPES for case in (CASES[1], Case(MANY, 0), Case(5, 1))]
    like, kept, later, added = (_tensors(side, parameters) for _ in range(4))
    a, sums = _sums_of(side, like, with_error=False)
    if not isinstance(sums, FusedSums):
        total = [0.5 * x + y for x, y in zip(later, added, strict=True)]
        yield from (*kept, *(torch.zeros_like(x) for x in kept), *total)
        yield from (x + 0.5 * y for x, y in zip(total, kept, strict=True))
        return
    assert isinstance(a, Fused)
    control = side.control(a, law=_STEADY)
    assert control is not None
    at, memory = a.current(), sums.keep(kept)
    yield from (x.clone() for x in memory)
    for ratio in (2.0, 1.0):
        _judged(control, ratio)
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
def _current_step(side: Side) -> Iterator[Value]:
    """Kernels that find their step in the control: a step, its outputs, and nothing more behind the end."""
    case = Case(MANY, 0)
    y0, k = side.take(case), [side.take(case) for _ in range(7)]
    times = (0.0, _T0 + _H / 2, _T0 + _H)
    a = side.arithmetic(y0, times=times, direction=-1.0)
    control = side.control(a, law=_STEADY, outputs=True)
    if control is not None:
        assert isinstance(a, Fused)
        control.start(_T0, _H)
        at = a.current()
    else:
        at = a.interval(_T0, _T0 + _H, _H)
    (t,) = a.slots(at, (0.5,), HERE)
    yield a.rk_stage(a.stage(_row(6), 0.5, HERE), at, y0, k, t)
    yield t
    y1, error = a.rk_finish(a.last_stage(_row(7), _row(6, seed=3), 1.0, HERE), at, y0, k, None)
    assert error is not None
    yield from (y1, error, *a.times(at, (0.0, 1.0), HERE))
    yield a.adjoint_stage(None, k, _weights(7), at)
    sums = a.sums([y0], with_error=False)
    sums.begin()
    sums.add([k[0]], 0.5, 0.0, at)
    sums.commit()
    yield from sums.total
    # An error so small that the step is accepted: it is the last one.
    error, last = 0.01 * error, (k[6], 0.01)
    out = torch.full((2, case.size), 0.5, dtype=y0.dtype, device=side.device)
    if control is None:
        yield a.error_ratio(at, error, last, y0, y1)
    else:
        assert isinstance(a, Fused)
        a.judge(at, error, last, y0, y1, None)
        yield control.read().ratio
    a.dense_outputs(_polynomials(a, 6, False), at, y0, y1, k, 1, out)
    yield out
    if control is None:
        yield from (1, 0, 0)
        return
    assert isinstance(a, Fused)
    a.judge(at, error, last, y0, y1, None)  # behind the end
    now = control.read()
    yield from (now.accepted, now.accept, now.active)


def _tape(side: Side) -> Iterator[Value]:
    """Three steps recorded, and the walk back over them, with an output in the first one."""
    case = Case(MANY, 0)
    lam, gradients = side.take(case), torch.stack([side.take(case) for _ in range(2)])
    times = (0.0, 0.125, 1.0)
    steps = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75))
    walk = side.arithmetic(lam, times=times)
    by_kernels = side.dtype not in (torch.float16, torch.bfloat16)  # the cotangents of outputs
    interpolant = _polynomials(walk, 6, False)
    if not isinstance(walk, Fused):
        for t0, t1 in steps:
            yield _doubles(t0, t1, 0.25)
        for place, (t0, t1) in reversed(list(enumerate(steps))):
            yield _doubles(t0, t1)
            yield from (place, t0, int(place > 0))
            found = walk.dense_adjoint(
                interpolant, walk.interval(t0, t1, 0.25), lam, 1, gradients[: 1 if place == 0 else 0]
            )
            yield from (found.lam, found.start, *found.extra) if by_kernels else ()
        return
    tape = Tape(side.device, 4, first=0, carries=False)
    solve = side.arithmetic(side.take(CASES[1]), times=times)
    control = side.control(solve, law=_STEADY, outputs=True, tape=tape)
    assert control is not None
    control.start(0.0, 0.25)
    for _ in steps:
        control.judge_ratio(torch.ones(1, dtype=torch.float64, device=side.device))
    for t0, t1, h, _begins in tape.read(len(steps)):
        yield _doubles(t0, t1, h)
    back, at = walk.grid_control(()), walk.current()
    back.start(0.0, 0.0)
    back.set_walk(tape)
    (time,) = walk.slots(at, (0.0,), HERE)
    for _ in steps:
        back.take_back(tape, time)
        now, row, t = back.read(), int(tape.row.item()), time.item()
        found = walk.dense_adjoint(interpolant, at, lam, 1, gradients) if by_kernels else None
        back.taken(tape)
        yield _doubles(now.t0, now.t1)
        yield from (row, t, back.read().active)
        yield from () if found is None else (found.lam, found.start, *found.extra)


class Primitive(NamedTuple):
    """A row of the check. run: gives its results on one side."""

    name: str
    run: Callable[[Side], Iterator[Value]]


ROWS = (
    Primitive("stage_times", _stage_times),
    Primitive("rk_stage", _rk_stage),
    Primitive("rk_finish", _rk_finish),
    Primitive("combine", _combine),
    Primitive("scaled_error", _scaled_error),
    Primitive("error_ratio", _error_ratio),
    Primitive("initial_step", _initial_step),
    Primitive("step_control", _step_control),
    Primitive("landings", _landings),
    Primitive("grid", _grid),
    Primitive("commit", _commit),
    Primitive("dense_eval", _dense_eval),
    Primitive("dense_adjoint", _dense_adjoint),
    Primitive("adjoint_stage", _adjoint_stage),
    Primitive("pack_adjoint", _pack_adjoint),
    Primitive("real_dot", _real_dot),
    Primitive("accumulate", _accumulate),
    Primitive("long_list", _long_list),
    Primitive("sums_on_device", _sums_on_device),
    Primitive("current_step", _current_step),
    Primitive("tape", _tape),
)


def difference(row: Primitive, device: Side, host: Side) -> str | None:
    """How the device differs from the host, as half a sentence; None: not beyond rounding."""
    number = ROWS.index(row)
    for side in (device, host):
        side.begin(number)
    got = [x.cpu() if isinstance(x, Tensor) else x for x in row.run(device)]
    for result, (x, expected) in enumerate(zip(got, row.run(host), strict=True)):
        if isinstance(x, Tensor):
            assert isinstance(expected, Tensor)
            wrong = _distance(x, expected)
        elif isinstance(x, int):
            wrong = None if x == expected else f"{x} came, and {expected} is right"
        else:
            wrong = _distance(_doubles(x), _doubles(float(expected)), host.dtype)
        if wrong is not None:
            return f"{wrong} (result {result} of {row.name})"
    return None


def _distance(x: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """How x differs from what is expected. dtype: whose rounding is allowed, by default that of x."""
    dtype = x.dtype if dtype is None else dtype
    if x.shape != expected.shape:
        return f"the shape {tuple(x.shape)} came, and {tuple(expected.shape)} is right"
    if x.numel() == 0:
        return None
    x, expected = x.to(_double(x.dtype)), expected.to(_double(expected.dtype))
    size = expected.abs()
    # The sums are of some twenty terms, none larger than 1 or than its result; then they are rounded to the dtype.
    rounding = 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * max(1.0, float(size.max()))
    allowed = torch.finfo(dtype).eps * size + rounding
    off = (x - expected).abs()
    bad = ~(off <= allowed)  # NaN is bad
    if not bool(bad.any()):
        return None
    i = int(torch.where(bad, off.nan_to_num(math.inf, math.inf), -1.0).argmax())
    value, right, limit = x.reshape(-1)[i].item(), expected.reshape(-1)[i].item(), allowed.reshape(-1)[i].item()
    return f"element {i} of {x.numel()} is {value:.9g}, {right:.9g} is right, and rounding allows {limit:.2g}"
