"""Gradients of a solve under torch.func, functional_call and autograd's batching: they are right, or an error says why.

They are never silently zero: if a transform cannot handle a solve as one operation, an error must say so.
"""

from __future__ import annotations

import contextlib
import functools
import warnings

import pytest
import torch
from problems import F64, MLP, Counting, linspace, loss_of, relative_difference
from torch import nn
from torch.func import functional_call, grad, grad_and_value, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from node_cuda import (
    TABLEAUS,
    MissingGradientWarning,
    NeuralODE,
    Unsupported,
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
    solve,
)

MODES = ("adjoint", "discrete")
both = pytest.mark.parametrize("mode", MODES)
# torch's forward mode scripts its decompositions at its first use, and torch warns about that.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
T = linspace(0.0, 1.0, 3)
Y = torch.tensor([0.7, -0.4], dtype=F64)
BATCH = torch.tensor([[0.7, -0.4], [-1.2, 0.1], [0.2, 2.0]], dtype=F64)
TOLERANCES = dict(rtol=1e-7, atol=1e-8)

# Two computations of the same number by one solver differ by some hundred roundings. The backward solve of the adjoint
# chooses other steps, so it agrees with backpropagation to some hundred times the tolerances.
SAME = 1e-12
OF_MODE = dict(adjoint=5e-5, discrete=1e-9)
REFUSED = (RuntimeError, NotImplementedError, ValueError, TypeError)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def leaves(params):
    return {name: leaf(p) for name, p in params.items()}


def listed(tree):
    """Return the tensors of a result of torch.func, in order."""
    return tuple(torch.utils._pytree.tree_leaves(tree))


def assert_equal(ours, theirs):
    ours, theirs = listed(ours), listed(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and torch.equal(a, b), float((a - b).abs().max())


def assert_near(ours, theirs, limit):
    ours, theirs = listed(ours), listed(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert relative_difference(a.detach(), b.detach()) <= limit, (a, b)


def assert_says(error, *words):
    """Check that the error has a message of this package: it is long enough and contains these words."""
    text = str(error.value)
    assert len(text) > 40 and all(word in text for word in words), text


class Net(nn.Module):
    """A neural ODE with a layer before and after it, as a typical model."""

    def __init__(self, mode, field=None, t=T, **solver):
        super().__init__()
        self.field = MLP(hidden=4, timed=True) if field is None else field
        self.scale = nn.Parameter(torch.tensor([1.1, 0.9], dtype=F64))
        self.mode, self.solver, self.t = mode, dict(TOLERANCES, **solver), t

    def forward(self, y0):
        return odeint_adjoint(self.field, y0 * self.scale, self.t, gradient=self.mode, **self.solver) * self.scale


def detached(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def by_autograd(net, params, y0, mode=None):
    """Return the value and the gradients for the parameters and y0. The parameters are put into the module itself."""
    net = Net(mode or net.mode, net.field, net.t, **net.solver)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(params[name])
    y0 = leaf(y0)
    value = loss_of(net(y0))
    grads = torch.autograd.grad(value, [*dict(net.named_parameters()).values(), y0])
    return value.detach(), dict(zip(dict(net.named_parameters()), grads, strict=False)), grads[-1]


def loss(net, params, y0):
    return loss_of(functional_call(net, params, (y0,)))


def shifted(params, by=0.1):
    return {name: p.detach() + by for name, p in params.items()}


# ------------------------------------------------------------------ functional_call with plain autograd
@both
@pytest.mark.parametrize("by", [0.0, 0.1], ids=["the same value", "another value"])
def test_functional_call_gives_the_gradient_of_the_given_parameters(mode, by):
    """The backward pass runs after functional_call has restored the module's own parameters."""
    net = Net(mode)
    given = leaves(shifted(detached(net), by))
    y0 = leaf(Y)
    grads = torch.autograd.grad(loss(net, given, y0), [*given.values(), y0])
    own = {name: p.detach().clone() for name, p in net.named_parameters()}
    _, for_params, for_y0 = by_autograd(net, shifted(own, by), Y)
    assert_equal(grads, (*for_params.values(), for_y0))
    assert all(p.grad is None for p in net.parameters())
    _, for_params, for_y0 = by_autograd(net, shifted(own, by), Y, "backprop")
    assert_near(grads, (*for_params.values(), for_y0), OF_MODE[mode])


@both
def test_functional_call_gives_the_gradient_of_products_of_a_hyper_network(mode):
    net = Net(mode)
    z = leaf(torch.tensor(0.3, dtype=F64))

    def of(mode):
        made = {name: p.detach() * (1 + z * torch.sin(p.detach())) for name, p in net.named_parameters()}
        return torch.autograd.grad(loss(Net(mode, net.field), made, Y), z)[0]

    assert_near(of(mode), of("backprop"), OF_MODE[mode])
    assert float(of(mode)) != 0


@both
@pytest.mark.parametrize("names", [["field.w1"], ["field.b1", "scale"]], ids=str)
def test_functional_call_with_some_of_the_parameters_gives_both_kinds_their_gradient(mode, names):
    net = Net(mode)
    given = {name: leaf(dict(net.named_parameters())[name] + 0.1) for name in names}
    loss(net, given, Y).backward()
    values = {name: p.detach() for name, p in net.named_parameters()} | {n: p.detach() for n, p in given.items()}
    ref = Net("backprop", MLP(hidden=4, timed=True))
    with torch.no_grad():
        for name, p in ref.named_parameters():
            p.copy_(values[name])
    loss_of(ref(Y)).backward()
    for name, p in ref.named_parameters():
        ours = given[name].grad if name in given else dict(net.named_parameters())[name].grad
        assert_near(ours, p.grad, OF_MODE[mode])
        if name in given:
            assert dict(net.named_parameters())[name].grad is None


class Buffered(nn.Module):
    """Multiplies by a buffer. `n` is a counter, like num_batches_tracked."""

    def __init__(self, frozen=False):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.3, -1.1], [0.8, 0.2]], dtype=F64), requires_grad=not frozen)
        self.register_buffer("gain", torch.tensor([1.0, 0.5], dtype=F64))
        self.register_buffer("n", torch.tensor(3))

    def forward(self, t, y):
        return torch.tanh(y @ self.w.T) * self.gain * torch.cos(t)


@both
def test_functional_call_replaces_buffers_in_the_backward_pass_too(mode):
    def of(mode):
        field = Buffered()
        net = Net(mode, field)
        given = {"field.w": leaf(field.w), "field.gain": torch.tensor([-0.4, 2.0], dtype=F64)}
        return torch.autograd.grad(loss(net, given, Y), given["field.w"])[0]

    assert_near(of(mode), of("backprop"), OF_MODE[mode])


@both
def test_functional_call_gives_the_gradient_of_a_buffer_or_says_that_it_has_none(mode):
    def of(mode):
        net = Net(mode, Buffered())
        given = {"field.gain": leaf(torch.tensor([-0.4, 2.0], dtype=F64))}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (g,) = torch.autograd.grad(loss(net, given, Y), given["field.gain"], allow_unused=True)
        return g, [w for w in caught if issubclass(w.category, MissingGradientWarning)]

    ours, told = of(mode)
    theirs, _ = of("backprop")
    assert told or relative_difference(ours, theirs) <= OF_MODE[mode]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2, dtype=F64)
        self.b = nn.Linear(2, 2, dtype=F64)
        self.b.weight = self.a.weight

    def forward(self, t, y):
        return torch.tanh(self.b(torch.tanh(self.a(y))))


@both
@pytest.mark.parametrize("cut", [False, True], ids=["tied", "the ties cut"])
def test_functional_call_with_tied_weights_adds_both_uses_or_gives_each_its_own_gradient(mode, cut):
    def of(mode):
        torch.manual_seed(1)
        net = Net(mode, Tied())
        given = leaves(shifted(detached(net)))
        assert "field.b.weight" not in given
        if cut:
            given["field.b.weight"] = leaf(given["field.a.weight"] - 0.3)
        ys = functional_call(net, given, (Y,), tie_weights=not cut)
        return torch.autograd.grad(loss_of(ys), list(given.values()))

    assert_near(of(mode), of("backprop"), OF_MODE[mode])


@both
def test_a_closure_that_calls_functional_call_itself_is_right(mode):
    field = MLP(hidden=4)
    given = leaves(shifted(dict(field.named_parameters())))

    def of(mode):
        named = {} if mode == "backprop" else dict(adjoint_params=tuple(given.values()))
        func = lambda t, y: functional_call(field, given, (t, y))  # noqa: E731
        return torch.autograd.grad(
            loss_of(solve(func, Y, T, gradient=mode, **TOLERANCES, **named).ys), list(given.values())
        )

    assert_near(of(mode), of("backprop"), OF_MODE[mode])


@both
def test_the_gradient_is_that_of_the_parameter_that_the_forward_pass_used(mode):
    """The parameter is replaced between the passes, as a load of another checkpoint with assign=True does."""
    field = nn.Linear(2, 2, dtype=F64)

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = field

        def forward(self, t, y):
            return torch.tanh(self.inner(y))

    func, old, y0 = Field(), field.weight, leaf(Y)
    expected = torch.autograd.grad(loss_of(solve(func, y0, T, gradient=mode).ys), [old, field.bias, y0])
    value = loss_of(solve(func, y0, T, gradient=mode).ys)
    field.weight = nn.Parameter(torch.full_like(old, 5.0))
    assert_equal(torch.autograd.grad(value, [old, field.bias, y0]), expected)
    assert float(field.weight.detach()[0, 0]) == 5.0 and field.weight.grad is None


@both
def test_a_parameter_written_into_between_the_passes_is_refused_as_autograd_does(mode):
    func = MLP(hidden=4)
    value = loss_of(solve(func, Y, T, gradient=mode).ys)
    with torch.no_grad():
        func.w1.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@both
@pytest.mark.parametrize("wrapped", ["hooks", "cpu"])
def test_saved_tensors_may_be_stored_elsewhere(mode, wrapped):
    net, given, y0 = Net(mode), None, leaf(Y)
    given = leaves(shifted(detached(net)))
    kept = []

    def pack(x):
        kept.append(x.shape)
        return x.numpy(force=True).copy()

    context = (
        torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy)
        if wrapped == "hooks"
        else torch.autograd.graph.save_on_cpu()
    )
    with context:
        value = loss(net, given, y0)
    grads = torch.autograd.grad(value, [*given.values(), y0])
    _, for_params, for_y0 = by_autograd(net, detached(net) | {n: p.detach() for n, p in given.items()}, Y)
    assert_equal(grads, (*for_params.values(), for_y0))
    assert kept or wrapped == "cpu"


@both
def test_saved_tensors_of_a_closure_stored_elsewhere_are_right_or_refused_with_a_message(mode):
    w = leaf(torch.tensor([0.4, -0.9], dtype=F64))

    def value():
        return loss_of(solve(lambda t, y: torch.tanh(y) * w, Y, T, gradient=mode, adjoint_params=(w,)).ys)

    expected = torch.autograd.grad(value(), w)
    with torch.autograd.graph.save_on_cpu():
        kept = value()
    try:
        ours = torch.autograd.grad(kept, w)
    except REFUSED as error:
        assert_says(type("caught", (), dict(value=error)), "saved-tensor")
    else:
        assert_equal(ours, expected)


@both
def test_functional_call_of_a_parametrized_field_gives_the_originals_their_gradient(mode):
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2, dtype=F64))

        def forward(self, t, y):
            return torch.tanh(self.linear(y))

    net, plain = Net(mode, Field()), Net("backprop", Field())
    params = shifted(detached(net))
    assert any("original0" in name for name in params)
    given = leaves(params)
    theirs = torch.autograd.grad(loss(plain, given, Y), list(given.values()))
    assert_near(torch.autograd.grad(loss(net, given, Y), list(given.values())), theirs, OF_MODE[mode])
    assert_near(grad(functools.partial(loss, net))(params, Y), theirs, OF_MODE[mode])


@both
def test_weights_of_a_hyper_network_are_right_if_they_are_replaced_between_the_passes(mode):
    """As in FFJORD's hyper networks, the weights are attributes and not parameters of func. Each call names them."""

    class Field(nn.Module):
        def forward(self, t, y):
            return torch.tanh(y @ self.w)

    z, field = leaf(torch.eye(2, dtype=F64)), Field()

    def value(mode):
        field.w = torch.sin(z) + 0.1
        named = {} if mode == "backprop" else dict(adjoint_params=(field.w,))
        return loss_of(solve(field, Y, T, gradient=mode, **TOLERANCES, **named).ys)

    kept = value(mode)
    expected = torch.autograd.grad(kept, z, retain_graph=True)
    assert_near(expected, torch.autograd.grad(value("backprop"), z), OF_MODE[mode])
    field.w = torch.cos(z)  # the next batch's, before the backward pass of this one
    try:
        ours = torch.autograd.grad(kept, z)
    except REFUSED as error:
        assert len(str(error)) > 40
    else:
        assert_equal(ours, expected)


@both
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_hook_of_a_parameter_meets_its_whole_gradient_once(mode, method):
    """As in autograd: not the part of each evaluation, and then their sum again. torchdiffeq's meets both."""
    func, y0, seen = MLP(hidden=4), leaf(Y), []
    run = functools.partial(solve, func, y0, T, method=method, gradient=mode, **TOLERANCES)
    params = tuple(func.parameters())
    expected = torch.autograd.grad(loss_of(run().ys), (y0, *params))

    def doubled(g):
        seen.append(g)
        return 2 * g

    handles = [params[0].register_hook(doubled), y0.register_hook(doubled)]
    loss_of(run().ys).backward()
    assert len(seen) == 2
    assert_equal((y0.grad, *(p.grad for p in params)), (2 * expected[0], 2 * expected[1], *expected[2:]))
    for handle in handles:
        handle.remove()
    outside = leaf(Y)  # a tensor that no module holds keeps its place
    outside.register_hook(doubled)
    named = dict(adjoint_params=(outside,), method=method, gradient=mode)
    assert torch.autograd.grad(loss_of(solve(lambda t, y: -outside * y, Y, T, **named).ys), outside)[0].isfinite().all()


@pytest.mark.parametrize("method", ["dopri5", "rk4", "rodas5p", "kvaerno5", "gl6"])
@pytest.mark.parametrize("gradient", ["adjoint", "discrete", "auto"])
def test_a_backward_pass_inside_inference_mode_is_that_outside(method, gradient):
    net, t = MLP(timed=True), linspace(0.0, 1.0, 3).requires_grad_()
    y0 = torch.ones(2, 2, dtype=F64, requires_grad=True)
    options = {} if method in ("dopri5", "rodas5p", "kvaerno5") else dict(step_size=0.1)

    def gradients(context):
        ys = odeint_adjoint(net, y0, t, method=method, rtol=1e-6, atol=1e-6, options=options, gradient=gradient)
        value = loss_of(ys)
        with context:
            return torch.autograd.grad(value, [y0, t, *net.parameters()])

    assert_equal(gradients(torch.inference_mode()), gradients(contextlib.nullcontext()))


@both
def test_the_backward_pass_may_run_twice(mode):
    net = Net(mode)
    given = leaves(detached(net))
    value = loss(net, given, Y)
    first = torch.autograd.grad(value, list(given.values()), retain_graph=True)
    assert_equal(torch.autograd.grad(value, list(given.values())), first)


@both
def test_a_solve_inside_torch_checkpoint_gives_the_given_parameters_their_gradient(mode):
    net, y0 = Net(mode), leaf(Y)
    expected = torch.autograd.grad(loss_of(net(y0)), [y0, *net.parameters()])
    ys = torch.utils.checkpoint.checkpoint(net, y0, use_reentrant=False)
    assert_equal(torch.autograd.grad(loss_of(ys), [y0, *net.parameters()]), expected)


# ------------------------------------------------------------------ torch.func: one sample
@both
def test_grad_of_parameters_and_state_is_that_of_autograd(mode):
    net = Net(mode)
    params = shifted(detached(net))
    grads, value = grad_and_value(functools.partial(loss, net), argnums=(0, 1))(params, Y)
    expected, for_params, for_y0 = by_autograd(net, params, Y)
    assert torch.equal(value, expected)
    assert_equal(grads, (for_params, for_y0))
    _, for_params, for_y0 = by_autograd(net, params, Y, "backprop")
    assert_near(grads, (for_params, for_y0), OF_MODE[mode])


@both
def test_vjp_gives_a_function_that_may_be_called_more_than_once(mode):
    net = Net(mode)
    params = detached(net)
    ys, pull = vjp(functools.partial(functional_call, net), params, (Y,))
    one, two = torch.ones_like(ys), torch.linspace(0.5, 1.5, ys.numel(), dtype=F64).reshape(ys.shape)
    first, second = pull(one), pull(two)
    assert_near(pull(one + two), [a + b for a, b in zip(listed(first), listed(second), strict=True)], OF_MODE[mode])
    _, for_params, for_y0 = by_autograd(net, params, Y)
    assert_equal(second, (for_params, (for_y0,)))


def jacobian_by_rows(run, *inputs):
    """Return the Jacobian of one output tensor, row by row, by plain autograd."""
    inputs = [leaf(x) for x in inputs]
    ys = run(*inputs)
    rows = [torch.autograd.grad(y, inputs, retain_graph=True, allow_unused=True) for y in ys.flatten()]
    return tuple(
        torch.stack([torch.zeros_like(x) if row[i] is None else row[i] for row in rows]).reshape(ys.shape + x.shape)
        for i, x in enumerate(inputs)
    )


@both
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_jacrev_is_the_jacobian_row_by_row(mode, chunk_size):
    net = Net(mode, t=linspace(0.0, 1.0, 2))
    names = ["field.w1", "field.b1"]
    params = detached(net)

    def run(w1, b1, y0):
        return functional_call(net, {"field.w1": w1, "field.b1": b1}, (y0,))

    ours = jacrev(run, argnums=(0, 1, 2), chunk_size=chunk_size)(params[names[0]], params[names[1]], Y)
    rows = jacobian_by_rows(run, params[names[0]], params[names[1]], Y)
    assert_near(ours, rows, SAME)


@both
def test_a_batch_of_gradients_of_the_outputs_is_refused_with_an_alternative(mode):
    """torch's vmap for these gradients does not call the vmap rule of this package."""
    net, y0 = Net(mode), leaf(Y)
    ys = net(y0)
    with pytest.raises(NotImplementedError, match=r"one gradient of the outputs at a time.*torch\.func\.jacrev"):
        torch.autograd.grad(ys, y0, torch.randn(4, *ys.shape, dtype=F64), is_grads_batched=True)
    with pytest.raises(NotImplementedError, match=r"one gradient of the outputs at a time.*torch\.func\.jacrev"):
        torch.autograd.functional.jacobian(net, Y, vectorize=True)


@both
@pytest.mark.parametrize(
    "method, options",
    [("dopri5", {}), ("rk4", {}), ("rk4", dict(step_size=0.3)), ("midpoint", dict(step_size=0.3, interp="cubic"))],
    ids=str,
)
def test_grad_for_the_times(mode, method, options):
    field = MLP(hidden=4, timed=True)
    t = torch.tensor([0.1, 0.5, 1.2], dtype=F64)

    def value(y0, t, mode=mode):
        return loss_of(solve(field, y0, t, gradient=mode, method=method, options=options, **TOLERANCES).ys)

    ours = grad(value, argnums=(0, 1))(Y, t)
    y0, t = leaf(Y), leaf(t)
    assert_equal(ours, torch.autograd.grad(value(y0, t), [y0, t]))
    theirs = torch.autograd.grad(value(y0, t, "backprop"), [y0, t])
    if mode == "discrete":
        assert_near(ours[0], theirs[0], OF_MODE[mode])
        # (between adaptive steps backpropagation gives the slope of the interpolant, the other modes that of the flow)
        assert_near(ours[1], theirs[1], OF_MODE[mode] if method != "dopri5" else 1e-3)
    assert float(ours[1].detach().abs().min()) > 0
    rows = torch.stack([grad(value, argnums=1)(y, t.detach()) for y in BATCH])
    assert_equal(vmap(grad(value, argnums=1), in_dims=(0, None))(BATCH, t.detach()), rows)


class Wrapped(NeuralODE):
    """A NeuralODE with the times of these tests as its default."""

    def forward(self, y0, t=T):
        return super().forward(y0, t)


# ------------------------------------------------------------------ vmap
@both
@pytest.mark.parametrize("how", ["module", "named closure", "no gradient"])
def test_vmap_is_a_loop_over_samples_bit_for_bit(mode, how):
    field = MLP(hidden=4, timed=True)
    func = field if how == "module" else (lambda t, y: field(t, y))
    named = dict(adjoint_params=tuple(field.parameters())) if how == "named closure" else {}
    if how == "no gradient":
        field.requires_grad_(False)
        named = dict(adjoint_params=())

    def run(y0):
        return odeint_adjoint(func, y0, T, gradient=mode, **named)

    assert_equal(vmap(run)(BATCH), torch.stack([run(y) for y in BATCH]))


@both
def test_vmap_over_any_dimension_into_any_dimension(mode):
    field = MLP(hidden=4)

    def run(y0):
        return odeint_adjoint(field, y0, T, gradient=mode)

    states = torch.stack([BATCH, 2 * BATCH, -BATCH, BATCH + 1], dim=2)  # 3, 2, 4: samples in the last
    loop = torch.stack([run(states[..., i]) for i in range(4)], dim=1)
    assert_equal(vmap(run, in_dims=-1, out_dims=1)(states), loop)
    assert_equal(vmap(run, in_dims=2, out_dims=1, chunk_size=3)(states), loop)


@both
def test_each_sample_of_vmap_has_its_own_steps_and_the_stats_are_their_sum(mode):
    field = Counting(MLP(hidden=4))
    scaled = torch.stack([BATCH[0], 50 * BATCH[1], 1e-3 * BATCH[2]])
    single = []
    for y0 in scaled:
        y0 = leaf(y0)
        one = solve(field, y0, T, gradient=mode)
        loss_of(one.ys).backward()
        single.append(one.stats)
    stats = []

    def value(y0):
        solution = solve(field, y0, T, gradient=mode)
        stats.append(solution.stats)
        return loss_of(solution.ys)

    assert len({s.accepted for s in single}) > 1
    field.nfe = 0
    vmap(grad(value))(scaled)
    for name in ("nfe", "nfe_backward", "accepted", "rejected"):
        assert getattr(stats[0], name) == sum(getattr(s, name) for s in single), name
    # (the discrete adjoint counts a replayed stage with its vjp as one evaluation, as the plain solve does)
    assert stats[0].nfe + stats[0].nfe_backward == field.nfe - 1  # and one evaluation of func outside the solves


@both
@pytest.mark.parametrize("in_dims", [(None, 0), (0, 0), (0, None)], ids=str)
def test_per_sample_gradients_are_those_of_a_loop(mode, in_dims):
    """For shared parameters, for an ensemble with separate data, and for an ensemble with the same data."""
    net = Net(mode)
    one = detached(net)
    many = {name: torch.stack([p, p + 0.1, p - 0.2]) for name, p in one.items()}
    params = one if in_dims[0] is None else many
    y0 = BATCH if in_dims[1] == 0 else Y
    of = grad_and_value(functools.partial(loss, net), argnums=(0, 1))
    ours = vmap(of, in_dims=in_dims)(params, y0)
    loop = []
    for i in range(3):
        p = one if in_dims[0] is None else {name: q[i] for name, q in many.items()}
        loop.append(listed(by_autograd(net, p, y0[i] if in_dims[1] == 0 else y0)))
    expected = [torch.stack(column) for column in zip(*loop, strict=True)]
    (g_params, g_y0), v = ours
    assert_equal((v, g_params, g_y0), expected)


@both
def test_the_gradient_through_vmap_is_the_sum_over_samples(mode):
    net = Net(mode)
    params = detached(net)

    def total(params, y0):
        return vmap(functools.partial(loss, net), in_dims=(None, 0))(params, y0).sum()

    ours = grad(total, argnums=(0, 1))(params, BATCH)
    loop = [by_autograd(net, params, y0)[1:] for y0 in BATCH]
    summed = {n: sum(row[0][n] for row in loop) for n in params}
    assert_near(ours, (summed, torch.stack([row[1] for row in loop])), SAME)


@both
def test_vmap_of_vmap_is_two_loops(mode):
    net = Net(mode)
    params = detached(net)
    of = grad_and_value(functools.partial(loss, net), argnums=(0, 1))
    states = torch.stack([BATCH, BATCH[[1, 2, 0]] * 0.5])
    ours = vmap(vmap(of, in_dims=(None, 0)), in_dims=(None, 0))(params, states)
    many = {name: torch.stack([p, p + 0.1]) for name, p in params.items()}
    crossed = vmap(vmap(of, in_dims=(None, 0)), in_dims=(0, None))(many, BATCH)
    for i in range(2):
        for j in range(3):
            value, g, gy = by_autograd(net, params, states[i, j])
            (a, b), v = ours
            assert_equal((v[i, j], {n: x[i, j] for n, x in a.items()}, b[i, j]), (value, g, gy))
            value, g, gy = by_autograd(net, {n: p[i] for n, p in many.items()}, BATCH[j])
            (a, b), v = crossed
            assert_equal((v[i, j], {n: x[i, j] for n, x in a.items()}, b[i, j]), (value, g, gy))


@both
def test_jacrev_of_vmap_and_vmap_of_jacrev_are_the_samples_jacobians(mode):
    net = Net(mode, t=linspace(0.0, 1.0, 2)).requires_grad_(False)

    def end(y0):
        return net(y0)[-1]

    rows = torch.stack([jacobian_by_rows(end, y0)[0] for y0 in BATCH])
    assert_near(vmap(jacrev(end))(BATCH), rows, SAME)
    whole = jacrev(vmap(end))(BATCH)  # 3, 2, 3, 2
    assert_near(torch.stack([whole[i, :, i] for i in range(3)]), rows, SAME)
    assert float(torch.stack([whole[i, :, (i + 1) % 3] for i in range(3)]).abs().max()) == 0


@both
def test_grad_of_vmap_of_jacrev_of_parameters_is_refused(mode):
    """This is a second derivative by two kinds of transform."""
    net = Net(mode, t=linspace(0.0, 1.0, 2))

    def trace(params, y0):
        jacobian = jacrev(lambda y: functional_call(net, params, (y,))[-1])(y0)
        return jacobian.diagonal().sum()

    with pytest.raises(REFUSED):
        grad(lambda p: vmap(trace, in_dims=(None, 0))(p, BATCH).sum())(detached(net))


@both
@pytest.mark.parametrize("field", ["mlp", "buffered", "frozen"])
def test_an_ensemble_of_modules_is_a_loop_over_its_members(mode, field):
    """Each member also has separate buffers and frozen parameters, because stack_module_state stacks them."""
    members = []
    for i in range(3):
        inner = Buffered(frozen=True) if field == "buffered" else MLP(hidden=4, seed=i)
        if field == "buffered":
            inner.gain.mul_(1 + i)
        if field == "frozen":
            inner.requires_grad_(False)
        members.append(Net(mode, inner))
    params, buffers = stack_module_state(members)
    params = {name: p.detach() for name, p in params.items()}

    def value(params, buffers, y0):
        return loss_of(functional_call(members[0], (params, buffers), (y0,)))

    for in_dims, data in (((0, 0, 0), BATCH), ((0, 0, None), Y)):
        of = vmap(grad_and_value(value, argnums=(0, 2)), in_dims=in_dims)
        (for_params, for_y0), values = of(params, buffers, data)
        for i, member in enumerate(members):
            y0 = leaf(data[i] if in_dims[2] == 0 else data)
            expected = loss_of(member(y0))
            assert_near(values[i], expected, SAME)
            wanted = [(n, p) for n, p in member.named_parameters() if p.requires_grad]
            theirs = torch.autograd.grad(expected, [y0, *(p for _, p in wanted)])
            # (torch.func.grad differentiates by the frozen ones as well, and the adjoint's error norm sees them)
            limit = SAME if field == "mlp" else OF_MODE[mode]
            assert_near([for_y0[i], *(for_params[n][i] for n, _ in wanted)], theirs, limit)


@both
def test_an_ensemble_trains_with_plain_autograd_around_vmap(mode):
    members = [Net(mode, MLP(hidden=4, seed=i)) for i in range(3)]
    params, buffers = stack_module_state(members)  # leaves that require gradients

    def one(params, buffers, y0):
        return functional_call(members[0], (params, buffers), (y0,))

    loss_of(vmap(one, in_dims=(0, 0, None))(params, buffers, Y)).backward()
    loss_of(torch.stack([member(Y) for member in members])).backward()
    for name, p in params.items():
        theirs = torch.stack([dict(m.named_parameters())[name].grad for m in members])
        assert_near(p.grad, theirs, SAME)


# ------------------------------------------------------------------ other states and settings under transforms
def pendulum(func):
    """A field of a tuple state, with the parameters of an MLP."""

    class Pendulum(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = func

        def forward(self, t, state):
            angle, speed = state
            return speed, self.inner(t, angle) - 0.1 * speed

    return Pendulum()


@both
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)], ids=str)
def test_vmap_of_grad_of_a_tuple_state(mode, in_dims):
    field = pendulum(MLP(hidden=4, timed=True))
    angles, speeds = BATCH, torch.flip(BATCH, [0]) + 0.1

    def value(angle, speed):
        return loss_of(odeint_adjoint(field, (angle, speed), T, gradient=mode, **TOLERANCES))

    a = angles if in_dims[0] == 0 else angles[0]
    s = speeds if in_dims[1] == 0 else speeds[0]
    ours = vmap(grad(value, argnums=(0, 1)), in_dims=in_dims)(a, s)
    for i in range(3):
        x, v = leaf(a[i] if in_dims[0] == 0 else a), leaf(s[i] if in_dims[1] == 0 else s)
        assert_equal([g[i] for g in ours], torch.autograd.grad(value(x, v), [x, v]))


@both
def test_vmap_of_grad_of_a_complex_state(mode):
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3 + 1j, -0.5 + 0.1j]).to(torch.complex128))

        def forward(self, t, y):
            return (self.w * y + 0.2j * y.conj()) * torch.cos(t)

    net = Wrapped(Field(), gradient=mode, **TOLERANCES)
    states = torch.complex(BATCH, BATCH.flip(0))
    params = detached(net)
    ours = vmap(grad(functools.partial(loss, net), argnums=(0, 1)), in_dims=(None, 0))(params, states)
    for i, y0 in enumerate(states):
        given, y0 = leaves(params), leaf(y0)
        theirs = torch.autograd.grad(loss(net, given, y0), [*given.values(), y0])
        assert_equal((ours[0]["func.w"][i], ours[1][i]), theirs)
        plain = Wrapped(net.func, gradient="backprop", **TOLERANCES)
        theirs = torch.autograd.grad(loss(plain, given, y0), [*given.values(), y0])
        assert_near((ours[0]["func.w"][i], ours[1][i]), theirs, OF_MODE[mode])


@pytest.mark.slow
@both
@pytest.mark.parametrize(
    "solver",
    [
        dict(t=linspace(1.0, -0.5, 3)),
        dict(t=linspace(0.0, 1.0, 9)),
        dict(method="rk4", options=dict(step_size=0.2)),
        dict(method="bosh3", rtol=1e-4, atol=1e-4),
        dict(options=dict(dense="accurate")),
        dict(checkpoints=2),
        dict(checkpoints="auto"),
        dict(options=dict(throw=False)),
        dict(options=dict(norm=lambda y: y.abs().max())),
        dict(adjoint_options=dict(norm="seminorm")),
        dict(adjoint_rtol=1e-9, adjoint_atol=1e-9),
        dict(rtol=torch.tensor(1e-6), atol=torch.tensor([1e-6, 1e-9], dtype=F64)),
    ],
    ids=lambda solver: ",".join(solver),
)
def test_per_sample_gradients_under_other_settings(mode, solver):
    if mode != ("discrete" if "checkpoints" in solver else "adjoint" if "adjoint" in "".join(solver) else mode):
        return  # a setting of the other mode
    net = Net(mode, **solver)
    params = detached(net)
    ours = vmap(grad(functools.partial(loss, net), argnums=(0, 1)), in_dims=(None, 0))(params, BATCH)
    for i, y0 in enumerate(BATCH):
        _, theirs, of_y0 = by_autograd(net, params, y0)
        assert_equal([{n: g[i] for n, g in ours[0].items()}, ours[1][i]], [theirs, of_y0])


@both
def test_a_sample_that_fails_without_throwing_is_nan_alone(mode):
    """y' = y^2 blows up at 1 / y0. The other samples have their solutions and gradients."""

    class Square(nn.Module):
        def forward(self, t, y):
            return y * y

    states = torch.tensor([[0.3], [5.0], [0.5]], dtype=F64)

    def run(y0):
        return odeint_adjoint(Square(), y0, T, gradient=mode, adjoint_params=(), options=dict(throw=False))

    ys = vmap(run)(states)
    assert ys[1, -1].isnan().all() and ys[[0, 2]].isfinite().all()
    grads = vmap(grad(lambda y: run(y)[-1].sum()))(states)
    exact = 1 / (1 - states) ** 2
    assert relative_difference(grads[[0, 2]], exact[[0, 2]]) < 1e-5
    with pytest.raises(RuntimeError, match="t ="):
        vmap(lambda y0: odeint_adjoint(Square(), y0, T, gradient=mode, adjoint_params=()))(states)


@both
def test_a_field_that_differentiates_inside_solves_under_vmap_and_grad(mode):
    """A continuous normalizing flow computes the exact trace in the field, by autograd or by torch.func."""

    class Trace(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inner, self.inside = MLP(hidden=4), inside

        def forward(self, t, state):
            x, _ = state
            if self.inside == "autograd":
                with torch.enable_grad():
                    x = x.requires_grad_(True) if x.is_leaf and not x.requires_grad else x
                    v = self.inner(t, x)
                    rows = [torch.autograd.grad(v[i], x, create_graph=True)[0][i] for i in range(2)]
                return v, -(rows[0] + rows[1])
            return self.inner(t, x), -jacrev(lambda x: self.inner(t, x))(x).diagonal().sum()

    zero = torch.zeros((), dtype=F64)
    found = []
    for inside in ("autograd", "func"):
        field = Trace(inside)

        def value(params, x, field=field):
            class Flow(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.field = field

                def forward(self, x):
                    return odeint_adjoint(self.field, (x, zero), T[[0, -1]], gradient=mode, **TOLERANCES)

            return loss_of(functional_call(Flow(), params, (x,)))

        params = {"field." + n: p.detach() for n, p in field.named_parameters()}
        ours = vmap(grad(value), in_dims=(None, 0))(params, BATCH)
        for i, x in enumerate(BATCH):
            given = leaves(params)
            theirs = torch.autograd.grad(value(given, x), list(given.values()))
            assert_equal([g[i] for g in ours.values()], theirs)
        found.append(ours)
    assert_near(found[0], found[1], 1e-9)


# ------------------------------------------------------------------ refused: second derivatives
def twice(x, by, value):
    """Differentiate the gradient and that of another term by plain autograd. by: gives the gradient for a leaf."""
    x = leaf(x)
    return torch.autograd.grad(by(value, x).sum() + x.square().sum(), x)


def batched(value, x):
    ones = torch.ones(2, dtype=F64)
    return torch.autograd.grad(value(x), x, ones, is_grads_batched=True, create_graph=True)[0]


SECOND = {
    "grad of grad": lambda value, x: grad(lambda x: grad(value)(x).sum())(x),
    "jacrev of jacrev": lambda value, x: jacrev(jacrev(value))(x),
    "hessian": lambda value, x: torch.func.hessian(value)(x),
    "jacrev of jacfwd": lambda value, x: jacrev(jacfwd(value))(x),
    "jvp of grad": lambda value, x: jvp(grad(value), (x,), (torch.ones_like(x),))[1],
    "vjp of grad": lambda value, x: vjp(grad(value), x)[1](torch.ones_like(x)),
    "vmap of grad of grad": lambda value, x: vmap(grad(lambda x: grad(value)(x).sum()))(x[None]),
    "functional.hessian": lambda value, x: torch.autograd.functional.hessian(value, x),
    "functional.hessian vectorized": lambda value, x: torch.autograd.functional.hessian(value, x, vectorize=True),
    "functional.hvp": lambda value, x: torch.autograd.functional.hvp(value, x, torch.ones_like(x)),
    "create_graph": lambda value, x: twice(x, lambda f, x: torch.autograd.grad(f(x), x, create_graph=True)[0], value),
    "create_graph of batched grads": lambda value, x: twice(x, batched, value),
    "autograd of func.grad": lambda value, x: twice(x, lambda f, x: grad(f)(x), value),
}


@both
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another term"])
@pytest.mark.parametrize("how", SECOND)
def test_second_derivatives_are_refused(mode, how, beside):
    """The loss is linear in the solution. Another term of the sum has a second derivative."""
    net = Net(mode)

    def value(y0):
        ours = loss_of(net(y0))
        return ours + y0.pow(3).sum() if beside else ours

    with pytest.raises(REFUSED) as error:
        SECOND[how](value, Y)
    assert len(str(error.value)) > 40, str(error.value)


@both
@pytest.mark.parametrize("how", ["create_graph", "autograd of func.grad", "grad of grad", "vmap"])
def test_mixed_second_derivatives_for_parameters_are_refused(mode, how):
    """The gradient for y0 is differentiated by the parameters. Another term has a derivative for them."""
    net = Net(mode)

    def penalty(params, y0):
        if how == "create_graph":
            y0 = leaf(y0)
            return torch.autograd.grad(loss(net, params, y0), y0, create_graph=True)[0].square().sum()
        return grad(functools.partial(loss, net), argnums=1)(params, y0).square().sum()

    def total(params, y0):
        return penalty(params, y0) + sum(p.square().sum() for p in params.values())

    with pytest.raises(REFUSED) as error:
        if how == "grad of grad":
            grad(total)(detached(net), Y)
        elif how == "vmap":
            vmap(grad(total), in_dims=(None, 0))(detached(net), BATCH)
        else:
            given = leaves(detached(net))
            torch.autograd.grad(total(given, Y), list(given.values()))
    assert len(str(error.value)) > 40


@both
def test_the_second_derivative_refused_names_the_mode(mode):
    y0 = leaf(Y)
    (g,) = torch.autograd.grad(loss_of(Net(mode)(y0)), y0, create_graph=True)
    with pytest.raises(NotImplementedError, match=f'gradient="{mode}" gives first derivatives only'):
        g.sum().backward()


# ------------------------------------------------------------------ refused: forward mode
@both
@pytest.mark.parametrize("by", ["state", "parameter", "time", "closure", "named closure"])
@pytest.mark.parametrize("how", ["jvp", "jacfwd", "dual"])
def test_forward_mode_is_right_or_raises(mode, how, by):
    """Silent tangents of zero would be wrong."""
    field = MLP(hidden=4, timed=True)
    t = T.clone()

    def run(x, mode=mode, **options):
        solver = dict(gradient=mode, **options)
        if by == "state":
            return solve(field, x, t, **solver).ys
        if by == "time":
            return solve(field, Y, x, **solver).ys
        if by == "parameter":
            return functional_call(Wrapped(field, **solver), {"func.b1": x}, (Y,))
        named = dict(adjoint_params=(x,)) if by == "named closure" else dict(adjoint_params=())
        return solve(lambda t, y: torch.tanh(y) * x, Y, t, **solver, **(named if mode != "backprop" else {})).ys

    x = {"state": Y, "time": t, "parameter": field.b1.detach()}.get(by, torch.tensor([0.4, -0.9], dtype=F64))
    v = torch.linspace(0.5, 1.0, x.numel(), dtype=F64)
    try:
        if how == "jvp":
            tangent = jvp(run, (x,), (v,))[1]
        elif how == "jacfwd":
            tangent = jacfwd(run)(x) @ v
        else:
            with torch.autograd.forward_ad.dual_level():
                ys = run(torch.autograd.forward_ad.make_dual(x, v))
                tangent = torch.autograd.forward_ad.unpack_dual(ys).tangent
                assert tangent is not None, "the tangent was dropped in silence"
    except REFUSED as error:
        assert len(str(error)) > 40, str(error)
        return
    eps = 1e-5
    with torch.no_grad():
        slope = (run(x + eps * v, "backprop") - run(x - eps * v, "backprop")) / (2 * eps)
    assert relative_difference(tangent, slope) < 1e-5


# ------------------------------------------------------------------ forward mode through odeint
W = torch.tensor([[0.0, 1.0], [-1.0, 0.3]], dtype=F64)
FORWARD = torch.tensor([0.0, 0.4, 1.0], dtype=F64)


def exact(y0, w, t):
    """Return the closed-form solution of y' = (1 + t) w y."""
    age = t + t.square() / 2
    return torch.stack([torch.matrix_exp(w * (a - age[0])) @ y0 for a in age])


# One method for each kind of step: grids of one and four stages, two stages with an error, FSAL, carried stage, Adams.
@pytest.mark.parametrize("method", ["euler", "rk4", "adaptive_heun", "dopri5", "dopri8", "explicit_adams"])
def test_forward_mode_through_odeint_is_right_by_state_parameters_and_times(method):
    """The derivative is by y0, w and t at once, with a parameter that requires a gradient, and under no_grad."""
    wanted = nn.Parameter(torch.ones((), dtype=F64))
    adaptive = method in TABLEAUS and TABLEAUS[method].adaptive
    fixed = dict(options=dict(step_size=0.05, interp="cubic"))

    def run(y0, w, t):
        def field(t, y):
            return (w @ y) * (1 + t) * wanted

        return odeint(field, y0, t, method=method, **(dict(rtol=1e-5, atol=1e-5) if adaptive else fixed))

    ours = jacfwd(run, (0, 1, 2))(Y, W, FORWARD)
    with torch.no_grad():
        assert_near(jacfwd(run, (0, 1, 2))(Y, W, FORWARD), ours, SAME)
    assert_near(ours, jacrev(run, (0, 1, 2))(Y, W, FORWARD), SAME)
    # The error of the method at these steps: at most 0.12 (euler) and 0.01 were seen.
    assert_near(ours, jacfwd(exact, (0, 1, 2))(Y, W, FORWARD), 0.2 if method == "euler" else 0.02)


@pytest.mark.parametrize("recording", [True, False])
def test_dual_tensors_pass_through_odeint_and_related_functions(recording):
    """The cases are tuples, time that runs backwards, an integral beside y, and the solution as a function."""
    wanted, v = nn.Parameter(W.clone()), torch.tensor([1.0, 0.5], dtype=F64)
    end = torch.matrix_exp(W)
    runs = {
        "tuple": (lambda y: odeint(lambda t, s: (wanted @ s[0], s[0]), (y, 0 * y), T, **TOLERANCES)[0][-1], end @ v),
        "backwards": (
            lambda y: odeint(lambda t, y: wanted @ y, y, T.flip(0), **TOLERANCES)[-1],
            torch.inverse(end) @ v,
        ),
        "integral": (
            lambda y: solve(lambda t, y: wanted @ y, y, T, integral=lambda t, y, dy: y, **TOLERANCES).integral[-1],
            torch.linalg.solve(W, (end - torch.eye(2, dtype=F64)) @ v),
        ),
        "function": (lambda y: odeint_dense(lambda t, y: wanted @ y, y, T[0], T[-1], **TOLERANCES)(T[-1]), end @ v),
    }
    with torch.set_grad_enabled(recording), torch.autograd.forward_ad.dual_level():
        for name, (run, right) in runs.items():
            tangent = torch.autograd.forward_ad.unpack_dual(run(torch.autograd.forward_ad.make_dual(Y, v))).tangent
            assert relative_difference(tangent.detach(), right) < 1e-5, name


def test_forward_mode_by_the_times_of_a_function_is_the_field():
    with torch.no_grad():
        slope = jvp(lambda t: odeint_dense(lambda t, y: W @ y, Y, T[0], T[-1], **TOLERANCES)(t), (T[1],), (T[-1],))[1]
    assert relative_difference(slope, W @ torch.matrix_exp(0.5 * W) @ Y) < 1e-5


def test_second_derivatives_by_forward_mode_are_right():
    """y(1) = y0 / (1 + y0) for y' = -y^2, and d2y / dy0^2 = -2 / (1 + y0)^3."""

    def end(y0):
        return odeint(lambda t, y: -y * y, y0, T, **TOLERANCES)[-1].sum()

    y0 = torch.tensor([0.5, 1.0], dtype=F64)
    for hessian in (jacfwd(jacrev(end)), jacfwd(jacfwd(end)), jacrev(jacfwd(end))):
        assert_near(hessian(y0), torch.diag(-2 / (1 + y0) ** 3), 1e-5)


@pytest.mark.parametrize("how", ["jvp", "vmap", "dual state", "dual field", "dual times"])
def test_scipy_refuses_transforms_with_a_message(how):
    def run(y0=Y, w=W, t=T):
        return odeint(lambda t, y: w @ y, y0, t, method="scipy_solver")

    with pytest.raises(Unsupported, match="odeint_adjoint"):
        if how in ("jvp", "vmap"):
            jvp(run, (Y,), (Y,)) if how == "jvp" else vmap(run)(BATCH)
        with torch.autograd.forward_ad.dual_level():
            name, x = {"dual state": ("y0", Y), "dual field": ("w", W), "dual times": ("t", T)}[how]
            run(**{name: torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))})


# ------------------------------------------------------------------ vmap over odeint
@pytest.mark.parametrize("over", ["state", "parameter"])
@pytest.mark.parametrize("method", ["dopri5", "implicit_adams"])
def test_vmap_over_odeint_says_what_to_use_instead(method, over):
    def run(y0, w):
        options = dict(step_size=0.1) if method == "implicit_adams" else None  # enough steps to iterate in
        return odeint(lambda t, y: w * y, y0, T, method=method, options=options)

    with pytest.raises(Unsupported, match=r"vmap over odeint.*`odeint_adjoint.*gradient=\"discrete\""):
        vmap(run, in_dims=(0, None) if over == "state" else (None, 0))(*((BATCH, Y) if over == "state" else (Y, BATCH)))


@pytest.mark.parametrize("recording", [True, False])
def test_vmap_over_odeint_on_a_fixed_grid_is_a_loop_over_samples(recording):
    field = MLP(hidden=4, timed=True)

    def run(y0):
        return odeint(field, y0, T, method="rk4", options=dict(step_size=0.1))

    with torch.set_grad_enabled(recording):
        assert_near(vmap(run)(BATCH).detach(), torch.stack([run(y0) for y0 in BATCH]).detach(), SAME)
    jacobians = torch.stack([jacrev(run)(y0) for y0 in BATCH])
    assert_near(vmap(jacrev(run))(BATCH).detach(), jacobians.detach(), SAME)


# ------------------------------------------------------------------ refused: unnamed tensors, times, events
def refused_or_told(run):
    """Check that a run raises with a message, and return the error. Warnings are errors here, so they count too."""
    with pytest.raises((*REFUSED, MissingGradientWarning)) as error:
        run()
    assert len(str(error.value)) > 60, str(error.value)
    return error


@both
@pytest.mark.parametrize("with_state", [False, True], ids=["y0 plain", "y0 of the transform too"])
@pytest.mark.parametrize("how", ["grad", "vmap", "vmap of grad", "jacrev", "vjp"])
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_a_closure_over_a_tensor_of_the_transform_is_refused_with_a_message(mode, how, with_state, named):
    def value(w, y0):
        params = (w,) if named else ()
        ys = odeint_adjoint(lambda t, y: torch.tanh(y) * w, y0, T, gradient=mode, adjoint_params=params)
        return loss_of(ys)

    w = torch.tensor([0.4, -0.9], dtype=F64)
    ws = torch.stack([w, 2 * w, w + 1])
    dims = (0, 0 if with_state else None)
    argnums = (0, 1) if with_state else 0

    def run():
        if how == "grad":
            return grad(value, argnums)(w, Y)
        if how == "jacrev":
            return jacrev(value, argnums)(w, Y)
        if how == "vjp":
            return vjp(value, w, Y)[1](torch.ones((), dtype=F64)) if with_state else vjp(lambda w: value(w, Y), w)
        of = value if how == "vmap" else grad(value, argnums)
        return vmap(of, in_dims=dims)(ws, BATCH if with_state else Y)

    refused_or_told(run)


class Holder(nn.Module):
    """Has the parameters of `inner`, and uses `other`, which is neither a parameter nor a buffer."""

    def __init__(self):
        super().__init__()
        self.inner = MLP(hidden=4)
        self.other = torch.tensor([0.4, -0.9], dtype=F64)

    def forward(self, t, y):
        return self.inner(t, y) * self.other


@both
@pytest.mark.parametrize("how", ["grad", "vmap"])
def test_an_attribute_of_the_transform_that_is_no_parameter_is_refused_with_a_message(mode, how):
    field = Holder()

    def value(x):
        kept, field.other = field.other, x
        try:
            return loss_of(odeint_adjoint(field, Y, T, gradient=mode))
        finally:
            field.other = kept

    x = torch.tensor([0.4, -0.9], dtype=F64)
    refused_or_told((lambda: grad(value)(x)) if how == "grad" else (lambda: vmap(value)(x.expand(3, 2).clone())))


@both
@pytest.mark.parametrize("how", ["grad", "vmap", "autograd"])
def test_a_parameter_left_out_of_adjoint_params_does_not_get_zeros_silently(mode, how):
    """functional_call gives both parameters, and adjoint_params names only one."""

    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.field = MLP(hidden=4)

        def forward(self, y0):
            return odeint_adjoint(self.field, y0, T, gradient=mode, adjoint_params=(self.field.w1,))

    net = Partly()
    params = detached(net)

    def run():
        if how == "grad":
            return grad(functools.partial(loss, net))(params, Y)
        if how == "vmap":
            many = {n: torch.stack([p, p + 1]) for n, p in params.items()}
            return vmap(functools.partial(loss, net), in_dims=(0, None))(many, Y)
        given = leaves(params)
        return loss(net, given, Y).backward()

    refused_or_told(run)


@both
@pytest.mark.parametrize("kind", ["bound method", "partial", "lambda"])
@pytest.mark.parametrize("how", ["autograd", "untouched", "grad", "vmap of grad", "vmap"])
def test_parameters_used_by_a_callable_that_is_no_module_are_right_or_refused(mode, how, kind):
    """The callables are a bound method of the module that functional_call rebinds, a partial and a lambda of it."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = MLP(hidden=4)

        def field(self, t, y):
            return self.inner(t, y)

        def forward(self, y0):
            func = {
                "bound method": self.field,
                "partial": functools.partial(self.inner),
                "lambda": lambda t, y: self.inner(t, y),
            }[kind]
            return odeint_adjoint(func, y0, T, gradient=mode, adjoint_params=tuple(self.parameters()), **TOLERANCES)

    net = Around()
    params = shifted(detached(net))
    of = grad(functools.partial(loss, net))
    try:
        if how == "untouched":
            params = detached(net)
            ours = [dict(zip(params, torch.autograd.grad(loss_of(net(Y)), list(net.parameters())), strict=True))]
        elif how == "autograd":
            given = leaves(params)
            ours = [dict(zip(given, torch.autograd.grad(loss(net, given, Y), list(given.values())), strict=True))]
        elif how == "grad":
            ours = [of(params, Y)]
        elif how == "vmap":
            many = {n: torch.stack([p, p + 1]) for n, p in params.items()}
            ours = vmap(functools.partial(loss, net), in_dims=(0, None))(many, Y)
        else:
            stacked = vmap(of, in_dims=(None, 0))(params, BATCH)
            ours = [{n: g[i] for n, g in stacked.items()} for i in range(len(BATCH))]
    except (*REFUSED, MissingGradientWarning) as error:
        assert len(str(error)) > 60 and how != "untouched", str(error)
        return
    for i, y0 in enumerate(BATCH if how == "vmap of grad" else [Y, Y] if how == "vmap" else [Y]):
        given = leaves({n: p + i for n, p in params.items()} if how == "vmap" else params)
        inner = {n[6:]: p for n, p in given.items()}
        ys = odeint(lambda t, y, inner=inner: functional_call(net.inner, inner, (t, y)), y0, T, **TOLERANCES)
        theirs = loss_of(ys) if how == "vmap" else torch.autograd.grad(loss_of(ys), list(given.values()))
        assert_near(ours[i], theirs, OF_MODE[mode])


@both
@pytest.mark.parametrize("how", ["grad", "vmap of grad"])
def test_a_module_parameter_named_in_adjoint_params_is_right(mode, how):
    class Named(nn.Module):
        def __init__(self, mode=mode):
            super().__init__()
            self.field, self.mode = MLP(hidden=4), mode

        def forward(self, y0):
            named = {} if self.mode == "backprop" else dict(adjoint_params=tuple(self.field.parameters()))
            return solve(self.field, y0, T, gradient=self.mode, **TOLERANCES, **named).ys

    net = Named()
    params = shifted(detached(net))
    of = grad(functools.partial(loss, net))
    ours = of(params, Y) if how == "grad" else vmap(of, in_dims=(None, 0))(params, BATCH)
    given = leaves(params)
    for i, y0 in enumerate([Y] if how == "grad" else BATCH):
        theirs = torch.autograd.grad(loss(Named("backprop"), given, y0), list(given.values()))
        assert_near([g if how == "grad" else g[i] for g in ours.values()], theirs, OF_MODE[mode])


@both
def test_times_batched_under_vmap_are_refused_with_a_message(mode):
    field = MLP(hidden=4)
    times = torch.stack([T, T + 0.5])

    def run(y0, t):
        return odeint_adjoint(field, y0, t, gradient=mode)

    for dims, y0 in (((None, 0), Y), ((0, 0), BATCH[:2])):
        error = refused_or_told(lambda dims=dims, y0=y0: vmap(run, in_dims=dims)(y0, times))
        assert "t" in str(error.value).split()


@both
def test_times_batched_by_the_transform_of_a_tolerance_are_refused(mode):
    """A tolerance of the transform gets no gradient, but the samples must not share the tolerance of the first one."""
    field = MLP(hidden=4)
    rtols = torch.tensor([1e-3, 1e-9], dtype=F64)

    def run(rtol):
        return odeint_adjoint(field, Y, T, rtol=rtol, atol=1e-9, gradient=mode)

    try:
        ours = vmap(run)(rtols)
    except REFUSED as error:
        assert len(str(error)) > 40, str(error)
    else:
        assert_equal(ours, torch.stack([run(r) for r in rtols]))


@both
@pytest.mark.parametrize("how", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("interface", ["solve", "odeint_event", "odeint_event by odeint"])
def test_events_under_transforms_are_refused_with_a_message(mode, how, interface):
    field = MLP(hidden=4)
    field.requires_grad_(False)

    def value(y0):
        def event(t, y):
            return y[0] - 5.0

        class Fall(nn.Module):
            def forward(self, t, y):
                return torch.ones_like(y)

        if interface == "solve":
            return solve(Fall(), y0, T[:2], event_fn=event, gradient=mode, adjoint_params=()).event_t
        by = {} if interface == "odeint_event by odeint" else dict(gradient=mode, adjoint_params=())
        solver = odeint_adjoint if by else odeint
        return odeint_event(Fall(), y0, T[:1], event_fn=event, odeint_interface=solver, **by)[0]

    assert float(value(Y).detach()) == pytest.approx(5.0 - float(Y[0]))

    def run():
        if how == "grad":
            return grad(value)(Y)
        if how == "jvp":
            return jvp(value, (Y,), (torch.ones_like(Y),))
        return vmap(value)(BATCH)

    refused_or_told(run)


# ------------------------------------------------------------------ random fields and warnings under transforms
class Dropped(nn.Module):
    """Two of its draws are not the same: each keeps about half of 64 numbers."""

    def __init__(self):
        super().__init__()
        self.inner, self.dropout = MLP(hidden=4), nn.Dropout(0.5)

    def forward(self, t, y):
        return self.inner(t, y) * self.dropout(torch.arange(1.0, 65.0, dtype=y.dtype).sqrt()).mean()


@both
@pytest.mark.parametrize("how", ["grad", "vmap of grad"])
def test_a_random_field_is_warned_about_under_transforms_too(mode, how):
    net = Net(mode, Dropped(), method="rk4")
    params = detached(net)
    of = grad(functools.partial(loss, net))

    def run():
        if how == "grad":
            return of(params, Y)
        return vmap(of, in_dims=(None, 0), randomness="different")(params, BATCH)

    with pytest.raises((*REFUSED, UserWarning)) as error:
        run()
    assert len(str(error.value)) > 60


@both
def test_a_closure_over_an_unnamed_leaf_gives_one_warning_under_vmap(mode):
    w = leaf(torch.tensor([0.4, -0.9], dtype=F64))

    def run(y0):
        return odeint_adjoint(lambda t, y: torch.tanh(y) * w, y0, T, gradient=mode, adjoint_params=())

    with pytest.warns(MissingGradientWarning) as caught:
        vmap(run)(BATCH)
    assert len(caught) == 1 and caught[0].filename == __file__


@both
def test_functional_call_with_tied_weights_adds_both_uses(mode):
    def of(mode):
        torch.manual_seed(1)
        net = Net(mode, Tied())
        given = leaves(shifted(detached(net)))
        assert "field.b.weight" not in given
        return torch.autograd.grad(loss(net, given, Y), list(given.values()))

    assert_near(of(mode), of("backprop"), OF_MODE[mode])


@both
def test_grad_agrees_with_finite_differences(mode):
    net = Net(mode, rtol=1e-10, atol=1e-10)
    params = detached(net)
    grads, of_y0 = grad(functools.partial(loss, net), argnums=(0, 1))(params, Y)
    eps = 1e-5  # (central differences of a solve with tolerance 1e-10 have an error of about 1e-10 / eps)
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    d0 = torch.randn_like(Y)

    def at(s):
        return loss(net, {n: p + s * direction[n] for n, p in params.items()}, Y + s * d0)

    with torch.no_grad():
        slope = float((at(eps) - at(-eps)) / (2 * eps))
    ours = sum(float((grads[n] * direction[n]).sum()) for n in params) + float((of_y0 * d0).sum())
    assert ours == pytest.approx(slope, rel=1e-4)


@both
def test_vmap_over_no_samples_is_empty_or_an_error(mode):
    field = MLP(hidden=4)
    try:
        out = vmap(lambda y: odeint_adjoint(field, y, T, gradient=mode))(torch.empty(0, 2, dtype=F64))
    except REFUSED as error:
        assert len(str(error)) > 20
    else:
        assert out.shape == (0, 3, 2)


@both
def test_vmap_without_gradients(mode):
    net = Net(mode)
    with torch.no_grad():
        ours = vmap(net)(BATCH)
    assert_equal(ours, torch.stack([net(y).detach() for y in BATCH]))
    assert not ours.requires_grad
