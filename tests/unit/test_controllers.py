"""The PID controllers of the step size, and users' controllers: the protocol `StepSizeController`."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from problems import BY_NAME, relative_difference
from shim.pretend_gpu import CUDA
from timed import steps
from tolerances import GLOBAL_ERROR_OVER_RTOL
from torch import nn

import node_cuda
from node_cuda import InvalidInput, odeint, solve
from node_cuda.controllers import CONTROLLERS, Controller, StepSizeController

F64 = torch.float64
T = torch.tensor([0.0, 0.4, 2.0], dtype=F64)


@pytest.mark.parametrize("option", [dict(safety=0.5), dict(ifactor=1.5), dict(dfactor=0.9)], ids=str)
def test_a_more_careful_controller_takes_no_fewer_steps(option):
    _, plain = steps()
    _, careful = steps(**option)
    assert careful.stats.accepted + careful.stats.rejected >= plain.stats.accepted


@pytest.mark.parametrize("controller", ["I", "PI", "PID"])
@pytest.mark.parametrize("name", ["linear", "stiffish", "reversed", "tuple", "complex"])
def test_every_controller_reaches_the_tolerance(controller, name):
    problem = BY_NAME[name]
    ys = odeint(problem.make(), problem.y0, problem.t, rtol=1e-6, atol=1e-8, options=dict(controller=controller))
    fine = odeint(problem.make(), problem.y0, problem.t, rtol=1e-9, atol=1e-11)
    assert relative_difference(ys, fine) <= GLOBAL_ERROR_OVER_RTOL * 1e-6


def test_an_unknown_controller_is_a_value_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="PID"):
        steps(controller="PIDD")


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 3.0], dtype=F64))

    def forward(self, t, y):
        return torch.sin(self.a * t) * y


class Halving:
    """Doubles an accepted step and halves a rejected one. The state counts steps."""

    def start(self, order, options):
        return 0

    def accept(self, h, ratio, state):
        return ratio <= 1.0

    def propose(self, h, ratio, accepted, state):
        return (2.0 * h if ratio < 0.01 else h) if accepted else 0.5 * h, state + accepted


class Wrapped:
    """A controller of the package, wrapped as a user's controller."""

    def __init__(self, inner):
        self.start, self.accept, self.propose = inner.start, inner.accept, inner.propose


def found(choice, gradient="backprop", device="cpu", **more):
    field, y0 = Field().to(device), torch.ones(2, dtype=F64, device=device, requires_grad=True)
    options = dict(controller=choice, record_steps=True, **more)
    solution = solve(field, y0, T, rtol=1e-7, atol=1e-9, options=options, gradient=gradient)
    return solution, torch.autograd.grad(solution.ys[-1].sum(), (y0, field.a))


def sizes(solution):
    return [b - a for a, b in itertools.pairwise(solution.stats.step_times)]


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_controller_of_the_package_takes_the_same_steps_as_one_of_the_users(name):
    here, there = found(name), found(Wrapped(CONTROLLERS[name]))
    assert here[0].stats.step_times == there[0].stats.step_times
    assert torch.equal(here[0].ys, there[0].ys)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint", "discrete"])
def test_a_controller_of_the_users_chooses_the_steps_in_every_gradient_mode(gradient):
    solution, grads = found(Halving(), gradient)
    exact = torch.exp((1 - torch.cos(Field().a.detach() * 2)) / Field().a.detach())
    assert solution.ys[-1].detach() == pytest.approx(exact, rel=1e-5)
    for before, after in itertools.pairwise(sizes(solution)):
        octaves = math.log2(after / before)
        assert octaves == pytest.approx(round(octaves), abs=1e-9)
    assert grads[0] == pytest.approx(exact, rel=1e-5)


def test_checkpoints_replay_the_steps_of_a_controller_of_the_users():
    field, y0 = Field(), torch.ones(2, dtype=F64, requires_grad=True)
    grads = []
    for checkpoints in (None, 2):
        given = dict(options=dict(controller=Halving()), gradient="discrete", checkpoints=checkpoints)
        grads.append(torch.autograd.grad(solve(field, y0, T, **given).ys[-1].sum(), (y0, field.a)))
    assert all(map(torch.equal, *grads))


def test_the_solver_keeps_the_limits_for_any_controller():
    solution, _ = found(Halving(), max_step=0.125, first_step=0.0625)
    assert max(sizes(solution)) <= 0.125


def test_a_step_that_is_not_finite_shrinks_without_a_call_of_the_controller():
    class Told(Halving):
        def accept(self, h, ratio, state):
            assert math.isfinite(ratio)
            return super().accept(h, ratio, state)

    def rooted(t, y):
        return -torch.sqrt(0.5 - t) * y if t < 0.5 else y * math.nan

    options = dict(controller=Told(), first_step=0.4)
    t = torch.tensor([0.0, 0.3], dtype=F64)
    assert solve(rooted, torch.ones(1, dtype=F64), t, rtol=1e-4, options=options).ys.isfinite().all()


def test_the_kernels_take_a_controller_of_the_users_at_one_read_a_step(shim):
    on_kernels, _ = found(Halving(), "discrete")
    with node_cuda.backend("reference"):
        plain, _ = found(Halving(), "discrete")
    # Norms are summed in another order, which moves the first step by rounding.
    assert on_kernels.ys.detach() == pytest.approx(plain.ys.detach(), rel=1e-12)
    assert on_kernels.stats.accepted == plain.stats.accepted
    # One read of the times, three for the first step, and one for each step.
    assert on_kernels.stats.host_reads == 4 + on_kernels.stats.accepted + on_kernels.stats.rejected
    assert shim.lib.shim_launches() > 0


@pytest.mark.gpu
def test_a_controller_of_the_users_takes_the_steps_of_the_cpu_on_a_gpu():
    there, _ = found(Halving(), "discrete", CUDA)
    with node_cuda.backend("reference"):
        here, _ = found(Halving(), "discrete")
    assert there.ys.detach().cpu() == pytest.approx(here.ys.detach(), rel=1e-9)
    assert there.stats.accepted == here.stats.accepted
    assert there.stats.host_reads == 4 + there.stats.accepted + there.stats.rejected


def test_a_captured_solve_gives_the_reason_for_the_host_loop(eager):
    with torch.no_grad():
        options = dict(controller=Halving(), cuda_graph=True)
        stats = solve(Field(), torch.ones(2, dtype=F64), T, options=options).stats
    assert stats.loop == "host" and stats.why == "the controller is the user's, and its Python runs on the host"


def test_an_invalid_controller_and_an_invalid_step_size_are_refused():
    for wrong in ("pid", 3, object()):
        with pytest.raises(InvalidInput, match=r'options\["controller"\] must be one of .* \(start, accept, propose\)'):
            found(wrong)

    class Lost(Halving):
        def propose(self, h, ratio, accepted, state):
            return math.nan, state

    with pytest.raises(InvalidInput, match=r"propose of Lost must return a step size that is .* finite; got nan"):
        found(Lost())


def test_a_plain_controller_satisfies_the_protocol():
    assert isinstance(Controller(), StepSizeController)
