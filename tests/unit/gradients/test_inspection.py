"""The warnings of a solve's first evaluation: gradients that would be lost, and fields that are no functions."""

from __future__ import annotations

import functools
import re
import warnings

import pytest
import torch
from problems import F64, MLP, Counting, linspace, loss_of, relative_difference
from torch import nn
from torch.nn.utils import parametrizations

from node_cuda import InvalidField, MissingGradientWarning, NeuralODE, odeint, odeint_adjoint, odeint_event, solve

MODES = ("adjoint", "discrete")
both = pytest.mark.parametrize("mode", MODES)
T = linspace(0.0, 1.0, 3)
Y = torch.tensor([0.7, -0.4], dtype=F64)
BATCH = torch.tensor([[0.7, -0.4], [-1.2, 0.1], [0.2, 2.0]], dtype=F64)
GLOBAL = torch.tensor([0.4, -0.9], dtype=F64, requires_grad=True)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def weight():
    return leaf(GLOBAL)


def told(run):
    """Return the MissingGradientWarnings of a run. All other warnings are errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.simplefilter("always", MissingGradientWarning)
        run()
    return caught


def silent(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run()


# ------------------------------------------------------------------ tensors that give a warning
class Plain:
    """A callable that is not a module."""

    def __init__(self, w):
        self.w = w

    def __call__(self, t, y):
        return torch.tanh(y) * self.w

    def method(self, t, y):
        return torch.tanh(y) * self.w


class Other(nn.Module):
    """Uses `inner`, a module that it does not own, and has one parameter."""

    def __init__(self, inner):
        super().__init__()
        self.own = nn.Parameter(torch.ones(2, dtype=F64))
        self.__dict__["inner"] = inner

    def forward(self, t, y):
        return self.inner(t, y) * self.own


class SavedIntegrands(nn.Module):
    """Holds a tensor that is not a parameter."""

    def __init__(self, w):
        super().__init__()
        self.own = nn.Parameter(torch.ones(2, dtype=F64))
        self.extra = w

    def forward(self, t, y):
        return torch.tanh(y) * self.own * self.extra


class Nested(nn.Module):
    """Holds a tensor in a list."""

    def __init__(self, w):
        super().__init__()
        self.own = nn.Parameter(torch.ones(2, dtype=F64))
        self.kept = {"deep": [w]}

    def forward(self, t, y):
        return torch.tanh(y) * self.own * self.kept["deep"][0]


def closure(w):
    return lambda t, y: torch.tanh(y) * w


def of_a_module(w):
    inner = MLP(hidden=4)
    return lambda t, y: inner(t, y)


def of_a_product(w):
    made = w * 2
    return lambda t, y: torch.tanh(y) * made


def of_a_view(w):
    made = w[:1]
    return lambda t, y: torch.tanh(y) * made


HIDDEN = {
    "closure": (closure, r"\bw\b"),
    "global": (lambda w: lambda t, y: torch.tanh(y) * GLOBAL, "GLOBAL"),
    "default argument": (lambda w: lambda t, y, w=w: torch.tanh(y) * w, None),
    "another module": (of_a_module, "w1"),
    "a module not registered": (lambda w: Other(MLP(hidden=4)), "w1"),
    "attribute": (SavedIntegrands, "extra"),
    "nested attribute": (Nested, None),
    "partial": (lambda w: functools.partial(lambda w, t, y: torch.tanh(y) * w, w), None),
    "partial with a keyword": (lambda w: functools.partial(lambda t, y, w: torch.tanh(y) * w, w=w), None),
    "callable object": (Plain, r"\bw\b"),
    "bound method": (lambda w: Plain(w).method, r"\bw\b"),
    "product": (of_a_product, "made"),
    "view": (of_a_view, "made"),
    "value only": (lambda w: lambda t, y: w.expand(y.shape) + 0 * y, r"\bw\b"),
    "without y": (lambda w: lambda t, y: w * torch.cos(t), r"\bw\b"),
    "the tensor itself": (lambda w: lambda t, y: w, r"\bw\b"),
}


@both
@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_tensor_that_requires_a_gradient_and_was_not_named_gives_one_warning(mode, hidden):
    make, name = HIDDEN[hidden]
    func = make(weight())
    params = {} if isinstance(func, nn.Module) else dict(adjoint_params=())

    def run():
        ys = odeint_adjoint(func, leaf(Y), T, gradient=mode, **params)
        if ys.requires_grad:
            loss_of(ys).backward()

    caught = told(run)
    assert len(caught) == 1
    assert caught[0].filename == __file__ and caught[0].lineno == run.__code__.co_firstlineno + 1
    text = str(caught[0].message)
    assert "adjoint_params" in text and mode in text
    assert issubclass(caught[0].category, UserWarning)
    if name is not None:
        assert re.search(name, text), text


@both
def test_the_next_solve_warns_again(mode):
    func = closure(weight())

    def run():
        for _ in range(3):
            odeint_adjoint(func, Y, T, gradient=mode, adjoint_params=())

    assert len(told(run)) == 3


@both
def test_several_tensors_give_one_warning(mode):
    one, two = weight(), leaf(torch.ones(2, 2, dtype=F64))
    caught = told(
        lambda: odeint_adjoint(lambda t, y: torch.tanh(y @ two) * one, Y, T, gradient=mode, adjoint_params=())
    )
    assert len(caught) == 1 and "one" in str(caught[0].message) and "two" in str(caught[0].message)


@both
def test_y0_captured_and_named_is_right(mode):
    y0 = leaf(Y)

    def of(mode, **named):
        ys = solve(lambda t, y: (y0 - 2 * y) * y0, y0, T, gradient=mode, rtol=1e-9, atol=1e-9, **named).ys
        return torch.autograd.grad(loss_of(ys), y0)[0]

    ours = silent(lambda: of(mode, adjoint_params=(y0,)))
    assert relative_difference(ours, of("backprop")) < 1e-6


def of_its_start(w):
    """The tensor has a gradient through the state, and none through the closure."""
    y0 = leaf(Y)
    return lambda t, y: y0 - y, y0, T, "y0"


def of_its_non_leaf_start(w):
    y0 = 2 * leaf(Y)
    return lambda t, y: y0 - y, y0, T, "y0"


def of_its_times(w):
    times = leaf(T)
    return lambda t, y: -y * (t - times[0]), Y, times, "times"


@both
@pytest.mark.parametrize(
    "make",
    [
        of_its_start, of_its_non_leaf_start, of_its_times,
        lambda w: (lambda t, s: (-s[0], s[1] * w), (Y, Y), T, "w"),
        lambda w: (lambda t, y: (w + 1j) * y, torch.complex(Y, Y), T, "w"),
    ],
    ids=["y0", "a y0 that is no leaf", "times", "one component of a tuple", "a complex field"],
)  # fmt: skip
def test_captured_tensors_are_warned_about_for_every_kind_of_state(mode, make):
    func, y0, t, name = make(weight())
    (warning,) = told(lambda: odeint_adjoint(func, y0, t, gradient=mode, adjoint_params=()))
    assert name in str(warning.message)


@both
@pytest.mark.parametrize("method", ["euler", "rk4", "bosh3", "explicit_adams", "scipy_solver"])
def test_captured_tensors_are_warned_about_with_every_kind_of_method(mode, method):
    if mode == "discrete" and method in ("explicit_adams", "scipy_solver"):
        pytest.skip("of Runge-Kutta methods only")
    caught = told(
        lambda: odeint_adjoint(
            closure(weight()), Y, T, method=method, rtol=1e-3, atol=1e-3, gradient=mode, adjoint_params=()
        )
    )
    assert len(caught) == 1


@both
def test_a_tensor_used_only_on_a_later_branch_may_be_missed_but_breaks_nothing(mode):
    """Only the first evaluation is inspected, and t > 0.5 comes later. The solve continues in both cases."""
    w = weight()
    func = lambda t, y: -y * (w if t > 0.5 else 1.0)  # noqa: E731
    assert len(told(lambda: odeint_adjoint(func, Y, T, gradient=mode, adjoint_params=()))) <= 1


@both
def test_parameters_left_out_of_adjoint_params_are_named_in_a_warning(mode):
    func = MLP(hidden=4)
    caught = told(lambda: odeint_adjoint(func, Y, T, gradient=mode, adjoint_params=(func.w1, func.b1)))
    assert len(caught) == 1 and "w2" in str(caught[0].message) and "w1" not in str(caught[0].message)


# ------------------------------------------------------------------ the line of the warning
@both
@pytest.mark.parametrize("interface", ["odeint_adjoint", "solve", "NeuralODE", "a submodule", "event", "odeint_event"])
def test_the_warning_points_to_the_line_of_the_caller(mode, interface):
    field = SavedIntegrands(weight())
    module = NeuralODE(field, gradient=mode)
    outer = nn.Sequential()
    outer.forward = lambda y0: module(y0, T)  # the line of the call

    def event(t, y):
        return t - 0.5

    calls = {
        "odeint_adjoint": lambda: odeint_adjoint(field, Y, T, gradient=mode),
        "solve": lambda: solve(field, Y, T, gradient=mode),
        "NeuralODE": lambda: module(Y, T),
        "a submodule": lambda: outer(Y),
        "event": lambda: solve(field, Y, T[:2], event_fn=event, gradient=mode),
        "odeint_event": lambda: odeint_event(
            field, Y, T[:1], event_fn=event, odeint_interface=odeint_adjoint, gradient=mode
        ),
    }
    (warning,) = told(calls[interface])
    line = outer.forward.__code__ if interface == "a submodule" else calls[interface].__code__
    first = line.co_firstlineno
    assert warning.filename == __file__ and first <= warning.lineno <= first + 2


# ------------------------------------------------------------------ tensors that give no warning
class Normed(nn.Module):
    """A field with a parametrization, or with another operation between the parameters and their use."""

    def __init__(self, kind):
        super().__init__()
        linear = nn.Linear(2, 2, dtype=F64)
        if kind == "weight_norm":
            linear = parametrizations.weight_norm(linear)
        elif kind == "old weight_norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                linear = nn.utils.weight_norm(linear)
        elif kind == "spectral_norm":
            linear = parametrizations.spectral_norm(linear)
        elif kind == "orthogonal":
            linear = parametrizations.orthogonal(linear)
        elif kind == "cached":
            linear = parametrizations.weight_norm(linear)
        self.linear, self.kind = linear, kind
        self.eval()

    def forward(self, t, y):
        if self.kind == "cached":
            with nn.utils.parametrize.cached():
                return torch.tanh(self.linear(self.linear(y)))
        if self.kind == "checkpoint":
            return torch.utils.checkpoint.checkpoint(self.linear, y, use_reentrant=False)
        if self.kind == "checkpoint of a lambda":
            return torch.utils.checkpoint.checkpoint(lambda y: torch.tanh(self.linear(y)), y, use_reentrant=False)
        return torch.tanh(self.linear(y))


@both
@pytest.mark.parametrize(
    "kind",
    ["weight_norm", "old weight_norm", "spectral_norm", "orthogonal", "cached", "checkpoint", "checkpoint of a lambda"],
)
def test_parametrizations_and_checkpoints_give_no_warning_and_are_right(mode, kind):
    """Tensors that each evaluation makes from parameters are known."""
    func = Normed(kind)
    wanted = [p for p in func.parameters() if p.requires_grad]

    def of(mode):
        y0 = leaf(BATCH)
        ys = solve(func, y0, T, gradient=mode, rtol=1e-8, atol=1e-8).ys
        return torch.autograd.grad(loss_of(ys), [y0, *wanted])

    ours = silent(lambda: of(mode))
    assert relative_difference(ours, of("backprop")) < (1e-5 if mode == "adjoint" else 1e-9)


@both
@pytest.mark.parametrize("kind", ["old weight_norm"])
def test_an_attribute_computed_from_parameters_before_the_solve_is_warned_about_or_right(mode, kind):
    """`linear.weight` of the old weight_norm is a non-leaf attribute until the hook computes it again."""
    func = Normed(kind)
    func.linear.weight.sum()  # (made outside the solve)
    silent(lambda: odeint_adjoint(func, leaf(Y), T, gradient=mode))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, dtype=F64), nn.Linear(2, 2, dtype=F64)
        self.b.weight = self.a.weight

    def forward(self, t, y):
        return torch.tanh(self.b(torch.tanh(self.a(y))))


def named_non_leaf(w):
    made = torch.exp(w)
    return lambda t, y: -y * made, dict(adjoint_params=(made,))


def under_no_grad(w):
    def func(t, y):
        with torch.no_grad():
            scale = torch.exp(w)
        return -y * scale

    return func, dict(adjoint_params=())


def frozen(w):
    func = MLP(hidden=4)
    func.b1.requires_grad_(False)
    return func, {}


def made_inside(w):
    def func(t, y):
        inside = torch.ones(2, dtype=F64, requires_grad=True)
        return -y * inside.detach()

    return func, dict(adjoint_params=())


class Flow(nn.Module):
    """A continuous normalizing flow, which differentiates in the field: by a new leaf or, as in torchdiffeq's example,
    by its argument."""

    def __init__(self, in_place):
        super().__init__()
        self.inner, self.in_place = MLP(hidden=4), in_place

    def forward(self, t, y):
        with torch.enable_grad():
            x = y.requires_grad_(True) if self.in_place or y.requires_grad else y.detach().requires_grad_(True)
            v = self.inner(t, x)
            trace = sum(torch.autograd.grad(v[i], x, create_graph=True)[0][i] for i in range(2))
        return v - 0.1 * trace


class Descent(nn.Module):
    """The field dy/dt = -dE/dy, for a leaf that is made in it."""

    def __init__(self):
        super().__init__()
        self.inner = MLP(hidden=4)

    def forward(self, t, y):
        with torch.enable_grad():
            x = y if y.requires_grad else y.detach().requires_grad_(True)
            energy = self.inner(t, x).square().sum()
            return -torch.autograd.grad(energy, x, create_graph=True)[0]


class Sharing(nn.Module):
    """Uses a submodule that another module owns too, by the given object and not by its attribute."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.evaluate = lambda t, y: inner(t, y)

    def forward(self, t, y):
        return self.evaluate(t, y)


def lambda_with_parameters(w):
    inner = MLP(hidden=4)
    return lambda t, y: inner(t, y), dict(adjoint_params=inner.parameters())


SILENT = {
    "a named leaf": lambda w: (closure(w), dict(adjoint_params=(w,))),
    "a named tensor that is no leaf": named_non_leaf,
    "a view of a named one": lambda w: (lambda t, y: -y * w[:1] * w.view(2).sum(), dict(adjoint_params=(w,))),
    "detached": lambda w: (lambda t, y: -y * w.detach(), dict(adjoint_params=())),
    "under no_grad": under_no_grad,
    "a frozen parameter": frozen,
    "all frozen": lambda w: (MLP(hidden=4).requires_grad_(False), {}),
    "made inside": made_inside,
    "a flow": lambda w: (Flow(in_place=False), {}),
    "a flow in place": lambda w: (Flow(in_place=True), {}),
    "a gradient field": lambda w: (Descent(), {}),
    "compiled": lambda w: (torch.compile(MLP(hidden=4), backend="eager"), {}),
    "shared": lambda w: (Sharing(MLP(hidden=4)), {}),
    "a lambda with parameters": lambda_with_parameters,
    "tied": lambda w: (Tied(), {}),
}


@both
@pytest.mark.parametrize("case", SILENT)
def test_named_tensors_give_no_warning_and_have_the_right_gradient(mode, case):
    if case == "compiled":
        pytest.importorskip("torch._dynamo")
    w = weight()
    func, named = SILENT[case](w)
    if "adjoint_params" in named:
        named = dict(adjoint_params=tuple(named["adjoint_params"]))
    wanted = [w, *(func.parameters() if isinstance(func, nn.Module) else ()), *named.get("adjoint_params", ())]
    wanted = [p for p in wanted if p.requires_grad]

    def of(mode, **named):
        y0 = leaf(Y)
        ys = solve(func, y0, T, gradient=mode, rtol=1e-8, atol=1e-8, **named).ys
        grads = torch.autograd.grad(loss_of(ys), [y0, *wanted], allow_unused=True, retain_graph=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, [y0, *wanted], strict=True)]

    with warnings.catch_warnings():
        if case == "compiled":
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
        ours = of(mode, **named)
        theirs = of("backprop")
    assert relative_difference(tuple(ours), tuple(theirs)) < (1e-5 if mode == "adjoint" else 1e-9)


@both
def test_a_replica_of_data_parallel_has_the_gradients_of_its_parameters(mode):
    """The parameters of a replica are non-leaf tensors with a name given by torch. The original module is trained."""
    inner = MLP(hidden=4)
    made = inner._replicate_for_data_parallel()
    made._former_parameters = {}
    for name, p in inner.named_parameters():
        made._parameters.pop(name, None)
        made._former_parameters[name] = p * 1.0
        setattr(made, name, made._former_parameters[name])
    silent(lambda: loss_of(odeint_adjoint(made, Y, T, gradient=mode)).backward())
    ours = [p.grad.clone() for p in inner.parameters()]
    inner.zero_grad()
    loss_of(odeint_adjoint(inner, Y, T, gradient=mode)).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(ours, inner.parameters(), strict=True))


@both
@pytest.mark.parametrize("how", [torch.jit.script, torch.jit.trace], ids=["script", "trace"])
def test_a_scripted_field_gives_no_warning(mode, how):
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2, dtype=F64)

        def forward(self, t: torch.Tensor, y: torch.Tensor):
            return torch.tanh(self.linear(y)) * torch.cos(t)

    plain = Field()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        func = how(plain) if how is torch.jit.script else how(plain, (T[0], Y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # (torch's own deprecated functions)
        loss_of(odeint_adjoint(func, Y, T, gradient=mode)).backward()
    ours = [p.grad.clone() for p in plain.parameters()]
    plain.zero_grad()
    loss_of(odeint_adjoint(plain, Y, T, gradient=mode)).backward()
    assert relative_difference(tuple(ours), tuple(p.grad for p in plain.parameters())) < 1e-12


@both
@pytest.mark.parametrize("mute", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("hidden", ["closure", "attribute", "product"])
def test_without_gradients_there_is_no_warning(mode, mute, hidden):
    func = HIDDEN[hidden][0](weight())
    params = {} if isinstance(func, nn.Module) else dict(adjoint_params=())

    def run():
        with mute():
            return odeint_adjoint(func, Y, T, gradient=mode, **params)

    expected = odeint(func, Y, T).detach()
    assert torch.equal(silent(run), expected)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_backprop_gives_no_warning_and_has_all_gradients(hidden):
    w = weight()
    func = HIDDEN[hidden][0](w)
    silent(lambda: loss_of(odeint(func, leaf(Y), T)).backward())
    silent(lambda: solve(func, leaf(Y), T, gradient="backprop"))
    if hidden not in ("global", "another module", "a module not registered"):
        assert w.grad is not None and float(w.grad.abs().max()) > 0


@both
def test_the_warning_can_be_filtered_without_a_change_of_the_solve(mode):
    func, y0 = closure(weight()), leaf(Y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingGradientWarning)
        ys = odeint_adjoint(func, y0, T, gradient=mode, adjoint_params=())
    assert torch.equal(ys, odeint(func, y0, T))
    assert torch.autograd.grad(loss_of(ys), y0)[0].isfinite().all()


# ------------------------------------------------------------------ the cost of the inspection
@both
@pytest.mark.parametrize("method", ["dopri5", "rk4", "euler", "bosh5", "dopri8"])
@pytest.mark.parametrize("hidden", [False, True], ids=["named", "told of"])
def test_the_inspection_costs_no_evaluation_and_changes_no_bit(mode, method, hidden):
    w = weight()
    inner = MLP(hidden=4, timed=True)
    func = Counting(lambda t, y: inner(t, y) * w) if hidden else Counting(inner)
    arguments = dict(gradient=mode, method=method, rtol=1e-5, atol=1e-5)
    if hidden:
        arguments["adjoint_params"] = ()
    with torch.no_grad():
        plain = solve(func, Y, T, **arguments)
    without = func.nfe
    func.nfe = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingGradientWarning)
        watched = solve(func, leaf(Y), T, **arguments)
    assert func.nfe == without == watched.stats.nfe == plain.stats.nfe
    assert torch.equal(watched.ys, plain.ys)


@both
def test_a_field_may_write_into_its_state_as_before(mode):
    """Law 9: the field gets a new tensor, or one without a graph, so that autograd does not notice a write into it."""

    class Writing(MLP):
        def forward(self, t, y):
            out = super().forward(t, y)
            out.mul_(2.0)
            return out

    func, y0 = Writing(hidden=4), leaf(Y)
    ours = torch.autograd.grad(loss_of(silent(lambda: odeint_adjoint(func, y0, T, gradient=mode))), y0)
    theirs = torch.autograd.grad(loss_of(odeint(func, y0, T)), y0)
    assert relative_difference(ours, theirs) < 1e-5


# ------------------------------------------------------------------ random fields
class Dropped(nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.inner, self.dropout = MLP(hidden=4), nn.Dropout(p)

    def forward(self, t, y):
        return self.dropout(self.inner(t, y))


class Noisy(nn.Module):
    """Draws random numbers at each evaluation, and adds `scale` times them."""

    def __init__(self, scale):
        super().__init__()
        self.inner, self.scale = MLP(hidden=4), scale

    def forward(self, t, y):
        return self.inner(t, y) + self.scale * torch.randn_like(y)


RANDOM = {"dropout": Dropped, "noise": lambda: Noisy(0.1), "a little noise": lambda: Noisy(1e-6)}


@pytest.mark.parametrize("kind", RANDOM)
def test_the_discrete_adjoint_refuses_a_random_field_with_a_message(kind):
    """Its backward pass recomputes the steps, and would draw other numbers."""
    func = RANDOM[kind]()
    with pytest.raises(InvalidField) as error:
        solve(func, leaf(BATCH), T, method="rk4", gradient="discrete")
    text = str(error.value)
    assert len(text) > 80 and ("eval()" in text or "noise" in text or "random" in text), text


@pytest.mark.parametrize("kind", RANDOM)
def test_the_adjoint_warns_about_a_random_field_and_continues(kind):
    func = RANDOM[kind]()

    def run():
        return solve(func, leaf(BATCH), T, method="rk4", gradient="adjoint")

    with pytest.warns(UserWarning) as caught:
        ys = run().ys
    assert len(caught) == 1 and caught[0].filename == __file__, [str(w.message) for w in caught]
    assert len(str(caught[0].message)) > 60
    loss_of(ys).backward()
    assert func.inner.w1.grad.isfinite().all()


@both
@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("mute", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_random_field_gives_no_warning(mode, kind, mute):
    func = RANDOM[kind]()

    def run():
        with mute():
            return solve(func, BATCH, T, method="rk4", gradient=mode).ys

    assert silent(run).isfinite().all()


@both
@pytest.mark.parametrize(
    "make", [lambda: Dropped().eval(), lambda: Dropped(0.0), lambda: Noisy(0.0)], ids=["eval", "p = 0", "no effect"]
)
def test_random_draws_without_effect_are_accepted(mode, make):
    func = make()

    def of(mode):
        y0 = leaf(BATCH)
        ys = solve(func, y0, T, gradient=mode, rtol=1e-8, atol=1e-8).ys
        return torch.autograd.grad(loss_of(ys), [y0, *func.parameters()])

    assert relative_difference(silent(lambda: of(mode)), of("backprop")) < (1e-5 if mode == "adjoint" else 1e-9)


@both
def test_one_draw_for_the_whole_solve_is_accepted(mode):
    """Hutchinson's estimate with noise that is drawn once before the solve, as the message recommends."""

    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = MLP(hidden=4)
            self.noise = torch.randn(2, dtype=F64)

        def forward(self, t, y):
            return self.inner(t, y) + 0.1 * self.noise

    silent(lambda: loss_of(solve(Flow(), leaf(Y), T, gradient=mode).ys).backward())


@both
def test_the_inspection_does_not_change_the_state_of_the_generator(mode):
    """A reproducible training run draws the same numbers after a solve with or without gradients."""
    func = MLP(hidden=4)
    torch.manual_seed(3)
    odeint_adjoint(func, leaf(Y), T, gradient=mode)
    after = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(4))


def test_a_field_under_the_adjoint_draws_the_same_numbers_as_without_the_inspection():
    func = Noisy(0.1)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours = solve(func, leaf(BATCH), T, method="rk4", gradient="adjoint").ys
    torch.manual_seed(3)
    with torch.no_grad():
        theirs = solve(func, BATCH, T, method="rk4", gradient="adjoint").ys
    assert torch.equal(ours, theirs)


class BatchNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 2, dtype=F64), nn.BatchNorm1d(2, dtype=F64)

    def forward(self, t, y):
        return torch.tanh(self.norm(self.linear(y)))


@both
@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_is_accepted_with_the_gradient_of_backprop(mode, training):
    def of(mode):
        torch.manual_seed(1)
        func = BatchNormed().train(training)
        y0 = leaf(BATCH)
        ys = solve(func, y0, T, gradient=mode, rtol=1e-8, atol=1e-8).ys
        return torch.autograd.grad(loss_of(ys), [y0, *func.parameters()])

    ours, theirs = silent(lambda: of(mode)), of("backprop")
    assert relative_difference(tuple(ours), tuple(theirs)) < (1e-5 if mode == "adjoint" else 1e-9)


def test_spectral_normalization_in_training_is_refused_by_the_discrete_adjoint():
    """Each evaluation iterates the vectors of the norm, so the field of the backward pass differs."""
    func = Normed("spectral_norm").train()
    with pytest.raises(InvalidField) as error:
        ys = solve(func, leaf(BATCH), T, gradient="discrete", method="rk4").ys
        loss_of(ys).backward()
    assert len(str(error.value)) > 80


# ------------------------------------------------------------------ static buffers, with and without a graph
class Static(nn.Module):
    """Returns one buffer for all evaluations with a graph, for all without one, or for all evaluations."""

    def __init__(self, when):
        super().__init__()
        self.inner, self.when = MLP(hidden=4, timed=True), when
        self.buffers_ = {}

    def forward(self, t, y):
        out = self.inner(t, y)
        taped = torch.is_grad_enabled()
        if self.when == "untaped" and not taped:
            kept = self.buffers_.setdefault("a", torch.empty_like(out))
            return kept.copy_(out)
        if self.when == "taped" and taped:
            # (autograd cannot record a static buffer, except through a custom function, as in graphed callables)
            return _IntoStatic.apply(out, self.buffers_)
        if self.when == "always":
            return _IntoStatic.apply(out, self.buffers_)
        return out


class _IntoStatic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept):
        buffer = kept.setdefault("a", torch.empty_like(x))
        buffer.copy_(x)
        return buffer.detach()

    @staticmethod
    def backward(ctx, g):
        return g, None


@both
@pytest.mark.parametrize("method", ["dopri5", "rk4", "euler"])
@pytest.mark.parametrize("when", ["untaped", "taped", "always"])
def test_a_field_with_one_static_buffer_is_right(mode, method, when):
    func = Static(when)
    reference = MLP(hidden=4, timed=True)

    def of(func, mode, inner):
        y0 = leaf(BATCH)
        options = dict(step_size=1 / 16) if method != "dopri5" else {}
        more = dict(checkpoints=2) if mode == "discrete" else {}  # so that steps are recomputed
        ys = solve(func, y0, T, gradient=mode, method=method, options=options, rtol=1e-7, atol=1e-7, **more).ys
        return ys.detach(), *torch.autograd.grad(loss_of(ys), [y0, *inner.parameters()])

    ours, theirs = silent(lambda: of(func, mode, func.inner)), of(reference, mode, reference)
    # One vjp a stage and one a step (`WholeStepAdjoint`) are equal to rounding. A stale buffer would be off by 1e-3.
    same = functools.partial(torch.allclose, rtol=1e-12, atol=1e-13) if mode == "discrete" else torch.equal
    assert all(map(same, ours, theirs))
