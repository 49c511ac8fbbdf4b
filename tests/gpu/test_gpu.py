"""What only a GPU can show: streams, devices, launches, synchronisation and memory, of solves by the installed kernels.

Results that a CPU also gives are compared in float64. AGREE is relative to the largest number, and allows for a few
hundred sums that are rounded in another order. The work of a step is the difference between a short and a long solve,
so that the cost of the set-up cancels. Step sizes are powers of two, so that the number of steps is known.
"""

from __future__ import annotations

import gc
import json
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import F64, MLP, Counting, linspace
from shim.pretend_gpu import CUDA
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from waves import TIMES, Wave, assert_near, same_bits, state, weighted

import node_cuda
from node_cuda import odeint, odeint_adjoint, solve
from node_cuda.extension import loading as extension
from node_cuda.gradients.adjoint import mode as adjoint
from node_cuda.kernels import backend as dispatch
from node_cuda.kernels import self_check
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.check_record import Record
from node_cuda.kernels.control import DeviceStepControl
from node_cuda.kernels.fused import DTYPES, Fused
from node_cuda.kernels.norms import ErrorNorm

pytestmark = [
    pytest.mark.gpu,
    # torch warns of this when the mode is first used.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

LOOSE: dict[str, Any] = dict(rtol=1e-4, atol=1e-4)


def differentiated(
    func: nn.Module, y0: Tensor, device: torch.device = CUDA, t_on: torch.device | None = None, **solver: Any
) -> tuple[Tensor, ...]:
    """Return the solution by odeint_adjoint, and its gradients for y0, t and the parameters."""
    func = func.to(device)
    y0 = y0.to(device).requires_grad_()
    t = TIMES.clone().to(device if t_on is None else t_on).requires_grad_()
    ys = odeint_adjoint(func, y0, t, **{**LOOSE, **solver})
    return (ys.detach(), *torch.autograd.grad(weighted(ys), (y0, t, *func.parameters())))


@pytest.fixture
def solves(monkeypatch) -> list[Fused]:
    """Collect the arithmetic of every solve that uses the kernels, forward and backward."""
    found: list[Fused] = []
    make = Fused.__init__

    def spy(self, *args, **kwargs):
        make(self, *args, **kwargs)
        found.append(self)

    monkeypatch.setattr(Fused, "__init__", spy)
    return found


# ------------------------------------------------------------------ which path, and that it is right
def test_auto_uses_the_kernels_on_cuda():
    y0, norm = state().to(CUDA), ErrorNorm(1e-6, 1e-6)
    assert isinstance(dispatch.make_arithmetic("auto", y0, 1.0, norm, (0.0, 1.0)), Fused)
    assert type(dispatch.make_arithmetic("auto", y0.cpu(), 1.0, norm, (0.0, 1.0))) is Arithmetic


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_solve_without_gradients_agrees_with_the_cpu(solves, method):
    func, y0 = MLP(dim=8, timed=True), state()
    with torch.no_grad():
        with node_cuda.backend("reference"):
            expected = odeint(func, y0, TIMES, method=method, **LOOSE)
        with node_cuda.backend("auto"):
            actual = odeint(func.to(CUDA), y0.to(CUDA), TIMES, method=method, **LOOSE)
    assert len(solves) == 1 and solves[0].plan.launches > 0
    assert actual.device.type == CUDA.type
    assert_near((actual,), (expected,))


@pytest.mark.parametrize("times", [torch.device("cpu"), CUDA], ids=["times on the host", "times on the device"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_adjoint_gradients_for_state_times_and_parameters_agree_with_the_cpu(solves, method, times):
    with node_cuda.backend("reference"):
        expected = differentiated(MLP(dim=8, timed=True), state(), torch.device("cpu"), method=method)
    with node_cuda.backend("auto"):
        actual = differentiated(MLP(dim=8, timed=True), state(), CUDA, times, method=method)
    assert len(solves) == 2 and all(solve.plan.launches > 0 for solve in solves)
    assert [x.device.type for x in actual] == [CUDA.type, CUDA.type, times.type, *[CUDA.type] * (len(actual) - 3)]
    assert_near(actual, expected)


def test_training_by_the_adjoint_learns_and_agrees_with_the_reference():
    """Adam scales all gradients to the same size, also those that are hardly more than rounding. A step with an error
    close to the limit may be accepted on one side only. Both change the losses by about rtol, hence 1e-4."""

    def losses(backend: str) -> list[float]:
        func = MLP(hidden=16, dtype=torch.float32).to(CUDA)
        y0 = state(64, 2, torch.float32).to(CUDA)
        target = torch.stack([y0[:, 1], -y0[:, 0]], dim=1)
        optimizer = torch.optim.Adam(func.parameters(), lr=1e-2)
        found = []
        with node_cuda.backend(backend):
            for _ in range(20):
                optimizer.zero_grad()
                ys = odeint_adjoint(func, y0, torch.tensor([0.0, 1.0]), rtol=1e-5, atol=1e-5)
                loss = (ys[-1] - target).square().mean()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        return found

    actual = losses("fused")
    assert actual[-1] < 0.5 * actual[0]
    assert actual == pytest.approx(losses("reference"), rel=1e-4)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"])
def test_repeating_a_solve_gives_the_same_bits_and_gradients(dtype, tol):
    """Hundreds of blocks run, and finish in any order."""
    with node_cuda.backend("fused"):
        first, second = (differentiated(Wave(64, dtype), state(4096, 64, dtype), rtol=tol, atol=tol) for _ in "ab")
    assert all(x.isfinite().all() for x in first)
    assert same_bits(first, second)


# ------------------------------------------------------------------ streams
def test_solves_run_on_the_current_stream_and_give_the_bits_of_the_default_stream(solves):
    with node_cuda.backend("fused"):
        expected = differentiated(Wave(), state())
        default = {solve.on[0] for solve in solves}
        assert default == {torch.cuda.current_stream().cuda_stream}
        for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
            solves.clear()
            with torch.cuda.stream(stream):
                actual = differentiated(Wave(), state())
            stream.synchronize()
            assert same_bits(actual, expected)
            assert len(solves) == 2 and {solve.on[0] for solve in solves} == {stream.cuda_stream} != default


def test_solves_of_two_threads_on_two_streams_give_the_bits_of_one_thread(solves):
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    start = threading.Barrier(2, timeout=60)

    def several(stream):
        found = []
        with torch.cuda.stream(stream), node_cuda.backend("fused"):  # both apply to this thread only
            start.wait()
            for _ in range(5):
                found.append(differentiated(Wave(), state()))
            stream.synchronize()
        return found

    with node_cuda.backend("fused"):
        expected = differentiated(Wave(), state())
    torch.cuda.synchronize()
    solves.clear()
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(several, streams))
    assert all(same_bits(actual, expected) for found in results for actual in found)
    launched_on = [solve.on[0] for solve in solves]
    assert sorted(launched_on) == sorted([stream.cuda_stream for stream in streams] * 10)


def test_a_solve_waits_for_earlier_work_on_its_stream():
    """A fixed grid reads nothing back. On another stream the solve would end before the state is written."""
    stream, y0 = torch.cuda.Stream(), torch.zeros(1000, dtype=F64, device=CUDA)
    solver: dict[str, Any] = dict(method="rk4", options=dict(step_size=0.25))
    with torch.no_grad(), node_cuda.backend("fused"):
        expected = odeint(lambda t, y: -y, torch.ones_like(y0), TIMES, **solver)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
            y0.fill_(1.0)
            actual = odeint(lambda t, y: -y, y0, TIMES, **solver)
        stream.synchronize()
    assert torch.equal(actual, expected)


# ------------------------------------------------------------------ devices
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has fewer than two CUDA devices")
def test_a_solve_runs_on_the_device_of_its_state_and_keeps_the_current_device(solves):
    second = torch.device("cuda", 1)
    with torch.cuda.device(0), node_cuda.backend("fused"):
        expected = differentiated(Wave(), state(), torch.device("cuda", 0))
        solves.clear()
        actual = differentiated(Wave(), state(), second)
        assert torch.cuda.current_device() == 0
    assert all(x.device == second for x in actual)
    assert [solve.on for solve in solves] == [(torch.cuda.current_stream(second).cuda_stream, 1)] * 2
    assert_near(actual, expected)  # the bits may differ, because it may be another kind of GPU


# ------------------------------------------------------------------ work a step
def steps_of(number: int) -> dict[str, Any]:
    """Solve from 0 to 1 in this number of steps (a power of two), all of them accepted."""
    return dict(rtol=1e3, atol=1e3, options=dict(first_step=1 / number, max_step=1 / number))


def inside_steps(number: int) -> Tensor:
    """Return the start, and one time inside every step."""
    return torch.cat([torch.zeros(1, dtype=F64), (torch.arange(number, dtype=F64) + 0.5) / number])


def trace(call: Callable[[], Any], folder: Path) -> list[dict[str, Any]]:
    """Return what the GPU did in the second of two calls: kernels, copies and fills, as named by the profiler."""
    if ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        pytest.skip("torch.profiler cannot observe the GPU here")
    call()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the profiler, which differ between versions
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
            time.sleep(0.05)  # the clocks of host and device differ, so no work near the edges
            call()
            torch.cuda.synchronize()
            time.sleep(0.05)
        profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text(errors="replace"), strict=False)["traceEvents"]
    found = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not found:
        pytest.skip("torch.profiler sees no kernels here (CUPTI may be missing or forbidden)")
    return found


def counts(events: list[dict[str, Any]]) -> dict[str, int]:
    kernels = [event["name"] for event in events if event["cat"] == "kernel"]
    copies = [event["name"] for event in events if event["cat"] == "gpu_memcpy"]
    ours = sum("node_cuda" in name for name in kernels)
    return {
        "ours": ours,
        "other kernels": len(kernels) - ours,
        "to the host": sum("DtoH" in name for name in copies),
        "to the device": sum("HtoD" in name for name in copies),
        "other copies and fills": len(events) - len(kernels) - sum("DtoH" in n or "HtoD" in n for n in copies),
    }


@pytest.mark.parametrize("outputs, launches", [(False, 7), (True, 8)], ids=["no outputs", "an output in every step"])
def test_a_dopri5_step_is_seven_launches_and_eight_with_an_output_and_one_copy_to_the_host(tmp_path, outputs, launches):
    """The field is one kernel, and a step evaluates it six times."""
    y0 = state(dtype=torch.float32).to(CUDA)

    def work(number: int) -> dict[str, int]:
        func = Counting(lambda t, y: torch.neg(y))
        t = inside_steps(number) if outputs else linspace(0.0, 1.0, 2)

        def call():
            func.nfe = 0
            with torch.no_grad(), node_cuda.backend("fused"):
                odeint(func, y0, t, **steps_of(number))

        found = counts(trace(call, tmp_path))
        assert func.nfe == 1 + 6 * number
        return found

    few, many = work(8), work(32)
    assert {name: (many[name] - few[name]) / 24 for name in few} == {
        "ours": launches,
        "other kernels": 6,
        "to the host": 1,
        "to the device": 0,
        "other copies and fills": 0,
    }


def test_all_work_of_a_solve_and_its_backward_pass_is_on_the_current_stream(tmp_path):
    def streams(stream) -> set[int]:
        def call():
            with torch.cuda.stream(stream), node_cuda.backend("fused"):
                differentiated(Wave(), state())

        return {event["args"]["stream"] for event in trace(call, tmp_path)}

    default, other = streams(torch.cuda.default_stream()), streams(torch.cuda.Stream())
    assert len(default) == len(other) == 1
    assert default != other


# ------------------------------------------------------------------ synchronisation
ERROR = 2  # the value of torch.cuda.get_sync_debug_mode in which a synchronisation raises


@pytest.fixture
def reads(monkeypatch):
    """Collect torch's mode at every read of the step control. This read is the only synchronisation of a step that
    never raises.

    A backward pass has another read for dL/dt0, which does not belong to a step.
    """
    found: list[int] = []
    read, ignores_time = DeviceStepControl.read, adjoint.ignores_time

    def unwatched(work, *args):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return work(*args)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def allowed(self):
        found.append(torch.cuda.get_sync_debug_mode())
        return unwatched(read, self)

    monkeypatch.setattr(DeviceStepControl, "read", allowed)
    monkeypatch.setattr(adjoint, "ignores_time", lambda *args: unwatched(ignores_time, *args))
    yield found
    torch.cuda.set_sync_debug_mode("default")


def watch(func: Counting, last: int | None = None) -> None:
    """Reset the counts, and let the third evaluation switch the mode on: earlier ones may belong to the set-up of a
    solve.

    `last` switches the mode off, because a fixed grid checks for NaN at the end.
    """

    def before(t, y):
        if func.nfe == 3:
            torch.cuda.set_sync_debug_mode("error")
        if func.nfe == last:
            torch.cuda.set_sync_debug_mode("default")

    func.nfe = 0
    func.before = before


class ControllerSnapshot(Wave):
    """Reads a number back in every evaluation."""

    def forward(self, t, y):
        return super().forward(t, y) * float(y.sum())


def test_the_mode_finds_a_synchronisation(reads):
    func, y0 = Counting(ControllerSnapshot().to(CUDA)), state().to(CUDA)
    watch(func)
    with torch.no_grad(), node_cuda.backend("fused"), pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        odeint(func, y0, TIMES, **LOOSE)
    assert func.nfe == 3


@pytest.mark.parametrize("dense", ["default", "accurate"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_a_step_synchronises_only_to_read_the_step_control(reads, method, dense):
    func, y0 = Counting(Wave().to(CUDA)), state().to(CUDA)
    watch(func)
    t = torch.cat([linspace(0.0, 0.1, 8), linspace(0.9, 3.0, 4)])
    with torch.no_grad(), node_cuda.backend("fused"):
        stats = solve(func, y0, t, rtol=1e-5, atol=1e-5, method=method, options=dict(dense=dense)).stats
        mode = torch.cuda.get_sync_debug_mode()
    assert mode == ERROR, "the watch was off before the end"
    assert reads.count(ERROR) == stats.accepted + stats.rejected > 3


@pytest.mark.parametrize("norm", [None, "seminorm"])
def test_a_step_of_the_backward_pass_synchronises_only_to_read_the_step_control(reads, norm):
    """The solve has several outputs, and gradients for y0, t and the parameters. The times are on the device: otherwise
    their gradients would be copied to the host."""
    func, y0 = Counting(Wave().to(CUDA)), state().to(CUDA).requires_grad_()
    t = TIMES.to(CUDA, copy=True).requires_grad_()
    options = None if norm is None else dict(norm=norm)
    with node_cuda.backend("fused"):
        loss = weighted(odeint_adjoint(func, y0, t, **LOOSE, adjoint_options=options))
        watch(func)
        gradients = torch.autograd.grad(loss, (y0, t, *func.parameters()))
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
    assert mode == ERROR, "the watch was off before the end"
    # A step has at least six evaluations, and an interval between outputs at least one step.
    assert len(TIMES) - 1 <= reads.count(ERROR) <= func.nfe / 6
    assert all(x.isfinite().all() for x in gradients)


def test_a_step_on_a_fixed_grid_never_synchronises(reads):
    func, y0 = Counting(Wave().to(CUDA)), state().to(CUDA)
    watch(func, last=4 * 16)
    with torch.no_grad(), node_cuda.backend("fused"):
        odeint(func, y0, TIMES, method="rk4", options=dict(step_size=1 / 16))
    assert func.nfe == 4 * 16
    assert not reads


def test_a_step_on_a_fixed_grid_never_synchronises_in_the_backward_pass(reads):
    """Only between two outputs: at each output a new grid is made, which reads the times."""
    func, y0 = Counting(Wave().to(CUDA)), state().to(CUDA).requires_grad_()
    options = dict(step_size=1 / 16)
    with node_cuda.backend("fused"):
        loss = weighted(odeint_adjoint(func, y0, linspace(0.0, 1.0, 2), method="rk4", options=options))
        watch(func, last=4 * 16)
        torch.autograd.grad(loss, (y0, *func.parameters()))
    assert func.nfe == 4 * 16
    assert not reads


# ------------------------------------------------------------------ memory
def allocations() -> int:
    """Return the number of allocations by torch's allocator since the process began."""
    return torch.cuda.memory_stats()["allocation.all.allocated"]


def forward_allocations(number: int) -> int:
    y0, func = state().to(CUDA), Wave().to(CUDA)
    with torch.no_grad(), node_cuda.backend("fused"):
        before = allocations()
        odeint(func, y0, inside_steps(number), **steps_of(number))
        return allocations() - before


def backward_allocations(number: int) -> int:
    y0, func = state().to(CUDA).requires_grad_(), Wave().to(CUDA)
    with node_cuda.backend("fused"):
        loss = weighted(odeint_adjoint(func, y0, linspace(0.0, 1.0, 2), **steps_of(number)))
        before = allocations()
        loss.backward()
        return allocations() - before


@pytest.mark.parametrize("count", [forward_allocations, backward_allocations], ids=["forward", "adjoint"])
def test_every_step_allocates_equally_often(count):
    count(8)  # memory that is allocated once in a process
    few, some, many = count(8), count(16), count(32)
    assert some > few, "no allocation was counted"
    assert (some - few) / 8 == (many - some) / 16


def test_the_peak_of_memory_of_the_adjoint_does_not_depend_on_the_number_of_steps():
    """A tensor that a step does not free would show. Half a state is allowed for the allocator's rounding."""
    y0 = state(4096, 64)

    def peak(number: int) -> int:
        func, start = Wave(64).to(CUDA), y0.to(CUDA).requires_grad_()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with node_cuda.backend("fused"):
            weighted(odeint_adjoint(func, start, linspace(0.0, 1.0, 2), **steps_of(number))).backward()
        return torch.cuda.max_memory_allocated() - before

    peak(32)
    few, many = peak(32), peak(512)
    assert few > y0.nbytes
    assert many <= few + y0.nbytes // 2


# ------------------------------------------------------------------ the first use
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_pass_their_self_check_on_every_gpu_in_100_ms(monkeypatch, tmp_path, dtype):
    monkeypatch.setenv("NODE_CUDA_CACHE", str(tmp_path))
    for device in (torch.device("cuda", index) for index in range(torch.cuda.device_count())):
        module = extension.kernels(device)
        assert module is not None
        record = Record(self_check.facts(module, device))
        seconds = []
        for _ in range(2):  # the first run also loads the kernels
            start = time.perf_counter()
            found = self_check.outcomes(module, device, dtype, record)
            seconds.append(time.perf_counter() - start)
            assert not [outcome for outcome in found if outcome.state != self_check.PASSED]
        assert min(seconds) < 0.1, seconds


@pytest.mark.parametrize("method, options", [("dopri5", {}), ("rk4", dict(step_size=0.1))])
def test_the_discrete_adjoint_gives_the_gradient_of_times_that_are_on_the_host(method, options):
    """The cotangents of the grid are computed on the device and copied to the device of t."""

    def gradients(device):
        y0 = torch.tensor([1.0, 2.0], dtype=torch.float64, device=device, requires_grad=True)
        t = torch.linspace(0.0, 1.0, 4, dtype=torch.float64, requires_grad=True)
        ys = solve(
            lambda t, y: -y * torch.cos(t), y0, t, method=method, options=options, gradient="discrete",
            adjoint_params=(),
        ).ys  # fmt: skip
        return [g.cpu() for g in torch.autograd.grad(ys.square().sum(), (y0, t))]

    for actual, expected in zip(gradients(CUDA), gradients("cpu"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)  # steps may differ in their last bits
