"""Captured solves: the loop over steps as CUDA graphs, in the best of the ways that a machine offers.

    "while"     one launch: the captured step in a WHILE node of our own, which the device leaves (csrc/graphs.h)
    "batches"   the captured step is launched again and again, the host looking a batch behind whether it was enough
    "host"      the host loop, for what cannot be captured; `Stats.why` says why

The field is captured with the step: its Python runs a few times when that happens and not in the solve.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from node_cuda.device_loop import DeviceLoop
from node_cuda.kernels.control import Reading, reading
from node_cuda.kernels.fused import Fused
from node_cuda.methods import ADAMS, SCIPY, Method, arithmetic_of
from node_cuda.options import AdaptiveOptions
from node_cuda.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import SolveError, Status

WARM_UPS = 3
"""Attempts before a capture: libraries choose their algorithms, and make their handles, in the first ones."""

FIRST_BATCH, LATER_BATCHES = 8, 4
"""Attempts in a batch, where no solve before tells how many it will take."""


class Repeat(Protocol):
    """Attempts until the solve is over, all in the current stream. tier: the way it is done."""

    tier: str

    def run(self) -> None: ...


class Captured:
    """A device loop, its beginning and its attempts as graphs."""

    def __init__(self, problem: Problem, method: Method) -> None:
        device = problem.y0.device
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream), torch.no_grad():
            arithmetic = arithmetic_of(problem)
            assert isinstance(arithmetic, Fused)
            self.loop = loop = DeviceLoop(problem, method, arithmetic)
            self.flags = [arithmetic.module.Flag(loop.control.address, device.index) for _ in range(2)]
            loop.y.copy_(problem.y0)
            before = torch.cuda.get_rng_state(device)
            for _ in range(WARM_UPS):
                loop.begin()
                loop.attempt()
            if not torch.equal(before, torch.cuda.get_rng_state(device)):
                raise Uncapturable("func draws random numbers, and a captured step would draw the same ones every time")
            self.stream.synchronize()
            self._begin = _graph(loop.begin, self.stream)
            self.step = _graph(loop.attempt, self.stream)
        torch.cuda.current_stream(device).wait_stream(self.stream)
        self.repeat, self.why = _repeat(self, arithmetic)

    def run(self, y0: Tensor, times: Sequence[float]) -> Tensor:
        """y at the times; nothing is read. The next solve of this loop may begin only behind it in the stream."""
        self.loop.rebind(y0, times)
        self._begin.replay()
        self.repeat.run()
        return self.loop.ys.clone()

    def read(self) -> Reading:
        """Where the solve ended: the one host read."""
        flag = self.flags[0]
        flag.record(torch.cuda.current_stream(self.loop.y.device).cuda_stream)
        flag.wait()
        return reading(flag.read())


class Uncapturable(RuntimeError):
    """Why this solve is the host loop's, as half a sentence."""


class WhileLoop:
    """One launch."""

    tier = "while"

    def __init__(self, captured: Captured, arithmetic: Fused) -> None:
        self.device = captured.loop.y.device
        self._graph = arithmetic.module.WhileGraph(
            captured.step.raw_cuda_graph(), captured.loop.control.address, self.device.index
        )

    def run(self) -> None:
        """See `Repeat`."""
        self._graph.launch(torch.cuda.current_stream(self.device).cuda_stream)


class Batches:
    """A batch of attempts is in the stream while the host waits for the one before it. The first is as long as the last
    solve was."""

    tier = "batches"

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.first = FIRST_BATCH

    def run(self) -> None:
        """See `Repeat`."""
        stream = torch.cuda.current_stream(self.captured.loop.y.device).cuda_stream
        now, behind = self.captured.flags
        self._launch(self.first)
        now.record(stream)
        while True:
            self._launch(LATER_BATCHES)
            behind.record(stream)
            now.wait()
            state = reading(now.read())
            if not state.active:
                self.first = max(state.accepted + state.rejected, 1)
                return
            now, behind = behind, now

    def _launch(self, count: int) -> None:
        for _ in range(count):
            self.captured.step.replay()


class Graphs:
    """Captured solves by what they depend on, for as long as this object lives. A copy is empty."""

    def __init__(self) -> None:
        self._captured: dict[Any, Captured | str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def get(self, problem: Problem, method: Method) -> Captured | str:
        """The captured solve, made where it is needed, or why there is none."""
        key = _key(problem, method)
        if key not in self._captured:
            try:
                self._captured[key] = capture(problem, method)
            except RuntimeError as why:
                self._captured[key] = str(why).split("\n")[0]
        return self._captured[key]


capture: Callable[[Problem, Method], Any] = Captured


@dataclass
class Run:
    """A solve by graphs that may not have ended yet."""

    ys: Tensor
    captured: Captured
    stats: Stats

    def end(self) -> SolveError | None:
        """Wait for it, and fill in what it cost: how it failed, if it did."""
        now = self.captured.read()
        self.stats.host_reads += 1
        self.captured.loop.cost(now, self.stats)
        return self.captured.loop.failure(now, self.stats)


def solve_by_graphs(problem: Problem, method: Method, stats: Stats) -> Run | None:
    """The solve by the device loop; None where it is the host loop's, and stats say why."""
    assert isinstance(method.options, AdaptiveOptions) or method.tableau is not None
    graphs = method.options.cuda_graph
    stats.why = obstacle(problem, method)
    if stats.why is not None:
        return None
    found = (graphs if isinstance(graphs, Graphs) else Graphs()).get(problem, method)
    if isinstance(found, str):
        stats.why = found
        return None
    stats.loop, stats.why = found.repeat.tier, found.why
    return Run(found.run(problem.y0, problem.times), found, stats)


def solve_outputs_by_graphs(problem: Problem, method: Method, stats: Stats) -> tuple[Tensor, Status] | None:
    """As `host_loop.solve_outputs`, or None where that is to do it."""
    run = solve_by_graphs(problem, method, stats)
    if run is None:
        return None
    failure = run.end()
    if failure is not None and method.options.throw:
        raise failure
    return run.ys, Status.SUCCESS if failure is None else failure.status


def obstacle(problem: Problem, method: Method) -> str | None:
    """Why a solve cannot be captured, as far as that is known before."""
    options = method.options
    if method.name == SCIPY or method.name in ADAMS:
        return f"{method.name} takes no Runge-Kutta steps"
    if problem.callbacks:
        return f"func has callbacks ({', '.join(problem.callbacks)}), whose Python no captured step would run"
    if options.record_steps:
        return "record_steps wants the times of all steps on the host"
    if problem.norm.custom is not None:
        return "a norm of the user's is measured on the host"
    if torch.is_grad_enabled() and _wants_gradient(problem):
        return 'autograd records the steps; gradient="adjoint" captures them, and so does torch.no_grad()'
    if len(problem.times) < 2 or problem.y0.numel() == 0:
        return "there is nothing to solve"
    if not isinstance(arithmetic_of(problem), Fused):
        return "the kernels are not live for this state; `python -m node_cuda` says why"
    if problem.y0.is_cuda and torch.cuda.is_current_stream_capturing():
        return "the stream is being captured already"
    return None


def _wants_gradient(problem: Problem) -> bool:
    func = problem.func
    if problem.y0.requires_grad or problem.t.requires_grad or not isinstance(func, nn.Module):
        return True
    return any(p.requires_grad for p in func.parameters())


def _graph(work: Callable[[], None], stream: Any) -> Any:
    """The launches of `work`, and memory of their own."""
    try:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
    except TypeError:  # torch before 2.8 gives no graph away, and only replays it
        graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def _repeat(captured: Captured, arithmetic: Fused) -> tuple[Repeat, str | None]:
    """The best way to repeat the step here, and why it is not the WHILE node."""
    if not hasattr(captured.step, "raw_cuda_graph"):
        return Batches(captured), "this torch gives no captured graph away; 2.8 does"
    try:
        return WhileLoop(captured, arithmetic), None
    except NotImplementedError as why:
        return Batches(captured), str(why)


def _key(problem: Problem, method: Method) -> tuple[Any, ...]:
    """All that a captured solve cannot change: what lies where, and what the launches hold as numbers."""
    y0, func = problem.y0, problem.func
    tensors = [*func.parameters(), *func.buffers()] if isinstance(func, nn.Module) else []
    training = [module.training for module in func.modules()] if isinstance(func, nn.Module) else []
    given = {f.name: getattr(method.options, f.name) for f in dataclasses.fields(method.options)}
    return (
        method.name,
        _plain({name: value for name, value in given.items() if name != "cuda_graph"}),
        (y0.shape, y0.dtype, y0.device),
        (len(problem.times), problem.times[0], problem.direction),
        problem.times if method.tableau is not None and not method.tableau.adaptive else None,
        problem.layout,
        _plain((problem.norm.rtol, problem.norm.atol)),
        problem.backend,
        tuple((x.data_ptr(), x.shape, x.requires_grad) for x in tensors),
        tuple(training),
        (torch.is_autocast_enabled(y0.device.type), torch.get_autocast_dtype(y0.device.type)),
    )


def _plain(value: Any) -> Any:
    """The value as something that can be compared and hashed."""
    if isinstance(value, Tensor):
        return tuple(value.detach().reshape(-1).tolist()), value.shape
    if isinstance(value, dict):
        return tuple((name, _plain(x)) for name, x in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value
