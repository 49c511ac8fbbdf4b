"""The tape of a solve on the device through the shim: the recorded steps, the kept tensors, and the reverse pass.

The host loop's Trajectory and Checkpoints give the expected content.
"""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
from problems import F64, TimedLinear, linspace
from shim.graphs import GraphCache, numbers_of
from torch import Tensor

import node_cuda
from node_cuda.controllers import Controller
from node_cuda.cuda_graphs.device_loop import OutputLoop, set_apart
from node_cuda.gradients.discrete.trajectory import Trajectory
from node_cuda.kernels.arithmetic import Arithmetic, Polynomials
from node_cuda.kernels.control import DeviceStepControl
from node_cuda.kernels.fused import Fused
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.reference import ControllerParams, DenseCotangents
from node_cuda.kernels.stage_times import HERE, JUST_AFTER, JUST_BEFORE, Clock, Interval
from node_cuda.kernels.step_control import ControlSpec
from node_cuda.kernels.step_log import StepLog
from node_cuda.loop.assemble import arithmetic_of, make_loop
from node_cuda.loop.grids import grid_of
from node_cuda.loop.outputs import solve_outputs
from node_cuda.methods.registry import lookup
from node_cuda.options import AdaptiveOptions, FixedOptions
from node_cuda.problem.problem import Problem, make_problem
from node_cuda.solution import Stats
from node_cuda.status import Status

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels with")

CPU = torch.device("cpu")
LAW = Controller(keep=True).law(5, AdaptiveOptions())
GOOD, BAD = (torch.tensor([ratio], dtype=F64) for ratio in (0.5, 2.0))
STREAM, DEVICE = 77, 1
LAYOUT = struct.Struct("=2q2i3q2i")  # struct StepLog of csrc/control/tape.h
RECORDED = struct.Struct("=4d2q2i")  # struct Recorded


@pytest.fixture
def control(shim_module) -> Callable[..., DeviceStepControl]:
    """Make the control of a solve that records on a tape, or of a reverse pass."""

    def make(law=LAW, outputs=(), direction=1.0, tape=None, on=(0, 0), dtype=F64) -> DeviceStepControl:
        fused = Fused(shim_module, on, torch.zeros(2, dtype=dtype), direction, ErrorNorm(1.0, 1.0), (0.0, *outputs))
        return fused.control(ControlSpec(law, 5, ends=bool(outputs)), tape=tape)

    return make


@pytest.fixture
def step_log(shim_module) -> Callable[..., StepLog]:
    """Makes a tape."""
    return partial(StepLog, shim_module, CPU)


def walk_in(control: Callable[..., DeviceStepControl], tape: StepLog, **given) -> DeviceStepControl:
    """Start a reverse pass over a tape."""
    walk = control(**given)
    walk.start(0.0, None)
    walk.begin_reverse(tape)
    return walk


def grid_solve(control: Callable[..., DeviceStepControl], tape: StepLog, points: Tensor, **given) -> None:
    """Solve from point to point of a grid, to its end."""
    made = control(tape=tape, **given)
    made.points = points
    made.start(float(points[0]), None)
    for _ in points:
        made.next_of_grid()


class Recorded(NamedTuple):
    """struct Recorded of csrc/control/tape.h: a step, the outputs in it, and the start of its first stage."""

    t0: float
    t1: float
    h: float
    dt: float
    first_output: int
    next_output: int
    begins: int
    unused: int


def read_tape(tape: StepLog) -> tuple[int, list[Recorded]]:
    """How many steps were accepted, and those that were recorded."""
    count = LAYOUT.unpack(tape._struct.numpy().tobytes())[4]
    steps = RECORDED.iter_unpack(tape._steps.numpy().tobytes())
    return count, [Recorded(*step) for step in steps][:count]


# --- the kept tensors ----------------------------------------------------------------------------------------------


def test_a_tape_without_room_is_refused(step_log):
    with pytest.raises(ValueError, match="at least one step; got 0"):
        step_log(0, first=0, carries=True)


@pytest.mark.parametrize("capacity", [3, 8])
def test_a_step_uses_the_row_of_its_number_or_the_scratch_row_if_it_is_not_kept(control, capacity, step_log):
    tape = step_log(capacity, first=1, carries=True)
    solve = control(outputs=[1.0], tape=tape)
    solve.start(0.0, 0.25)
    assert tape.slot.item() == capacity
    rows = []
    for ratio in (BAD, GOOD, BAD, GOOD, GOOD, GOOD, GOOD, GOOD, GOOD):
        solve.judge_ratio(ratio)
        rows.append((solve.read().accept, int(tape.slot)))
    taken = solve.read().accepted
    assert 3 < taken < 7 and not solve.read().active  # the last attempts came after the end
    assert [row for accept, row in rows if accept] == [min(i, capacity) for i in range(taken)]
    assert {row for accept, row in rows if not accept} == {capacity}
    solve.start(0.0, 0.25)
    assert (read_tape(tape)[0], int(tape.slot)) == (0, capacity)


def test_a_step_that_fails_is_not_recorded(control, step_log):
    tape = step_log(8, first=0, carries=True)
    law = LAW._replace(min_step=0.5)  # so that it is accepted whatever its error
    solve = control(law, outputs=[1.0], tape=tape)
    solve.start(0.0, 0.5)
    solve.judge_ratio(torch.tensor([math.nan], dtype=F64))
    assert Status(solve.read().status) is Status.NON_FINITE
    assert (*read_tape(tape), int(tape.slot)) == (0, [], 8)


# --- the record of whole solves ----------------------------------------------------------------------------------


@dataclass
class Solved:
    """A solve by the device loop with a tape, and the same solve by the host loop."""

    loop: OutputLoop
    tape: StepLog
    states: Tensor
    host: Trajectory
    problem: Problem

    @property
    def fused(self) -> Fused:
        return self.loop.arithmetic


def solved(y0: Tensor, t: Tensor, method: str, options: dict, capacity: int) -> Solved:
    parsed = lookup(method, {**options, "throw": False})
    func = TimedLinear(dtype=y0.dtype)
    with torch.no_grad(), node_cuda.backend("fused"):
        problem = make_problem(func, y0, t, 1e-4, 1e-4)
        points = grid_of(problem, parsed.options)[0] if isinstance(parsed.options, FixedOptions) else None
        host, interpolant = make_loop(problem, parsed, Stats(), points=points)
        trajectory = Trajectory.of(host, host.stepper, None, None)  # pyright: ignore[reportArgumentType]
        solve_outputs(host, interpolant, False)
        inside = host.selector.starts_at_jump if parsed.adaptive else bool(options.get("perturb"))
        own = set_apart(problem)
        fused = arithmetic_of(own)
        assert isinstance(fused, Fused)
        tape = StepLog(fused.module, CPU, capacity, first=int(inside), carries=parsed.adaptive)
        loop = OutputLoop(own, parsed, fused, points=points, tape=tape)
        states = torch.full((capacity + 1, *y0.shape), math.nan, dtype=y0.dtype)
        loop.begin()
        while loop.control.read().active:
            y = loop.y.clone()
            loop.attempt()
            states.index_copy_(0, tape.slot, y[None])
    return Solved(loop, tape, states, trajectory, problem)


T = linspace(0.0, 2.0, 9)
SOLVES = {
    "rejections": ("bosh3", dict(first_step=5.0), T),
    "many outputs in a step": ("dopri5", {}, linspace(0.0, 5.0, 80)),
    "reversed": ("tsit5", {}, linspace(2.0, -1.0, 5)),
    "jumps": ("dopri5", dict(jump_t=[0.4, 0.41, 1.3], step_t=[0.9], first_step=0.5), T),
    "a jump at the start": ("bosh3", dict(jump_t=[0.0, 1.0]), T),
    "no fsal": ("adaptive_heun", dict(jump_t=[0.75]), T),
    "accurate": ("dopri8", dict(dense="accurate", max_step=0.3), T),
    "too many steps": ("dopri5", dict(max_num_steps=9, max_step=0.05), linspace(0.0, 3.0, 3)),
    "grid": ("rk4", {}, T),
    "finer grid": ("rk4", dict(step_size=0.13, interp="cubic"), T),
    "grid inside": ("midpoint", dict(step_size=0.13, perturb=True), linspace(1.0, -1.0, 4)),
}


def begins_of(solved: Solved) -> list[int]:
    """Return the starts of the first stages, from the host loop's record."""
    return [-1 if taken.carried else taken.side for taken in solved.host.steps]


@pytest.mark.parametrize("name", SOLVES)
def test_the_record_of_a_solve_agrees_with_the_host_loop(shim, name):
    method, options, t = SOLVES[name]
    device = solved(torch.tensor([0.7, -0.4], dtype=F64), t, method, options, 200)
    count, steps = read_tape(device.tape)
    expected, times = device.host.steps, device.problem.times
    assert count == len(expected) > 3
    assert [step.begins for step in steps] == begins_of(device)
    control = device.loop.control.read()
    assert (control.accepted, control.first_output) == (count, steps[-1].first_output)
    if name == "rejections":
        assert control.rejected
    if name == "jumps":
        assert begins_of(device).count(JUST_AFTER) == 3
    reached = 0
    for step, taken in zip(steps, expected, strict=True):
        at = taken.at
        assert step[:4] == (at.t0, at.t1, at.h, at.signed)
        assert step.first_output == reached
        reached = sum(s <= at.t1 for s in times[1:])
        assert step.next_output == reached
    device.host.begin(device.problem.y0)
    for i, state in device.host.checkpoints._kept.items():
        assert torch.equal(device.states[i], state.y0)


def test_steps_past_the_capacity_are_counted_but_not_written(shim):
    device = solved(torch.tensor([0.7, -0.4], dtype=F64), T, "rk4", dict(step_size=0.1), 7)
    count, steps = read_tape(device.tape)
    assert count == 20 and len(steps) == 7
    assert [(s.t0, s.t1) for s in steps] == [(x.at.t0, x.at.t1) for x in device.host.steps[:7]]
    walk = walk_of(device.fused)
    walk.begin_reverse(device.tape)
    state = walk.read()
    assert (state.active, Status(state.status)) == (0, Status.RECORD_FULL)


# --- the reverse pass ----------------------------------------------------------------------------------------------


def walk_of(fused: Fused) -> DeviceStepControl:
    """Return the control of a reverse pass over the tape of a solve with this arithmetic, in a new plan."""
    y0 = torch.zeros(fused.shape, dtype=fused.dtype)
    own = Fused(fused.module, fused.on, y0, fused.direction, fused.norm, (0.0,))
    law = ControllerParams((0.0, 0.0, 0.0), 1.0, 1.0, 1.0, False, 0.0, math.inf)
    walk = own.control(ControlSpec(law, 1))
    walk.start(0.0, None)
    return walk


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.complex64], ids=str)
def test_the_reverse_pass_loads_each_step_with_the_time_of_its_first_stage(shim, name, dtype):
    method, options, t = SOLVES[name]
    y0 = torch.tensor([0.7, -0.4], dtype=F64).to(dtype)
    device = solved(y0, t, method, options, 200)
    walk, fused, (_, steps) = walk_of(device.fused), device.fused, read_tape(device.tape)
    time = torch.zeros((), dtype=dtype.to_real())
    walk.begin_reverse(device.tape)
    places = list(reversed(range(len(steps))))
    for n in places:
        walk.load_step(device.tape, time)
        now, (at, carried, start, node, side) = walk.read(), device.host.steps[n]
        assert (now.active, now.accept, now.status) == (1, 1, 0) and device.tape.row.item() == n
        assert (now.t0, now.t1, now.h, now.dt) == (at.t0, at.t1, at.h, at.signed)
        assert (now.last_t0, now.last_t1, now.last_h, now.last_dt) == (at.t0, at.t1, at.h, at.signed)
        assert (now.first_output, now.next_output) == (steps[n].first_output, steps[n].next_output)
        assert now.direction == device.problem.direction
        assert carried == (steps[n].begins == -1)
        plain = Clock(fused.direction, dtype.to_real(), CPU).at_nodes(start, (node,), side)[0]
        assert torch.equal(time, fused.times(start, (node,), side)[0]) and torch.equal(time, plain)
        assert torch.equal(device.states[n], device.host.checkpoints._kept[n].y0) or n == 0
        walk.advance_reverse(device.tape)
    assert not walk.read().active
    before = walk.read()
    walk.load_step(device.tape, time.fill_(7.0))  # past the end
    walk.advance_reverse(device.tape)
    now = walk.read()
    expected = {**numbers_of(before), "accept": 0, "first_output": now.next_output}
    assert numbers_of(now) == expected and time == 7.0
    assert device.tape.row.item() == 0


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_time_of_a_first_stage_agrees_with_the_clock_in_every_dtype(control, dtype, direction, step_log):
    points = torch.tensor([-3.1, -1.0, 0.0, 1 / 3, 1.0, 2.0, 100.1], dtype=F64)
    clock, time = Clock(direction, dtype, CPU), torch.zeros((), dtype=dtype)
    for first, carries in ((HERE, False), (JUST_AFTER, False), (JUST_AFTER, True)):
        tape = step_log(6, first=first, carries=carries)
        grid_solve(control, tape, points, direction=direction)
        walk = walk_in(control, tape, direction=direction, dtype=dtype)
        for n in reversed(range(6)):
            walk.load_step(tape, time)
            t0 = float(points[n])
            at, side = Interval(t0, float(points[n + 1]), 1.0, direction, direction), first
            if carries and n:
                at, side = Interval(float(points[n - 1]), t0, 1.0, direction, direction), JUST_BEFORE
            node = 1.0 if side == JUST_BEFORE else 0.0
            assert torch.equal(time, clock.at_nodes(at, (node,), side)[0])


def test_a_reverse_pass_over_steps_that_were_not_kept_does_nothing_and_has_a_status(control, step_log):
    points, tape = torch.arange(12.0, dtype=F64), step_log(4, first=0, carries=False)
    grid_solve(control, tape, points)
    walk, time = walk_in(control, tape), torch.full((), 7.0, dtype=F64)
    walk.load_step(tape, time)
    walk.advance_reverse(tape)
    now = walk.read()
    assert (now.active, now.accept, Status(now.status)) == (0, 0, Status.RECORD_FULL)
    assert time == 7.0 and int(tape.row) == 4
    grid_solve(control, tape, points[:4])  # the next solve is shorter
    walk.begin_reverse(tape)
    assert (walk.read().active, walk.read().status) == (1, 0)


def test_a_solve_without_a_step_has_no_step_to_reverse(control, step_log):
    tape = step_log(4, first=0, carries=True)
    walk = walk_in(control, tape)
    walk.load_step(tape)
    assert (walk.read().active, walk.read().status, int(tape.row)) == (0, 0, 0)


def test_an_unknown_dtype_is_refused(shim_module, control, step_log):
    tape = step_log(4, first=0, carries=True)
    with pytest.raises(RuntimeError, match="load_step failed"):
        shim_module.load_step(9, control().address, tape.address, 0, (0, 0))


def test_a_captured_reverse_pass_repeats_in_a_loop_on_the_device(shim_library, shim_module, control, step_log):
    graphs, on = GraphCache(shim_library), (STREAM, DEVICE)
    graphs.reset()
    points, tape = torch.arange(9.0, dtype=F64) / 4, step_log(8, first=1, carries=True)
    grid_solve(control, tape, points, outputs=[0.6, 2.0])
    walk, time, rows = control(on=on), torch.zeros((), dtype=F64), torch.zeros(2, dtype=torch.int64)
    walk.start(0.0, None)
    with graphs.capturing(STREAM) as found:
        walk.begin_reverse(tape)
    with graphs.capturing(STREAM) as bodies:
        walk.load_step(tape, time)
        for i in range(2):  # copy the row of this step to the first row, and that of the step before it to the second
            source = rows if i == 0 else tape.row
            graphs.lib.shim_copy(rows[1 - i :].data_ptr(), source.data_ptr(), 8, STREAM)
        walk.advance_reverse(tape)
    begin = graphs.lib.shim_instantiate(found[0])
    loop = shim_module.WhileGraph(bodies[0], walk.address, DEVICE)
    for _ in range(2):
        shim_module.replay(begin, 1, on)
        loop.launch(STREAM)
        now = walk.read()
        assert (now.active, now.t0, rows.tolist()) == (0, 0.0, [0, 1])
        assert time.item() == math.nextafter(0.0, 1.0)
    del loop
    graphs.lib.shim_destroy_exec(begin)
    for graph in (*found, *bodies):
        graphs.lib.shim_destroy_graph(graph)
    assert graphs.lib.shim_complaints() == b""


# --- the arithmetic of the backward pass at the current step of the reverse pass -----------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["many outputs in a step", "reversed", "accurate", "grid", "finer grid"])
def test_the_cotangents_of_the_current_step_have_the_bits_of_those_of_the_same_step_by_value(shim, name, dtype):
    """They also agree with the reference up to rounding."""
    method, options, t = SOLVES[name]
    device = solved(torch.tensor([0.7, -0.4], dtype=F64).to(dtype), t, method, options, 200)
    host = device.fused
    fused = Fused(host.module, host.on, device.problem.y0, host.direction, host.norm, device.problem.times)
    walk = fused.grid_control((), tape=None)
    walk.start(0.0, None)
    current, polynomials = fused.current(), polynomials_of(device.loop, fused)
    lam, mu, ys = (torch.randn(*shape, dtype=dtype) for shape in ((2,), (2,), (len(t) - 1, 2)))
    walk.begin_reverse(device.tape)
    for taken, step in zip(reversed(device.host.steps), reversed(read_tape(device.tape)[1]), strict=True):
        walk.load_step(device.tape)
        at, first, stop = taken.at, step.first_output, step.next_output
        for base in (None, lam):
            kappa = fused.adjoint_stage(base, [lam, mu], [0.3, -0.7], current)
            assert torch.equal(kappa, fused.adjoint_stage(base, [lam, mu], [0.3, -0.7], at))
            torch.testing.assert_close(kappa, Arithmetic.adjoint_stage(fused, base, [lam, mu], [0.3, -0.7], at))
        found = fused.dense_adjoint(polynomials, current, lam, 1, ys)
        given = ys[first:stop]
        same = fused.dense_adjoint(polynomials, at, lam, 1 + first, given)
        assert all(map(torch.equal, flat(found), flat(same)))
        plain = Arithmetic.dense_adjoint(fused, polynomials, at, lam, 1 + first, given)
        for x, y in zip(flat(found), flat(plain), strict=True):
            torch.testing.assert_close(x, y)
        walk.advance_reverse(device.tape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cotangents_of_half_states_take_the_path_of_plain_pytorch(shim, dtype):
    device = solved(torch.ones(2, dtype=dtype), linspace(0.0, 1.0, 4), "rk4", {}, 20)
    fused, at = device.fused, device.host.steps[0].at
    lam, g = torch.ones(2, dtype=dtype), torch.ones(1, 2, dtype=dtype)
    found = fused.dense_adjoint(fused.polynomials((), (1.0,)), at, lam, 1, g)
    assert torch.equal(found.lam, 2 * lam) and not found.start.any()  # the output is at the end of the step


def polynomials_of(loop: OutputLoop, fused: Fused) -> Polynomials:
    """Prepare the polynomials of the loop's outputs again."""
    own = loop.interpolant._polynomials
    return fused.polynomials(own.rows, own.end)


def flat(cotangents: DenseCotangents) -> list[Tensor]:
    return [cotangents.lam, cotangents.start, *cotangents.extra]
