"""Every kernel of csrc/ against kernels.reference: on the CPU behind the shim, and the same cases on a GPU.

Tolerances: a kernel may round each sum in another order, so it may be off by a few units in the last place of the
largest term; halves accumulate in float32 on both sides and are rounded once.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import random
import shutil
import subprocess

import pytest
import torch
from shim import library as shim
from shim.library import DTYPES, HALF, Kernels, Law, Slot, Sums, acc, step
from shim.pretend_gpu import pretending

import node_cuda
from node_cuda.controllers import CONTROLLERS, Adaptive, Controller
from node_cuda.interpolation import HERMITE, HERMITE_END
from node_cuda.kernels import reference
from node_cuda.kernels.clock import Clock
from node_cuda.kernels.tape import Tape
from node_cuda.methods import arithmetic_of
from node_cuda.norms import ErrorNorm
from node_cuda.options import AdaptiveOptions
from node_cuda.problem import make_problem
from node_cuda.solution import Stats
from node_cuda.status import SolveError, Status
from node_cuda.steppers.step import Step
from node_cuda.tableaus import TABLEAUS

THREADS = 256
REAL = DTYPES[:4]
LAW = Controller(keep=True).law(5, AdaptiveOptions())


@pytest.fixture(scope="session", params=["shim", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request):
    """csrc/, compiled once."""
    if request.param == "gpu" and not pretending():
        return Kernels(shim.for_gpu(), "cuda")
    return Kernels(request.getfixturevalue("shim_library"))


@pytest.fixture(autouse=True)
def blocks_in_order(request):
    yield
    if "kernels" in request.fixturenames:
        request.getfixturevalue("kernels").configure()


def make(kernels, n, dtype, offset=0):
    """Random numbers of size 1; offset: in elements, from an address that suits vectors."""
    x = torch.randn(n + offset, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    return x.to(kernels.device, dtype)[offset:]


def cases(dtype):
    """(size, offsets of the tensors): around a warp and a block, several blocks, beyond the cap, any alignment."""
    block = THREADS * 16 // dtype.itemsize
    for n in (0, 1, 31, 32, 33, block - 1, block, block + 1, 3 * block + 5, 6 * block + 7):
        yield n, itertools.repeat(0)
    for n in (33, block + 1):
        yield n, itertools.repeat(1)
        yield n, itertools.cycle((0, 1, 2))


def assert_near(actual, expected, dtype, ulps=4):
    """To a few units in the last place of the largest number."""
    actual, expected = actual.cpu(), expected.cpu()
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    size = float(expected.abs().max()) if expected.numel() else 0.0
    bound = ulps * torch.finfo(dtype).eps * max(1.0, size)
    difference = (actual - expected).abs()
    assert bool((difference <= bound).all()), f"off by {float(difference.max()):.3g}, more than {bound:.3g}"


def row_of(count, gap=True):
    """Coefficients of `count` stages, with one left out."""
    values = [(j, (-1) ** j * 0.3 * (j + 1) / count) for j in range(count + gap)]
    return [entry for entry in values if not gap or entry[0] != count // 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rk_stage(kernels, dtype):
    for (n, offsets), count in zip(cases(dtype), itertools.cycle((7, 1, 2, 3, 4, 5, 6, 9, 17)), strict=False):
        y0, *k = (make(kernels, n, dtype, o) for o, _ in zip(offsets, range(count + 2), strict=False))
        row = row_of(count)
        k[count // 2].fill_(math.nan)  # its coefficient is zero
        out = make(kernels, n, dtype, next(iter(offsets)))
        z = kernels.rk_stage(y0, k, row, step(0.1), out=out)
        assert_near(z, reference.rk_stage(y0, k, row, 0.1), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stage_without_terms_is_a_copy(kernels, dtype):
    y0 = make(kernels, 40, dtype)
    assert torch.equal(kernels.rk_stage(y0, [], [], step(0.1)), y0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rk_finish(kernels, dtype):
    for (n, offsets), count in zip(cases(dtype), itertools.cycle((6, 7, 1, 2, 3, 4, 5, 9)), strict=False):
        y0, *k = (make(kernels, n, dtype, o) for o, _ in zip(offsets, range(count + 1), strict=False))
        b = row_of(count, gap=False)
        e = [(j, a - 0.7) for j, a in b] + [(count, 1.0)]  # the last entry is that of a stage yet to come
        y1, error = kernels.rk_finish(y0, k, b, e, step(0.1))
        expected = reference.rk_finish(y0, k, b, e, 0.1)
        assert_near(y1, expected[0], dtype)
        assert_near(error, expected[1], acc(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rk_finish_never_reads_a_zero_coefficient(kernels, dtype):
    y0, *k = (make(kernels, 300, dtype) for _ in range(4))
    k[1].fill_(math.inf)
    y1, error = kernels.rk_finish(y0, k[:3], [(0, 0.5), (2, 0.5)], [(1, 1.0)], step(0.1))
    assert bool(torch.isfinite(y1).all()) and not bool(torch.isfinite(error).any())
    y1, error = kernels.rk_finish(y0, k[:3], [(1, 1.0)], [(0, 0.5), (2, 0.5)], step(0.1))
    assert bool(torch.isfinite(error).all()) and not bool(torch.isfinite(y1).any())


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_stage_times_are_those_of_the_clock(kernels, dtype, direction):
    clock = Clock(direction, dtype, torch.device("cpu"))
    y0 = make(kernels, 3, dtype)
    for t0, h in [(0.0, 0.1), (0.9, 0.1), (-1.0, 1.0), (-0.3, 0.05), (3.0, 1.0), (1 / 3, 1 / 7), (100.0, 28.0)]:
        where, t1 = step(h, t0, direction), t0 + h
        times = torch.zeros(5, dtype=dtype, device=kernels.device)
        pick = [times[i : i + 1].data_ptr() for i in range(5)]
        kernels.rk_stage(y0, [y0], [(0, 1.0)], where, Slot(pick[0], 0.3, -1))
        kernels.rk_finish(y0, [y0], [(0, 1.0)], [(0, 1.0)], where, Slot(pick[1], 1.0, -1))
        others = [Slot(pick[2], 1.0, 0), Slot(pick[3], 0.0, 1), Slot(pick[4], 0.0, 0)]
        kernels.stage_time(dtype, others, where)
        expected = clock.tensors([t0 + 0.3 * h, clock.before(t1), t1, clock.after(t0), t0])
        assert times.tolist() == torch.stack(expected).tolist(), (t0, h)


def test_the_time_is_written_for_an_empty_state(kernels):
    time, y0 = torch.zeros(1, device=kernels.device), make(kernels, 0, torch.float32)
    kernels.rk_stage(y0, [y0], [(0, 1.0)], step(1.0, 2.0), Slot(time.data_ptr(), 0.5, 0))
    assert time.item() == 2.5


# --- norms -----------------------------------------------------------------------------------------------------


def sizes_of(n):
    """Segments of uneven sizes, one of them empty."""
    return (n // 3, 0, n // 2, n - n // 3 - n // 2) if n > 3 else None


def norm_of(rtol, atol, sizes=None):
    return ErrorNorm(rtol, atol, sizes)


@pytest.mark.parametrize("each", ["numbers", "tensors", "rtol a tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_ratio_and_scaled_error(kernels, dtype, each):
    real = dtype.to_real()
    for i, (n, offsets) in enumerate(cases(dtype)):
        if n == 0:
            continue
        error, last, y0, y1 = (make(kernels, n, dtype, o) for o, _ in zip(offsets, range(4), strict=False))
        error = make(kernels, n, acc(dtype), next(iter(offsets)))
        rtol, atol = 1e-2, 0.125
        if each != "numbers":
            rtol = torch.linspace(0.01, 0.1, n).to(kernels.device, real)
        if each == "tensors":
            atol = torch.linspace(0.1, 1.0, n).to(kernels.device, real)
        sizes = sizes_of(n) if i % 2 else None
        last = None if i % 3 == 2 else last
        ratio = kernels.error_ratio(error, last, 0.3, y0, y1, rtol, atol, sizes, step(0.1))
        scaled = kernels.scaled_error(error, last, 0.3, y0, y1, rtol, atol, step(0.1))
        norm = ErrorNorm(rtol, atol, sizes)
        expected = reference.error_ratio(
            error.clone(), None if last is None else (last, 0.1 * 0.3), y0, y1, norm
        )  # its scale is rounded to half
        assert ratio.item() == pytest.approx(expected, rel=8 * torch.finfo(real).eps)
        total = error if last is None else error + 0.03 * last
        quotient = total / norm.scale(torch.maximum(y0.abs(), y1.abs()))
        assert_near(scaled, quotient.to(error.dtype), dtype, ulps=8)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["error", "last", "y0", "y1"])
def test_what_is_not_finite_reaches_the_ratio(kernels, bad, where):
    n = 5000
    tensors = {name: make(kernels, n, torch.float32) for name in ("error", "last", "y0", "y1")}
    tensors[where][n - 7] = bad
    ratio = kernels.error_ratio(
        tensors["error"], tensors["last"], 0.5, tensors["y0"], tensors["y1"], 1e-3, 1e-3, (n - 100, 100)
    ).item()
    # An infinite state alone makes its scale infinite, and its quotient zero: the reference says the same.
    norm = reference.error_ratio(
        tensors["error"], (tensors["last"], 0.5), tensors["y0"], tensors["y1"], norm_of(1e-3, 1e-3, (n - 100, 100))
    )
    assert math.isfinite(ratio) == math.isfinite(norm) == (where in ("y0", "y1") and bad == math.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_initial_norms_and_change(kernels, dtype):
    for i, (n, offsets) in enumerate(cases(dtype)):
        if n == 0:
            continue
        y0, f0, f1 = (make(kernels, n, dtype, o) for o, _ in zip(offsets, range(3), strict=False))
        rtol, atol, sizes = 1e-2, 0.125, sizes_of(n) if i % 2 else None
        norm = ErrorNorm(rtol, atol, sizes)
        d0, d1 = kernels.initial_norms(y0, f0, rtol, atol, sizes).tolist()
        change = kernels.initial_change(y0, f0, f1, rtol, atol, sizes).item()
        eps = torch.finfo(dtype).eps
        assert (d0, d1) == pytest.approx(tuple(reference.initial_norms(y0, f0, norm)), rel=8 * eps)
        assert change == pytest.approx(reference.initial_change(y0, f0, f1, norm), rel=8 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_jump(kernels, dtype):
    for n, offsets in cases(dtype):
        a, g, f = (make(kernels, n, dtype, o) for o, _ in zip(offsets, range(3), strict=False))
        expected = a + g
        dot = torch.vdot(g.to(torch.complex128), f.to(torch.complex128)).real.item()
        assert kernels.jump(a, g, f).item() == pytest.approx(dot, rel=1e-9, abs=1e-9)
        assert_near(a, expected, dtype, ulps=1)
        kernels.jump(a, g, None)
        assert_near(a, expected + g, dtype, ulps=1)


def test_the_same_bits_in_any_order_of_the_blocks_and_at_any_alignment(kernels):
    dtype, n = torch.float32, 40_000
    tensors = [make(kernels, n, dtype) for _ in range(4)]
    seen = set()
    for seed, offset in itertools.product((0, 1, 2, 3), (0, 1, 3)):
        kernels.configure(seed=seed)
        moved = [make(kernels, n, dtype, offset).copy_(x) for x in tensors]
        error, last, y0, y1 = moved
        results = [
            kernels.error_ratio(error, last, 0.3, y0, y1, 1e-3, 1e-3, (n // 3, n - n // 3)),
            kernels.initial_norms(y0, y1, 1e-3, 1e-3),
            kernels.initial_change(y0, y1, last, 1e-3, 1e-3),
            kernels.jump(None, y0, y1),
            kernels.rk_stage(y0, [y1, last], [(0, 0.1), (1, 0.2)], step(0.1)).double().sum(),
        ]
        seen.add(tuple(x for r in results for x in r.reshape(-1).tolist()))
    assert len(seen) == 1


def test_a_workspace_serves_again_and_again(kernels):
    n = 30_000
    error, y0 = make(kernels, n, torch.float64), make(kernels, n, torch.float64)
    workspace = kernels.workspace(n)
    ratios = {kernels.error_ratio(error, None, 0.0, y0, y0, 1e-3, 1e-3, workspace=workspace).item() for _ in range(4)}
    assert len(ratios) == 1


# --- dense output and the adjoint -----------------------------------------------------------------------------


def horner(weights, x):
    value = 0.0
    for weight in reversed(weights):
        value = (value + weight) * x
    return value


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8", "accurate dopri8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_eval(kernels, dtype, method):
    tableau = TABLEAUS[method.removeprefix("accurate ")]
    dense = tableau.accurate if method.startswith("accurate") else tableau.dense
    t0, h = 0.5, 0.25
    times = torch.tensor([0.5, 0.5 + 0.25 / 3, 0.7, 0.75], dtype=torch.float64, device=kernels.device)
    for n, offsets in cases(dtype):
        y0, y1, *k = (make(kernels, n, dtype, o) for o, _ in zip(offsets, range(len(dense.weights) + 2), strict=False))
        out = torch.full((4, n), 7.0, dtype=dtype, device=kernels.device)
        kernels.dense_eval(out, times, y0, y1, k, dense.weight_rows, step(h, t0))
        for i, s in enumerate(times.tolist()[:-1]):
            row = [(j, horner(weights, (s - t0) / h)) for j, weights in dense.weight_rows]
            assert_near(out[i], reference.dense_eval(y0, k, row, h), dtype, ulps=16)
        assert torch.equal(out[3], y1)


@pytest.mark.parametrize("count", [2, 4, 6, 7])
@pytest.mark.parametrize("with_end", [False, True])
def test_dense_eval_of_many_outputs(kernels, count, with_end):
    """More than the kernel takes at once, for the counts of terms that it has apart, and with P as fixed grids have."""
    n, m = 37, 150
    y0, y1, *k = (make(kernels, n, torch.float64) for _ in range(2 + count))
    times = torch.linspace(0, 1, m + 1, dtype=torch.float64, device=kernels.device)[1:]
    out = torch.zeros(m, n, dtype=torch.float64, device=kernels.device)
    rows = [(j, (1.0, -2.0 - j, 1.0)) for j in range(count)]
    end = (0.0, 3.0, -2.0) if with_end else None
    kernels.dense_eval(out, times, y0, y1, k, rows, step(2.0, 0.0, -1.0, t1=1.0), end=end)
    x = times[:, None]
    expected = y0 - 2.0 * sum(horner(weights, x) * k[j] for j, weights in rows)
    if with_end:
        expected = expected + x * x * (3 - 2 * x) * (y1 - y0)
    expected[-1] = y1  # the end of the step is y1 itself
    assert_near(out, expected, torch.float64, ulps=64)  # 8 sums of terms up to 8 in size


def test_dense_eval_writes_only_the_outputs_asked_for(kernels):
    y = make(kernels, 5, torch.float32)
    times = torch.linspace(0, 1, 6, dtype=torch.float64, device=kernels.device)
    out = torch.zeros(6, 5, device=kernels.device)
    kernels.dense_eval(out, times, y, y, [y], [(0, (1.0,))], step(1.0), first=2, stop=4)
    assert out.any(1).tolist() == [False, False, True, True, False, False]


WIDE = [dtype for dtype in DTYPES if dtype not in HALF]


def transposed(lam, g, times, rows, at, end):
    """What dense_adjoint must give."""
    pairs = list(zip(times.tolist(), g, strict=True))
    inner = [((s - at.t0) / (at.t1 - at.t0), v) for s, v in pairs if s != at.t1]
    result = reference.dense_adjoint(
        lam,
        [v for _, v in inner],
        [horner(end or (), x) for x, _ in inner],
        [[horner(weights, x) for x, _ in inner] for _, weights in rows],
        [v for s, v in pairs if s == at.t1],
        at.dt,
    )
    return [result.lam, result.start, *result.extra]


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "accurate dopri8", "linear", "cubic"])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_dense_adjoint(kernels, dtype, method):
    if method in ("linear", "cubic"):
        rows, end = (HERMITE, HERMITE_END) if method == "cubic" else ((), (1.0,))
    else:
        tableau = TABLEAUS[method.removeprefix("accurate ")]
        dense = tableau.accurate if method.startswith("accurate") else tableau.dense
        assert dense is not None
        rows, end = dense.weight_rows, None
    where = step(0.25, 0.5, -1.0)
    times = torch.tensor([0.5 + 0.25 / 3, 0.7, 0.75], dtype=torch.float64, device=kernels.device)
    for (n, offsets), count in zip(cases(dtype), itertools.cycle((3, 0, 1, 2)), strict=False):
        chosen = times[3 - count :] if count != 2 else times[:2]  # with and without one at the end
        lam, *out = (make(kernels, n, dtype, o) for o, _ in zip(offsets, range(len(rows) + 3), strict=False))
        g = make(kernels, count * n, dtype, next(iter(offsets))).view(count, n)
        kernels.dense_adjoint(out, lam, g, chosen, rows, where, end=end)
        for got, want in zip(out, transposed(lam, g, chosen, rows, where.at, end), strict=True):
            assert_near(got, want, dtype, ulps=16)


@pytest.mark.parametrize("with_end", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 20])
def test_dense_adjoint_is_the_transpose_of_dense_eval_for_many_outputs(kernels, count, with_end):
    """More outputs than the kernel takes at once, and more rows. lam is written where it lies."""
    n, m = 37, 150
    y0, y1, *k = (make(kernels, n, torch.float64) for _ in range(2 + count))
    times = torch.linspace(0, 1, m + 1, dtype=torch.float64, device=kernels.device)[1:]
    rows = [(j, (1.0, -2.0 - j, 1.0)) for j in range(count)]
    end, where = (0.0, 3.0, -2.0) if with_end else None, step(2.0, 0.0, -1.0, t1=1.0)
    if not rows and not with_end:
        rows, end = [], ()
    ys, g = (
        torch.zeros(m, n, dtype=torch.float64, device=kernels.device),
        make(kernels, m * n, torch.float64).view(m, n),
    )
    kernels.dense_eval(ys, times, y0, y1, k, rows, where, end=end)
    lam = make(kernels, n, torch.float64)
    before, others = lam.clone(), [torch.full_like(lam, 7.0) for _ in range(1 + count)]
    kernels.dense_adjoint([lam, *others], lam, g, times, rows, where, end=end)
    for got, want in zip([lam, *others], transposed(before, g, times, rows, where.at, end), strict=True):
        assert_near(got, want, torch.float64, ulps=64)
    pairs = zip([lam - before, *others], [y1, y0, *k], strict=True)
    assert sum(float(a @ b) for a, b in pairs) == pytest.approx(float((g * ys).sum()), rel=1e-10)


def test_dense_adjoint_reads_the_outputs_of_the_current_step(kernels):
    """Those that are asked for, or with a control its own: none, one, several, the last."""
    n, times = 500, torch.tensor([0.1, 0.2, 0.25, 0.8, 1.0], dtype=torch.float64, device=kernels.device)
    rows, end = ((0, (1.0, -0.5)),), (0.25,)
    g, lam = make(kernels, 5 * n, torch.float64).view(5, n), make(kernels, n, torch.float64)

    def taken(where, **those):
        out = [torch.full_like(lam, 7.0) for _ in range(3)]
        kernels.dense_adjoint(out, lam, g, times, rows, where, end=end, **those)
        return torch.stack(out)

    tape = Tape(kernels.device, 4, first=0, carries=False)
    points = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64, device=kernels.device)
    law = Law(LAW, outputs=times.tolist(), device=kernels.device, tape=tape)
    solve, walk = kernels.new_ctl(), kernels.new_ctl()
    kernels.start_control(solve, law, -1.0, 0.0, -1.0)
    for _ in points:
        kernels.grid_control(solve, law, points)
    kernels.start_control(walk, Law(LAW, device=kernels.device), -1.0, 0.0, -1.0)
    kernels.set_walk(walk, tape)
    for n_, (first, stop) in zip((3, 2, 1, 0), ((4, 5), (3, 4), (3, 3), (0, 3)), strict=True):
        kernels.take_back(walk, tape)
        t0, t1 = points[n_].item(), points[n_ + 1].item()
        by_value = step(t1 - t0, t0, -1.0, t1)
        found = taken(kernels.where(walk))
        assert torch.equal(found, taken(by_value, first=first, stop=stop))
        for got, want in zip(
            found, transposed(lam, g[first:stop], times[first:stop], rows, by_value.at, end), strict=True
        ):
            assert_near(got, want, torch.float64, ulps=16)
        kernels.taken(walk, tape)
    assert bool((taken(kernels.where(walk)) == 7.0).all())  # the walk has ended


def test_dense_adjoint_never_reads_a_zero_coefficient(kernels):
    """The output at the end of a step is y1 itself, and without P y1 is in no other."""
    lam = make(kernels, 300, torch.float32)
    times = torch.tensor([0.5, 1.0], dtype=torch.float64, device=kernels.device)
    for o, finite in ((1, (False, True, True, True)), (0, (True, False, False, True))):
        g = torch.zeros(2, 300, device=kernels.device)
        g[o].fill_(math.inf)
        out = [torch.empty_like(lam) for _ in range(4)]
        kernels.dense_adjoint(out, lam, g, times, [(0, (1.0, 0.0)), (1, (1.0, -2.0))], step(1.0))
        assert tuple(bool(torch.isfinite(x).all()) for x in out) == finite


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_dense_adjoint_refuses_half_precision(kernels, dtype):
    x = make(kernels, 8, dtype)
    with pytest.raises(RuntimeError, match="dense_adjoint failed"):
        kernels.dense_adjoint([x, x], x, x[None], torch.ones(1, dtype=torch.float64), (), step(1.0), end=(1.0,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adjoint_stage_and_finish(kernels, dtype):
    for n, offsets in cases(dtype):
        lam, *mu = (make(kernels, n, dtype, o) for o, _ in zip(offsets, range(5), strict=False))
        row = [(0, 0.3), (2, -0.7), (4, 0.2)]
        kappa = kernels.adjoint_stage([lam, *mu], row, step(0.1, direction=-1.0))
        assert_near(kappa, reference.combine(torch.zeros_like(lam), [lam, *mu], row, -0.1), dtype)
        expected = reference.combine(lam, mu, [(j, 1.0) for j in range(4)], 1.0)
        kernels.adjoint_finish(lam, mu)
        assert_near(lam, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_adjoint(kernels, dtype):
    for n, offsets in cases(dtype):
        f, vjp = (make(kernels, n, dtype, o) for o, _ in zip(offsets, range(2), strict=False))
        assert torch.equal(kernels.pack_adjoint(f, vjp), torch.cat([f, -vjp]))
        assert torch.equal(kernels.pack_adjoint(f, None), torch.cat([f, torch.zeros_like(f)]))


@pytest.mark.parametrize("length", [0, 1, 7, 500])
def test_accumulate(kernels, length):
    """A list of mixed dtypes and sizes, longer than what one launch takes by value."""
    sizes = itertools.cycle((3, 0, 4096, 1, 10_001, 33))
    if length == 500:
        sizes = itertools.cycle((1, 0, 5))
    kinds = itertools.cycle(DTYPES)
    params = [make(kernels, n, d, i % 2) for i, n, d in zip(range(length), sizes, kinds, strict=False)]
    sums = Sums(kernels, params)
    first, second = ([torch.randn_like(p) for p in params] for _ in range(2))
    dtypes = [acc(p.dtype) for p in params]
    sums.accumulate(first, -0.5, 0.25, 0, step(0.1))
    sums.accumulate(second, 0.75, -0.5, 1, step(0.1), table=True)
    expected, errors = (
        reference.accumulate(reference.accumulate([], first, w * 0.1, dtypes), second, v * 0.1, dtypes)
        for w, v in ((-0.5, 0.75), (0.25, -0.5))
    )
    for got, want in zip((*sums.sums, *sums.errors), (*expected, *errors), strict=True):
        assert_near(got, want, got.dtype)
    for total in sums.totals:
        total.normal_()
    if not length:
        assert sums.ratio(1e-2, 1e-3).item() == 0.0
        return
    scaled = reference.scaled_sums(
        errors, sums.totals, [t + s for t, s in zip(sums.totals, expected, strict=True)], ErrorNorm(1e-2, 1e-3)
    )
    norm = ErrorNorm(1e-2, 1e-3)(torch.zeros(0), scaled)
    assert sums.ratio(1e-2, 1e-3).item() == pytest.approx(norm, rel=1e-4)
    totals = [t + s for t, s in zip(sums.totals, expected, strict=True)]
    sums.commit()
    for got, want in zip(sums.totals, totals, strict=True):
        assert_near(got, want, got.dtype)


def test_an_integrand_that_is_missing_counts_as_zero(kernels):
    params = [make(kernels, 10, torch.float32) for _ in range(2)]
    sums = Sums(kernels, params)
    sums.accumulate([params[0], None], 2.0, 0.0, 0, step(1.0))
    assert torch.equal(sums.sums[0], 2 * params[0]) and not sums.sums[1].any()
    assert bool((sums.errors[0] == 9.0).all())  # a weight of zero writes nothing
    sums.accumulate([params[0], None], 1.0, 0.0, 1, step(1.0))
    assert torch.equal(sums.sums[0], 3 * params[0]) and not sums.sums[1].any()


def test_the_norm_of_sums_sees_every_tensor(kernels):
    params = [make(kernels, n, torch.float32) for n in (10, 5000, 3)]
    for i, bad in itertools.product(range(3), (1e3, math.nan)):
        sums = Sums(kernels, params)
        sums.accumulate(params, 0.0, 1e-6, 0, step(1.0))
        for s in sums.sums:
            s.zero_()
        sums.errors[i][-1] = bad
        ratio = sums.ratio(0.0, 1.0, also=torch.tensor([0.5], dtype=torch.float64, device=kernels.device)).item()
        assert math.isnan(ratio) if math.isnan(bad) else ratio == pytest.approx(bad / len(params[i]) ** 0.5, rel=1e-5)


# --- step control ----------------------------------------------------------------------------------------------


def scenario(seed):
    """Options, times and ratios of a solve that meets every rule of step control."""
    rnd = random.Random(seed)
    grid = sorted(rnd.uniform(0.05, 3.0) for _ in range(6))
    options = dict(
        first_step=rnd.choice([0.01, 0.3, 2.0]),
        min_step=rnd.choice([0.0, 1e-3, 0.05]),
        max_step=rnd.choice([math.inf, 0.2]),
        controller=rnd.choice(list(CONTROLLERS)),
        max_num_steps=rnd.choice([2**31 - 1, 9]),
        step_t=rnd.sample(grid[:3], rnd.randint(0, 3)),
        jump_t=rnd.sample(grid[3:], rnd.randint(0, 3)),
    )
    if seed % 5 == 0:  # a step of 0.1 misses some multiples of 0.1 by rounding
        grid = [0.1 * (i + 1) + 0.2 for i in range(6)]
        options.update(first_step=0.1, max_step=0.1, min_step=0.0, step_t=grid[:3], jump_t=grid[3:])
    times = [0.0, *sorted(rnd.uniform(0.1, 3.0) for _ in range(rnd.randint(1, 4)))]
    ratios = [rnd.choice([0.0, 1e-9, rnd.uniform(0.1, 1.0), rnd.uniform(1, 50), 1.0]) for _ in range(60)]
    if rnd.random() < 0.3:
        ratios[rnd.randint(0, 20)] = rnd.choice([math.nan, math.inf])
    if rnd.random() < 0.2:
        ratios[5:] = [math.nan if rnd.random() < 0.5 else 1e300] * 55
    return options, times, ratios, rnd.choice([(), times[1:]])


@pytest.mark.parametrize("seed", range(40))
def test_step_control_is_that_of_the_host(kernels, seed, monkeypatch):
    options, times, ratios, stops = scenario(seed)
    sign = -1.0 if seed % 3 == 0 else 1.0
    user = {**options, "step_t": [sign * x for x in options["step_t"]], "jump_t": [sign * x for x in options["jump_t"]]}
    t = torch.tensor([sign * x for x in times], dtype=torch.float64)
    problem = make_problem(lambda t, y: y, torch.ones(1), t, 1e-3, 1e-3)
    pace = Adaptive(problem, arithmetic_of(problem), 5, AdaptiveOptions(**user), Stats(), stops)
    landings = sorted(x for x in options["step_t"] + options["jump_t"] if x > 0)
    law = Law(
        pace.law, 5, options["max_num_steps"], landings, options["jump_t"], stops, times[1:], kernels.device
    )  # fmt: skip
    ctl = kernels.new_ctl()
    kernels.start_control(ctl, law, sign, 0.0, options["first_step"])
    y, zero = torch.ones(1), torch.zeros(1)
    pace.start(0.0, y, y)
    now, count, status = 0.0, 1, Status.SUCCESS
    same = (lambda x: x) if kernels.device.type == "cpu" else (lambda x: pytest.approx(x, rel=1e-12, abs=1e-300))
    for ratio in ratios:
        state = kernels.read(ctl)
        try:
            move = pace.propose(now, y)
            assert move is not None and state.active
            assert (state.next.t0, state.next.t1, state.next.h) == same((now, move.t1, move.h))
            assert state.next.dt == same(sign * move.h) and state.attempts == pace.attempts and state.h == same(pace.h)
            monkeypatch.setattr(reference, "error_ratio", lambda *_, ratio=ratio: ratio)
            tried = Step(pace.arithmetic.interval(now, move.t1, move.h), y, y, [], zero)
            accepted = pace.judge(tried)
        except SolveError as failure:
            if state.active:  # the judgement fails
                kernels.step_control(ctl, law, torch.tensor([ratio], dtype=torch.float64, device=kernels.device))
                state = kernels.read(ctl)
            status = failure.status
            assert (state.status, state.active, state.accept) == (status.value, 0, 0) or state.next.h == 0.0
            assert state.status == status.value and not state.active
            break
        both = torch.tensor([0.0, ratio], dtype=torch.float64, device=kernels.device)
        kernels.step_control(ctl, law, both)
        state = kernels.read(ctl)
        assert (state.accept, state.jump) == (accepted, tried.jump)
        assert tuple(state.history) == same(pace._history) and state.finite == pace._finite
        assert (state.accepted, state.rejected) == (pace.stats.accepted, pace.stats.rejected)
        if not accepted:
            assert state.first_output == state.next_output
            continue
        now = tried.t1
        reached = count
        while count < len(times) and times[count] <= now:
            count += 1
        if count > reached:
            pace.fresh()
        assert (state.first_output, state.next_output) == (reached - 1, count - 1)
        if count == len(times):
            assert not state.active and state.status == 0
            break


def test_a_control_that_has_ended_changes_nothing(kernels):
    law, ctl = Law(LAW, outputs=[0.5], device=kernels.device), kernels.new_ctl()
    kernels.start_control(ctl, law, 1.0, 0.0, 1.0)
    good = torch.tensor([0.5], dtype=torch.float64, device=kernels.device)
    kernels.step_control(ctl, law, good)
    before = kernels.read(ctl)
    assert before.accept and not before.active and (before.first_output, before.next_output) == (0, 1)
    y = make(kernels, 100, torch.float32)
    for _ in range(2):
        kernels.error_ratio(y, None, 0.0, y, y, 1e-3, 1e-3, where=kernels.where(ctl), ctl=ctl, law=law)
        after = kernels.read(ctl)
        assert not after.accept and after.first_output == after.next_output == 1 and after.accepted == 1
    z = kernels.rk_stage(y, [y], [(0, 1.0)], kernels.where(ctl), out=torch.zeros_like(y))
    assert not z.any()


def test_the_starting_step(kernels):
    y0, f0, f1 = (make(kernels, 999, torch.float64) for _ in range(3))
    for scale in (1.0, 1e-7, 0.0):
        law, ctl = Law(LAW, order=5, device=kernels.device), kernels.new_ctl()
        kernels.start_control(ctl, law, -1.0, 2.0, -1.0)
        d0, d1 = kernels.initial_norms(scale * y0, scale * f0, 1e-3, 1e-6, ctl=ctl).tolist()
        h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        probe = kernels.read(ctl).next
        assert (probe.t0, probe.t1, probe.h, probe.dt) == (2.0, 2.0 + h0, h0, -h0)
        change = kernels.initial_change(scale * y0, scale * f0, scale * f1, 1e-3, 1e-6, ctl=ctl, law=law).item()
        d2 = change / h0
        h1 = max(1e-6, h0 * 1e-3) if d1 <= 1e-15 and d2 <= 1e-15 else (0.01 / max(d1, d2)) ** (1.0 / 5)
        assert kernels.read(ctl).h == pytest.approx(min(100 * h0, h1), rel=0 if kernels.device.type == "cpu" else 1e-14)
    kernels.start_control(ctl, law, -1.0, 2.0, -1.0)
    y0[3] = math.nan
    kernels.initial_norms(y0, f0, 1e-3, 1e-6, ctl=ctl)
    state = kernels.read(ctl)
    assert state.status == Status.NON_FINITE.value and not state.active


def test_a_grid_goes_from_point_to_point(kernels):
    points = torch.tensor([0.0, 0.25, 1.0, 1.5], dtype=torch.float64, device=kernels.device)
    law, ctl = Law(LAW, outputs=[0.5, 1.0, 1.2], device=kernels.device), kernels.new_ctl()
    kernels.start_control(ctl, law, 1.0, 0.0, -1.0)
    seen = []
    for _ in range(5):
        kernels.grid_control(ctl, law, points)
        s = kernels.read(ctl)
        seen.append((s.next.t0, s.next.t1, s.active, s.accept, s.first_output, s.next_output))
    assert seen == [
        (0.0, 0.25, 1, 0, 0, 0),
        (0.25, 1.0, 1, 1, 0, 0),
        (1.0, 1.5, 1, 1, 0, 2),
        (1.5, 1.5, 0, 1, 2, 3),
        (1.5, 1.5, 0, 0, 3, 3),
    ]


def test_commit_copies_after_an_accepted_step_only(kernels):
    for n, offset, ratio in itertools.product((1, 15, 16, 17, 9000), (0, 1), (0.5, 2.0)):
        law, ctl = Law(LAW, device=kernels.device), kernels.new_ctl()
        kernels.start_control(ctl, law, 1.0, 0.0, 1.0)
        kernels.step_control(ctl, law, torch.tensor([ratio], dtype=torch.float64, device=kernels.device))
        to, source = ([make(kernels, n, torch.float16, offset) for _ in range(2)] for _ in range(2))
        expected = [x.clone() for x in (source if ratio < 1 else to)]
        kernels.commit(to, source, ctl)
        assert all(map(torch.equal, to, expected))


# --- whole solves ----------------------------------------------------------------------------------------------


class DeviceSolve:
    """An adaptive solve of which Python only evaluates the field: what the plan and the device loop will do."""

    def __init__(self, kernels, func, y0, t, method, rtol, atol, options):
        self.kernels, self.func, self.rtol, self.atol = kernels, func, rtol, atol
        self.problem = make_problem(func, y0, t, rtol, atol)
        self.y0, self.n, self.tableau = self.problem.y0.clone(), self.problem.y0.numel(), TABLEAUS[method]
        parsed = AdaptiveOptions(**options)
        pace = Adaptive(self.problem, arithmetic_of(self.problem), self.tableau.order, parsed, Stats())
        self.outputs = self.problem.times[1:]
        self.law = Law(
            pace.law, self.tableau.order, parsed.max_num_steps, list(pace._landings), pace._jumps, (), self.outputs,
            kernels.device,
        )  # fmt: skip
        self.ctl, self.workspace = kernels.new_ctl(), kernels.workspace(self.n)
        self.where = kernels.where(self.ctl)
        self.times = torch.tensor(self.outputs, dtype=torch.float64, device=kernels.device)
        self.ys = torch.full((len(self.outputs), *y0.shape), math.nan, dtype=y0.dtype, device=kernels.device)
        self.step_times = [self.problem.times[0]]
        kernels.start_control(
            self.ctl, self.law, self.problem.direction, self.problem.times[0], parsed.first_step or -1.0
        )
        self.k1 = self.at(0.0, 0, self.y0)
        if parsed.first_step is None:
            kernels.initial_norms(self.y0, self.k1, rtol, atol, ctl=self.ctl)
            f1 = self.stage(1.0, 0, [self.k1], [(0, 1.0)])
            kernels.initial_change(self.y0, self.k1, f1, rtol, atol, ctl=self.ctl, law=self.law)

    def slot(self, c, side):
        self.time = torch.zeros((), dtype=self.problem.time_dtype, device=self.kernels.device)
        return Slot(self.time.data_ptr(), c, side)

    def at(self, c, side, y):
        self.kernels.stage_time(self.problem.time_dtype, [self.slot(c, side)], self.where)
        return self.func(self.time, y)

    def stage(self, c, side, k, row):
        z = self.kernels.rk_stage(self.y0, k, row, self.where, self.slot(c, side))
        return self.func(self.time, z)

    def attempt(self):
        """One step, tried and judged."""
        tableau, kernels, k = self.tableau, self.kernels, [self.k1]
        for i in range(1, tableau.stages - tableau.fsal):
            k.append(self.stage(tableau.nodes[i], -1, k, tableau.rows[i]))
        y1, error = kernels.rk_finish(
            self.y0, k, tableau.b_row, tableau.err_row, self.where, self.slot(tableau.nodes[-1], -1)
        )
        last, weight = None, 0.0
        if tableau.fsal:
            k.append(self.func(self.time, y1))
            weight = float(tableau.b_err[-1])
            last = k[-1] if weight else None
        kernels.error_ratio(
            error, last, weight, self.y0, y1, self.rtol, self.atol, where=self.where, ctl=self.ctl, law=self.law,
            workspace=self.workspace,
        )  # fmt: skip
        kernels.dense_eval(self.ys, self.times, self.y0, y1, k, tableau.dense.weight_rows, self.where, stop=0)
        return y1, k

    def run(self):
        """The host swaps pointers after it read whether the step was good."""
        while self.kernels.read(self.ctl).active:
            y1, k = self.attempt()
            state = self.kernels.read(self.ctl)
            if state.accept:
                self.step_times.append(state.last.t1)
                self.y0, self.k1 = y1, k[-1]
                if state.jump and state.active:
                    self.k1 = self.at(0.0, 1, self.y0)
        return self.kernels.read(self.ctl)

    def run_blindly(self, steps):
        """Nobody reads anything: every step commits if it was good, and those after the end do nothing."""
        for _ in range(steps):
            y1, k = self.attempt()
            self.kernels.commit([self.y0, self.k1], [y1, k[-1]], self.ctl)
        return self.kernels.read(self.ctl)


SOLVES = {
    "square": (lambda t, y: -y * y, lambda: torch.linspace(0.5, 2.0, 1003, dtype=torch.float64)),
    "linear": (
        lambda t, y: y @ torch.tensor([[-0.1, 1.0], [-1.0, -0.1]], dtype=y.dtype, device=y.device) + t,
        lambda: torch.tensor([[1.0, 0.0], [0.5, -2.0], [0.0, 0.1]], dtype=torch.float64),
    ),
}


@pytest.mark.parametrize(
    "problem, method, options, t",
    [
        ("square", "dopri5", {}, [0.0, 0.7, 2.0]),
        ("square", "dopri5", dict(first_step=1.5, controller="PI"), [0.0, 0.1, 0.2, 0.21, 3.0]),
        ("linear", "dopri5", {}, [0.0, 1.0, 4.0]),
        ("linear", "tsit5", dict(step_t=[0.3], jump_t=[1.1], max_step=0.5), [0.0, 1.0, 2.0]),
        ("linear", "bosh3", dict(controller="PID"), [1.0, 0.5, 0.0]),
        ("linear", "dopri8", {}, [0.0, 2.0]),
        ("linear", "adaptive_heun", dict(min_step=0.05), [0.0, 1.0]),
    ],
)
def test_a_whole_solve(kernels, problem, method, options, t):
    func, make_y0 = SOLVES[problem]
    y0, t = make_y0().to(kernels.device), torch.tensor(t, dtype=torch.float64)
    found = []
    for seed in (1, 2):
        kernels.configure(seed=seed)
        solve = DeviceSolve(kernels, func, y0, t, method, 1e-6, 1e-8, options)
        state = solve.run()
        found.append((solve.step_times, solve.ys))
    assert state.status == 0 and found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    options = {**options, "record_steps": True}
    expected = node_cuda.solve(func, y0, t, rtol=1e-6, atol=1e-8, method=method, options=options)
    sign = solve.problem.direction
    assert [sign * s for s in solve.step_times] == pytest.approx(expected.stats.step_times, rel=1e-7, abs=1e-9)
    assert state.rejected == expected.stats.rejected
    assert torch.allclose(solve.ys, expected.ys[1:], rtol=1e-9, atol=1e-12)


def test_a_solve_without_a_host(kernels):
    func, make_y0 = SOLVES["linear"]
    y0, t = make_y0().to(kernels.device), torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    with_host, without = (DeviceSolve(kernels, func, y0, t, "dopri5", 1e-6, 1e-8, {}) for _ in range(2))
    state = with_host.run()
    steps = state.accepted + state.rejected
    blind = without.run_blindly(steps + 3)
    assert torch.equal(with_host.ys, without.ys) and torch.equal(with_host.y0, without.y0)
    assert (blind.accepted, blind.rejected, blind.active) == (state.accepted, state.rejected, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_a_solve_in_other_dtypes(kernels, dtype):
    y0 = torch.linspace(0.5, 1.0, 77).to(kernels.device, dtype)
    t = torch.tensor([0.0, 1.0])
    rtol = 1e-2 if dtype in HALF else 1e-4
    solve = DeviceSolve(kernels, lambda t, y: -y, y0, t, "dopri5", rtol, rtol, {})
    assert solve.run().status == 0
    exact = y0.to(torch.complex128) * math.exp(-1)
    assert float((solve.ys[-1] - exact).abs().max()) < 3 * rtol


def test_failures_of_a_solve(kernels):
    t, y0 = torch.tensor([0.0, 2.0], dtype=torch.float64), torch.ones(40, dtype=torch.float64, device=kernels.device)
    blow_up = DeviceSolve(kernels, lambda t, y: y * y, y0, t, "dopri5", 1e-3, 1e-6, {}).run()
    assert Status(blow_up.status) in (Status.STEP_UNDERFLOW, Status.NON_FINITE)
    assert blow_up.next.t0 == pytest.approx(1.0, abs=0.05)
    few = DeviceSolve(kernels, lambda t, y: -y, y0, t, "dopri5", 1e-9, 1e-9, dict(max_num_steps=3)).run()
    assert Status(few.status) is Status.MAX_STEPS and few.accepted + few.rejected == 3


# --- launching -------------------------------------------------------------------------------------------------


def test_a_launch_goes_to_its_device_and_stream_and_names_what_failed(shim_library):
    kernels = Kernels(shim_library)
    y = torch.ones(5)
    arguments = (0, 5, y.data_ptr(), y.data_ptr(), 1, shim.array_of_pointers([y]), shim.doubles([1.0]))
    where = ctypes.byref(step(1.0))
    kernels.call("rk_stage", *arguments, where, None, on=shim.On(77, 1, 0))
    assert kernels.lib.shim_launch_device() == 1 and kernels.lib.shim_launch_stream() == 77
    assert kernels.lib.shim_device() == 0
    kernels.lib.shim_fail_next_launch(35)
    with pytest.raises(RuntimeError, match="rk_stage failed with error 35"):
        kernels.call("rk_stage", *arguments, where, None)
    with pytest.raises(RuntimeError, match="rk_stage failed with error 101"):
        kernels.call("rk_stage", *arguments, where, None, on=shim.On(None, 9, 0))
    with pytest.raises(RuntimeError, match="rk_stage failed with error 1"):
        kernels.call("rk_stage", 9, *arguments[1:], where, None)
    too_many = [(0, 1.0)] * 21
    with pytest.raises(RuntimeError, match="rk_stage failed"):
        kernels.rk_stage(y, [y], too_many, step(1.0))


def test_nothing_is_launched_for_nothing(shim_library):
    kernels = Kernels(shim_library)
    empty = torch.empty(0)
    before = kernels.lib.shim_launches()
    kernels.rk_stage(empty, [empty], [(0, 1.0)], step(1.0))
    kernels.rk_finish(empty, [empty], [(0, 1.0)], [(0, 1.0)], step(1.0))
    kernels.scaled_error(empty, None, 0.0, empty, empty, 1.0, 1.0)
    kernels.pack_adjoint(empty, None)
    kernels.jump(empty, empty, None)
    kernels.dense_eval(empty, torch.zeros(1), empty, empty, [], [], step(1.0), end=(1.0,))
    kernels.dense_adjoint([empty, empty], empty, empty, torch.zeros(1), [], step(1.0), end=(1.0,))
    Sums(kernels, []).accumulate([], 1.0, 0.0, 0, step(1.0))
    assert kernels.lib.shim_launches() == before


def test_csrc_knows_nothing_of_torch():
    allowed = {"cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "cmath", "cstddef", "cstdint", "type_traits"}
    own = {p.name for p in shim.CSRC.glob("*.h")}
    for path in (*shim.sources(), *(p for p in shim.CSRC.glob("*.h") if p.name != "check.h")):  # which the .cpp include
        includes = (line.split() for line in path.read_text().splitlines() if line.startswith("#include"))
        included = {name.strip('<>"') for _, name, *_ in includes}
        assert included <= allowed | own, path.name
        assert path.name == "launch.h" or "<<<" not in path.read_text(), f"{path.name} launches past the helper"


# --- sanitizers ------------------------------------------------------------------------------------------------

SANITIZERS = {
    "address,undefined": dict(ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0"),
    "thread": dict(TSAN_OPTIONS="halt_on_error=1"),
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels with")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_sanitizers_find_nothing(sanitizer, tmp_path):
    flags = ("-O0", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-DNODE_CUDA_FEW_TYPES")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    linked = subprocess.run(["g++", f"-fsanitize={sanitizer}", str(probe), "-o", str(tmp_path / "probe")])
    if linked.returncode:
        pytest.skip(f"this g++ has no {sanitizer} sanitizer")
    program = shim.compile_with_shim(tmp_path, *flags, main=shim.HERE / "driver.cpp")
    hashes = set()
    for seed, workers in ((0, 1), (1, 3)):
        # The thread sanitizer cannot map its shadow where addresses are too random.
        run = subprocess.run(
            ["setarch", "-R", str(program), str(seed), str(workers)],
            env={**os.environ, **SANITIZERS[sanitizer]},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-4000:]
        hashes.add(run.stdout)
    assert len(hashes) == 1
