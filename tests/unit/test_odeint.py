"""odeint and solve: the times, states, callbacks and options that they take, and their results."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from problems import BY_NAME, F64, PROBLEMS, as_tuple, linspace, relative_difference
from shim.pretend_gpu import CUDA
from timed import LOOSE, Y, exact, steps, timed
from tolerances import GLOBAL_ERROR_OVER_RTOL, ROUNDING, rtol_and_limit
from torch import nn

import node_cuda
from node_cuda import TABLEAUS, odeint, solve

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]


# ------------------------------------------------------------------ every method, every problem
@pytest.mark.parametrize("method", ADAPTIVE)
def test_every_adaptive_method_solves_every_problem_to_its_tolerance(method):
    rtol, limit = rtol_and_limit(method, 1e-6)
    for problem in PROBLEMS:
        if problem.exact is None or (rtol > 1e-6 and problem.name == "stiffish"):
            continue
        end = problem.t[-1:]  # a step ends there, so the error is that of the method and not of its interpolant
        ys = odeint(
            problem.make(), problem.y0, problem.t, rtol=rtol, atol=rtol, method=method, options=dict(step_t=end)
        )
        assert relative_difference(as_tuple(ys)[0][-1], problem.exact(problem.t[-1])) <= limit, problem.name


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5"])
def test_outputs_between_the_steps_are_as_good_as_the_tolerance(method):
    t = linspace(0.0, 3.0, 200)
    ys = odeint(timed, Y, t, rtol=1e-5, atol=1e-5, method=method, options=dict(dense="accurate"))
    assert relative_difference(ys, exact(t)) <= GLOBAL_ERROR_OVER_RTOL * 1e-5


def test_the_first_output_is_y0_itself():
    ys = odeint(timed, Y, linspace(0.0, 1.0, 4))
    assert torch.equal(ys[0], Y)


@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4", "implicit_adams", "scipy_solver"])
def test_one_output_time_returns_y0_and_is_told_of(method):
    with pytest.warns(UserWarning, match=r"t holds one time, t\[0\] = 0\.7, at which y is y0"):
        ys = odeint(timed, Y, torch.tensor([0.7], dtype=F64), method=method)
    assert ys.shape == (1, 2)
    assert torch.equal(ys[0], Y)


def test_outputs_do_not_change_the_steps():
    few, _ = steps(t=linspace(0.0, 2.0, 2))
    many, _ = steps(t=linspace(0.0, 2.0, 301))
    assert few == many


def test_more_outputs_cost_no_evaluations():
    nfe = [steps(t=linspace(0.0, 2.0, n))[1].stats.nfe for n in (2, 301)]
    assert nfe[0] == nfe[1]


def test_odeint_is_the_ys_of_solve():
    t = linspace(0.0, 1.0, 4)
    assert torch.equal(odeint(timed, Y, t), solve(timed, Y, t).ys)


def test_the_same_inputs_give_the_same_bits():
    problem = BY_NAME["mlp"]
    runs = [odeint(problem.make(), problem.y0, problem.t) for _ in range(2)]
    assert torch.equal(*runs)


# ------------------------------------------------------------------ time
@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4", "implicit_adams"])
def test_time_runs_backwards(method):
    t = linspace(1.0, -1.0, 5)
    rtol, limit = rtol_and_limit(method, 1e-5)
    if method in ADAPTIVE:
        options = dict(step_t=t[-1:])
    else:
        options = dict(step_size=0.02, **(dict(max_order=4) if method == "implicit_adams" else {}))
    ys = odeint(timed, Y, t, rtol=rtol, atol=rtol, method=method, options=options)
    assert ys.shape == (5, 2)
    assert relative_difference(ys[-1], exact(t)[-1]) <= limit


def test_the_time_that_the_field_sees_has_the_real_dtype_of_the_state():
    for dtype, real in (
        (torch.float32, torch.float32),
        (F64, F64),
        (torch.complex64, torch.float32),
        (torch.complex128, F64),
    ):
        seen = set()

        def func(t, y, seen=seen):
            seen.add((t.dtype, t.shape, y.dtype))
            return -y

        for method in ("dopri5", "rk4"):
            odeint(
                func,
                torch.ones(2, dtype=dtype),
                torch.tensor([0.0, 1.0], dtype=real),
                method=method,
                rtol=1e-3,
                atol=1e-3,
            )
        assert seen == {(real, torch.Size([]), dtype)}


@pytest.mark.parametrize("t_dtype", [torch.float32, F64])
@pytest.mark.parametrize("y_dtype", [torch.float32, F64])
def test_time_and_state_may_be_of_different_precision(t_dtype, y_dtype):
    ys = odeint(timed, Y.to(y_dtype), torch.tensor([0.0, 1.0], dtype=t_dtype), rtol=1e-5, atol=1e-5)
    assert ys.dtype == y_dtype
    assert relative_difference(ys[-1].double(), exact(linspace(0.0, 1.0, 2))[-1]) < 1e-3


def test_steps_are_added_up_in_double_precision_also_for_float32():
    """In float32 arithmetic, ten thousand steps of 1e-4 would end 5e-5 away from 1."""
    ys = odeint(
        lambda t, y: torch.ones_like(y),
        torch.zeros(1),
        torch.tensor([0.0, 1.0]),
        method="dopri5",
        options=dict(first_step=1e-3, max_step=1e-3),
        **LOOSE,
    )
    assert float(ys[-1, 0]) == pytest.approx(1.0, abs=2e-5)


# ------------------------------------------------------------------ states
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 3, 1)], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4", "explicit_adams"])
def test_states_of_any_shape(method, shape):
    y0 = torch.rand(shape, dtype=F64) + 0.5
    t = linspace(0.0, 1.0, 41)
    ys = odeint(timed, y0, t, rtol=1e-5, atol=1e-7, method=method)
    assert ys.shape == (41, *shape)
    truth = y0 * torch.exp(torch.sin(t)).reshape(-1, *[1] * len(shape))
    assert relative_difference(ys, truth) < 1e-3


def test_a_state_that_is_not_contiguous():
    y0 = torch.rand(4, 3, dtype=F64).T
    strided = odeint(timed, y0, linspace(0.0, 1.0, 3))
    assert relative_difference(strided, odeint(timed, y0.contiguous(), linspace(0.0, 1.0, 3))) < 1e-14
    assert (
        relative_difference(
            odeint(timed, torch.ones((), dtype=F64).expand(3), linspace(0.0, 1.0, 3)),
            odeint(timed, torch.ones(3, dtype=F64), linspace(0.0, 1.0, 3)),
        )
        < 1e-14
    )


def test_a_tuple_state_gives_a_tuple_of_solutions():
    problem = BY_NAME["tuple"]
    angle, speed = odeint(problem.make(), problem.y0, problem.t)
    assert angle.shape == speed.shape == (len(problem.t), 2, 2)


def test_a_tuple_may_hold_states_of_different_shapes_and_the_field_may_return_a_list():
    y0 = (torch.ones((), dtype=F64), torch.ones(2, 3, dtype=F64), torch.ones(1, dtype=F64))

    def func(t, state):
        assert isinstance(state, tuple) and [part.shape for part in state] == [part.shape for part in y0]
        return [part * torch.cos(t) for part in state]

    t = linspace(0.0, 1.0, 3)
    for part, start in zip(odeint(func, y0, t), y0, strict=True):
        assert part.shape == (3, *start.shape)
        assert relative_difference(part[-1], start * math.exp(math.sin(1.0))) < 1e-6


def test_a_tuple_of_one_state_stays_a_tuple():
    (ys,) = odeint(lambda t, state: (timed(t, state[0]),), (Y,), linspace(0.0, 1.0, 3))
    assert relative_difference(ys, odeint(timed, Y, linspace(0.0, 1.0, 3))) < 1e-12


def test_a_tuple_of_mixed_precision_is_promoted():
    single, double = odeint(
        lambda t, s: (-s[0], -s[1]), (torch.ones(2), torch.ones(2, dtype=F64)), linspace(0.0, 1.0, 3)
    )
    assert single.dtype == double.dtype == F64


def test_tuples_may_mix_real_and_complex_states():
    y0 = (torch.ones(2, dtype=F64), torch.ones(1, dtype=torch.complex128))
    real, turning = odeint(lambda t, s: (-s[0], 1j * s[1]), y0, linspace(0.0, 1.0, 3))
    assert torch.allclose(real[-1].real, torch.exp(torch.tensor(-1.0, dtype=F64)).expand(2))
    assert torch.allclose(turning[-1], torch.exp(torch.tensor(1j, dtype=torch.complex128)))


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "rk4", "implicit_adams"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_states(method, dtype):
    real = torch.float32 if dtype == torch.complex64 else F64
    y0 = torch.tensor([1.0 + 1.0j, -0.5j], dtype=dtype)
    t = torch.linspace(0, 1, 21, dtype=real)
    if method == "implicit_adams":
        options = dict(step_size=0.02, max_order=4)
    else:
        options = {} if method == "rk4" else dict(step_t=t[-1:])
    ys = odeint(lambda t, y: 2j * y, y0, t, rtol=1e-4, atol=1e-4, method=method, options=options)
    assert ys.dtype == dtype
    assert relative_difference(ys[-1], y0 * torch.exp(torch.tensor(2j, dtype=dtype))) < 1e-3


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "midpoint"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states(method, dtype):
    y0 = torch.tensor([1.0, -2.0], dtype=dtype)
    t = torch.linspace(0, 1, 5)
    options = dict(step_t=t[-1:]) if method in ADAPTIVE else {}
    ys = odeint(lambda t, y: -y, y0, t, rtol=1e-2, atol=1e-2, method=method, options=options)
    assert ys.dtype == dtype
    truth = y0.double() * math.exp(-1)
    assert relative_difference(ys[-1].double(), truth) < ROUNDING[dtype] / 10 + 1e-2


def test_half_precision_states_change_if_a_step_is_below_their_resolution():
    """Stage combinations are accumulated in float32: one hundred steps of 0.01 add up to one."""
    ys = odeint(
        lambda t, y: torch.ones_like(y),
        torch.zeros(1, dtype=torch.bfloat16),
        torch.tensor([0.0, 1.0]),
        method="dopri5",
        options=dict(first_step=0.25, max_step=0.25),
        rtol=1e-1,
        atol=1e-1,
    )
    assert float(ys[-1]) == pytest.approx(1.0, abs=2**-6)


# ------------------------------------------------------------------ callbacks
class Reporting(nn.Module):
    def __init__(self, func=timed):
        super().__init__()
        self.__dict__["func"] = func
        self.calls: list[tuple[str, float, torch.Tensor, float]] = []

    def forward(self, t, y):
        return self.func(t, y)

    def _note(self, name, t0, y0, dt):
        for value in (t0, dt):
            assert isinstance(value, torch.Tensor) and value.shape == (), "t0 and dt are 0-d tensors"
        self.calls.append((name, float(t0), y0, float(dt)))

    def callback_step(self, t0, y0, dt):
        self._note("step", t0, y0, dt)

    def callback_accept_step(self, t0, y0, dt):
        self._note("accept", t0, y0, dt)

    def callback_reject_step(self, t0, y0, dt):
        self._note("reject", t0, y0, dt)

    def count(self, name):
        return sum(call[0] == name for call in self.calls)


def test_callbacks_get_every_step():
    func = Reporting(lambda t, y: torch.where(t < 0.5, 1.0, 50.0) * torch.cos(40 * t) * y)
    times, solution = steps(func, first_step=0.4)
    accepted, rejected = solution.stats.accepted, solution.stats.rejected
    assert rejected > 0
    assert (func.count("accept"), func.count("reject"), func.count("step")) == (accepted, rejected, accepted + rejected)
    starts = [t0 for name, t0, _, _ in func.calls if name == "accept"]
    assert starts == pytest.approx(times[:-1])
    ends = [t0 + dt for name, t0, _, dt in func.calls if name == "accept"]
    assert ends == pytest.approx(times[1:])


def test_callbacks_of_a_tuple_state_get_a_tuple():
    func = Reporting(BY_NAME["tuple"].make())
    odeint(func, BY_NAME["tuple"].y0, BY_NAME["tuple"].t)
    assert all(isinstance(y0, tuple) and y0[0].shape == (2, 2) for _, _, y0, _ in func.calls)


def test_callbacks_get_the_users_time_when_time_runs_backwards():
    func = Reporting()
    odeint(func, Y, linspace(2.0, 1.0, 2))
    assert all(0.5 < t0 <= 2.0 for _, t0, _, _ in func.calls)


def test_callbacks_of_a_plain_object_are_called_too():
    class Field:
        calls = 0

        def __call__(self, t, y):
            return timed(t, y)

        def callback_step(self, t0, y0, dt):
            Field.calls += 1

    odeint(Field(), Y, linspace(0.0, 1.0, 2))
    assert Field.calls > 0


# ------------------------------------------------------------------ options
@pytest.mark.parametrize("odeint", [node_cuda.odeint, node_cuda.odeint_adjoint], ids=["odeint", "odeint_adjoint"])
def test_option_dicts_are_never_written_to(odeint):
    options = dict(first_step=0.1, step_t=torch.tensor([0.5, 0.25], dtype=F64), norm=lambda y: y.abs().max())
    adjoint_options = dict(first_step=0.1)
    before, adjoint_before = copy.copy(options), copy.copy(adjoint_options)
    step_t = options["step_t"].clone()
    extra = {} if odeint is node_cuda.odeint else dict(adjoint_options=adjoint_options, adjoint_params=())
    y0 = Y.clone().requires_grad_()
    odeint(timed, y0, linspace(1.0, 0.0, 3), method="dopri5", options=options, **extra).sum().backward()
    assert options == before and torch.equal(options["step_t"], step_t)
    assert adjoint_options == adjoint_before


def test_the_input_times_are_never_written_to():
    t = linspace(1.0, 0.0, 3)
    before = t.clone()
    odeint(timed, Y, t)
    assert torch.equal(t, before)


# ------------------------------------------------------------------ unusual circumstances
def test_a_solve_inside_inference_mode_and_without_gradients():
    t = linspace(0.0, 1.0, 3)
    plain = odeint(timed, Y, t)
    with torch.inference_mode():
        assert torch.equal(odeint(timed, Y, t), plain)
    with torch.no_grad():
        assert torch.equal(odeint(timed, Y, t), plain)


def test_a_solve_inside_a_field():
    def func(t, y):
        return -odeint(timed, y, linspace(0.0, 0.5, 2), rtol=1e-6, atol=1e-8)[-1]

    rate = math.exp(math.sin(0.5))
    ys = odeint(func, Y, linspace(0.0, 1.0, 2), rtol=1e-6, atol=1e-8)
    assert relative_difference(ys[-1], Y * math.exp(-rate)) < 1e-4


def test_a_zero_field_takes_few_steps():
    solution = solve(lambda t, y: torch.zeros_like(y), Y, linspace(0.0, 100.0, 2))
    assert torch.equal(solution.ys[-1], Y)
    assert solution.stats.nfe < 100


def test_a_state_of_zeros_is_solved():
    ys = odeint(lambda t, y: torch.ones_like(y), torch.zeros(3, dtype=F64), linspace(0.0, 1.0, 2))
    assert torch.allclose(ys[-1], torch.ones(3, dtype=F64))


def test_very_long_and_very_short_intervals():
    for scale in (1e-12, 1e12):
        ys = odeint(lambda t, y, scale=scale: -y / scale, Y, linspace(0.0, 1.0, 2) * scale)
        assert relative_difference(ys[-1], Y * math.exp(-1)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", [problem.name for problem in PROBLEMS if problem.name != "linear"])  # a CPU matrix
@torch.no_grad()
def test_a_gpu_gives_the_cpus_solution(name):
    problem = BY_NAME[name]
    func, device = problem.make(), CUDA
    here = odeint(func, problem.y0, problem.t, rtol=1e-6, atol=1e-8)
    y0 = tuple(part.to(device) for part in as_tuple(problem.y0))
    if isinstance(func, nn.Module):
        func = func.to(device)
    there = odeint(func, y0 if isinstance(problem.y0, tuple) else y0[0], problem.t.to(device), rtol=1e-6, atol=1e-8)
    there = tuple(part.cpu() for part in there) if isinstance(there, tuple) else there.cpu()
    assert relative_difference(there, here) < 1e-9
