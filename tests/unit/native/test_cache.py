"""When a solve is compiled again, and how long compiled solves are kept."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
import weakref

import pytest
import torch
from native import Timed, start
from problems import F64, linspace
from torch import nn

import node_cuda
from node_cuda import InvalidInput, NeuralODE, odeint, solve
from node_cuda.native import build
from node_cuda.native import cache as module
from node_cuda.native.cache import PATIENCE, NativeCache, natives_of

pytestmark = pytest.mark.usefixtures("interpreted")
T = linspace(0.0, 1.0, 3)


@pytest.fixture(autouse=True)
def built(monkeypatch):
    """Count the graphs that are built."""
    made = []
    native = build.native
    monkeypatch.setattr(build, "native", lambda *arguments: made.append(1) or native(*arguments))
    return made


def run(field, y0=None, t=T, kept=True, *, step=0.25, **solver):
    solver = dict(method="midpoint") | solver
    options = dict(compile=kept) if solver["method"] != "midpoint" else dict(compile=kept, step_size=step)
    with torch.no_grad():
        return solve(field, start() if y0 is None else y0, t, options=options, **solver)


# ------------------------------------------------------------------ what needs no other code
def test_an_update_of_the_parameters_needs_no_other_code(built):
    field = Timed()
    seen = [run(field).ys]
    optimizer = torch.optim.SGD(field.parameters(), lr=0.5)
    for p in field.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    seen.append(run(field).ys)
    field.load_state_dict({"w": torch.eye(2, dtype=F64)})
    seen.append(run(field).ys)
    field.w.data = torch.zeros(2, 2, dtype=F64)  # other memory
    seen.append(run(field).ys)
    field.w = nn.Parameter(torch.ones(2, 2, dtype=F64))  # another tensor
    seen.append(run(field).ys)
    field.w.requires_grad_(False)
    seen.append(run(field).ys)
    assert len(built) == 1
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen[:5]))
    with torch.no_grad():
        assert torch.allclose(seen[-1], solve(field, start(), T, method="midpoint", options=dict(step_size=0.25)).ys)


def test_other_times_tolerances_states_and_steps_need_no_other_code(built):
    field = Timed()
    for t in (T, T * 2 - 1, T.flip(0), torch.tensor([0.0, 1e-3, 5.0])):
        run(field, start() * 2, t, method="adaptive_heun", rtol=1e-3 * (1 + len(built)), atol=1e-4)
    assert len(built) == 1
    for step in (0.25, 0.24, 0.22):  # grids of nearly the same length
        run(field, step=step)
    assert len(built) == 2


def test_gradients_on_or_off_need_no_other_code(built):
    field = Timed()
    run(field)
    options = dict(compile=True, step_size=0.25)
    assert solve(field, start(), T, method="midpoint", options=options, gradient="adjoint").stats.loop == "native"
    with torch.inference_mode():
        assert run(field, start()).stats.loop == "native"
    assert len(built) == 1


# ------------------------------------------------------------------ what does
def test_a_cubic_interpolant_needs_other_code_than_a_grid_that_is_t_itself(built):
    """Both grids have five points, the same room. Only one has outputs between its points."""
    field, t = Timed(), linspace(0.0, 1.0, 5)
    for options in (dict(interp="cubic"), dict(interp="cubic", step_size=0.3)):
        with torch.no_grad():
            found = solve(field, start(), t, method="rk4", options=dict(options, compile=True)).ys
            assert torch.allclose(found, solve(field, start(), t, method="rk4", options=options).ys, rtol=1e-12)
    assert len(built) == 2


def test_other_shapes_dtypes_methods_and_numbers_of_outputs_need_other_code(built):
    field = Timed()
    for i, change in enumerate(
        (
            lambda: run(field),
            lambda: run(field, start()[:2]),
            lambda: run(field, t=linspace(0.0, 1.0, 4)),
            lambda: run(field, method="heun3"),
            lambda: run(field, method="adaptive_heun", rtol=1e-3),
            lambda: run(field, method="adaptive_heun", rtol=torch.full((3, 2), 1e-3, dtype=F64)),
        )
    ):
        for _ in range(2):
            assert change().stats.loop == "native"
        assert len(built) == i + 1


class Switch(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2).double()
        self.rate = 1.0

    def forward(self, t, y):
        dy = self.rate * self.lin(y)
        return dy if self.training else 2 * dy


def expected(field):
    with torch.no_grad():
        return solve(field, start(), T, method="midpoint", options=dict(step_size=0.25)).ys


def test_train_and_eval_have_each_their_code(built):
    field = Switch()
    for training in (True, False, True, False, True):
        field.train(training)
        assert torch.allclose(run(field).ys, expected(field), rtol=1e-12)
    assert len(built) == 2


def test_a_number_in_an_attribute_is_compiled_again_at_most_twice(built):
    field = Switch()
    whys = []
    for i in range(6):
        field.rate = 1.0 + i
        found = run(field)
        whys.append(found.stats.why)
        assert torch.allclose(found.ys, expected(field), rtol=1e-12)
    assert len(built) == 1 + PATIENCE == 3
    assert whys[:3] == [None] * 3
    assert all("'rate' has changed again" in why and "make it a buffer" in why for why in whys[3:])
    field.rate = 2.0  # this value was compiled
    assert run(field).stats.loop == "native" and len(built) == 3
    field.rate = 77.0
    with pytest.raises(ValueError, match="'rate' has changed again"):
        run(field, kept="require") and [
            setattr(field, "rate", float(i)) or run(field, kept="require") for i in range(4)
        ]


def test_a_parameter_that_is_added_or_replaced_by_one_of_another_shape(built):
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=F64))])

        def forward(self, t, y):
            return -y * sum(self.weights)

    field = Growing()
    run(field)
    field.weights.append(nn.Parameter(torch.ones(2, dtype=F64)))
    assert torch.allclose(run(field).ys, expected(field), rtol=1e-12)
    field.weights[0] = nn.Parameter(torch.ones(3, 2, dtype=F64))
    assert torch.allclose(run(field).ys, expected(field), rtol=1e-12)
    assert len(built) == 3


def test_a_parameter_that_becomes_that_of_another_layer(built):
    """Two tensors of the same form are inputs of the graph; shared they are one."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Linear(2, 2).double() for _ in range(2))

        def forward(self, t, y):
            return self.b(torch.tanh(self.a(y)))

    field = Two()
    run(field)
    field.b.weight = field.a.weight
    assert torch.allclose(run(field).ys, expected(field), rtol=1e-12)
    field.b.weight = nn.Parameter(torch.ones(2, 2, dtype=F64))
    assert torch.allclose(run(field).ys, expected(field), rtol=1e-12)


SCALE = 1.0


def test_a_global_number_and_the_code_of_the_field_are_in_the_key(built, monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    before = run(of_a_global).ys
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    after = run(of_a_global).ys
    assert len(built) == 2 and not torch.equal(before, after)


def of_a_global(t, y):
    return -SCALE * y


def test_torch_settings_are_in_the_key(built):
    field = Timed(torch.float32)
    y0 = start(torch.float32)
    run(field, y0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(field, y0)
    assert len(built) == 2


def test_the_oldest_code_is_dropped(monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    kept, field = NativeCache(), Timed()
    for n in (2, 3, 4, 5):
        run(field, t=linspace(0.0, 1.0, n), kept=kept)
    assert kept.count == 2


def test_there_is_no_code_for_a_solve_within_a_transform_of_torch_func():
    y0 = start()
    with torch.no_grad():
        why = []
        torch.func.vmap(lambda y: why.append(run(lambda t, y: -y, y).stats.why) or y)(y0)
    assert why == ["a transform of torch.func is active"]


# ------------------------------------------------------------------ how long it is kept
def test_the_code_of_a_function_exists_as_long_as_the_function(built):
    field = Timed()
    run(field)
    code = weakref.ref(natives_of(field, False))
    assert code().count == 1
    del field
    gc.collect()
    assert code() is None


def test_bound_methods_share_the_life_of_their_object(built):
    class Two(Timed):
        def backwards(self, t, y):
            return -self.forward(t, y)

    field = Two()
    for _ in range(2):
        a, b = run(field.forward).ys, run(field.backwards).ys
    assert len(built) == 2 and not torch.equal(a, b)


def test_a_layer_keeps_its_own_code_and_a_copy_of_it_has_none(built):
    layer = NeuralODE(Timed(), T, method="midpoint", options=dict(compile=True, step_size=0.25))
    with torch.no_grad():
        ys = layer(start())
    own = layer.solver["options"]["compile"]
    assert isinstance(own, NativeCache) and own.count == 1 and not own.required
    assert natives_of(layer.func, False).count == 0
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.solver["options"]["compile"].count == 0
        with torch.no_grad():
            assert torch.equal(other(start()), ys)
    assert len(built) == 3


def test_a_layer_that_requires_code_keeps_requiring_it():
    layer = NeuralODE(Timed(), T, options=dict(compile="require", record_steps=True))
    for other in (layer, copy.deepcopy(layer)):
        with pytest.raises(ValueError, match='"compile"] is "require"'), torch.no_grad():
            other(start())


def test_a_function_without_weak_references_is_compiled_at_each_call(built):
    class Slotted:
        __slots__ = ()

        def __call__(self, t, y):
            return -y

    field = Slotted()
    for _ in range(2):
        run(field)
    assert len(built) == 2


def test_two_threads_build_one_graph(built):
    field, found = Timed(), []
    kept = NativeCache(required=True)
    threads = [threading.Thread(target=lambda: found.append(run(field, kept=kept).ys)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == kept.count == 1 and torch.equal(*found)


# ------------------------------------------------------------------ node_cuda.compile
def test_compile_with_the_native_tier_demands_compiled_solves(built):
    solver = node_cuda.compile(Timed(), tier="native", method="midpoint", options=dict(step_size=0.25))
    with torch.no_grad():
        assert solver(start(), T).stats.loop == "native"
        assert solver(start(), T).stats.loop == "native" and len(built) == 1
    refuses = node_cuda.compile(Timed(), tier="native", method="kvaerno5")
    with pytest.raises(ValueError, match="no explicit Runge-Kutta method"), torch.no_grad():
        refuses(start(), T)


def test_compile_takes_the_option(built):
    solver = node_cuda.compile(Timed(), method="midpoint", options=dict(compile=True))
    with torch.no_grad():
        assert solver(start(), T).stats.loop == "native"


def test_captured_and_compiled_exclude_each_other():
    with pytest.raises(InvalidInput, match="compile=True is for the CPU and cuda_graph=True for CUDA"):
        odeint(Timed(), start(), T, options=dict(compile=True, cuda_graph=True))
    with pytest.raises(InvalidInput, match="compile=True is for the CPU and cuda_graph=True for CUDA"):
        node_cuda.compile(Timed(), tier="while", options=dict(compile=True))(start(), T)
