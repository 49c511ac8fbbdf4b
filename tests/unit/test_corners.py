"""Corner cases that were wrong once, with one test for each."""

import gc
import weakref

import pytest
import torch
from torch import nn

import node_cuda
from node_cuda import InvalidType, SolveError, Status, odeint, odeint_adjoint, odeint_dense, odeint_event, solve
from node_cuda.kernels import reference
from node_cuda.kernels.norms import ErrorNorm

F64 = torch.float64
T = torch.tensor([0.0, 1.0], dtype=F64)


class Decay(nn.Module):
    """y' = -p y, counting its evaluations."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(1.0, dtype=F64))
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        return -self.p * y


def ones(n=1, **kwargs):
    return torch.ones(n, dtype=F64, **kwargs)


def test_a_parameter_that_is_named_twice_gets_its_gradient_once():
    w = torch.tensor(1.0, dtype=F64, requires_grad=True)
    ys = odeint_adjoint(lambda t, y: -w * y, ones(), T, rtol=1e-8, atol=1e-8, adjoint_params=(w, w))
    assert torch.autograd.grad(ys[-1].sum(), w)[0] == pytest.approx(-float(torch.exp(torch.tensor(-1.0))), rel=1e-6)


def test_weights_tied_in_a_replica_get_their_gradient_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Decay(), Decay()
            self.b.p = self.a.p

        def forward(self, t, y):
            return 0.5 * (self.a(t, y) + self.b(t, y))

    field = Tied()
    p = field.a.p
    field._is_replica = True  # DataParallel: parameters become plain attributes
    for module in (field.a, field.b):
        del module._parameters["p"]
        module.p = p * 1.0
    field.b.p = field.a.p
    odeint_adjoint(field, ones(), T, rtol=1e-8, atol=1e-8)[-1].sum().backward()
    assert p.grad == pytest.approx(-float(torch.exp(torch.tensor(-1.0))), rel=1e-6)


@pytest.mark.parametrize("settings", [{}, dict(method="rk4", options=dict(step_size=0.01))], ids=["dopri5", "rk4"])
@pytest.mark.parametrize("level", [0.97, 0.5])
def test_an_event_moves_with_its_start_in_every_step(settings, level):
    t0 = torch.tensor(0.0, dtype=F64, requires_grad=True)
    event_t, _ = odeint_event(
        lambda t, y: -y, ones(), t0, event_fn=lambda t, y: (y - level).sum(), rtol=1e-6, atol=1e-6, **settings
    )
    # An autonomous solution that starts later crosses later by the same time. Linear interpolants have larger errors.
    assert torch.autograd.grad(event_t, t0)[0] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("at", [0.01, 0.05, 0.7])
def test_dense_output_moves_with_its_start_in_every_step(at):
    t0 = torch.tensor(0.0, dtype=F64, requires_grad=True)
    y = odeint_dense(lambda t, y: -y, ones(), t0, torch.tensor(1.0, dtype=F64), rtol=1e-6, atol=1e-6)(at)
    assert torch.autograd.grad(y.sum(), t0)[0] == pytest.approx(float(torch.exp(torch.tensor(-at))), rel=1e-3)


def test_dense_output_takes_plain_numbers():
    exact = torch.exp(torch.tensor(-0.7))
    assert odeint_dense(lambda t, y: -y, torch.ones(1), 0.0, 0.7)(0.7) == pytest.approx(float(exact), rel=1e-5)
    assert odeint_dense(lambda t, y: -y, torch.ones(1), 0, 1)(1) == pytest.approx(float(torch.exp(torch.tensor(-1.0))))


def test_the_gradient_of_an_event_is_that_of_the_element_that_crossed():
    y0 = torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True)
    event_t, _ = odeint_event(
        lambda t, y: torch.stack([-y[0], 0 * y[1] - 0.1]),
        y0,
        torch.tensor(0.0, dtype=F64),
        event_fn=lambda t, y: torch.stack([y[0] - 0.5, 1e-9 * (y[1] + 1)]),
        rtol=1e-6,
        atol=1e-6,
    )
    gradient = torch.autograd.grad(event_t, y0)[0]
    assert gradient[0] == pytest.approx(1.0, rel=1e-4) and gradient[1] == 0


def test_a_frozen_parameter_of_an_event_function_is_left_alone():
    class Level(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.5, dtype=F64))
            self.b = nn.Parameter(torch.tensor(0.0, dtype=F64), requires_grad=False)

        def forward(self, t, y):
            return (y - self.a - self.b).sum()

    level = Level()
    event_t, _ = odeint_event(lambda t, y: -y, ones(), torch.tensor(0.0, dtype=F64), event_fn=level)
    event_t.backward()
    assert level.a.grad == pytest.approx(-2.0, rel=1e-4) and level.b.grad is None


def test_a_nan_on_a_fixed_grid_is_in_the_status():
    solution = solve(lambda t, y: y * float("nan"), torch.ones(1), torch.tensor([0.0, 1.0]), method="rk4")
    assert solution.status is Status.NON_FINITE and solution.ys[-1].isnan().all()


def test_a_nan_on_a_fixed_grid_is_a_nan_in_the_adjoint_gradient_too():
    y0 = ones(requires_grad=True)
    odeint_adjoint(lambda t, y: y * float("nan"), y0, T, method="rk4", adjoint_params=())[-1].sum().backward()
    assert y0.grad.isnan().all()


@pytest.mark.parametrize("landing", [0.1, 1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("key", ["step_t", "jump_t"])
def test_a_stop_between_outputs_does_not_halve_the_backward_steps(landing, key):
    field = Decay()
    options = {key: torch.tensor([landing], dtype=F64)}
    ys = odeint_adjoint(field, ones(), T, rtol=1e-3, atol=1e-3, options=options)
    field.nfe = 0
    ys[-1].sum().backward()
    # Three steps of six evaluations, k1 and the first step's probe, as in torchdiffeq; one more after a jump.
    assert field.nfe <= (20 if key == "step_t" else 21)


def test_a_short_interval_between_outputs_does_not_shorten_the_later_backward_steps():
    """The step size before a stop is kept: one more output costs one step and one evaluation at any distance."""
    nfe = []
    for times in ([0.0, 0.5, 1.0], [0.0, 0.5, 0.5 + 1e-7, 1.0]):
        field = Decay()
        ys = odeint_adjoint(field, ones(), torch.tensor(times, dtype=F64), rtol=1e-6, atol=1e-6)
        field.nfe = 0
        ys[-1].sum().backward()
        nfe.append(field.nfe)
    assert nfe[1] <= nfe[0] + 7


def test_a_jump_at_the_last_time_is_known_when_the_backward_solve_begins():
    """Otherwise the first backward slope is that of the other side, and the solve needs 170 evaluations."""
    nfe = 0

    def field(t, y):
        nonlocal nfe
        nfe += 1
        return torch.where(t < 0.5, -1.0, 100.0).to(y) * y

    t = torch.tensor([0.0, 0.5], dtype=F64)
    y0 = ones(requires_grad=True)
    options = dict(jump_t=torch.tensor([0.5], dtype=F64))
    ys = odeint_adjoint(field, y0, t, rtol=1e-8, atol=1e-8, options=options, adjoint_params=())
    forward = nfe
    ys[-1].sum().backward()
    assert nfe - forward <= 100
    assert y0.grad == pytest.approx(float(torch.exp(torch.tensor(-0.5))), rel=1e-7)


@pytest.mark.parametrize("solver", ["RK45", "Radau", "LSODA"])
def test_scipy_reports_a_nan_with_a_message(solver):
    def field(t, y):
        return torch.where(t > 0.3, torch.nan, -1.0).to(y) * y

    with pytest.raises(SolveError, match="NaN") as caught:
        odeint(field, ones(), T, method="scipy_solver", options=dict(solver=solver))
    assert caught.value.status is Status.NON_FINITE and 0.2 < caught.value.t <= 1.0
    kept = solve(field, ones(), T, method="scipy_solver", options=dict(solver=solver, throw=False))
    assert kept.status is Status.NON_FINITE and kept.ys[-1].isnan().all()


def test_scipy_solvers_without_complex_states_say_so():
    with pytest.raises(ValueError, match="RK45"):
        odeint(lambda t, y: 1j * y, ones().to(torch.complex128), T, method="scipy_solver")


def test_what_a_field_of_scipy_keeps_is_never_rewritten():
    kept, copies = [], []

    def field(t, y):
        kept.append(y)
        copies.append(y.clone())
        return -y

    odeint(field, ones(3), T, method="scipy_solver")
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        dict(dfactor=1.0),
        dict(ifactor=0.5),
        dict(safety=-1.0),
        dict(safety=float("nan")),
        dict(first_step=float("inf")),
        dict(max_num_steps="a"),
        dict(min_step="a"),
        dict(min_step=None),
        dict(min_step=float("inf")),
        dict(safety=ones(2)),
        dict(dtype="float64"),
        dict(norm=3),
        dict(controller=[1]),
    ],
    ids=str,
)
def test_constants_with_which_no_solve_ends_are_refused(options):
    (name,) = options
    with pytest.raises((ValueError, TypeError), match=name):
        odeint(lambda t, y: -y, ones(), T, options=options)


@pytest.mark.parametrize("name", ["max_order", "max_iters"])
@pytest.mark.parametrize("value", ["4", 2.5, float("nan"), float("inf"), -1])
def test_the_numbers_of_adams_methods_are_whole(name, value):
    with pytest.raises(InvalidType, match=rf'options\["{name}"\] must be a whole number, 0 or more; got .* Use 4\.'):
        odeint(lambda t, y: -y, ones(), T, method="implicit_adams", options={name: value})


def test_an_event_function_that_is_nan_gives_an_error():
    with pytest.raises(SolveError, match="event_fn returned NaN"):
        odeint(lambda t, y: -y, ones(), T, event_fn=lambda t, y: torch.where(t > 0.1, torch.nan, 1.0))


def test_an_event_that_fails_without_throw_is_a_status_and_nan():
    solution = solve(
        lambda t, y: y**2, ones(), T, event_fn=lambda t, y: y[0] + 1, options=dict(throw=False), rtol=1e-3, atol=1e-3
    )
    assert solution.status is not Status.SUCCESS
    assert solution.event_t.isnan() and solution.ys[-1].isnan().all() and torch.equal(solution.ys[0], ones())


def test_the_reached_outputs_of_a_failed_solve_have_their_gradient_in_both_modes():
    gradients = []
    for mode in ("backprop", "adjoint"):
        a = torch.tensor(1.0, dtype=F64, requires_grad=True)
        solution = solve(
            lambda t, y, a=a: a * y**2,
            ones(),
            torch.tensor([0.0, 0.5, 0.9, 1.5], dtype=F64),
            options=dict(throw=False),
            gradient=mode,
            **(dict(adjoint_params=(a,)) if mode == "adjoint" else {}),
        )
        assert solution.ys[3].isnan().all()
        gradients.append(torch.autograd.grad(solution.ys[:3].sum(), a)[0])
    # y = 1 / (1 - a t): dy/da = t / (1 - a t)^2
    assert gradients == pytest.approx([0.5 / 0.25 + 0.9 / 0.01] * 2, rel=1e-5)


def test_tolerances_of_components_broadcast():
    y0 = (torch.ones(2, 3, dtype=F64), torch.ones(4, dtype=F64))
    ys = odeint(lambda t, y: (-y[0], -y[1]), y0, T, rtol=(torch.full((1, 3), 1e-6, dtype=F64), 1e-6), atol=(1e-8, 1e-8))
    assert ys[0].shape == (2, 2, 3) and ys[0][-1, 0, 0] == pytest.approx(float(torch.exp(torch.tensor(-1.0))), rel=1e-5)


@pytest.mark.parametrize("rtol", [torch.ones(7), torch.ones(5, 3), None, "ab", 1j, -1e-3, float("nan")], ids=str)
def test_an_invalid_tolerance_is_refused(rtol):
    with pytest.raises((ValueError, TypeError), match="rtol"):
        odeint(lambda t, y: -y, ones(3), T, rtol=rtol)


def test_a_step_size_below_the_rounding_of_t_works():
    t = torch.tensor([1000.0, 1000.01])
    y = odeint(lambda t, y: -y, torch.ones(1), t, method="euler", options=dict(step_size=1e-5))[-1]
    assert y == pytest.approx(float(torch.exp(t[0].double() - t[1].double())), rel=1e-4)


def test_half_precision_is_solved_at_the_default_tolerances_of_a_zero_state():
    y = odeint(lambda t, y: torch.ones_like(y), torch.zeros(2, dtype=torch.float16), T.half(), rtol=1e-2, atol=1e-4)
    assert y[-1].float() == pytest.approx(torch.ones(2), abs=1e-2)


def test_a_backward_pass_with_callbacks_leaves_nothing_to_the_garbage_collector():
    class Told(Decay):
        def callback_step_adjoint(self, t0, y0, dt):
            pass

    field, y0 = Told(), ones(requires_grad=True)
    while gc.collect():  # again, for objects that the first collection released
        pass
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)  # garbage that others make meanwhile, such as an import, does not count
    try:
        ys = odeint_adjoint(field, y0, T)
        watched = weakref.ref(ys.grad_fn)
        ys[-1].sum().backward()
        del ys
        assert watched() is None
        gc.collect()
        ours = [x for x in gc.garbage if isinstance(x, torch.Tensor) or type(x).__module__.startswith("node_cuda")]
        assert not ours
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_the_adjoint_does_not_keep_an_unused_starting_state_alive():
    start = ones(1000, requires_grad=True)
    y0 = start * 2
    alive = weakref.ref(y0)
    ys = odeint_adjoint(Decay(), y0, T)
    del y0
    assert alive() is None
    ys[-1].sum().backward()
    assert start.grad is not None


def test_every_host_read_of_a_fixed_grid_is_counted():
    """The host reads the times once, the convergence in each corrector iteration, and the status once."""
    t = torch.linspace(0, 1, 11, dtype=F64)
    assert solve(lambda t, y: -y, ones(), t, method="rk4").stats.host_reads == 2
    corrected = solve(lambda t, y: -y, ones(), t, method="implicit_adams", rtol=1e-3, atol=1e-3).stats
    starters, steps = 2, 10
    assert corrected.host_reads - 2 == corrected.nfe - steps - 3 * starters


def test_the_public_names_exist():
    assert all(hasattr(node_cuda, name) for name in node_cuda.__all__)


def test_the_starting_step_of_a_half_state_does_not_overflow():
    """The change of the field in units of the tolerance is about 1e8 here, which half precision cannot represent."""
    y0 = torch.full((3,), 1000.0, dtype=torch.float16)
    f0, f1 = y0, y0 * 1.5
    norm = ErrorNorm(1e-9, 1e-9)
    assert reference.initial_change(y0, f0, f1, norm) == pytest.approx(500 / (1e-9 + 1e-6), rel=1e-3)


def test_an_empty_environment_variable_counts_as_not_set(monkeypatch):
    monkeypatch.setenv("NODE_CUDA_BACKEND", "")
    assert odeint(lambda t, y: -y, torch.ones(2, dtype=F64), T).shape == (2, 2)


def test_an_event_that_never_comes_on_an_easy_field_ends_with_its_status():
    with pytest.raises(SolveError) as caught:
        odeint(lambda t, y: torch.ones_like(y), torch.zeros(1), T.float(), event_fn=lambda t, y: y[0] + 1)
    assert caught.value.status is Status.NO_EVENT
