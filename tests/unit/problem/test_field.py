"""The solver never writes into tensors of the user. A field may return a view, a parameter or a static buffer."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from problems import F64, linspace, relative_difference
from torch import nn

from node_cuda import TABLEAUS, InvalidField, odeint, odeint_adjoint, solve
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS
from node_cuda.methods.registry import lookup
from node_cuda.problem.field import Layout, VectorField

T = linspace(0.0, 1.0, 6)
# the errors of the methods themselves at these settings
LIMIT = {"euler": 2e-2, "fehlberg2": 5e-2, "adaptive_heun": 5e-3}
METHODS = [*TABLEAUS, "explicit_adams", "implicit_adams"]


def fresh():
    return torch.tensor([1.0, -0.5, 2.0], dtype=F64)


def settings(method):
    """Return steps that are short enough for every method to be right to three digits, and the rtol for them."""
    if method in TABLEAUS and TABLEAUS[method].adaptive:
        rtol = 1e-4 if TABLEAUS[method].order < 3 else 1e-6
        return dict(method=method, rtol=rtol, atol=rtol, options=dict(step_t=T[-1:]))
    extra = dict(max_order=4) if "adams" in method else {}
    return dict(method=method, rtol=1e-6, atol=1e-6, options=dict(step_size=1 / 100, **extra))


# ------------------------------------------------------------------ fields, and y(1) of each for the state above
class Static(nn.Module):
    """Returns the same memory each time, like a captured graph."""

    def __init__(self):
        super().__init__()
        self.buffer = torch.empty(3, dtype=F64)

    def forward(self, t, y):
        return torch.mul(y, -1.0, out=self.buffer)


class OffsetStatic(Static):
    """Returns the same slice of a larger buffer each time."""

    def __init__(self):
        super().__init__()
        self.pool = torch.zeros(10, dtype=F64)
        self.buffer = self.pool[3:6]


class TwoStatic(nn.Module):
    """Returns two buffers in turn, so that the first two evaluations do not show the reuse."""

    def __init__(self):
        super().__init__()
        self.buffers, self.calls = [torch.empty(3, dtype=F64), torch.empty(3, dtype=F64)], 0

    def forward(self, t, y):
        self.calls += 1
        return torch.mul(y, -1.0, out=self.buffers[self.calls % 2])


class InTurn(nn.Module):
    """Returns buffers in turn, without a graph. scratch: it also writes into the next one, an earlier output."""

    def __init__(self, count, *, scratch=False):
        super().__init__()
        self.buffers, self.scratch = [torch.empty(3, dtype=F64) for _ in range(count)], scratch

    @torch.no_grad()
    def forward(self, t, y):
        self.buffers.append(self.buffers.pop(0))
        if self.scratch:
            torch.mul(y, 7.0, out=self.buffers[1])
        return torch.mul(y, -1.0, out=self.buffers[0])


class Ring(nn.Module):
    """y' = y cos t in a ring of buffers, from the sixth call on and where autograd does not record; 0: no buffer."""

    def __init__(self, count):
        super().__init__()
        self.buffers, self.calls = [torch.empty(3, dtype=F64) for _ in range(count)], 0

    def forward(self, t, y):
        dy = y * torch.cos(t)
        self.calls += 1
        if not self.buffers or self.calls < 6 or torch.is_grad_enabled():
            return dy
        return self.buffers[self.calls % len(self.buffers)].copy_(dy)


class KeepsItsLast(nn.Module):
    """Writes into the tensor that it returned before."""

    last = None

    def forward(self, t, y):
        if self.last is not None:
            self.last.zero_()
        self.last = -y
        return self.last


class LateStatic(nn.Module):
    """Returns new tensors at first, and one buffer from the sixth call on, like a late compilation."""

    def __init__(self):
        super().__init__()
        self.buffer, self.calls = torch.empty(3, dtype=F64), 0

    def forward(self, t, y):
        self.calls += 1
        return -y if self.calls < 6 else torch.mul(y, -1.0, out=self.buffer)


class Parameter(nn.Module):
    """Returns its parameter."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=F64))

    def forward(self, t, y):
        return self.p


class Constant(nn.Module):
    """Returns a stored tensor that is not a parameter."""

    def __init__(self):
        super().__init__()
        self.p = torch.tensor([1.0, 2.0, 3.0], dtype=F64)

    def forward(self, t, y):
        return self.p


class Keeping(nn.Module):
    """Keeps all its arguments and all its results."""

    def __init__(self):
        super().__init__()
        self.ts, self.ys, self.ks, self.copies = [], [], [], []

    def forward(self, t, y):
        k = -y
        self.ts.append(t)
        self.ys.append(y)
        self.ks.append(k)
        self.copies.append((t.detach().clone(), y.detach().clone(), k.detach().clone()))
        return k

    def check(self):
        assert self.copies
        for i, (t, y, k) in enumerate(self.copies):
            assert torch.equal(self.ts[i], t), f"t of evaluation {i} was rewritten"
            assert torch.equal(self.ys[i], y), f"y of evaluation {i} was rewritten"
            assert torch.equal(self.ks[i], k), f"the value returned by evaluation {i} was rewritten"


def grow(y0):
    return y0 * math.e


def decay(y0):
    return y0 / math.e


FIELDS = {
    "y itself": (lambda: lambda t, y: y, grow),
    "a view of y": (lambda: lambda t, y: y.view(1, 3)[0], grow),
    "y detached": (lambda: lambda t, y: y.detach(), grow),
    "a flipped view written over": (lambda: lambda t, y: y.flip(0).flip(0), grow),
    "an expanded tensor": (lambda: lambda t, y: torch.ones((), dtype=F64).expand(3), lambda y0: y0 + 1),
    "t expanded": (lambda: lambda t, y: t.expand(3), lambda y0: y0 + 0.5),
    "a parameter": (Parameter, lambda y0: y0 + torch.tensor([1.0, 2.0, 3.0], dtype=F64)),
    "a constant": (Constant, lambda y0: y0 + torch.tensor([1.0, 2.0, 3.0], dtype=F64)),
    "one static buffer": (Static, decay),
    "a slice of a static buffer": (OffsetStatic, decay),
    "two buffers in turn, one as scratch": (lambda: InTurn(2, scratch=True), decay),
    "a new tensor that is zeroed in the next call": (KeepsItsLast, decay),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_may_return_any_tensor(name, method):
    make, exact = FIELDS[name]
    y0 = fresh()
    func = make()
    with torch.no_grad():
        ys = odeint(func, y0, T, **settings(method))
    assert torch.equal(y0, fresh()), "the caller's y0 was rewritten"
    limit = LIMIT.get(method, 1e-4)
    assert relative_difference(ys[-1], exact(fresh())) < limit
    assert torch.equal(ys[0], fresh())
    if isinstance(func, Parameter | Constant):
        assert torch.equal(func.p.detach(), torch.tensor([1.0, 2.0, 3.0], dtype=F64)), "a parameter was rewritten"


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "rk4", "explicit_adams"])
@pytest.mark.parametrize("make", [TwoStatic, LateStatic])
def test_a_static_buffer_that_appears_late_is_copied_or_refused(make, method):
    """The buffer has overwritten an earlier stage before it can be noticed, so a clear error is also right."""
    try:
        with torch.no_grad():
            ys = odeint(make(), fresh(), T, **settings(method))
    except (RuntimeError, ValueError) as error:
        assert "buffer" in str(error) or "memory" in str(error)
    else:
        assert relative_difference(ys[-1], decay(fresh())) < LIMIT.get(method, 1e-4)


@pytest.mark.parametrize("method", [*METHODS, *IMPLICIT_TABLEAUS])
def test_a_ring_of_buffers_of_any_length_changes_no_bit_of_outputs_and_gradients(method):
    """A rejected step (first_step is too long) or a slope at the end of a step meets a buffer of an earlier stage."""
    adaptive = lookup(method, None).adaptive
    options = dict(first_step=1.5) if adaptive else dict(step_size=0.1, perturb=True)
    t = linspace(0.0, 3.0, 3)

    def found(count, gradient):
        func, y0 = Ring(count), fresh().requires_grad_()
        solution = solve(func, y0, t, rtol=1e-4, atol=1e-4, method=method, options=options, gradient=gradient)
        (grad,) = torch.autograd.grad(solution.ys[1:].sum(), y0)
        return solution.ys.detach(), grad, torch.tensor(solution.stats.nfe)

    for gradient in ("adjoint",) if "adams" in method else ("adjoint", "discrete"):
        without = found(0, gradient)
        for count in (3, 6):
            assert all(map(torch.equal, found(count, gradient), without)), (gradient, count)


@pytest.mark.parametrize("buffers", [1, 2, 3, 4])
@pytest.mark.parametrize("gradient", ["adjoint", "discrete"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "rk4", "dopri5"])
def test_buffers_that_a_field_writes_again_are_not_taken_for_a_change_of_func(method, gradient, buffers):
    func, y0 = InTurn(buffers, scratch=buffers == 2), fresh().requires_grad_()
    ys = odeint_adjoint(func, y0, T, method=method, gradient=gradient)
    odeint_adjoint(func, 2 * fresh(), T, method=method)  # writes again what was kept of the first solve
    (grad,) = torch.autograd.grad(ys[-1].sum(), y0)
    assert torch.equal(grad, torch.ones(3, dtype=F64))  # func hides its graph, so y1 = y0 + a constant


@pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
@pytest.mark.parametrize("method", METHODS)
def test_a_y0_that_is_a_buffer_of_func_is_refused(method, solver):
    func = Static()
    func.buffer.copy_(fresh())
    with pytest.raises(InvalidField, match="y0 is a tensor that func holds and writes into"):
        solver(func, func.buffer, T, **settings(method))


@pytest.mark.parametrize("method", METHODS)
def test_a_field_may_write_beside_y0(method):
    log, calls = torch.zeros(10_000, 3, dtype=F64), 0
    log[0] = fresh()

    def func(t, y):
        nonlocal calls
        calls += 1
        log[calls] = y
        return -y

    with torch.no_grad():
        ys = odeint(func, log[0], T, **settings(method))
    assert relative_difference(ys[-1], decay(fresh())) < LIMIT.get(method, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_field_that_writes_minus_y_in_place_is_right_or_refused(method):
    """y.neg_() overwrites the given state. Its result is y' = -y nevertheless."""
    y0 = fresh()
    try:
        with torch.no_grad():
            ys = odeint(lambda t, y: y.neg_(), y0, T, **settings(method))
    except (RuntimeError, ValueError) as error:
        assert "place" in str(error)
    else:
        assert relative_difference(ys[-1], decay(fresh())) < LIMIT.get(method, 1e-4)
    assert torch.equal(y0, fresh()), "the caller's y0 was rewritten"


@pytest.mark.parametrize(
    "solver",
    [odeint, lambda *args, **kw: odeint_adjoint(*args, adjoint_params=(), **kw)],
    ids=["odeint", "odeint_adjoint"],
)
def test_a_field_that_writes_in_place_has_the_right_gradient_or_is_refused(solver):
    y0 = fresh().requires_grad_()
    try:
        (grad,) = torch.autograd.grad(solver(lambda t, y: y.neg_(), y0, T)[-1].sum(), y0)
    except (RuntimeError, ValueError):
        pass  # autograd refuses to write to a leaf, so an error is right too
    else:
        assert torch.allclose(grad, torch.full((3,), 1 / math.e, dtype=F64), rtol=1e-5)
    assert torch.equal(y0.detach(), fresh())


@pytest.mark.parametrize("method", [*METHODS, *IMPLICIT_TABLEAUS])
def test_what_a_field_keeps_is_never_rewritten(method):
    func = Keeping()
    with torch.no_grad():
        odeint(func, fresh(), linspace(0.0, 1.0, 3), rtol=1e-4, atol=1e-4, method=method)
    func.check()


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
@pytest.mark.parametrize("solver", [odeint, odeint_adjoint], ids=["odeint", "odeint_adjoint"])
def test_what_a_field_keeps_is_never_rewritten_while_training_either(solver, method):
    func = Keeping()
    ys = solver(func, fresh().requires_grad_(), linspace(0.0, 1.0, 3), rtol=1e-4, atol=1e-4, method=method)
    ys.sum().backward()
    func.check()


def test_what_a_field_keeps_of_a_tuple_state_is_never_rewritten():
    kept = []

    def func(t, state):
        kept.append((state, tuple(part.clone() for part in state)))
        return tuple(-part for part in state)

    odeint(func, (fresh(), fresh()[:2]), T)
    for state, copies in kept:
        assert all(torch.equal(a, b) for a, b in zip(state, copies, strict=True))


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_graph_that_a_field_makes_for_itself_ends_with_its_call(method):
    """As in a flow, which differentiates in its field: a step would keep the graphs of its stages."""

    class Kept:
        """What a graph saves, in an object that ends with the graph."""

        def __init__(self, x):
            self.x = x.detach()

    graphs = []

    def pack(x):
        kept = Kept(x)
        graphs.append(weakref.ref(kept))
        return kept

    def func(t, y):
        alive.append(sum(graph() is not None for graph in graphs))
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.x):
            return torch.tanh(y.detach().requires_grad_())

    y0, alive = torch.ones(2), []
    with torch.no_grad():
        ys = odeint(func, y0, torch.linspace(0, 1, 3), method=method)
    assert len(graphs) == len(alive) >= 8 and not any(alive) and not ys.requires_grad, alive


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "implicit_adams"])
def test_what_a_callback_keeps_is_never_rewritten(method):
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = []

        def forward(self, t, y):
            return -y

        def callback_step(self, t0, y0, dt):
            self.kept.append(((t0, y0, dt), (t0.clone(), y0.clone(), dt.clone())))

    func = Field()
    odeint(func, fresh(), T, rtol=1e-3, atol=1e-3, method=method)
    assert len(func.kept) > 1
    for kept, copies in func.kept:
        assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_what_an_adjoint_callback_keeps_is_never_rewritten():
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, dtype=F64))
            self.kept = []

        def forward(self, t, y):
            return -self.w * y

        def callback_step_adjoint(self, t0, y0, dt):
            self.kept.append((y0, tuple(part.clone() for part in y0)))

    func = Field()
    odeint_adjoint(func, fresh(), T).sum().backward()
    assert func.kept
    for kept, copies in func.kept:
        assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_what_a_norm_keeps_is_never_rewritten():
    kept = []

    def norm(y):
        kept.append((y, y.clone()))
        return y.abs().max()

    odeint(lambda t, y: -y, fresh(), T, options=dict(norm=norm))
    assert all(torch.equal(a, b) for a, b in kept)


def test_outputs_of_two_solves_do_not_share_memory():
    first = odeint(lambda t, y: -y, fresh(), T)
    copy = first.clone()
    odeint(lambda t, y: y, fresh(), T)
    assert torch.equal(first, copy)


@pytest.mark.filterwarnings("ignore:t holds one time")
def test_the_solution_is_no_view_of_y0():
    y0 = fresh()
    for method in ("dopri5", "rk4"):
        for t in (T, T[:1]):
            ys = odeint(lambda t, y: -y, y0, t, method=method)
            ys.zero_()
            assert torch.equal(y0, fresh())


def test_the_caller_may_change_y0_after_the_solve():
    y0 = fresh()
    leaf = fresh().requires_grad_()
    ys = odeint_adjoint(lambda t, y: leaf * y, y0, T, adjoint_params=(leaf,))
    copy = ys.detach().clone()
    y0.zero_()
    assert torch.equal(ys.detach(), copy)


# ------------------------------------------------------------------ gradients of the unusual fields
@pytest.mark.parametrize("method", ["dopri5", "rk4", "adaptive_heun"])
@pytest.mark.parametrize(
    "solver",
    [odeint, lambda *args, **kw: odeint_adjoint(*args, adjoint_params=(), **kw)],
    ids=["odeint", "odeint_adjoint"],
)
@pytest.mark.parametrize("name", ["y itself", "a view of y"])
def test_the_gradient_of_a_field_that_returns_its_input(name, solver, method):
    y0 = fresh().requires_grad_()
    ys = solver(FIELDS[name][0](), y0, T, **dict(settings(method), rtol=1e-4, atol=1e-4))
    (grad,) = torch.autograd.grad(ys[-1].sum(), y0)
    assert torch.allclose(grad, torch.full((3,), math.e, dtype=F64), rtol=1e-3)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "adaptive_heun"])
@pytest.mark.parametrize("solver", [odeint, odeint_adjoint], ids=["odeint", "odeint_adjoint"])
def test_the_gradient_of_a_field_that_returns_its_parameter(solver, method):
    func, y0 = Parameter(), fresh().requires_grad_()
    ys = solver(func, y0, T, method=method, rtol=1e-4, atol=1e-4)
    ys[-1].sum().backward()
    assert torch.allclose(func.p.grad, torch.ones(3, dtype=F64), rtol=1e-9)
    assert torch.allclose(y0.grad, torch.ones(3, dtype=F64), rtol=1e-9)


def test_the_gradient_of_a_parameter_that_is_expanded():
    rate = torch.tensor(2.0, dtype=F64, requires_grad=True)
    for solver in (odeint, lambda *args: odeint_adjoint(*args, adjoint_params=(rate,))):
        (grad,) = torch.autograd.grad(solver(lambda t, y: rate.expand(3), fresh(), T)[-1].sum(), rate)
        assert float(grad) == pytest.approx(3.0, rel=1e-9)


# ------------------------------------------------------------------ the output
def test_an_output_changed_in_place_before_the_backward_pass_of_the_adjoint_raises():
    w = torch.ones(3, dtype=F64, requires_grad=True)
    ys = odeint_adjoint(lambda t, y: -w * y, fresh(), T, adjoint_params=(w,))
    loss = ys.square().sum()
    with torch.no_grad():
        ys.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_component_changed_in_place_before_the_backward_pass_of_the_adjoint_raises():
    w = torch.ones(3, dtype=F64, requires_grad=True)
    one, two = odeint_adjoint(lambda t, s: (-w * s[0], s[1]), (fresh(), fresh()), T, adjoint_params=(w,))
    loss = one.sum() + two.sum()
    with torch.no_grad():
        one.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_an_output_of_odeint_changed_in_place_is_differentiated_as_changed_or_raises(method):
    y0 = fresh().requires_grad_()
    ys = odeint(lambda t, y: torch.tanh(y), y0, T, method=method)
    (plain,) = torch.autograd.grad(ys[-1].sum(), y0, retain_graph=True)
    try:
        ys.mul_(2.0)
        (grad,) = torch.autograd.grad(ys[-1].sum(), y0)
    except RuntimeError as error:
        assert "inplace" in str(error) or "in-place" in str(error)
    else:
        assert torch.allclose(grad, 2 * plain)


def test_a_spare_state_is_not_copied_and_shows_as_well_whether_func_writes_into_its_argument():
    seen = []

    def func(t, y):
        seen.append(y)
        return y.mul_(2.0) if len(seen) > 1 else y + 1.0

    field, y, z = VectorField(func, Layout()), torch.ones(3), torch.ones(3)
    field(T[0], y)
    field(T[0], z, spare=True)
    assert seen[0] is not y and seen[1] is z  # y may be the user's y0
    later = torch.ones(3)
    assert torch.equal(field(T[0], later), torch.full((3,), 2.0))
    assert torch.equal(later, torch.ones(3))
