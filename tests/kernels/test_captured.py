"""The cache of captured solves: what is reused, what is captured again, and what runs on the host, with the reason.

The fixture `eager` replaces CUDA graphs. The tests check `count`, the number of captures.
unit/cuda_graphs/test_fingerprint.py tests that changes are noticed.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from problems import F64, Counting, TimedLinear, linspace
from shim.eager import Eager
from torch import nn
from torch.nn.utils import parametrize

import node_cuda
from node_cuda import NeuralODE, SolveError, Status, _torch_modes, odeint, odeint_adjoint, odeint_dense, solve
from node_cuda.cuda_graphs import cache as graphs
from node_cuda.cuda_graphs import capture
from node_cuda.cuda_graphs.cache import MOST, PATIENCE, GraphCache, graphs_of
from node_cuda.cuda_graphs.capture import Uncapturable
from node_cuda.gradients.inspection import sources
from node_cuda.kernels import backend
from node_cuda.problem.field import VectorField
from node_cuda.status import InvalidInput, InvalidType, Unsupported

Y = torch.tensor([0.7, -0.4], dtype=F64)
T = linspace(0.0, 1.0, 4)
RELEASE = VectorField.release  # Eager needs func, so the fixture keeps it
LOOSE = dict(rtol=1e-3, atol=1e-3)

pytestmark = pytest.mark.usefixtures("eager")


class Scaled(nn.Module):
    """y' = -scale y, with an attribute, a parameter and a buffer."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale
        self.w = nn.Parameter(torch.full((2,), 1.5, dtype=F64))
        self.register_buffer("b", torch.ones(2, dtype=F64))

    def forward(self, t, y):
        return -self.scale * self.w * self.b * y * (0.5 if self.training else 1.0)


def decay(t, y):
    return -y


def run(func, kept, y0=Y, t=T, options=None, **solver):
    """Run a captured solve, and check that its outputs have the bits of the host loop."""
    given = {**LOOSE, **solver}
    device = solve(func, y0, t, options={**(options or {}), "cuda_graph": kept}, **given)
    host = solve(func, y0, t, options=options, **given)
    parts = zip(*((x if isinstance(x, tuple) else (x,)) for x in (device.ys, host.ys)), strict=True)
    assert all(torch.equal(a, b) for a, b in parts)
    return device


# ------------------------------------------------------------------ the contents of a key
TWO = (Y, torch.ones(3, dtype=F64))
KINDS = {
    "another shape": dict(y0=torch.ones(3, 2, dtype=F64)),
    "another dtype": dict(y0=Y.float(), func=decay),
    "a complex state": dict(y0=Y.to(torch.complex128), func=decay),
    "another number of outputs": dict(t=linspace(0.0, 1.0, 5)),
    "the other direction": dict(t=linspace(1.0, 0.0, 4)),
    "another method": dict(method="bosh3"),
    "a fixed method": dict(method="rk4"),
    "another rtol": dict(rtol=1e-4),
    "another atol": dict(atol=1e-4),
    "a tensor for rtol": dict(rtol=torch.full((2,), 1e-3, dtype=F64)),
    "max_step": dict(options=dict(max_step=0.1)),
    "min_step": dict(options=dict(min_step=0.1)),
    "first_step": dict(options=dict(first_step=0.1)),
    "safety": dict(options=dict(safety=0.8)),
    "ifactor": dict(options=dict(ifactor=5.0)),
    "dfactor": dict(options=dict(dfactor=0.5)),
    "max_num_steps": dict(options=dict(max_num_steps=100)),
    "jump_t": dict(options=dict(jump_t=[0.4])),
    "another jump_t": dict(options=dict(jump_t=torch.tensor([0.6]))),
    "step_t": dict(options=dict(step_t=np.array([0.4]))),
    "step_t with another start": dict(t=linspace(0.1, 1.0, 4), options=dict(step_t=np.array([0.4]))),
    "an interpolant": dict(options=dict(dense="accurate")),
    "a controller": dict(options=dict(controller="PI")),
    "a step size": dict(method="rk4", options=dict(step_size=0.3)),
    "another number of points": dict(method="rk4", options=dict(step_size=0.1)),
    "cubic interpolation": dict(method="rk4", options=dict(interp="cubic")),
    "perturbed": dict(method="rk4", options=dict(perturb=True)),
}


@torch.no_grad()
def test_a_solve_of_another_kind_is_captured_and_the_other_graphs_are_kept():
    kept, func = GraphCache(), Scaled().eval()
    run(func, kept)
    for count, (name, kind) in enumerate(KINDS.items(), start=2):
        assert run(**{"func": func, "kept": kept, **kind}).stats.loop == "eager"
        assert kept.count == count, name
    for name, kind in ({"the first": {}} | KINDS).items():
        run(**{"func": func, "kept": kept, "t": T.square(), **kind})
        assert kept.count == count <= MOST, name


@torch.no_grad()
def test_a_tuple_is_captured_by_the_sizes_of_its_parts():
    kept = GraphCache()

    def func(t, y):
        return tuple(-part for part in y)

    for y0, count in ((TWO, 1), (TWO[::-1], 2), ((torch.ones(5, dtype=F64),), 3), (TWO, 3)):
        run(func, kept, y0=y0)
        assert kept.count == count


@torch.no_grad()
def test_a_captured_step_is_reused_for_other_values():
    kept, func = GraphCache(), Scaled().eval()
    rtol = torch.full((2,), 1e-3, dtype=F64)
    for change in (
        dict(),
        dict(y0=3 * Y),
        dict(y0=torch.stack([Y, Y])[:, 0]),
        dict(t=linspace(-2.0, 5.0, 4)),
        dict(t=torch.tensor([0.0, 0.1, 0.11, 3.0], dtype=F64)),
        dict(t=T.float()),
        dict(rtol=torch.tensor([1e-5, 1e-2], dtype=F64)),
        dict(options=dict(throw=False)),
        dict(options=dict(dtype=torch.float32)),
    ):
        run(**{"func": func, "kept": kept, "rtol": rtol, **change})
    assert kept.count == 1
    assert torch.equal(rtol, torch.full((2,), 1e-3, dtype=F64)), "it is the user's"
    kept = GraphCache()
    for t in (T, 2 * T, T + 1, T.flip(0).neg()):  # the same number of points
        run(func, kept, t=t, method="rk4")
    assert kept.count == 1


@torch.no_grad()
def test_the_settings_of_torch_are_part_of_the_key():
    kept, func = GraphCache(), decay
    run(func, kept)
    with torch.autocast("cpu", torch.bfloat16):
        run(func, kept)
    assert kept.count == 2
    torch.set_default_dtype(F64)
    try:
        run(func, kept)
    finally:
        torch.set_default_dtype(torch.float32)
    run(func, kept)
    assert kept.count == 3


# ------------------------------------------------------------------ the contents of a func
@torch.no_grad()
def test_a_change_of_func_is_captured_again_only_if_it_must_be():
    kept, func = GraphCache(), Scaled().eval()
    for change, count in (
        (lambda: None, 1),
        (lambda: func.w.mul_(2.0), 1),
        (lambda: func.load_state_dict({**func.state_dict(), "b": torch.full((2,), 3.0, dtype=F64)}), 1),
        (lambda: setattr(func, "scale", 0.5), 2),
        (lambda: func.train(), 3),
        (lambda: func.eval(), 3),  # from before
        (lambda: setattr(func, "w", nn.Parameter(func.w.detach().clone())), 4),
        (lambda: func.register_buffer("b", func.b.clone()), 5),
        (lambda: func.register_forward_hook(lambda module, given, out: 2 * out), 6),
        (lambda: func.register_full_backward_hook(lambda *_: None), 6),
        (lambda: parametrize.register_parametrization(func, "w", nn.Softplus()), 7),
    ):
        change()
        for _ in range(2):
            assert run(func, kept).stats.loop == "eager"
        assert kept.count == count


def test_a_training_loop_captures_once():
    net = NeuralODE(Scaled(), options=dict(cuda_graph=True), adjoint_options=dict(cuda_graph=False), **LOOSE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = net(Y, T).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert net.stats.loop == "eager" and net.solver["options"]["cuda_graph"].count == 1
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1], "the weights are those of the moment"


@torch.no_grad()
def test_a_tensor_that_func_writes_in_each_evaluation_does_not_count_as_a_change():
    class Logging(Counting):
        def __init__(self):
            super().__init__(decay)
            self.times, self.last = [], None

        def forward(self, t, y):
            self.times.append(float(t))
            self.last = y.clone()
            return super().forward(t, y)

    kept, func = GraphCache(), Logging()
    for _ in range(3):  # the host loop of `run` evaluates it as well
        run(func, kept)
    assert kept.count == 1


@torch.no_grad()
def test_attributes_made_in_the_first_evaluation_of_func_are_part_of_the_fingerprint():
    class Prepared(nn.Module):
        ready = None

        def __init__(self):
            super().__init__()
            self.scale, self.ready = 1.0, None

        def forward(self, t, y):
            if self.ready is None:
                self.ready = torch.full((2,), self.scale, dtype=F64)
            return -self.ready * y

    kept, func = GraphCache(), Prepared()
    for scale, count in ((1.0, 1), (2.0, 2)):
        func.scale, func.ready = scale, None
        run(func, kept)
        run(func, kept)
        assert kept.count == count
    func.ready = func.ready.clone()
    run(func, kept)
    assert kept.count == 3


@torch.no_grad()
def test_a_func_that_is_new_in_each_solve_runs_on_the_host_with_a_warning():
    kept, func = GraphCache(), Scaled().eval()
    for i in range(PATIENCE + 1):
        func.scale = 1.0 + i
        assert run(func, kept).stats.loop == "eager"
    count = kept.count
    for i in range(2):
        func.scale = -1.0 - i
        stats = run(func, kept).stats
        assert stats.loop == "host" and f"func's 'scale' had changed at each of the last {PATIENCE}" in stats.why
    assert kept.count == count
    other = run(func, kept, y0=torch.ones(3, 2, dtype=F64)).stats
    assert (other.loop, other.why) == ("eager", None), "a solve of another kind was never tried"
    func.scale = 1.0
    assert run(func, kept).stats.loop == "eager", "one that is known"
    func.scale = 77.0
    assert run(func, kept).stats.loop == "eager", "and then there is patience again"


@torch.no_grad()
def test_a_field_with_hidden_state_runs_on_the_host_with_a_reason():
    func, kept = Scaled(), GraphCache()
    func.table = list(range(2000))
    stats = run(func, kept).stats
    assert (stats.loop, kept.count) == ("host", 0)
    assert stats.why == "func's 'table' has 2000 items, too many to search: make it a tensor"
    del func.table
    assert run(func, kept).stats.loop != "host" and kept.count == 1


@torch.no_grad()
def test_an_evaluation_may_create_the_hidden_state():
    class Once(Scaled):
        def forward(self, t, y):
            self.made = (x for x in [1.0])
            return super().forward(t, y)

    kept = GraphCache()
    for _ in range(2):
        stats = run(Once(), kept).stats
        assert (stats.loop, kept.count) == ("host", 0) and "func's 'made' is of builtins.generator" in stats.why


@torch.no_grad()
def test_a_limited_number_of_graphs_is_kept_and_the_last_used_stay():
    kept = GraphCache()
    run(decay, kept)
    for n in range(2, MOST + 3):
        run(decay, kept, t=linspace(0.0, 0.1, n), method="euler")
        if n % 10 == 0:
            run(decay, kept)
    assert kept.count == MOST
    run(decay, kept)
    assert kept.count == MOST
    made = []
    kept.get("a key", decay, torch.device("cpu"), lambda: made.append(1))
    kept.get("a key", decay, torch.device("cpu"), lambda: made.append(2))
    assert made == [1] and kept.count == MOST


@torch.no_grad()
def test_the_reason_why_a_solve_cannot_be_captured_is_also_kept(monkeypatch):
    tried = []

    class Failing(Eager):
        def record(self, work):
            tried.append(1)
            raise Uncapturable("it could not be captured (a reason)")

    monkeypatch.setattr(capture, "GraphCapture", Failing)
    kept = GraphCache()
    for _ in range(2):
        stats = run(decay, kept).stats
        assert (stats.loop, stats.why) == ("host", "it could not be captured (a reason)")
    assert tried == [1] and kept.count == 1


@torch.no_grad()
def test_an_error_of_func_during_a_capture_reaches_the_user_and_nothing_is_kept():
    kept, func = GraphCache(), Scaled().eval()
    func.scale = None
    with pytest.raises(TypeError):
        solve(func, Y, T, options=dict(cuda_graph=kept))
    assert kept.count == 0
    func.scale = 1.0
    assert run(func, kept).stats.loop == "eager"


# ------------------------------------------------------------------ the owner of the graphs
class Bound:
    scale = 1.0

    def rhs(self, t, y):
        return -self.scale * y

    def other(self, t, y):
        return -2 * self.scale * y


@torch.no_grad()
def test_the_option_keeps_graphs_with_the_function_module_or_object():
    def func(t, y):
        return -y

    bound = Bound()
    for lookup in (lambda: func, lambda: bound.rhs, lambda: bound.other):
        for _ in range(2):
            run(lookup(), True)
        assert graphs_of(lookup()).count == 1
    net = Scaled().eval()
    run(net, True)
    assert graphs_of(net).count == 1 and graphs_of(Scaled()).count == 0


@pytest.mark.filterwarnings("ignore:Solver 'euler' does not support callbacks")
@pytest.mark.parametrize("method", ["dopri5", "euler"])
@torch.no_grad()
def test_graphs_do_not_keep_their_function_alive_and_are_freed_with_it(monkeypatch, method):
    """A graph needs no Python."""

    class Once(Eager):
        def record(self, work):
            return type("Recording", (), {"replay": staticmethod(lambda: None)})()

        def repeat(self, step, control):
            return type("Repeat", (), {"tier": "once", "run": staticmethod(lambda: None)})(), None

    monkeypatch.setattr(capture, "GraphCapture", Once)
    monkeypatch.setattr(VectorField, "release", RELEASE)

    class Called(Scaled):
        if method == "euler":  # euler does not call it

            def callback_accept_step(self, t0, y0, dt):
                raise AssertionError("was called")

    func, kept = Called().eval(), GraphCache()
    func.hooked = [func]
    solution = solve(func, Y, T, method=method, options=dict(cuda_graph=True, throw=False))
    assert solution.stats.loop == "once"
    solve(func, Y, T, method=method, options=dict(cuda_graph=kept, throw=False))
    gone = [weakref.ref(x) for x in (func, func.w, graphs_of(func))]
    del func
    for _ in range(2):  # the first run creates the memory that the second one reuses
        gc.collect()
    assert [x() for x in gone] == [None] * 3
    assert kept.count == 1


@torch.no_grad()
def test_compile_keeps_separate_graphs():
    func = Scaled().eval()
    solver = node_cuda.compile(func, method="bosh3", options=dict(max_step=0.5), **LOOSE)
    for y0 in (Y, 2 * Y):
        solution = solver(y0, T)
        assert solution.stats.loop == "eager"
        assert torch.equal(solution.ys, solve(func, y0, T, method="bosh3", options=dict(max_step=0.5), **LOOSE).ys)
    assert solver.graphs.count == 1 and graphs_of(func).count == 0
    assert "bosh3" in repr(solver)
    shared = GraphCache()
    assert node_cuda.compile(func, options=dict(cuda_graph=shared)).graphs is shared
    with pytest.raises(InvalidInput, match="tier must be one of 'while', 'batches', 'native' or None; got 'best'"):
        node_cuda.compile(func, tier="best")


def test_the_options_of_the_user_are_not_changed():
    options = dict(cuda_graph=True, max_step=0.5)
    net = NeuralODE(Scaled(), options=options, **LOOSE)
    with torch.no_grad():
        net(Y, T)
        node_cuda.compile(decay, options=options)(Y, T)
        solve(decay, Y, T, options=options)
    assert options == dict(cuda_graph=True, max_step=0.5)


@pytest.mark.parametrize("throw", [True, "deferred"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_layer_has_separate_graphs(way, throw):
    net = NeuralODE(Scaled().eval(), options=dict(cuda_graph=True, throw=throw), **LOOSE)
    with torch.no_grad():
        expected = net(Y, T)
        other = copy.deepcopy(net) if way == "deepcopy" else pickle.loads(pickle.dumps(net))
        assert other.solver["options"]["cuda_graph"].count == 0
        assert torch.equal(other(Y, T), expected)
        other.func.w.mul_(2.0)
        assert not torch.equal(other(Y, T), expected) and torch.equal(net(Y, T), expected)
    for each in (net, other):
        assert each.solver["options"]["cuda_graph"].count == 1
    net.solver["options"]["cuda_graph"] = GraphCache("batches")
    assert copy.deepcopy(net).solver["options"]["cuda_graph"].tier == "batches"


def test_a_layer_that_trains_records_its_steps_and_one_that_is_evaluated_does_not():
    func, kept = Weighted(), GraphCache()
    net = NeuralODE(func, options=dict(cuda_graph=kept), **LOOSE)
    for count in (1, 2):
        ys = net(Y, T)
        ys.square().sum().backward()
        assert (net.stats.loop, net.stats.loop_backward, net.stats.why_gradient) == ("eager", "eager", None)
        with torch.no_grad():
            assert torch.equal(net(Y, T), ys)
        assert net.stats.loop == "eager" and "autograd is off" in net.stats.why_gradient
        assert kept.count == 3, f"recorded, reversed, and without a record, in round {count}"
    deferred = NeuralODE(func, options=dict(cuda_graph=kept, throw="deferred"), **LOOSE)
    deferred(Y, T)
    assert "deferred" in deferred.stats.why_gradient and deferred.stats.loop == "eager"


@torch.no_grad()
def test_two_layers_with_the_same_func_do_not_share_graphs():
    func = Scaled().eval()
    first, second = (NeuralODE(func, options=dict(cuda_graph=True), **LOOSE) for _ in range(2))
    first(Y, T)
    assert [net.solver["options"]["cuda_graph"].count for net in (first, second)] == [1, 0]


# ------------------------------------------------------------------ modes of torch
def test_graphs_captured_in_inference_mode_are_reused_outside_of_it():
    kept, func = GraphCache(), Scaled().eval().requires_grad_(False)
    rtol = torch.full((2,), 1e-3, dtype=F64)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad):
        for factor in (1.0, 2.0):
            with mode():
                run(func, kept, y0=factor * Y, t=factor * T, rtol=factor * rtol)
    assert kept.count == 1


@torch.no_grad()
def test_weights_cached_by_torch_between_evaluations_are_not_captured():
    kept, func = GraphCache(), Scaled().eval()
    parametrize.register_parametrization(func, "w", nn.Softplus())
    with parametrize.cached():
        stats = run(func, kept).stats
        assert stats.loop == "host" and "parametrize.cached()" in stats.why
    assert run(func, kept).stats.loop == "eager"


@torch.no_grad()
def test_a_field_that_computes_derivatives_is_captured():
    def hamiltonian(t, y):
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(y.square().sum() * torch.cos(t), y)
        return -slope

    assert run(hamiltonian, GraphCache()).stats.loop == "eager"


# ------------------------------------------------------------------ deferred
def test_a_deferred_solve_reads_nothing_before_check():
    net = NeuralODE(Scaled().eval(), options=dict(cuda_graph=True, throw="deferred"), **LOOSE)
    with torch.no_grad():
        solution = solve(net.func, Y, T, options=net.solver["options"], **LOOSE)
    assert solution.status is Status.PENDING and "Solution.check()" in str(solution.status)
    assert (solution.stats.accepted, solution.stats.nfe, solution.stats.host_reads) == (0, 0, 1), "of the times"
    with torch.no_grad():
        expected = solve(net.func, Y, T, **LOOSE)
    assert solution.check() is solution and solution.status is Status.SUCCESS
    assert torch.equal(solution.ys, expected.ys)
    for name in ("accepted", "rejected", "nfe"):
        assert getattr(solution.stats, name) == getattr(expected.stats, name)
    reads = solution.stats.host_reads
    assert solution.check().stats.host_reads == reads, "nothing is left to read"


@torch.no_grad()
def test_each_of_several_deferred_solves_has_the_right_status():
    def func(t, y):
        return y * y

    kept, t = GraphCache(), linspace(0.0, 2.0, 3)
    options = dict(max_num_steps=20)
    starts = [torch.tensor([start], dtype=F64) for start in (0.1, 3.0, 0.2)]
    found = [solve(func, y0, t, options=dict(options, cuda_graph=kept, throw="deferred"), **LOOSE) for y0 in starts]
    assert kept.count == 1
    for solution, y0 in reversed(list(zip(found, starts, strict=True))):
        expected = solve(func, y0, t, options=dict(options, throw=False), **LOOSE)
        if expected.status is Status.SUCCESS:
            solution.check()
        else:
            with pytest.raises(SolveError, match="max_num_steps = 20"):
                solution.check()
        assert solution.status is expected.status
        assert solution.stats.accepted == expected.stats.accepted
        torch.testing.assert_close(solution.ys, expected.ys, rtol=0.0, atol=0.0, equal_nan=True)
    assert {solution.status for solution in found} == {Status.SUCCESS, Status.MAX_STEPS}


@torch.no_grad()
def test_a_deferred_solve_that_runs_on_the_host_has_ended():
    solution = solve(decay, Y, T, method="implicit_adams", options=dict(cuda_graph=True, throw="deferred"), **LOOSE)
    assert (solution.status, solution.stats.loop) == (Status.SUCCESS, "host")
    assert solution.check() is solution
    failed = solve(
        decay, Y, T, options=dict(cuda_graph=True, throw="deferred", record_steps=True, max_num_steps=1, max_step=0.01)
    )
    assert failed.status is Status.MAX_STEPS and bool(failed.ys[-1].isnan().all())
    with pytest.raises(SolveError, match="max_num_steps"):
        failed.check()


# ------------------------------------------------------------------ reasons and messages
def test_a_solve_inside_a_capture_of_the_user_is_refused_before_func_is_evaluated(monkeypatch):
    func, y0 = Counting(Scaled()), Y.clone().requires_grad_()
    outside = solve(func, y0, T, gradient="adjoint", **LOOSE)
    before = func.nfe
    monkeypatch.setattr(graphs, "capturing", lambda device: True)
    kept = dict(cuda_graph=GraphCache(), throw="deferred")
    for call in (
        lambda: odeint(func, y0, T, method="rk4"),
        lambda: solve(func, (y0,), T, options=kept),
        lambda: NeuralODE(func, options=kept)(y0, T),
        lambda: node_cuda.compile(func)(y0, T),
        lambda: odeint_dense(func, y0, 0.0, 1.0),
        lambda: outside.ys.sum().backward(),
    ):
        with pytest.raises(Unsupported, match=r'solve outside the graph with options=.*throw="deferred"'):
            call()
    assert func.nfe == before


def test_deferred_without_cuda_graph_is_refused():
    for options in (dict(throw="deferred"), dict(throw="deferred", cuda_graph=False)):
        with pytest.raises(InvalidInput, match=r'"deferred" is only for solves in a CUDA graph.*cuda_graph=True'):
            solve(decay, Y, T, options=options)
    with pytest.raises(InvalidInput, match="must be True, False or \"deferred\"; got 'later'"):
        solve(decay, Y, T, options=dict(throw="later", cuda_graph=True))


@pytest.mark.parametrize("given", [1, "while", np.bool_(True), [GraphCache]])
def test_an_invalid_value_of_cuda_graph_is_refused(given):
    with pytest.raises(
        InvalidType,
        match=r'options\["cuda_graph"\] must be True, False, or a `node_cuda.cuda_graphs.cache.GraphCache`.*got',
    ):
        solve(decay, Y, T, options=dict(cuda_graph=given))


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_callbacks_are_refused(method):
    class Called(Scaled):
        def callback_step(self, t0, y0, dt):
            raise AssertionError("was called")

    for call in (odeint, odeint_adjoint):
        with pytest.raises(
            Unsupported, match=r"callback_step, and the Python of a callback does not run.*Drop cuda_gr"
        ):
            call(Called(), Y, T, method=method, options=dict(cuda_graph=True))


HOST = {
    "Adams": (dict(method="implicit_adams", options=dict(step_size=0.1)), "takes no Runge-Kutta steps"),
    "scipy": (dict(method="scipy_solver"), "takes no Runge-Kutta steps"),
    "a norm": (dict(options=dict(norm=lambda x: x.abs().max())), "a custom norm"),
    "record_steps": (dict(options=dict(record_steps=True)), "record_steps needs"),
    "an empty state": (dict(y0=Y.new_empty(0), method="rk4"), "nothing to solve"),
    "one time": (dict(t=T[:1]), "nothing to solve"),
}


@pytest.mark.filterwarnings("ignore:t holds one time")
@pytest.mark.parametrize("case", HOST)
@torch.no_grad()
def test_a_solve_that_cannot_be_captured_runs_on_the_host_with_a_reason(case):
    given, why = HOST[case]
    stats = run(decay, GraphCache(), **given).stats
    assert stats.loop == "host" and why in stats.why


@torch.no_grad()
def test_a_solve_with_an_event_runs_on_the_host():
    found = {}
    for options in ({}, dict(cuda_graph=True)):
        solution = solve(decay, Y, T[:2], event_fn=lambda t, y: t - 0.25, options=options, **LOOSE)
        found[bool(options)] = solution
    assert torch.equal(found[True].ys, found[False].ys) and torch.equal(found[True].event_t, found[False].event_t)
    assert (found[True].stats.loop, found[True].stats.why) == ("host", "an event is looked for by the host")


@torch.no_grad()
def test_dense_output_runs_on_the_host():
    found = [odeint_dense(decay, Y, 0.0, 1.0, options=options) for options in ({}, dict(cuda_graph=True))]
    assert torch.equal(found[0](0.3), found[1](0.3))
    assert found[0].stats.why is None and "keeps the stages of every step on the host" in found[1].stats.why


def test_a_solve_that_autograd_records_runs_on_the_host_with_right_gradients():
    func, found = TimedLinear(), []
    for options in ({}, dict(cuda_graph=True)):
        y0 = Y.clone().requires_grad_()
        solution = solve(func, y0, T, options=options, **LOOSE)
        found.append(torch.autograd.grad(solution.ys.sum(), [y0, func.A]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert solution.stats.loop == "host" and "autograd records the steps" in solution.stats.why
    frozen = solve(func.requires_grad_(False), Y, T, options=dict(cuda_graph=True), **LOOSE)
    assert (frozen.stats.loop, frozen.stats.why) == ("eager", None), "there is nothing to record"


@torch.no_grad()
def test_a_solve_with_an_integral_is_captured_once():
    for func in (Scaled().eval(), decay):
        kept, found = GraphCache(), []
        for options in ({}, dict(cuda_graph=kept), dict(cuda_graph=kept)):
            found.append(solve(func, Y, T, integral=lambda t, y, dy: dy.square().sum(), options=options, **LOOSE))
        assert [solution.stats.loop for solution in found] == ["host", "eager", "eager"] and kept.count == 1
        assert torch.equal(found[0].ys, found[2].ys) and torch.equal(found[0].integral, found[2].integral)
        solve(func, Y, T, integral=lambda t, y, dy: y.square().sum(), options=dict(cuda_graph=kept), **LOOSE)
        assert kept.count == 2


@torch.no_grad()
def test_without_kernels_the_host_solves():
    with node_cuda.backend("reference"):
        stats = run(decay, GraphCache()).stats
    assert (stats.loop, stats.why) == ("host", 'the backend is "reference"')


@torch.no_grad()
def test_on_a_cpu_the_host_solves_with_a_reason(monkeypatch):
    monkeypatch.setattr(backend, "_has_kernels", lambda device: False)
    stats = run(decay, GraphCache()).stats
    assert stats.loop == "host" and "the state is on cpu, and the kernels run on CUDA devices" in stats.why


# ------------------------------------------------------------------ leaves of captured backward passes
class Weighted(nn.Module):
    """y' = -w b y."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.5, 0.5], dtype=F64))
        self.register_buffer("b", torch.ones(2, dtype=F64))

    def forward(self, t, y):
        return -self.w * self.b * y

    def rate(self, t, y):
        return self(t, y) * torch.cos(t)


class Tied(Weighted):
    def __init__(self):
        super().__init__()
        self.again = self.w
        self.frozen = nn.Parameter(torch.full((2,), 2.0, dtype=F64), requires_grad=False)

    def forward(self, t, y):
        return -self.w * self.again * self.frozen * y


class Recurrent(Weighted):
    """nn.GRU keeps its parameters also in a list."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(2, 2, dtype=F64)

    def forward(self, t, y):
        return self.gru(y[None])[0][0] - self.w * y


class Hoarding(Weighted):
    """Keeps its parameter also in a list."""

    def __init__(self):
        super().__init__()
        self.flat = [self.w]

    def forward(self, t, y):
        return -self.flat[0] * y


def parametrized():
    func = Weighted()
    parametrize.register_parametrization(func, "w", nn.Softplus())
    return func


def by_a_closure():
    func = Weighted()
    return (lambda t, y: func(t, y)), tuple(func.parameters())


def by_its_method():
    func = Weighted()
    return func.rate, tuple(func.parameters())


# The solver, and the variables of differentiation. False: func keeps its parameters where they cannot be replaced.
LEAVES = {
    "a module": (lambda: (Weighted(), None), True),
    "tied and frozen": (lambda: (Tied(), None), True),
    "parametrized": (lambda: (parametrized(), None), True),
    "a method": (by_its_method, True),
    "a penalty beside": (lambda: (node_cuda.regularized(Weighted(), kinetic=0.1), None), True),
    "a recurrent net": (lambda: (Recurrent(), None), True),
    "a function": (by_a_closure, False),
    "hoarding": (lambda: (Hoarding(), None), False),
}


@pytest.fixture
def seen(monkeypatch):
    """Yield a list with one entry for each vjp: did it use the node of a parameter in the user's graph? params:
    these."""
    found, real = SimpleNamespace(params=(), nodes=[]), _torch_modes._run_backward

    def spy(outputs, *args, **more):
        found.nodes.append(bool(sources(outputs, found.params, {})[0]))
        return real(outputs, *args, **more)

    def gradients(ys, inputs):
        found.nodes.clear()
        return torch.autograd.grad(ys.square().sum(), inputs)

    monkeypatch.setattr(_torch_modes, "_run_backward", spy)
    found.gradients = gradients
    return found


@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
@pytest.mark.parametrize("case", LEAVES)
def test_a_captured_backward_pass_uses_no_leaf_of_the_users_graph(case, gradient, seen, monkeypatch):
    """With such a leaf the stream of that graph would wait for the capture."""
    make, replaceable = LEAVES[case]
    func, named = make()
    wanted = [p for p in (named or func.parameters()) if p.requires_grad]
    seen.params = tuple(wanted)
    given = dict(gradient=gradient, adjoint_params=named, method="bosh3", rtol=1e-2, atol=1e-2)

    def run(flag):
        y0 = Y.clone().requires_grad_()
        s = solve(func, y0, T[:3], options=dict(cuda_graph=flag), **given)
        return s.stats, seen.gradients(s.ys, [y0, *wanted])

    _, expected = run(False)
    assert all(seen.nodes), "what this test looks for"
    for override in (None,) if replaceable else (print, None):
        monkeypatch.setattr(capture, "override_of_streams", lambda override=override: override)
        stats, found = run(GraphCache())
        assert len(seen.nodes) > 3 and any(seen.nodes) is not replaceable
        if replaceable or override:
            assert (stats.loop_backward, stats.why_backward) == ("eager", None)
        else:
            assert stats.loop_backward == "host" and "or not only, a parameter of an nn.Module" in stats.why_backward
        for a, b in zip(found, expected, strict=True):  # a few rounding errors
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
def test_a_captured_backward_pass_uses_the_values_that_an_optimizer_wrote(gradient):
    func, kept = Weighted(), GraphCache()
    net = NeuralODE(func, gradient=gradient, options=dict(cuda_graph=kept), **LOOSE)
    found = []
    for _ in range(3):
        for ode in (net, NeuralODE(func, gradient=gradient, **LOOSE)):
            func.zero_grad()
            ode(Y, T).square().sum().backward()
            found.append(func.w.grad)
        torch.testing.assert_close(found[-1], found[-2], rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            func.w.mul_(0.8)
    assert kept.count == 2 and net.stats.loop_backward == "eager"
    assert not torch.equal(found[0], found[-1])
