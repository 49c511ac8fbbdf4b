"""gradient="discrete": the exact gradient of the computed steps, recomputed from the states that they began with."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from functools import cache, partial

import pytest
import torch
from problems import F64, MLP, Counting, Parted, TimedLinear, as_tuple, linspace, loss_of, relative_difference
from tolerances import GLOBAL_ERROR_OVER_RTOL
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from node_cuda import TABLEAUS, odeint, odeint_adjoint, odeint_event, solve
from node_cuda.gradients.discrete import mode as discrete_mode
from node_cuda.gradients.discrete import step_adjoint, whole_step
from node_cuda.gradients.discrete.checkpoints import Checkpoints
from node_cuda.gradients.discrete.memory import graph_size
from node_cuda.status import InvalidInput, Status, Unsupported

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
FIXED = [name for name, tableau in TABLEAUS.items() if not tableau.adaptive]
EVERY = [*ADAPTIVE, *FIXED]
Y = torch.tensor([0.7, -0.4], dtype=F64)
W = torch.tensor([[0.3, -1.1], [0.8, 0.2]], dtype=F64)

# Two orders of summation of the same hundred or so float64 terms, each of the size of the result: 1e-14 was measured.
SAME = 1e-10
# The same replay from a state that was recomputed with the same arithmetic. Only the parameter sums may be split anew.
AGAIN = 1e-13
# Complex-step differentiation has no truncation error: only the roundings of some hundred stages remain.
COMPLEX_STEP = 1e-12


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def curved(w):
    """A field that depends on t, is not linear in y, and has the parameter w; holomorphic in y and w."""
    return lambda t, y: torch.tanh(y @ w.T) * torch.cos(t) + 0.1 * y * y


def asked(method, **options):
    """Return settings with which a method takes some five to thirty steps on an interval of length two, or eleven."""
    if method in FIXED:
        return dict(method=method, options=dict(step_size=0.19, **options))
    rtol = {"adaptive_heun": 1e-3, "fehlberg2": 1e-4, "bosh3": 1e-4, "dopri8": 1e-9}.get(method, 1e-6)
    return dict(method=method, rtol=rtol, atol=rtol, options=options)


def discrete_and_backprop(
    make, starts, t, *, checkpoints=(None,), params=(W,), wants_t=False, loss=loss_of, **arguments
):
    """Return [(gradients by "discrete", stats) for each of `checkpoints`], and the gradients by "backprop".

    The loss depends on all outputs.

    make(*params) gives the field; starts: one tensor, or the components of a tuple state.
    """

    def gradients(mode, **more):
        y0 = tuple(map(leaf, as_tuple(starts)))
        ps, time = tuple(map(leaf, params)), leaf(t) if wants_t else t
        if mode == "discrete":
            more |= dict(adjoint_params=ps)
        solution = solve(
            make(*ps), y0 if isinstance(starts, tuple) else y0[0], time, gradient=mode, **more, **arguments
        )
        wanted = [*y0, *ps, *([time] if wants_t else [])]
        return torch.autograd.grad(loss(solution.ys), wanted), solution.stats

    truth, stats = gradients("backprop")
    found = [gradients("discrete", checkpoints=c) for c in checkpoints]
    for _, ours in found:
        assert (ours.accepted, ours.rejected) == (stats.accepted, stats.rejected)
    return found, truth


def assert_same(make, starts, t, *, least_steps=3, limit=SAME, **arguments):
    found, truth = discrete_and_backprop(make, starts, t, **arguments)
    assert all(float(part.abs().max()) > 1e-6 for part in truth), "a gradient of zero tells nothing"
    for grads, stats in found:
        assert stats.accepted >= least_steps
        for ours, right in zip(grads, truth, strict=True):
            assert ours.dtype == right.dtype and ours.shape == right.shape
            assert relative_difference(ours, right) <= limit
    return found


# ------------------------------------------------------------------ the gradients of autograd through the same steps
LAYOUTS = {
    "one output at the end": linspace(0.0, 2.0, 2),
    "outputs inside of steps": torch.tensor([0.0, 0.31, 0.55, 1.27, 1.9], dtype=F64),
    "many outputs in each step": linspace(0.0, 2.0, 60),
    "none between, then many": torch.cat([torch.zeros(1, dtype=F64), linspace(1.7, 1.75, 9)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", EVERY)
def test_gradients_are_those_of_backprop_for_outputs_at_any_time(method, layout):
    assert_same(curved, Y, LAYOUTS[layout], **asked(method))


@pytest.mark.parametrize("method", EVERY)
def test_gradients_are_those_of_backprop_when_outputs_lie_at_the_ends_of_steps(method):
    t = torch.tensor([0.0, 0.25, 0.5, 1.1, 1.5], dtype=F64)
    if method in ADAPTIVE:
        arguments = asked(method, step_t=t[1:], record_steps=True)
        found = assert_same(curved, Y, t, **arguments)
        assert set(t.tolist()) <= set(found[0][1].step_times)
    else:
        assert_same(curved, Y, t, method=method)


@pytest.mark.parametrize("method", EVERY)
def test_gradients_are_those_of_backprop_with_any_number_of_checkpoints(method):
    found = assert_same(curved, Y, linspace(0.0, 2.0, 12), checkpoints=(1, 2, 3, 8, "auto"), **asked(method))
    for slots, (_, stats) in zip((1, 2, 3, 8), found, strict=False):
        assert 1 <= stats.peak_checkpoints <= slots
    assert found[0][1].recomputed_steps > found[2][1].recomputed_steps > 0 == found[4][1].recomputed_steps


@pytest.mark.parametrize("method", ADAPTIVE)
def test_gradients_are_those_of_backprop_with_accurate_interpolants(method):
    t = LAYOUTS["outputs inside of steps"]
    assert_same(curved, Y, t, checkpoints=(None, 2), **asked(method, dense="accurate"))


@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("method", FIXED)
def test_gradients_are_those_of_backprop_on_a_grid_with_outputs_on_chords_and_cubics(method, interp, perturb):
    t = LAYOUTS["outputs inside of steps"]
    assert_same(curved, Y, t, checkpoints=(None, 2), **asked(method, interp=interp, perturb=perturb))


JUMPS = torch.tensor([0.6, 1.3], dtype=F64)


def jumping(w):
    """A field that is discontinuous at 0.6 and 1.3. At 0.6 it is still the old field, at 1.3 already the new one."""
    return lambda t, y: torch.tanh(y @ w.T) * torch.where(t <= 0.6, 1.0, torch.where(t < 1.3, -2.0, 3.0))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_gradients_are_those_of_backprop_across_jumps(method, backwards):
    t = torch.tensor([0.0, 0.31, 0.6, 0.61, 1.2, 1.9], dtype=F64)
    arguments = asked(method, jump_t=JUMPS, record_steps=True)
    found = assert_same(jumping, Y, t.flip(0) if backwards else t, checkpoints=(None, 2), **arguments)
    assert {0.6, 1.3} <= set(found[0][1].step_times)


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
def test_gradients_are_those_of_backprop_if_the_solve_begins_at_a_jump(method):
    t = torch.tensor([0.6, 1.0, 1.2], dtype=F64)
    assert_same(jumping, Y, t, checkpoints=(None, 1), least_steps=1, **asked(method, jump_t=JUMPS))


@pytest.mark.parametrize("method", FIXED)
def test_gradients_are_those_of_backprop_if_perturb_decides_the_side_of_a_jump(method):
    """The grid points 0.6 and 1.3 are discontinuities: without `perturb` the stages there see another field."""
    t = torch.tensor([0.0, 0.6, 0.9, 1.3, 1.9], dtype=F64)
    seen = []
    for perturb in (False, True):
        found = assert_same(jumping, Y, t, checkpoints=(None, 2), method=method, options=dict(perturb=perturb))
        seen.append(found[0][0][1])
    assert relative_difference(*seen) > 1e-3


@pytest.mark.parametrize("method", EVERY)
def test_gradients_are_those_of_backprop_when_time_runs_backwards(method):
    t = torch.tensor([1.9, 1.4, 1.35, 0.2, -0.1], dtype=F64)
    assert_same(curved, Y, t, checkpoints=(None, 2), **asked(method))


@pytest.mark.parametrize("method", EVERY)
def test_gradients_are_those_of_backprop_for_tuple_states(method):
    def make(w):
        return lambda t, s: (torch.tanh(s[0] @ w.T) * s[1].sum(), -s[1] * torch.cos(t) + s[0][:1])

    starts = (Y, torch.tensor([[0.5]], dtype=F64))
    assert_same(make, starts, linspace(0.0, 2.0, 5), checkpoints=(None, 2), **asked(method))


@pytest.mark.parametrize("method", EVERY)
def test_gradients_are_those_of_backprop_for_complex_states(method):
    """The field is not holomorphic, so that a forgotten conjugate changes the result."""
    y0 = torch.tensor([0.5 + 0.2j, -0.3j], dtype=torch.complex128)
    w = torch.tensor([0.3 + 1j, -0.5 + 0.1j], dtype=torch.complex128)

    def make(w):
        return lambda t, y: (w * y + 1j * y.conj()) * torch.cos(t)

    t = LAYOUTS["outputs inside of steps"]
    assert_same(make, y0, t, params=(w,), checkpoints=(None, 2), **asked(method))


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
def test_gradients_are_those_of_backprop_with_per_element_tolerances_and_a_custom_norm(method):
    t = LAYOUTS["outputs inside of steps"]
    tolerances = dict(rtol=torch.tensor([1e-4, 1e-2], dtype=F64), atol=torch.tensor([1e-3, 1e-5], dtype=F64))
    assert_same(curved, Y, t, method=method, checkpoints=(None, 2), **tolerances)
    assert_same(curved, Y, t, checkpoints=(None, 2), **asked(method, norm=lambda y: y.abs().max()))


@pytest.mark.parametrize("method", ["dopri5", "fehlberg2"])
def test_rejected_steps_do_not_affect_the_gradient(method):
    found = assert_same(
        lambda w: lambda t, y: torch.sin(8 * t) * (y @ w.T),
        Y,
        linspace(0.0, 2.0, 9),
        method=method,
        rtol=1e-4,
        atol=1e-4,
        checkpoints=(None, 2),
        options=dict(first_step=1.5),
    )
    assert found[0][1].rejected > 0


def test_the_gradient_of_some_outputs_only():
    """The cotangent of the others is zero, even if autograd sends none. Steps after the last one add nothing."""
    t = linspace(0.0, 2.0, 5)
    assert_same(curved, Y, t, loss=lambda ys: ys[2, 0], **asked("dopri5"))
    make = lambda w: lambda t, s: (torch.tanh(s[0] @ w.T), -s[1])  # noqa: E731
    found, truth = discrete_and_backprop(make, (Y, Y), t, loss=lambda ys: ys[0][1, 0], **asked("dopri5"))
    assert relative_difference(found[0][0], truth) <= SAME


@pytest.mark.filterwarnings("ignore:t holds one time")
def test_with_one_output_time_the_gradient_of_y0_is_that_of_the_output():
    y0 = leaf(Y)
    ys = odeint_adjoint(lambda t, y: -y, y0, linspace(0.0, 0.0, 1), adjoint_params=(), gradient="discrete")
    assert torch.equal(torch.autograd.grad(ys.sum(), y0)[0], torch.ones_like(Y))


# ------------------------------------------------------------------ complex-step and finite differences of the solve
def steps_of(method, h):
    """Return settings for steps of size h that do not depend on the state, which may be complex."""
    if method in FIXED:
        return dict(method=method, options=dict(step_size=h, interp="cubic"))
    return dict(method=method, rtol=1e3, atol=1e3, options=dict(first_step=h, max_step=h, controller="I"))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "rk4"])
def test_gradients_are_those_of_complex_step_differentiation(method, backwards):
    t = torch.tensor([0.0, 0.1, 0.2, 0.75, 1.0, 1.13], dtype=F64) * (-1 if backwards else 1)
    settings, tiny = steps_of(method, 0.25), 1e-30
    y0, w = leaf(Y), leaf(W)
    solution = solve(curved(w), y0, t, gradient="discrete", adjoint_params=(w,), checkpoints=2, **settings)
    weights = torch.linspace(0.5, 1.5, solution.ys.numel(), dtype=F64).reshape(solution.ys.shape)
    assert solution.stats.accepted == 5
    grads = torch.autograd.grad((weights * solution.ys).sum(), [y0, w])

    def derivative(y_direction, w_direction):
        ys = odeint(curved(W + tiny * 1j * w_direction), Y + tiny * 1j * y_direction, t, **settings)
        return float((weights * ys.imag).sum()) / tiny

    def units(x):
        return torch.eye(x.numel(), dtype=F64).reshape(-1, *x.shape)

    of_y0 = torch.tensor([derivative(e, torch.zeros_like(W)) for e in units(Y)], dtype=F64)
    of_w = torch.tensor([derivative(torch.zeros_like(Y), e) for e in units(W)], dtype=F64).reshape(W.shape)
    assert relative_difference(grads[0], of_y0) <= COMPLEX_STEP
    assert relative_difference(grads[1], of_w) <= COMPLEX_STEP


# ------------------------------------------------------------------ the gradient of the times
def stretched(func, y0, t):
    """An uneven grid of eight steps that moves with both ends."""
    return t[0] + (t[-1] - t[0]) * torch.linspace(0, 1, 9, dtype=F64) ** 1.5


GRIDS = {
    "of the outputs": dict(),
    "of a step size": dict(step_size=0.19),
    "of one's own": dict(grid_constructor=stretched),
}


@pytest.mark.parametrize("interp, backwards", [("linear", False), ("cubic", True)])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", FIXED)
def test_the_gradient_of_the_times_is_exact_on_a_fixed_grid(method, grid, interp, backwards):
    t = torch.tensor([0.0, 0.31, 0.55, 0.6, 1.27, 1.9], dtype=F64)
    options = GRIDS[grid] | dict(interp=interp)
    t = t.flip(0) if backwards else t
    assert_same(curved, Y, t, wants_t=True, checkpoints=(None, 2), method=method, options=options)


@pytest.mark.parametrize("state", ["tuple", "complex"])
def test_the_gradient_of_the_times_is_exact_on_a_fixed_grid_for_every_kind_of_state(state):
    t = torch.tensor([0.0, 0.31, 0.55, 1.27], dtype=F64)
    if state == "tuple":
        make, y0, w = (lambda w: lambda t, s: (torch.tanh(s[0] @ w.T) * torch.cos(t), s[0] * s[1])), (Y, Y + 1), W
    else:
        make, y0 = (lambda w: lambda t, y: (w * y + 1j * y.conj()) * torch.cos(t)), torch.complex(Y, Y + 1)
        w = torch.tensor([0.3 + 1j, -0.5 + 0.1j], dtype=torch.complex128)
    options = dict(step_size=0.2, interp="cubic")
    assert_same(make, y0, t, wants_t=True, params=(w,), method="rk4", options=options)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "bosh5"])
def test_the_gradient_of_the_times_is_that_of_the_solution_in_adaptive_methods(method, backwards):
    """dL/dt_m = g_m . f(t_m, y_m) and dL/dt_0 = -dL/dy_0 . f(t_0, y_0), of the exact flow: right to the tolerance."""
    func, y0, rtol = TimedLinear(), leaf(Y), 1e-9
    t = leaf(linspace(1.5, -0.5, 5) if backwards else linspace(0.3, 2.0, 5))
    ys = odeint_adjoint(
        func, y0, t, rtol=rtol, atol=rtol, method=method, gradient="discrete", options=dict(dense="accurate")
    )
    grads = torch.autograd.grad(loss_of(ys), [t, y0, func.A])
    truth = torch.autograd.grad(loss_of(func.exact(y0, t)), [t, y0, func.A])
    for ours, right in zip(grads, truth, strict=True):
        assert relative_difference(ours, right) <= GLOBAL_ERROR_OVER_RTOL * rtol


def test_the_gradient_of_the_times_is_the_slope_of_the_computed_outputs():
    """Check the formula at a loose tolerance: g_m . f at the computed y_m, to rounding."""
    t, y0 = leaf(linspace(0.0, 2.0, 5)), leaf(Y)
    ys = odeint_adjoint(curved(W), y0, t, rtol=1e-3, atol=1e-3, gradient="discrete", adjoint_params=())
    g = torch.linspace(0.5, 1.5, ys.numel(), dtype=F64).reshape(ys.shape)
    adj_t, adj_y0 = torch.autograd.grad((g * ys).sum(), [t, y0])
    f = torch.stack([curved(W)(s, y) for s, y in zip(t.detach(), ys.detach(), strict=True)])
    expected = (g * f).sum(1)
    expected[0] = -((adj_y0 - g[0]) * f[0]).sum()  # the output at t[0] is y0 itself and does not move
    assert relative_difference(adj_t, expected) <= SAME


# ------------------------------------------------------------------ events
class Falling(nn.Module):
    """A fall with friction. Gravity and friction have one parameter each."""

    def __init__(self):
        super().__init__()
        self.gravity, self.drag = (nn.Parameter(torch.tensor(x, dtype=F64)) for x in (9.8, 0.3))

    def forward(self, t, y):
        return torch.stack([y[1], -self.gravity - self.drag * y[1] * y[1].abs()])


@pytest.mark.parametrize("checkpoints", [None, 2])
@pytest.mark.parametrize("named", [False, True], ids=["parameters of func", "adjoint_params"])
@pytest.mark.parametrize("settings", [dict(rtol=1e-5, atol=1e-7), dict(method="rk4", options=dict(step_size=0.07))])
def test_the_gradient_of_an_event_is_that_of_backprop(settings, named, checkpoints):
    found = []
    for mode in ("backprop", "discrete"):
        func, y0 = Falling(), leaf(torch.tensor([10.0, 1.0], dtype=F64))
        interface = odeint
        if mode == "discrete":
            params = dict(adjoint_params=tuple(func.parameters())) if named else {}
            interface = partial(odeint_adjoint, gradient="discrete", checkpoints=checkpoints, **params)
        event_t, ys = odeint_event(
            func, y0, torch.zeros(1, dtype=F64), event_fn=lambda t, y: y[0], odeint_interface=interface, **settings
        )
        assert 1.0 < float(event_t.detach()) < 3.0
        wanted = [y0, *func.parameters()]
        found.append(
            [
                *torch.autograd.grad(event_t, wanted, retain_graph=True),
                *torch.autograd.grad(loss_of(ys), wanted, retain_graph=True),
                *torch.autograd.grad(event_t + ys[-1, 1], wanted),
            ]
        )
    for right, ours in zip(*found, strict=True):
        assert float(right.abs().max()) > 1e-6
        assert relative_difference(ours, right) <= SAME


def test_through_the_state_of_an_event_only_the_starting_time_has_a_gradient():
    """For y' = -y, dy(t*)/dt_0 = y(t*) at constant t*. t[1] only gives the direction. t* moves with t_0."""
    t, y0 = leaf(linspace(0.0, 1.0, 2)), leaf(Y.abs())
    event_t, ys = odeint_adjoint(
        lambda t, y: -y, y0, t, event_fn=lambda t, y: y[0] - 0.2, gradient="discrete", adjoint_params=()
    )
    torch.testing.assert_close(
        torch.autograd.grad(event_t, t, retain_graph=True)[0], torch.tensor([1.0, 0.0], dtype=F64), rtol=0, atol=1e-6
    )
    (grad,) = torch.autograd.grad(ys[1].sum(), t)
    assert grad[1] == 0
    assert float(grad[0]) == pytest.approx(float(ys[1].detach().sum()), rel=GLOBAL_ERROR_OVER_RTOL * 1e-7)


# ------------------------------------------------------------------ the cost of the backward pass
class Tally(torch.autograd.Function):
    """The identity, which counts the cotangents that pass it."""

    count = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Tally.count += 1
        return grad


def vjps(t, **arguments):
    """Return (the vjps of the backward pass, its evaluations, stats)."""
    w, y0 = leaf(W), leaf(Y)
    func = Counting(lambda t, y: Tally.apply(curved(w)(t, y)))
    solution = solve(func, y0, t, gradient="discrete", adjoint_params=(w,), **arguments)
    Tally.count, before = 0, func.nfe
    torch.autograd.grad(loss_of(solution.ys), [y0, w])
    assert solution.stats.nfe_backward == func.nfe - before
    return Tally.count, func.nfe - before, solution.stats


def test_a_step_costs_six_vjps_for_any_number_of_outputs():
    counts = set()
    for n in (2, 20, 200):
        count, nfe, stats = vjps(linspace(0.0, 2.0, n), rtol=1e-6, atol=1e-6)
        assert count <= nfe <= 6 * stats.accepted + 1
        counts.add((count, stats.accepted))
    assert len(counts) == 1


def test_outputs_in_the_last_step_cost_one_vjp_more():
    end = torch.tensor([0.0, 0.3, 0.7, 2.0], dtype=F64)
    settings = dict(rtol=1e-6, atol=1e-6, options=dict(step_t=end[-1:], record_steps=True))
    middle = sum(solve(curved(W), Y, end, **settings).stats.step_times[-2:]) / 2
    inside = torch.tensor([0.0, 0.3, 0.7, middle, 2.0], dtype=F64)
    for t, more in ((inside, 1), (end, 0), (end[[0, -1]], 0)):
        count, _, stats = vjps(t, **settings)
        assert stats.accepted >= 5
        assert count == 6 * stats.accepted + more


@pytest.mark.parametrize("dense", ["default", "accurate"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_outputs_at_the_ends_of_steps_cost_no_evaluation(method, dense):
    t = torch.tensor([0.0, 0.25, 1.1, 2.0], dtype=F64)
    options = dict(step_t=t[1:], dense=dense)
    count, nfe, stats = vjps(t, method=method, rtol=1e-4, atol=1e-4, options=options)
    assert count == nfe == (TABLEAUS[method].stages - 1) * stats.accepted


@pytest.mark.parametrize("checkpoints", [1, 2, 4])
def test_a_recomputed_step_costs_its_six_evaluations_and_no_vjp(checkpoints):
    settings = dict(rtol=1e-6, atol=1e-6)
    count, nfe, stats = vjps(linspace(0.0, 2.0, 2), checkpoints=checkpoints, **settings)
    assert stats.recomputed_steps > 0
    assert count == 6 * stats.accepted + 1  # (the last output lies inside the last step)
    assert nfe == count + 6 * stats.recomputed_steps


def test_a_step_of_the_classical_method_costs_four_vjps():
    count, nfe, stats = vjps(linspace(0.0, 2.0, 9), method="rk4")
    assert count == nfe == 4 * stats.accepted == 32


def test_a_solve_without_a_backward_pass_costs_the_same_as_any_solve():
    nfe = [
        solve(curved(W), leaf(Y), linspace(0.0, 2.0, 5), gradient=mode, adjoint_params=()).stats.nfe
        for mode in ("backprop", "discrete")
    ]
    assert nfe[0] == nfe[1]


# ------------------------------------------------------------------ checkpoints: the number of recomputed steps
def reversal(steps, slots, count=None):
    """Return (recomputed steps, largest number of states), with numbers as states. Check the order and every state."""
    checkpoints, again, seen = Checkpoints(slots, count), [], []
    for i in range(steps):
        checkpoints.offer(i, i)
        assert checkpoints.peak <= (slots or steps)

    def advance(i, state):
        assert state == i
        again.append(i)
        return state + 1

    def back(i, state):
        assert state == i
        seen.append(i)

    checkpoints.reverse(advance, back)
    assert seen == list(range(steps))[::-1]
    assert checkpoints.spent
    return len(again), checkpoints.peak


def griewank(steps, slots):
    """(r - 1) N - C(c + r, r - 1) + 1 with the least r for which N <= C(c + r, c): Griewank and Walther 2000."""
    r = next(r for r in itertools.count() if steps <= math.comb(slots + r, slots))
    return (r - 1) * steps - (math.comb(slots + r, r - 1) if r else 0) + 1


@cache
def fewest(steps, slots):
    """Return the fewest steps, including those of the forward solve, by a search over all places of the next state."""
    if steps <= 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(m + fewest(steps - m, slots - 1) + fewest(m, slots) for m in range(1, steps))


@pytest.mark.parametrize("slots", range(1, 9))
def test_the_fewest_steps_are_recomputed_if_their_number_is_known(slots):
    for steps in range(1, 41):
        again, peak = reversal(steps, slots, steps)
        assert again == griewank(steps, slots) == fewest(steps, slots) - (steps - 1)
        assert peak <= slots


@pytest.mark.parametrize("slots", [2, 3, 4, 7, 8, 16, 31, 32])
def test_at_most_twice_the_fewest_steps_are_recomputed_if_their_number_is_unknown(slots):
    for steps in [*range(2 * slots, 8 * slots), 10 * slots, 13 * slots + 5, 40 * slots, 1000]:
        again, peak = reversal(steps, slots)
        assert again <= 2 * griewank(steps, slots), steps
        assert peak <= slots


@pytest.mark.parametrize("slots", [2, 3, 4, 8, 16, 31, 32])
def test_each_step_is_recomputed_once_if_their_number_is_unknown_and_segments_fit(slots):
    """A segment fits if the slots that are free before its reversal can hold all its states but the first."""
    fitted = 0
    for steps in range(1, slots * slots + 1):
        stride = 1
        while math.ceil(steps / stride) > slots:
            stride *= 2
        starts = range(0, steps, stride)
        lengths = [min(stride, steps - 1 - start) for start in starts]  # the last state is still available
        if all(length - 1 <= slots - kept for kept, length in enumerate(lengths, start=1)):
            fitted += 1
            assert reversal(steps, slots)[0] <= steps, steps
    assert fitted >= slots


def test_without_a_limit_all_states_are_kept_and_no_step_is_recomputed():
    for count in (None, 50):
        assert reversal(50, None, count) == (0, 50)


@pytest.mark.parametrize("slots", [1, 3, 4])
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "rk4"])
def test_gradients_do_not_depend_on_the_number_of_checkpoints(method, slots):
    for steps in (slots, slots + 1, 2 * slots, 4 * slots + 3):
        t = torch.tensor([0.0, 0.6, 1.0], dtype=F64) * (steps / 16)
        settings = steps_of(method, 1 / 16)
        ((whole, _), (thinned, stats)), _ = discrete_and_backprop(curved, Y, t, checkpoints=(None, slots), **settings)
        assert stats.accepted == steps
        assert stats.peak_checkpoints <= slots
        if method == "rk4":
            assert stats.recomputed_steps == griewank(steps, slots)
        else:
            assert stats.recomputed_steps > 0 if steps > slots + 1 else stats.recomputed_steps <= steps
        for ours, right in zip(thinned, whole, strict=True):
            assert relative_difference(ours, right) <= AGAIN


# ------------------------------------------------------------------ memory
SIZE = 4099  # the size of a state: a prime number, so that nothing else has this size


class Alive(TorchDispatchMode):
    """Tracks every tensor that an operation makes. `states` is the memory of those that are alive, in states."""

    def __init__(self):
        super().__init__()
        self._made = {}
        self.peak = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= SIZE * 8:
                storage = x.untyped_storage()
                self._made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
                self.peak = max(self.peak, self.states)
        return out

    @property
    def states(self):
        self._made = {at: made for at, made in self._made.items() if not made[0].expired()}
        return sum(size for _, size in self._made.values()) / (SIZE * 8)


def memory(steps, method, checkpoints, gradient="discrete"):
    """Return the states alive between the passes, besides the two outputs, and the most in the backward pass."""
    rate, y0 = leaf(torch.tensor(0.3, dtype=F64)), leaf(torch.full((SIZE,), 0.5, dtype=F64))
    params = dict(adjoint_params=(rate,), checkpoints=checkpoints) if gradient == "discrete" else {}
    with Alive() as alive:
        ys = solve(
            lambda t, y: torch.tanh(rate * y), y0, linspace(0.0, steps / 16, 2), gradient=gradient, **params,
            **steps_of(method, 1 / 16),
        ).ys  # fmt: skip
        gc.collect()
        between, alive.peak = alive.states - 2, 0.0
        ys[-1].sum().backward()
    assert y0.grad is not None
    return between, alive.peak


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_every_step_keeps_one_state_for_the_backward_pass(method):
    few, many = memory(10, method, None), memory(25, method, None)
    assert many[0] - few[0] == 15
    assert few[0] <= 12
    assert many[1] - few[1] <= 15
    # autograd keeps at least the argument and the value of every stage
    assert memory(10, method, None, "backprop")[0] >= 4 * few[0]


@pytest.mark.parametrize(("method", "slots"), [("dopri5", 1), ("rk4", 4)])
def test_with_checkpoints_memory_does_not_grow_with_the_steps(method, slots):
    between, during = zip(*(memory(steps, method, slots) for steps in (10, 25)), strict=True)
    # the states, and the one that the last step began with
    assert max(between) <= slots + 1
    assert max(during) == pytest.approx(min(during), abs=slots)
    # ... and the memory of one step: for each stage argument, two graph nodes, value, cotangents, and copies of these
    assert max(during) <= slots + 8 * TABLEAUS[method].stages


# ------------------------------------------------------------------ the solve as an operation of autograd
@pytest.mark.parametrize("checkpoints", [None, 1, 3])
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "rk4"])
def test_a_second_backward_pass_gives_the_same_bits(method, checkpoints):
    func, y0 = MLP(), leaf(Y)
    solution = solve(func, y0, linspace(0.0, 2.0, 9), gradient="discrete", checkpoints=checkpoints, **asked(method))
    wanted = [y0, *func.parameters()]
    passes = [torch.autograd.grad(loss_of(solution.ys), wanted, retain_graph=True) for _ in range(3)]
    for again in passes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(passes[0], again, strict=True))
    assert checkpoints is None or solution.stats.peak_checkpoints <= checkpoints


def test_a_second_backward_pass_without_retain_graph_raises():
    y0 = leaf(Y)
    loss = loss_of(odeint_adjoint(MLP(), y0, linspace(0.0, 1.0, 3), gradient="discrete"))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("checkpoints", [None, 2])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_overwriting_y0_after_the_solve_is_right_or_raises(method, checkpoints):
    """The result is the right gradient or autograd's error, and never a wrong gradient."""
    func, t = MLP(), linspace(0.0, 1.0, 9)
    (truth,) = torch.autograd.grad(loss_of(odeint(func, Y, t, **asked(method))), func.w1)
    y0 = Y.clone()
    ys = odeint_adjoint(func, y0, t, gradient="discrete", checkpoints=checkpoints, **asked(method))
    y0.zero_()
    try:
        (grad,) = torch.autograd.grad(loss_of(ys), func.w1)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert relative_difference(grad, truth) <= SAME


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_an_output_changed_in_place_is_right_or_raises(method):
    func, t = MLP(), linspace(0.0, 1.0, 3)
    y0 = leaf(Y)
    truth = torch.autograd.grad(3 * odeint(func, y0, t, method=method).sum(), [y0, func.w1])
    ys = odeint_adjoint(func, y0, t, gradient="discrete", method=method)
    try:
        ys.mul_(3.0)
        grads = torch.autograd.grad(ys.sum(), [y0, func.w1])
    except RuntimeError as error:
        assert "inplace" in str(error) or "in-place" in str(error)
    else:
        assert relative_difference(grads, truth) <= SAME


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_unused_and_frozen_parameters_get_what_the_adjoint_gives_them(method):
    grads = {}
    for mode in ("adjoint", "discrete"):
        func = Parted(W)
        odeint_adjoint(func, leaf(Y), linspace(0.0, 1.0, 3), method=method, gradient=mode).sum().backward()
        grads[mode] = {name: p.grad for name, p in func.named_parameters()}
        assert float(grads[mode]["used"].abs().min()) > 0
    assert grads["discrete"]["fixed"] is None and grads["adjoint"]["fixed"] is None
    assert torch.equal(grads["discrete"]["unused"], grads["adjoint"]["unused"])


def test_a_start_that_needs_no_gradient_gets_none_and_the_parameters_get_one():
    func, t = MLP(), linspace(0.0, 1.0, 3)
    (truth,) = torch.autograd.grad(loss_of(odeint(func, Y, t)), func.w1)
    y0 = Y.clone()
    loss_of(odeint_adjoint(func, y0, t, gradient="discrete")).backward()
    assert y0.grad is None
    assert relative_difference(func.w1.grad, truth) <= SAME


def test_a_solve_of_constants_needs_no_gradient_and_neither_does_one_under_no_grad():
    t = linspace(0.0, 1.0, 3)
    assert not odeint_adjoint(curved(W), Y, t, adjoint_params=(), gradient="discrete").requires_grad
    with torch.no_grad():
        assert not odeint_adjoint(MLP(), leaf(Y), t, gradient="discrete").requires_grad


def test_a_field_that_depends_on_no_input_has_zero_gradients():
    for method in ("dopri5", "rk4"):
        y0, p = leaf(Y), leaf(W)
        ys = odeint_adjoint(
            lambda t, y: torch.ones_like(y), y0, linspace(0.0, 1.0, 3), adjoint_params=(p,), gradient="discrete",
            method=method,
        )  # fmt: skip
        ys.sum().backward()
        assert relative_difference(y0.grad, torch.full((2,), 3.0, dtype=F64)) <= AGAIN
        assert torch.equal(p.grad, torch.zeros_like(W))


def test_adjoint_params_may_be_a_generator_and_need_not_be_leaves():
    w, t = leaf(W), linspace(0.0, 1.0, 3)
    scaled = w * 2
    ys = odeint_adjoint(curved(scaled), Y, t, adjoint_params=(p for p in (scaled,)), gradient="discrete")
    (truth,) = torch.autograd.grad(loss_of(odeint(curved(2 * w), Y, t)), w)
    assert relative_difference(torch.autograd.grad(loss_of(ys), w)[0], truth) <= SAME


# ------------------------------------------------------------------ graphs that are too large, and half precision
@pytest.fixture
def no_memory(monkeypatch):
    """Pretend that no graph of a whole step fits in memory."""
    monkeypatch.setattr(step_adjoint, "fits", lambda size, device: False)


@pytest.mark.parametrize("checkpoints", [None, 2])
@pytest.mark.parametrize("method", EVERY)
def test_one_graph_at_a_time_gives_the_same_gradients(method, checkpoints, no_memory, monkeypatch):
    """The bits are equal: the operations are the same and in the same order, and some are done twice."""

    def gradients():
        func, y0, t = MLP(), leaf(Y), leaf(linspace(0.0, 1.0, 5))
        solution = solve(func, y0, t, gradient="discrete", checkpoints=checkpoints, **asked(method))
        found = torch.autograd.grad(loss_of(solution.ys), [y0, t, *func.parameters()])
        return solution.stats.graph_of, found

    one, of_stage = gradients()
    monkeypatch.undo()
    monkeypatch.setattr(whole_step, "SMALL", 0)
    two, of_step = gradients()
    assert (one, two) == ("step" if method == "euler" else "stage", "step")  # a step of euler has one stage
    assert all(torch.equal(a, b) for a, b in zip(of_stage, of_step, strict=True))


@pytest.mark.parametrize("method, stages", [("dopri5", 6), ("rk4", 4), ("bosh3", 3)])
def test_one_graph_at_a_time_costs_one_more_evaluation_for_each_stage_that_others_read(method, stages, no_memory):
    """The backward pass has N (2s - 1) evaluations and s N products."""
    t = linspace(0.0, 2.0, 9)
    options = {} if method == "rk4" else dict(step_t=t[1:])  # outputs at the ends of steps only
    count, nfe, stats = vjps(t, method=method, options=options)
    assert count == stages * stats.accepted
    assert nfe == (2 * stages - 1) * stats.accepted


def test_a_system_that_does_not_say_what_is_free_solves_with_states_to_spare(monkeypatch):
    """On Windows and macOS. Here 8 bytes a state fill a quarter of 4 GiB."""

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", unknown)
    stats = solve(
        MLP(dim=1), torch.ones(1, dtype=F64), linspace(0.0, 1.0, 2), gradient="discrete", checkpoints="auto"
    ).stats
    assert stats.checkpoint_slots == 2**32 // 4 // 8


def test_at_most_one_graph_is_alive_if_no_more_fit(no_memory):
    alive, most = 0, 0

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            nonlocal alive, most
            if torch.is_grad_enabled() or y.requires_grad:
                alive += 1
                most = max(most, alive)
                ctx.mark = weakref.finalize(ctx, left)
            return -y

        @staticmethod
        def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
            return -g

    def left():
        nonlocal alive
        alive -= 1

    ys = solve(lambda t, y: Watched.apply(y), leaf(Y), linspace(0.0, 2.0, 9), gradient="discrete", adjoint_params=()).ys
    most = 0
    ys.sum().backward()
    assert most == 1


def test_the_size_of_a_graph_excludes_the_parameters():
    w, y = leaf(torch.ones(50, 50, dtype=F64)), leaf(torch.ones(20, 50, dtype=F64))
    with graph_size(y.device, [w]) as size:
        kept = torch.tanh(torch.tanh(y @ w) @ w)
    assert kept.requires_grad
    assert size() == 3 * y.nbytes  # y itself and both results of tanh


@pytest.mark.parametrize(
    ("method", "dtype", "outputs"),
    [("euler", torch.bfloat16, 300), ("rk4", torch.bfloat16, 300), ("euler", torch.float16, 2100)],
)
def test_cotangents_of_half_states_add_up_in_single_precision(method, dtype, outputs):
    """A constant state with many outputs: a sum of ones stops growing at 256 in bfloat16, and at 2048 in float16."""
    y0 = torch.ones(3, dtype=dtype, requires_grad=True)
    ys = odeint_adjoint(
        lambda t, y: 0 * y, y0, torch.linspace(0, 1, outputs), method=method, gradient="discrete", adjoint_params=()
    )
    (grad,) = torch.autograd.grad(ys.sum(), y0)
    assert grad.dtype == dtype and torch.equal(grad, torch.full_like(grad, outputs))


# ------------------------------------------------------------------ errors, and solves that fail
@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver"])
def test_methods_that_are_not_runge_kutta_are_refused_with_an_alternative(method):
    with pytest.raises(Unsupported, match=r'gradient="adjoint".*"dopri5"') as error:
        odeint_adjoint(MLP(), leaf(Y), linspace(0.0, 1.0, 3), method=method, gradient="discrete")
    assert repr(method) in str(error.value)


@pytest.mark.parametrize("checkpoints", [0, -1, 2.5, "all", True, False])
def test_an_invalid_number_of_checkpoints_is_refused(checkpoints):
    with pytest.raises(InvalidInput, match="checkpoints must be .*got " + repr(checkpoints).replace(".", r"\.")):
        odeint_adjoint(MLP(), leaf(Y), linspace(0.0, 1.0, 3), gradient="discrete", checkpoints=checkpoints)


@pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
def test_checkpoints_of_another_gradient_are_refused(gradient):
    with pytest.raises(
        InvalidInput, match=f'checkpoints=4 belongs to gradient="discrete" and "auto"; got gradient=.{gradient}'
    ):
        solve(MLP(), leaf(Y), linspace(0.0, 1.0, 3), gradient=gradient, checkpoints=4)


def test_a_field_whose_parameters_cannot_be_found_is_refused_with_an_alternative():
    with pytest.raises(ValueError, match=r"nn\.Module.*adjoint_params="):
        odeint_adjoint(curved(leaf(W)), leaf(Y), linspace(0.0, 1.0, 3), gradient="discrete")


@pytest.mark.parametrize("checkpoints", [None, 2])
@pytest.mark.parametrize("status", [Status.STEP_UNDERFLOW, Status.MAX_STEPS], ids=lambda status: status.name)
def test_the_reached_outputs_of_a_failed_solve_have_the_gradient_of_backprop(status, checkpoints):
    t = torch.tensor([0.0, 0.3, 0.6, 0.8, 2.5], dtype=F64)
    few = dict(max_num_steps=12) if status is Status.MAX_STEPS else {}
    found = []
    for mode in ("backprop", "discrete"):
        w, y0 = leaf(torch.tensor(1.0, dtype=F64)), leaf(torch.tensor([0.5, 1.0], dtype=F64))
        more = dict(adjoint_params=(w,), checkpoints=checkpoints) if mode == "discrete" else {}
        solution = solve(
            lambda t, y, w=w: w * y * y, y0, t, gradient=mode, rtol=1e-6, atol=1e-6,
            options=dict(throw=False, **few), **more,
        )  # fmt: skip
        assert solution.status is status
        reached = solution.ys.isfinite().all(1)
        assert reached.tolist() == [True] * 4 + [False]
        found.append(torch.autograd.grad(loss_of(solution.ys[reached]), [y0, w]))
    for right, ours in zip(*found, strict=True):
        assert relative_difference(ours, right) <= SAME


def test_the_times_that_a_failed_solve_did_not_reach_have_no_gradient():
    y0, t = leaf(torch.tensor([0.5, 1.0], dtype=F64)), leaf(torch.tensor([0.0, 0.3, 0.6, 2.5], dtype=F64))
    options = dict(throw=False, max_num_steps=12)
    ys = solve(lambda t, y: y * y, y0, t, gradient="discrete", adjoint_params=(), options=options).ys
    (grad,) = torch.autograd.grad(ys[:3].sum(), t)
    assert grad[:3].abs().min() > 0 and grad[3] == 0


def test_a_failed_solve_that_reached_nothing_has_the_gradient_of_its_start():
    y0 = leaf(Y)
    solution = solve(
        lambda t, y: y * math.nan, y0, linspace(0.0, 1.0, 3), gradient="discrete", adjoint_params=(),
        options=dict(throw=False),
    )  # fmt: skip
    assert solution.status is Status.NON_FINITE
    assert torch.equal(torch.autograd.grad(solution.ys[0].sum(), y0)[0], torch.ones_like(Y))


# ------------------------------------------------------------------ fields for which the continuous adjoint is wrong
def test_the_discrete_gradient_of_a_dissipative_field_is_exact_and_the_continuous_one_is_not():
    """For y' = -20 y, the backward solve of the continuous adjoint multiplies the error of y by e^20."""
    t, rtol = linspace(0.0, 1.0, 2), 1e-6

    class Decay(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(20.0, dtype=F64))

        def forward(self, t, y):
            return -self.rate * y

    grads = {}
    for mode in ("backprop", "adjoint", "discrete"):
        func, y0 = Decay(), leaf(torch.tensor([1.0, 2.0], dtype=F64))
        ys = solve(func, y0, t, rtol=rtol, atol=rtol, gradient=mode).ys
        grads[mode] = torch.autograd.grad(ys[-1].sum(), [y0, func.rate])
    for i in range(2):
        error = {m: relative_difference(grads[m][i], grads["backprop"][i]) for m in ("discrete", "adjoint")}
        assert error["discrete"] <= SAME < 1e3 * SAME < error["adjoint"], error


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_are_those_of_finite_differences_in_a_random_direction(method):
    t, settings = torch.tensor([0.0, 0.1, 0.75, 1.13], dtype=F64), steps_of(method, 0.25)
    y0, w = leaf(Y), leaf(W)
    ys = odeint_adjoint(curved(w), y0, t, gradient="discrete", adjoint_params=(w,), **settings)
    grads = torch.autograd.grad(loss_of(ys), [y0, w])
    dy, dw, eps = torch.randn(2, dtype=F64), torch.randn(2, 2, dtype=F64), 1e-5
    ahead, behind = (float(loss_of(odeint(curved(W + s * dw), Y + s * dy, t, **settings))) for s in (eps, -eps))
    along = float((grads[0] * dy).sum() + (grads[1] * dw).sum())
    # central differences have errors of eps^2 times a third derivative, and of 1e-16 / eps
    assert (ahead - behind) / (2 * eps) == pytest.approx(along, rel=1e-8)


# ------------------------------------------------------------------ the loop of plain grids
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_a_grid_whose_states_are_all_kept_takes_the_plain_loop_with_the_same_bits(method, dtype, monkeypatch):
    def gradients(checkpoints):
        func, y0 = MLP().to(dtype), leaf(Y.to(dtype))
        solution = solve(func, y0, linspace(0.0, 1.0, 5), gradient="discrete", checkpoints=checkpoints, method=method)
        found = torch.autograd.grad(loss_of(solution.ys), [y0, *func.parameters()])
        return [solution.ys, *found], solution.stats

    monkeypatch.setattr(discrete_mode.plain_grid, "applies", lambda problem, method: False)
    general, stats = gradients(None)
    monkeypatch.undo()
    monkeypatch.setattr(discrete_mode, "make_loop", None)  # the general loop is not made
    for checkpoints in (None, "auto", 4):
        plain, counted = gradients(checkpoints)
        assert all(torch.equal(a, b) for a, b in zip(plain, general, strict=True))
        assert (counted.nfe, counted.nfe_backward, counted.accepted) == (stats.nfe, stats.nfe_backward, stats.accepted)
        assert counted.recomputed_steps == 0
    with pytest.raises(TypeError):  # three states are fewer than the steps: the general loop keeps them
        gradients(3)


def test_the_gradient_of_a_grid_that_ends_in_nan_is_nan_as_in_the_other_modes():
    """A partial gradient is for those who asked for a partial solution, by throw=False."""

    def breaks(t, y):
        return torch.where(t > 0.5, y * math.inf, -y)

    for gradient in ("backprop", "adjoint", "discrete"):
        y0 = leaf(torch.tensor([1.0, 2.0], dtype=F64))
        t = linspace(0.0, 1.0, 5)
        ys = odeint_adjoint(breaks, y0, t, method="rk4", gradient=gradient, adjoint_params=())
        ys.nan_to_num(0.0, 0.0, 0.0).sum().backward()
        assert y0.grad is not None and y0.grad.isnan().all()


@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_two_parameters_whose_gradients_are_one_tensor_get_each_its_own(method, gradient):
    """autograd gives p and q of y + p + q the same tensor, into which a sum over the stages must not be written."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(3, dtype=F64))
            self.q = nn.Parameter(torch.zeros(3, dtype=F64))

        def forward(self, t, y):
            return self.p + self.q - y

    func, t = Shifted(), torch.linspace(0, 1, 101, dtype=F64)
    ys = odeint_adjoint(func, torch.ones(3, dtype=F64), t, method=method, gradient=gradient)
    ys[-1].sum().backward()
    # y(1) = exp(-1) + (1 - exp(-1)) (p + q); euler with 100 steps has an error of 2e-3
    for x in (func.p, func.q):
        assert torch.allclose(x.grad, torch.full((3,), 1 - math.exp(-1), dtype=F64), atol=4e-3, rtol=0)
