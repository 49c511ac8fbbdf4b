"""A step loop without the host: csrc/graphs/graphs.cpp through the shim, on captured steps of the real kernels.

The shim's runtime refuses the calls that CUDA refuses, complains about undefined behaviour, and runs a graph in any
order that its dependencies allow. Only a GPU can show what a GPU does with such a graph.
"""

from __future__ import annotations

import gc
import math
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from shim import library
from shim.graphs import GraphCache, numbers_of
from torch import Tensor

import node_cuda
from node_cuda.extension import build
from node_cuda.kernels import backend as dispatch
from node_cuda.kernels.fused import Fused
from node_cuda.kernels.stage_times import JUST_BEFORE, Interval
from node_cuda.loop.assemble import arithmetic_of
from node_cuda.loop.step_control import AdaptiveSteps
from node_cuda.methods.interpolation import dense_of
from node_cuda.methods.tableaus import TABLEAUS
from node_cuda.options import AdaptiveOptions
from node_cuda.problem.problem import make_problem
from node_cuda.solution import Solution, Stats
from node_cuda.status import Status

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels with")

STREAM, DEVICE = 77, 1
ON = (STREAM, DEVICE)
INVALID_VALUE, OUT_OF_MEMORY = 1, 2


@pytest.fixture(scope="session")
def module(shim_library):
    return library.import_module(shim_library)


@pytest.fixture
def shim(shim_library, module, monkeypatch) -> Iterator[GraphCache]:
    """The controls of the shim's runtime. A test fails if it leaves objects, or if its behaviour is undefined in
    CUDA."""
    monkeypatch.setattr(dispatch, "_has_kernels", lambda device: device.type == "cpu")
    monkeypatch.setattr(dispatch, "_kernels", lambda device: (module, ON))
    graphs = GraphCache(shim_library)
    graphs.reset()
    before = graphs.lib.shim_leaks()
    yield graphs
    gc.collect()
    found = graphs.lib.shim_complaints().decode(), graphs.lib.shim_leaks() - before, graphs.lib.shim_device()
    graphs.reset()
    assert found == ("", 0, 0), "complaints, objects that were not freed, the current device"


class CapturedSolve:
    """One attempted step as a graph, with all of its memory. The start comes from the host loop."""

    def __init__(
        self, shim: GraphCache, y0: Tensor, t: Tensor, method: str = "dopri5", tol: float = 1e-5, **options: Any
    ) -> None:
        self.shim, self.tableau = shim, TABLEAUS[method]
        problem = make_problem(self.field, y0, t, tol, tol)
        fused = arithmetic_of(problem)
        assert isinstance(fused, Fused)
        self.fused, self.problem = fused, problem
        self.selector = AdaptiveSteps(problem, fused, self.tableau.order, AdaptiveOptions(**options), Stats())
        self.ys = torch.full((len(t), *y0.shape), math.nan, dtype=y0.dtype)
        self.y0, self.k1 = torch.empty_like(y0), torch.empty_like(y0)
        self.start()
        with shim.capturing(STREAM) as graphs:
            self.held = self.attempt()
        self.graph = graphs[0]

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        f = torch.empty_like(y)
        self.shim.field(f, t, y, library.Launch(STREAM, DEVICE, 0))
        return f

    @property
    def control(self):
        return self.selector.control

    @property
    def ctl(self) -> int:
        return self.control._ctl.data_ptr()

    def start(self) -> None:
        t0 = self.problem.times[0]
        self.ys.fill_(math.nan)
        self.ys[0] = self.problem.y0
        self.y0.copy_(self.problem.y0)
        start = self.fused.interval(t0, t0, 0.0)
        self.k1.copy_(self.field(self.fused.times(start, [0.0], 0)[0], self.y0))
        self.selector.start(t0, self.y0, self.k1)

    def attempt(self) -> list[Any]:
        """Take a step at fixed addresses. Returns the objects that must exist as long as its graph."""
        fused, tableau, k = self.fused, self.tableau, [self.k1]
        at = Interval(math.nan, math.nan, math.nan, math.nan, math.nan, fused.plan.current())
        nodes, known = tableau.nodes[1:], tableau.stages - tableau.fsal
        times, z = fused.slots(at, nodes, JUST_BEFORE), []
        for i in range(1, known):
            z.append(
                fused.rk_stage(fused.stage(tableau.rows[i], nodes[i - 1], JUST_BEFORE), at, self.y0, k, times[i - 1])
            )
            k.append(self.field(times[i - 1], z[-1]))
        partial = tuple((j, e) for j, e in tableau.err_row if j < known)
        last = fused.last_stage(tableau.b_row, partial, 1.0, JUST_BEFORE)
        y1, error = fused.rk_finish(last, at, self.y0, k, times[-1])
        assert error is not None
        k.append(self.field(times[-1], y1))
        fused.judge(at, error, (k[-1], float(tableau.b_err[-1])), self.y0, y1, None)
        polynomials = fused.polynomials(dense_of(tableau, "default").weight_rows)
        fused.dense_outputs(polynomials, at, self.y0, y1, k, 1, self.ys[1:])
        fused.plan.commit([self.y0.data_ptr(), self.k1.data_ptr()], [y1.data_ptr(), k[-1].data_ptr()])
        return [times, z, k, y1, error]

    def by_the_host(self, y0: Tensor | None = None, **options: Any) -> Solution:
        """Run the same solve by the host loop, with the same kernels."""
        tol = self.problem.norm.rtol
        options["throw"] = False
        y0 = self.problem.y0 if y0 is None else y0
        return node_cuda.solve(
            self.field, y0, self.problem.t, rtol=tol, atol=tol, method=self.tableau.name, options=options
        )

    def close(self) -> None:
        assert self.shim.lib.shim_destroy_graph(self.graph) == 0


def linspace(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(0.2, 3.0, n, dtype=dtype)


# Calls of the runtime.
LAUNCHED = ["cudaGraphLaunch"]
RECORDED = ["cudaMemcpyAsync", "cudaEventRecord"]


# --- a solve in one launch ---------------------------------------------------------------------------------------

SOLVES = {
    "with rejected steps": (1003, torch.float64, [0.0, 0.7, 2.0], dict(first_step=1.5)),
    "many outputs in a step": (33, torch.float64, [0.0, 0.1, 0.11, 0.12, 0.5, 0.50001, 1.0], {}),
    "backwards": (1003, torch.float64, [0.25, 0.1, 0.0], dict(controller="PID")),
    "float32": (257, torch.float32, [0.0, 1.0], {}),
    "tsit5": (33, torch.float64, [0.0, 1.0], dict(max_step=0.1)),
    "bosh3": (33, torch.float64, [0.0, 1.0], dict(step_t=[0.35], controller="PI")),
}


@pytest.mark.parametrize("name", SOLVES)
def test_one_launch_has_the_bits_of_the_solve_on_the_host(shim, module, name):
    n, dtype, t, options = SOLVES[name]
    method = name if name in TABLEAUS else "dopri5"
    solve = CapturedSolve(shim, linspace(n, dtype), torch.tensor(t, dtype=torch.float64), method, **options)
    expected = solve.by_the_host(**options)
    loop = module.WhileGraph(solve.graph, solve.ctl, DEVICE)
    solve.close()  # the loop has its own copy of the graph
    states = []
    for seed in (0, 1, 2, 3):  # the order of blocks, and of independent nodes
        shim.lib.shim_configure(seed, 1)
        solve.start()
        with shim.written() as calls:
            loop.launch(STREAM)
        assert [call.name for call in calls] == LAUNCHED
        state = solve.control.read()
        assert (state.active, state.status, state.next_output) == (0, 0, len(t) - 1)
        assert (state.accepted, state.rejected) == (expected.stats.accepted, expected.stats.rejected)
        assert torch.equal(solve.ys, expected.ys)
        states.append(numbers_of(state))
    assert all(state == states[0] for state in states)
    if name == "with rejected steps":
        assert expected.stats.rejected > 0


def test_a_solve_that_has_ended_does_not_start(shim, module):
    solve = CapturedSolve(shim, linspace(40), torch.tensor([0.0, 1.0]))
    loop = module.WhileGraph(solve.graph, solve.ctl, DEVICE)
    loop.launch(STREAM)
    state, y = numbers_of(solve.control.read()), solve.y0.clone()
    solve.ys.zero_()
    loop.launch(STREAM)
    assert numbers_of(solve.control.read()) == state and torch.equal(solve.y0, y) and not solve.ys.any()
    solve.close()


@pytest.mark.parametrize(
    ("status", "start", "options"),
    [
        (Status.MAX_STEPS, 1.0, dict(max_num_steps=2, first_step=0.01, max_step=0.01)),
        (Status.NON_FINITE, -1e200, dict(first_step=0.1, dfactor=0.01)),
        (Status.NON_FINITE, math.nan, dict(first_step=0.1, dfactor=0.01)),
        (Status.STEP_UNDERFLOW, -1.0, dict(first_step=0.1)),  # it has a pole
    ],
    ids=["too many steps", "infinite", "nan", "pole"],
)
def test_a_failed_solve_ends_its_loop_and_has_a_status(shim, module, status, start, options):
    y0 = torch.full((40,), start, dtype=torch.float64)
    solve = CapturedSolve(shim, y0, torch.tensor([0.0, 0.001, 9.0]), **options)
    expected = solve.by_the_host(**options)
    loop = module.WhileGraph(solve.graph, solve.ctl, DEVICE)
    loop.launch(STREAM)
    state = solve.control.read()
    assert (state.active, Status(state.status), expected.status) == (0, status, status)
    assert (state.accepted, state.rejected) == (expected.stats.accepted, expected.stats.rejected)
    assert torch.equal(solve.ys.isnan(), expected.ys.isnan())
    solve.close()


def test_copies_and_fills_of_torch_in_a_step_are_repeated(shim, module):
    solve = CapturedSolve(
        shim, linspace(40), torch.tensor([0.0, 1.0], dtype=torch.float64), first_step=0.05, max_step=0.05
    )
    source, copy, filled = torch.arange(4.0), torch.zeros(4), torch.zeros(4)
    with shim.capturing(STREAM) as graphs:
        held = solve.attempt()
        shim.lib.shim_copy(copy.data_ptr(), source.data_ptr(), 16, STREAM)
        shim.lib.shim_fill(filled.data_ptr(), 0, 16, STREAM)
    loop = module.WhileGraph(graphs[0], solve.ctl, DEVICE)
    filled.fill_(3.0)
    loop.launch(STREAM)
    assert held and torch.equal(copy, source) and not filled.any() and solve.control.read().accepted == 20
    shim.lib.shim_destroy_graph(graphs[0])
    solve.close()


def test_a_plan_without_step_control_has_no_current_step(shim, module):
    plan = module.SolveContext(0, 1, 4, 4, ON, 1.0)
    with pytest.raises(RuntimeError, match="has no current step"):
        plan.current()


# --- steps that cannot be in a loop ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("types", "words"),
    [
        (["kernel", "host"], "1 call of a host function"),
        (["wait", "kernel", "record", "record"], "1 wait for an event, 2 records of events"),
        (["alloc", "kernel", "free"], "1 allocation of memory, 1 release of memory"),
        (["signal", "semaphore"], "1 signal to a semaphore, 1 wait for a semaphore"),
        (["conditional", "conditional"], "2 branches or loops"),
        (["unheard of"], "1 node of an unknown kind"),
    ],
)
def test_a_step_that_cannot_be_in_a_loop_is_refused_with_the_kinds_of_its_nodes(shim, module, types, words):
    ctl = torch.zeros(208, dtype=torch.uint8)
    plain, inner = shim.graph(*types), shim.graph("kernel", "memset")
    graphs = [plain, inner]
    if not {"conditional", "alloc", "free"} & set(types):  # these can be in a child graph, at any depth
        for _ in range(2):
            graphs.append(shim.graph("memcpy", "empty", child=graphs[-1] if len(graphs) > 2 else plain))
    for graph in (plain, *graphs[2:]):
        with shim.written() as calls, pytest.raises(NotImplementedError) as refused:
            module.WhileGraph(graph, ctl.data_ptr(), DEVICE)
        assert str(refused.value) == (
            f"a loop on the GPU may hold kernels, copies and memsets only, and the captured step has {words}"
        )
        assert "cudaGraphCreate" not in {call.name for call in calls}
    for graph in graphs:
        shim.lib.shim_destroy_graph(graph)


def test_all_kinds_of_nodes_that_a_loop_may_contain_are_accepted(shim, module):
    ctl = torch.zeros(208, dtype=torch.uint8)
    child = shim.graph("kernel", "memcpy", "memset", "empty")
    graphs = [child, shim.graph("empty", child=child), shim.graph()]  # one of them is empty
    for graph in graphs:
        module.WhileGraph(graph, ctl.data_ptr(), DEVICE).launch(STREAM)
        shim.lib.shim_destroy_graph(graph)


@pytest.mark.parametrize(("driver", "words"), [(12030, "this one is for 12.3"), (0, "there is none")])
def test_a_driver_that_is_too_old_is_named(shim, module, driver, words):
    shim.lib.shim_driver_version(driver)
    with shim.written() as calls, pytest.raises(NotImplementedError) as refused:
        module.WhileGraph(0, 0, DEVICE)
    assert str(refused.value) == f"a loop on the GPU needs a driver for CUDA 12.4 or newer, and {words}"
    assert [call.name for call in calls] == ["cudaDriverGetVersion"]  # no call that needs a driver


# --- the owner of each object ------------------------------------------------------------------------------------

MADE = [
    "cudaDriverGetVersion",
    "cudaGraphGetNodes",
    "cudaGraphGetNodes",
    "cudaGraphNodeGetType",
    "cudaGraphCreate",
    "cudaGraphConditionalHandleCreate",
    "cudaGraphAddKernelNode",
    "cudaGraphAddNode",
    "cudaGraphAddChildGraphNode",
    "cudaGraphAddKernelNode",
    "cudaGraphInstantiate",
]


def test_a_loop_is_made_launched_and_freed_on_its_device_without_the_gil(shim, module):
    ctl, step = torch.zeros(208, dtype=torch.uint8), shim.graph("kernel")
    with shim.written() as calls:
        loop = module.WhileGraph(step, ctl.data_ptr(), DEVICE)
        assert shim.lib.shim_device() == 0
        loop.launch(STREAM)
    names = [call.name for call in calls]
    assert names == [*MADE, *LAUNCHED]
    assert {call.gil for call in calls} == {0}
    assert {call.device for call in calls[1:]} == {DEVICE}
    with shim.written() as calls:
        del loop
    assert [(call.name, call.device) for call in calls] == [
        ("cudaGraphExecDestroy", DEVICE),
        ("cudaGraphDestroy", DEVICE),
    ]
    shim.lib.shim_destroy_graph(step)


@pytest.mark.parametrize("place", range(len(MADE)))
def test_a_failed_call_is_named_and_all_objects_are_freed(shim, module, place):
    ctl, step = torch.zeros(208, dtype=torch.uint8), shim.graph("kernel")
    name = MADE[place]
    shim.lib.shim_fail_call(name.encode(), MADE[:place].count(name), OUT_OF_MEMORY)
    before = shim.lib.shim_leaks()
    with pytest.raises(RuntimeError, match=f"^node_cuda: {name} failed: "):
        module.WhileGraph(step, ctl.data_ptr(), DEVICE)
    assert shim.lib.shim_leaks() == before and shim.lib.shim_device() == 0
    assert shim.lib.shim_last_error() == 0, "the next launch of anybody's would find the error"
    module.WhileGraph(step, ctl.data_ptr(), DEVICE)
    shim.lib.shim_destroy_graph(step)


def test_a_failed_launch_raises(shim, module):
    ctl, step = torch.zeros(208, dtype=torch.uint8), shim.graph("kernel")
    loop = module.WhileGraph(step, ctl.data_ptr(), DEVICE)
    shim.lib.shim_fail_call(b"cudaGraphLaunch", 0, OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match=r"^node_cuda: cudaGraphLaunch failed: "):
        loop.launch(STREAM)
    with pytest.raises(RuntimeError, match="cudaSetDevice failed"):
        module.WhileGraph(step, ctl.data_ptr(), 9)
    assert shim.lib.shim_last_error() == 0
    shim.lib.shim_destroy_graph(step)


def test_a_loop_may_be_freed_before_its_launch_has_run(shim, module):
    solve = CapturedSolve(shim, linspace(40), torch.tensor([0.0, 1.0]))
    shim.lib.shim_lazy(1)
    loop = module.WhileGraph(solve.graph, solve.ctl, DEVICE)
    loop.launch(STREAM)
    solve.close()
    del loop
    assert not solve.ys[1].isfinite().any()
    assert solve.control.read().active == 0 and bool(solve.ys.isfinite().all())


@pytest.mark.parametrize("on_its_way", [False, True])
def test_freeing_objects_does_not_break_a_capture_of_another_thread(shim, module, on_its_way):
    ctl, step = torch.zeros(208, dtype=torch.uint8), shim.graph("kernel")
    loop, flag = module.WhileGraph(step, ctl.data_ptr(), DEVICE), module.Flag(ctl.data_ptr(), DEVICE)
    shim.lib.shim_destroy_graph(step)
    shim.lib.shim_lazy(1)
    if on_its_way:
        flag.record(STREAM)
    with shim.capturing(STREAM + 1) as captured:
        del loop, flag
    assert captured[0] is not None
    with shim.capturing(STREAM + 1) as spoiled, pytest.raises(RuntimeError, match="cudaHostAlloc failed"):
        module.Flag(ctl.data_ptr(), DEVICE)  # the mode of the thread is restored
    assert spoiled == [None]
    shim.lib.shim_last_error()
    shim.lib.shim_destroy_graph(captured[0])


# --- the host repeats the step -----------------------------------------------------------------------------------


def test_batches_with_flags_give_the_same_solve_and_wait_only_after_launching_the_next_batch(shim, module):
    t = torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64)
    solve = CapturedSolve(shim, linspace(200), t, first_step=1.5)
    expected = solve.by_the_host(first_step=1.5)
    step = shim.lib.shim_instantiate(solve.graph)
    shim.lib.shim_lazy(1)
    flags, batch = [module.Flag(solve.ctl, DEVICE) for _ in range(2)], 3
    done = batches = 0
    with shim.written() as calls:
        while True:
            module.replay(step, batch, ON)
            flags[batches % 2].record(STREAM)
            batches += 1
            if batches == 1:
                continue
            flag = flags[batches % 2]  # of the previous batch
            flag.wait()
            with pytest.raises(RuntimeError, match=r"wait\(\) first"):  # else the GPU has no work in the meantime
                flags[(batches + 1) % 2].read()
            state = flag.read()
            assert state.accepted + state.rejected > done or not state.active
            done = state.accepted + state.rejected
            if not state.active:
                break
    assert {call.gil for call in calls} == {0} and {call.device for call in calls} == {DEVICE}
    assert [call.name for call in calls].count("cudaGraphLaunch") == batch * batches
    assert "cudaStreamSynchronize" not in {call.name for call in calls}
    assert done == expected.stats.accepted + expected.stats.rejected and batches == math.ceil(done / batch) + 1
    assert torch.equal(solve.ys, expected.ys)
    del flags, flag
    end = solve.control.read()  # the last batch has run by now, and changed nothing
    assert (end.accepted, end.rejected) == (expected.stats.accepted, expected.stats.rejected)
    assert torch.equal(solve.ys, expected.ys)
    assert shim.lib.shim_destroy_exec(step) == 0
    solve.close()


def test_a_flag_can_be_read_only_after_waiting_for_its_copy(shim, module):
    ctl = torch.arange(208, dtype=torch.uint8)
    flag = module.Flag(ctl.data_ptr(), DEVICE)
    flag.wait()  # no copy to wait for
    with pytest.raises(RuntimeError, match="before it was recorded"):
        flag.read()
    shim.lib.shim_lazy(1)
    flag.record(STREAM)
    with pytest.raises(RuntimeError, match=r"wait\(\) first"):
        flag.read()
    flag.wait()
    ctl.zero_()
    expected = torch.arange(208, dtype=torch.uint8)
    assert numbers_of(flag.read()) == numbers_of(module.ControllerState.copy(expected.data_ptr()))
    with shim.written() as calls:
        flag.record(STREAM)
        flag.record(STREAM)
    assert [call.name for call in calls] == RECORDED * 2  # neither waits
    shim.lib.shim_progress(STREAM)
    shim.lib.shim_progress(STREAM)
    ctl.fill_(1)
    flag.wait()
    assert numbers_of(flag.read()) == numbers_of(module.ControllerState.copy(ctl.data_ptr()))
    assert flag.read().active == 0x01010101


def test_freeing_a_flag_waits_for_its_copy(shim, module):
    ctl = torch.zeros(208, dtype=torch.uint8)
    shim.lib.shim_lazy(1)
    for wait in (False, True):
        flag = module.Flag(ctl.data_ptr(), DEVICE)
        flag.record(STREAM)
        if wait:
            flag.wait()
        with shim.written() as calls:
            del flag
        names = ["cudaEventSynchronize", "cudaEventDestroy", "cudaFreeHost"][wait:]
        assert [(call.name, call.device) for call in calls] == [(name, DEVICE) for name in names]


@pytest.mark.parametrize("name", ["cudaHostAlloc", "cudaEventCreateWithFlags", *RECORDED])
def test_after_failed_calls_of_a_flag_all_objects_are_freed(shim, module, name):
    ctl = torch.zeros(208, dtype=torch.uint8)
    shim.lib.shim_fail_call(name.encode(), 0, INVALID_VALUE)
    with pytest.raises(RuntimeError, match=f"^node_cuda: {name} failed: "):
        module.Flag(ctl.data_ptr(), DEVICE).record(STREAM)
    assert shim.lib.shim_last_error() == 0


def test_a_replay_stops_at_its_first_failure(shim, module):
    graph = shim.graph("kernel")
    step = shim.lib.shim_instantiate(graph)
    shim.lib.shim_fail_call(b"cudaGraphLaunch", 2, INVALID_VALUE)
    with shim.written() as calls, pytest.raises(RuntimeError, match="cudaGraphLaunch failed"):
        module.replay(step, 5, ON)
    assert len(calls) == 3
    with shim.written() as calls:
        module.replay(step, 0, ON)
    assert calls == []
    shim.lib.shim_destroy_exec(step)
    shim.lib.shim_destroy_graph(graph)


# --- compilers ---------------------------------------------------------------------------------------------------

ANY_TOOLKIT = """
#include "graphs/graphs.h"
#include <cstdio>
int main() {
  cudaGraph_t step = nullptr;
  node_cuda::ControllerState ctl{};
  const int made = cudaGraphCreate(&step, 0);
  try {
    node_cuda::WhileGraph loop(step, &ctl, 0);
    loop.launch(nullptr);
    std::puts("launched");
  } catch (const node_cuda::Impossible& why) {
    std::puts(why.what());
  }
  if (made == 0) cudaGraphDestroy(step);
}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "said"),
    [
        (12030, "a loop on the GPU needs node_cuda to be compiled with CUDA 12.4 or newer, and it was with 12.3"),
        pytest.param(12040, "launched", marks=pytest.mark.builds),  # by functions without edge data
    ],
)
def test_every_toolkit_compiles_it_and_with_an_old_one_the_message_says_what_is_missing(tmp_path, version, said):
    (tmp_path / "main.cpp").write_text(ANY_TOOLKIT)
    unit = tmp_path / "unit.cpp"
    unit.write_text(
        '#include "graphs/graphs.cpp"\n#include "graphs/set_condition.cu"\n'
        'extern "C" const char* node_cuda::failed_op() { return nullptr; }\n'
    )
    program = tmp_path / "program"
    subprocess.run(
        ["g++", *library.FLAGS, "-O0", f"-DCUDART_VERSION={version}", "-DNODE_CUDA_WITH_KERNELS",
         f"-I{library.HERE}", f"-I{library.CSRC}", str(unit), str(library.HERE / "cuda_graphs.cpp"),
         str(tmp_path / "main.cpp"), "-o", str(program), "-lpthread"],
        check=True,
    )  # fmt: skip
    assert subprocess.run([program], check=True, capture_output=True, text=True).stdout == said + "\n"


@pytest.mark.builds
@pytest.mark.skipif(build.find_toolkit() is None, reason="no CUDA toolkit on this machine")
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a driver, which does more than to say that it is missing"
)
def test_the_real_runtime_without_a_driver_raises_with_the_reason(tmp_path):
    toolkit = build.find_toolkit()
    assert toolkit is not None
    (tmp_path / "main.cpp").write_text(ANY_TOOLKIT)
    sources = [
        library.CSRC / name for name in ("graphs/graphs.cpp", "graphs/set_condition.cu", "control/step_control.cu")
    ]
    program = tmp_path / "program"
    subprocess.run(
        [str(toolkit.home / "bin" / "nvcc"), "-std=c++17", "-arch=sm_80", "-DNODE_CUDA_WITH_KERNELS", "--threads", "2",
         "-Xcompiler", "-Wall,-Wextra,-Werror", f"-I{library.CSRC}", *map(str, sources), str(tmp_path / "main.cpp"),
         "-o", str(program)],
        check=True,
    )  # fmt: skip
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert said == "a loop on the GPU needs a driver for CUDA 12.4 or newer, and there is none\n"
