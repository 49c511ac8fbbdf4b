"""The kernels of csrc/, as solves call them, compared with kernels.reference: on the CPU through the shim, and on a
GPU.

The rows of the self-check compare the result of every primitive, here in sizes around a warp, a block and the largest
number of blocks, and at any alignment. The other tests check properties that no row shows.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from shim import library as shim
from shim.pretend_gpu import pretending

from node_cuda.controllers import CONTROLLERS, Controller
from node_cuda.kernels import backend as dispatch
from node_cuda.kernels import reference
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.check_rows import ROWS, Case, Side, difference, sides
from node_cuda.kernels.control import DeviceStepControl
from node_cuda.kernels.fused import DTYPES, Fused, Launch
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.stage_times import HERE, JUST_AFTER, JUST_BEFORE
from node_cuda.kernels.step_control import ControllerSnapshot, ControlSpec, StepControl
from node_cuda.options import AdaptiveOptions
from node_cuda.status import Status

THREADS = 256
F64 = torch.float64
NORM = ErrorNorm(1e-3, 1e-3)
LAW = Controller(keep=True).law(5, AdaptiveOptions())


class Kernels(NamedTuple):
    """The compiled module and its device. shuffle: changes the order of blocks, if that is possible."""

    module: ModuleType
    on: Launch
    device: torch.device
    shuffle: Callable[[int], None]

    def arithmetic(self, y0, norm=NORM, times=(0.0, 1.0), direction=1.0) -> Fused:
        return Fused(self.module, self.on, y0, direction, norm, times)

    def numbers(self, n, dtype=torch.float32):
        """Return random numbers of size 1."""
        x = torch.randn(n, dtype=torch.complex128 if dtype.is_complex else F64)
        return x.to(self.device, dtype)

    def doubles(self, *values):
        return torch.tensor(values, dtype=F64, device=self.device)


@pytest.fixture(params=["shim", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request):
    if request.param == "gpu" and not pretending():
        device = torch.device("cuda")
        return Kernels(*dispatch._kernels(device), device, lambda seed: None)
    shuffle = request.getfixturevalue("shim_controls").configure
    request.addfinalizer(shuffle)
    return Kernels(request.getfixturevalue("shim_module"), (0, 0), torch.device("cpu"), shuffle)


def control_of(a, law=LAW, **given) -> DeviceStepControl:
    return a.control(ControlSpec(law, 5, **given))


def unit(a, h=1.0):
    """Return a step from 0."""
    return a.interval(0.0, h, h)


# --- the results of the primitives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rows_of_the_self_check_pass_around_warps_and_blocks_and_at_any_alignment(kernels, dtype, monkeypatch):
    block = THREADS * 16 // dtype.itemsize
    sizes = (31, 32, 33, block - 1, block, block + 1, 3 * block + 5, 6 * block + 7, 6 * block + 8)
    rows = [row for row in ROWS if len(row.cases) > 1]
    pair = sides(kernels.module, kernels.on, kernels.device, dtype)
    with torch.no_grad():
        for row in rows:
            assert difference(row._replace(cases=[*(Case(n, 0) for n in sizes), Case(33, 1)]), *pair) is None
        # Tensors with other alignments than the tensors next to them.
        tensor = Side.tensor
        monkeypatch.setattr(Side, "tensor", lambda s, case, of: tensor(s, case._replace(shift=s.taken % 3), of))
        for row in rows:
            assert difference(row._replace(cases=[Case(33, 0), Case(block + 1, 0)]), *pair) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_coefficient_is_never_read(kernels, dtype):
    y0, *k = (kernels.numbers(300, dtype) for _ in range(4))
    k[1].fill_(math.inf)
    a = kernels.arithmetic(y0)
    at, finite, infinite = unit(a, 0.1), [(0, 0.5), (2, 0.5)], [(1, 1.0)]
    (t,) = a.slots(at, (0.5,), HERE)
    with torch.no_grad():
        y1, error = a.rk_finish(a.last_stage(finite, infinite, 1.0, HERE), at, y0, k, t)
        assert bool(torch.isfinite(y1).all()) and error is not None and not bool(torch.isfinite(error).any())
        y1, error = a.rk_finish(a.last_stage(infinite, finite, 1.0, HERE), at, y0, k, t)
        assert not bool(torch.isfinite(y1).any()) and error is not None and bool(torch.isfinite(error).all())
        found = a.rk_stage(a.stage(finite, 0.5, HERE), at, y0, k, t), a.combine(y0, k, [(1, 0.0), *finite], 0.1)
        for x in (*found, a.adjoint_stage(y0, k, [0.5, 0.0, 0.5], at)):
            assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("dtype", list(DTYPES)[:4], ids=str)
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_stage_times_agree_with_the_clock(kernels, dtype, direction):
    y0 = kernels.numbers(3, dtype)
    a = kernels.arithmetic(y0, direction=direction)
    for t0, h in [(0.0, 0.1), (0.9, 0.1), (-1.0, 1.0), (-0.3, 0.05), (3.0, 1.0), (1 / 3, 1 / 7), (100.0, 28.0)]:
        at = a.interval(t0, t0 + h, h)
        inner, end = (a.slots(at, (node,), JUST_BEFORE)[0] for node in (0.3, 1.0))
        with torch.no_grad():
            a.rk_stage(a.stage([(0, 1.0)], 0.3, JUST_BEFORE), at, y0, [y0], inner)
            a.rk_finish(a.last_stage([(0, 1.0)], [(0, 1.0)], 1.0, JUST_BEFORE), at, y0, [y0], end)
        found = [inner, end, *a.times(at, (0.0, 1.0), HERE), *a.times(at, (0.0, 1.0), JUST_AFTER)]
        plain = [Arithmetic.times(a, at, nodes, side) for nodes, side in
                 (((0.3, 1.0), JUST_BEFORE), ((0.0, 1.0), HERE), ((0.0, 1.0), JUST_AFTER))]  # fmt: skip
        assert [x.item() for x in found] == [x.item() for times in plain for x in times], (t0, h)


# --- norms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["error", "last", "y0", "y1"])
def test_an_error_that_is_not_finite_reaches_the_ratio(kernels, bad, where):
    n = 5000
    tensors = {name: kernels.numbers(n) for name in ("error", "last", "y0", "y1")}
    tensors[where][n - 7] = bad
    norm = ErrorNorm(1e-3, 1e-3, (n - 100, 100))
    a = kernels.arithmetic(tensors["y0"], norm)
    control, given = control_of(a), (unit(a), tensors["error"], (tensors["last"], 0.5), tensors["y0"], tensors["y1"])
    control.start(0.0, 1.0)
    a.judge(*given, None)
    # An infinite state with a finite error has an infinite scale and a quotient of zero: the reference gives the same.
    found = math.isfinite(control.read().ratio), math.isfinite(a.error_ratio(*given))
    assert found == 2 * (where in ("y0", "y1") and bad == math.inf,)


def test_the_norm_of_sums_includes_every_tensor(kernels):
    for i, bad in itertools.product(range(3), (1e3, math.nan)):
        x = [torch.zeros(n, device=kernels.device) for n in (10, 5000, 3)]
        sums = kernels.arithmetic(x[0]).sums(x, with_error=True)
        x[i][-1] = bad
        sums.begin()
        sums.add(x, 1.0, 1.0)
        ratio = sums.device_ratio(ErrorNorm(0.0, 1.0)).item()
        assert math.isnan(ratio) if math.isnan(bad) else ratio == pytest.approx(bad / len(x[i]) ** 0.5, rel=1e-5)


def test_bits_do_not_depend_on_block_order_alignment_or_a_used_workspace(kernels):
    n = 20_000
    tensors, seen = [kernels.numbers(n) for _ in range(4)], set()
    for seed, offset in itertools.product((0, 1, 2, 3), (0, 1, 3)):
        kernels.shuffle(seed)
        error, last, y0, y1 = (torch.empty(n + offset, device=kernels.device)[offset:].copy_(x) for x in tensors)
        a = kernels.arithmetic(y0, ErrorNorm(1e-3, 1e-3, (n // 3, n - n // 3)))
        control = control_of(a)
        for _ in range(2):
            control.start(0.0, None)
            control.initial_norms(y0, y1)
            control.initial_change(y0, y1, last)
            begun, sums = control.read(), a.sums([y0, y1], with_error=True)
            a.judge(unit(a), error, (last, 0.3), y0, y1, None)
            sums.begin()
            sums.add([last, error], 0.5, 0.25)
            found = (
                a.real_dot(y0, y1).item(),
                a.combine(y0, [y1, last], [(0, 0.1), (1, 0.2)], 0.1).double().sum().item(),
            )
            of_sums = sums.device_ratio(ErrorNorm(1e-3, 1e-3)).item()
            seen.add((begun.norm_0, begun.norm_1, begun.proposal, control.read().ratio, of_sums, *found))
    assert len(seen) == 1


# --- dense output ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_end", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 6, 7, 8, 20])
def test_dense_adjoint_is_the_transpose_of_dense_eval_for_many_outputs(kernels, count, with_end):
    """More outputs than the kernels handle at once, and more rows."""
    n, m = 37, 150
    y0, y1, lam, *k = (kernels.numbers(n, F64) for _ in range(3 + count))
    times = [0.0, *(i / m for i in range(1, m + 1))]
    a = kernels.arithmetic(y0, times=times, direction=-1.0)
    polynomials = a.polynomials([(j, (1.0, -2.0 - j, 1.0)) for j in range(count)], (0.0, 3.0, -2.0) if with_end else ())
    at, g = a.interval(0.0, 1.0, 2.0), kernels.numbers(m * n, F64).view(m, n)
    ys, expected = (torch.full((m + 2, n), 7.0, dtype=F64, device=kernels.device) for _ in range(2))
    a.dense_outputs(polynomials, at, y0, y1, k, 1, ys[1:-1])
    Arithmetic.dense_outputs(a, polynomials, at, y0, y1, k, 1, expected[1:-1])
    # Sums of up to 20 terms, which grow with j.
    torch.testing.assert_close(ys, expected, rtol=1e-13, atol=1e-12)
    assert torch.equal(ys[-2], y1)  # the end of the step
    found, plain = (of(polynomials, at, lam, 1, g) for of in (a.dense_adjoint, super(Fused, a).dense_adjoint))
    for got, want in zip((found.lam, found.start, *found.extra), (plain.lam, plain.start, *plain.extra), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-11)
    pairs = zip((found.lam - lam, found.start, *found.extra), (y1, y0, *k), strict=True)
    assert sum(float(x @ y) for x, y in pairs) == pytest.approx(float((g * ys[1:-1]).sum()), rel=1e-10)


def test_dense_adjoint_never_reads_a_zero_coefficient(kernels):
    """The output at the end of a step is y1 itself. Without P no other output depends on y1."""
    lam = kernels.numbers(300)
    a = kernels.arithmetic(lam, times=(0.0, 0.5, 1.0))
    polynomials = a.polynomials([(0, (1.0, 0.0)), (1, (1.0, -2.0))])
    for o, finite in ((1, (False, True, True, True)), (0, (True, False, False, True))):
        g = torch.zeros(2, 300, device=kernels.device)
        g[o].fill_(math.inf)
        found = a.dense_adjoint(polynomials, unit(a), lam, 1, g)
        assert tuple(bool(torch.isfinite(x).all()) for x in (found.lam, found.start, *found.extra)) == finite


# --- step control ----------------------------------------------------------------------------------------------


def scenario(seed):
    """Return options, times and ratios of a solve that uses every rule of step control."""
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
def test_step_control_is_that_of_the_host_call_by_call(kernels, seed):
    options, times, ratios, stops = scenario(seed)
    sign = -1.0 if seed % 3 == 0 else 1.0
    law = CONTROLLERS[options["controller"]].law(
        5, AdaptiveOptions(min_step=options["min_step"], max_step=options["max_step"])
    )
    a = kernels.arithmetic(kernels.numbers(1), times=times, direction=sign)
    tstops, jumps = sorted(options["step_t"] + options["jump_t"]), frozenset(options["jump_t"])
    spec = ControlSpec(law, 5, options["max_num_steps"], tstops, jumps, stops, ends=True)
    device, host = a.control(spec), StepControl(spec, a.norm, times[1:])
    # Of what the host has in another form, and of waiting at outputs, which it does not do.
    other = "history", "paused", "gave_up", "never_began"
    names = [name for name in ControllerSnapshot.__annotations__ if name not in other]
    tolerance = 0.0 if kernels.device.type == "cpu" else 1e-12  # a GPU has another pow

    def agree():
        now = device.read()
        pairs = {name: (float(getattr(now, name)), float(getattr(host.read(), name))) for name in names}
        pairs["history"], pairs["before"] = zip(now.history, host.history, strict=True)
        pairs["dt"] = now.dt, sign * host.h
        for name, (found, expected) in pairs.items():
            assert found == pytest.approx(expected, rel=tolerance, abs=0.0, nan_ok=True), name

    for control in (device, host):
        control.start(0.0, options["first_step"])
    agree()
    for ratio in ratios:
        if not host.active:
            break
        device.judge_ratio(kernels.doubles(0.0, ratio))
        host.judge_ratio(ratio)
        agree()


def test_a_control_that_has_ended_changes_nothing(kernels):
    y = kernels.numbers(100)
    a = kernels.arithmetic(y, times=(0.0, 0.5))
    control, at = control_of(a, ends=True), a.current()
    control.start(0.0, 1.0)
    control.judge_ratio(kernels.doubles(0.5))
    before = control.read()
    assert before.accept and not before.active and (before.first_output, before.next_output) == (0, 1)
    for _ in range(2):
        a.judge(at, y, None, y, y, None)
        after = control.read()
        assert not after.accept and after.first_output == after.next_output == 1 and after.accepted == 1
    z = torch.zeros_like(y)
    a.plan.rk_stage(a.stage([(0, 1.0)], 0.5, HERE).native, at.native, z.data_ptr(), y.data_ptr(), [y.data_ptr()], 0)
    assert not z.any()


def test_the_starting_step_agrees_with_the_host(kernels):
    y0, f0, f1 = (kernels.numbers(999, F64) for _ in range(3))
    norm = ErrorNorm(1e-3, 1e-6)
    a = kernels.arithmetic(y0, norm, direction=-1.0)
    control = control_of(a)
    for scale in (1.0, 1e-7, 0.0):
        y, f, g = scale * y0, scale * f0, scale * f1
        control.start(2.0, None)
        control.initial_norms(y, f)
        probe = control.read()
        d0, d1 = probe.norm_0, probe.norm_1
        assert (d0, d1) == pytest.approx(tuple(reference.initial_norms(y, f, norm)), rel=1e-12)
        h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        assert (probe.t0, probe.t1, probe.h, probe.dt) == (2.0, 2.0 + h0, h0, -h0)
        control.initial_change(y, f, g)
        d2 = reference.initial_change(y, f, g, norm) / h0
        h1 = max(1e-6, h0 * 1e-3) if d1 <= 1e-15 and d2 <= 1e-15 else (0.01 / max(d1, d2)) ** (1.0 / 5)
        assert control.read().proposal == pytest.approx(min(100 * h0, h1), rel=1e-12)
    y0[3] = math.nan
    control.start(2.0, None)
    control.initial_norms(y0, f0)
    assert control.read().status == Status.NON_FINITE.value and not control.read().active


# --- launching -------------------------------------------------------------------------------------------------


def test_a_launch_goes_to_its_device_and_stream_and_names_what_failed(shim_module, shim_controls):
    y = torch.ones(5)
    k, weights, where = (ctypes.c_void_p * 21)(*[y.data_ptr()] * 21), (ctypes.c_double * 21)(*[1.0] * 21), step(1.0)

    def rk_stage(on=(0, 0), dtype=0, count=1):
        shim_module.rk_stage(dtype, 5, y.data_ptr(), y.data_ptr(), count, ctypes.addressof(k),
                             ctypes.addressof(weights), ctypes.addressof(where), 0, on)  # fmt: skip

    rk_stage(on=(77, 1))
    assert shim_controls.lib.shim_launch_device() == 1 and shim_controls.lib.shim_launch_stream() == 77
    assert shim_controls.lib.shim_device() == 0
    shim_controls.lib.shim_fail_next_launch(35)
    for wrong in ({}, dict(on=(0, 9)), dict(dtype=9), dict(count=21)):
        with pytest.raises(RuntimeError, match="rk_stage failed"):
            rk_stage(**wrong)
    with pytest.raises(RuntimeError, match="dense_adjoint failed"):  # in half precision
        shim_module.dense_adjoint(2, 5, *[y.data_ptr()] * 2, 0, *[y.data_ptr()] * 3, 0, 1, 0, 1, 0,
                                  ctypes.addressof(weights), ctypes.addressof(where), (0, 0))  # fmt: skip


def step(h: float):
    """struct StepRef of csrc/launchers.h: a step from 0 by value."""
    return ctypes.create_string_buffer(struct.pack("=q5d", 0, 0.0, h, h, h, 1.0))


def test_without_elements_nothing_is_launched(shim_module, shim_controls):
    x = torch.empty(0)
    a = Fused(shim_module, (0, 0), x, 1.0, ErrorNorm(1.0, 1.0), (0.0, 1.0))
    at, stage, before = unit(a), a.last_stage([(0, 1.0)], [(0, 1.0)], 1.0, HERE), shim_controls.lib.shim_launches()
    a.plan.rk_stage(stage.native, at.native, 0, 0, [0], 0)
    a.rk_finish(stage, at, x, [x], None)
    a.scaled_error(at, x, None, x, x)
    a.pack_adjoint(x, None)
    a.combine(x, [x], [(0, 1.0)], 1.0)
    a.adjoint_stage(None, [x], [1.0], at)
    a.dense_outputs(a.polynomials([], (1.0,)), at, x, x, [], 1, torch.empty(1, 0))
    a.dense_adjoint(a.polynomials([], (1.0,)), at, x, 1, torch.empty(1, 0))
    a.sums([], with_error=False).add([], 1.0, 0.0)
    assert shim_controls.lib.shim_launches() == before


def test_every_launcher_is_bound(shim_module):
    declared = re.findall(r"^int launch_(\w+)\(", (shim.CSRC / "launchers.h").read_text(), re.MULTILINE)
    assert len(declared) > 10
    assert set(declared) <= set(dir(shim_module))


def test_the_kernels_do_not_include_torch():
    allowed = {"cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "cmath", "cstddef", "cstdint", "type_traits"}
    headers = sorted(shim.CSRC.rglob("*.h"))
    own = {str(p.relative_to(shim.CSRC)) for p in headers}
    for path in (*shim.sources(), *(p for p in headers if p.name != "check.h")):  # headers that the .cpp include
        includes = (line.split() for line in path.read_text().splitlines() if line.startswith("#include"))
        included = {name.strip('<>"') for _, name, *_ in includes}
        assert included <= allowed | own, path.name
        assert path.name == "launch.h" or "<<<" not in path.read_text(), f"{path.name} launches past the helper"


# --- sanitizers ------------------------------------------------------------------------------------------------

ASAN = dict(ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0")
SANITIZERS = [
    pytest.param("address,undefined", ASAN, id="address"),
    pytest.param("thread", dict(TSAN_OPTIONS="halt_on_error=1"), id="thread", marks=pytest.mark.builds),
]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels with")
@pytest.mark.parametrize(("sanitizer", "options"), SANITIZERS)
def test_the_sanitizers_find_nothing(sanitizer, options, tmp_path):
    flags = ("-O0", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-DNODE_CUDA_FEW_TYPES")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    linked = subprocess.run(["g++", f"-fsanitize={sanitizer}", str(probe), "-o", str(tmp_path / "probe")])
    if linked.returncode:
        pytest.skip(f"this g++ has no {sanitizer} sanitizer")
    version = subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout
    program = shim.built(
        sanitizer.replace(",", "-"),
        lambda folder: shim.compile_with_shim(folder, *flags, main=shim.HERE / "driver.cpp"),
        f"{flags} {version}",
    )
    hashes = set()
    for seed, workers in ((0, 1), (1, 3)):
        # The thread sanitizer cannot map its shadow memory if addresses are too random.
        run = subprocess.run(
            ["setarch", "-R", str(program), str(seed), str(workers)],
            env={**os.environ, **options},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-4000:]
        hashes.add(run.stdout)
    assert len(hashes) == 1
