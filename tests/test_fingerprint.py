"""A fingerprint changes with all that a field computes with, and with nothing else.

Each row of CHANGES makes a field and changes something; that the change is one, the field's own values show. Work that
was captured before it would go on with the old values.
"""

from __future__ import annotations

import collections
import enum
import functools
import gc
import types
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from node_cuda import fingerprint as of_package
from node_cuda.fingerprint import difference, fingerprint, surroundings, without, written

CPU = torch.device("cpu")
Y = torch.tensor([0.5, -0.25])
T = torch.tensor(0.0)

SCALE = 1.0
TABLE = {"scale": 1.0, "nested": [{"deep": 1.0}]}
WEIGHTS = [torch.ones(2), torch.ones(2)]
settings = types.ModuleType("settings_of_a_user")
settings.scale = 1.0


class Mode(enum.Enum):
    SLOW = 1.0
    FAST = 2.0


class Config:
    scale = 1.0


@dataclass
class Options:
    scale: float = 1.0


class Slotted:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0


class Field(nn.Module):
    """y' = -scale y, with a module inside."""

    rate = 1.0

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        self.register_buffer("buffer", torch.ones(2))
        self.gain = 1.0

    def forward(self, t, y):
        return self.helper(y) * self.rate * self.gain * self.buffer * self.by_property

    def helper(self, y):
        return self.net(y)

    @property
    def by_property(self):
        return SCALE


def attribute(value, use, change):
    """A field with an attribute that `use` makes a number of, and what changes it."""

    class Holder(Field):
        def forward(self, t, y):
            return y * use(self.x)

    def make():
        func = Holder()
        func.x = value()
        return func

    return make, change


def set_x(value):
    return lambda func: setattr(func, "x", value)


def global_function(t, y):
    return _indirect(y)


def _indirect(y):
    return y * SCALE


def in_a_comprehension(t, y):
    return sum([w * y for w in WEIGHTS]) + sum(SCALE * y for _ in range(2))


def by_a_module(t, y):
    return y * settings.scale


def by_a_class(t, y):
    return y * Config.scale


def with_attributes(t, y):
    return y * with_attributes.scale


with_attributes.scale = 1.0


def with_defaults(t, y, scale=1.0, *, shift=0.0):
    return y * scale + shift


def by_a_table(t, y):
    return y * TABLE["scale"] * TABLE["nested"][0]["deep"]


class Called:
    """Is no module."""

    def __call__(self, t, y):
        return self.rhs(y)

    def rhs(self, y):
        return y * SCALE


class Child(Field):
    def forward(self, t, y):
        return super().forward(t, y) + 1.0


class Routed(nn.Module):
    """One of two modules does it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.chosen = self.a

    def forward(self, t, y):
        return self.chosen(y)


class Low(nn.Module):
    """A linear layer with an adapter of rank one around it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(2, 1))
        self.scale = 1.0

    def forward(self, y):
        return self.base(y) + self.scale * (y @ self.down.T) @ self.up.T


class Doubled(nn.Module):
    factor = 2.0

    def forward(self, weight):
        return self.factor * weight


def closure(box):
    return lambda t, y: y * box[0]


def reweighted(make):
    def made():
        func = Field()
        make(func.net[0])
        return func

    return made


def replaced(name, value):
    """A global of this file is another one."""
    return lambda func, patch: patch.setitem(globals(), name, value)


def patched(owner, name, value):
    return lambda func, patch: patch.setattr(owner, name, value)


class Noisy(nn.Module):
    def forward(self, t, y):
        return 2 * y if self.training else y


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, y):
        return y * self.factor


class Plus(Times):
    def forward(self, y):
        return y + self.factor


class Wrap(Low):
    def __init__(self, base):
        nn.Module.__init__(self)
        self.base = base
        self.down, self.up, self.scale = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.ones(2, 1)), 1.0


class Multiplier:
    def __init__(self, factor):
        self.factor = factor

    def times(self, y):
        return self.factor * y


def hooked(options):
    func = Field()
    func.options = [options]
    func.net.register_forward_hook(lambda m, x, out: out * options.scale)
    return func


def everywhere(patch):
    from torch.nn.modules import module

    patch.setitem(module._global_forward_hooks, -1, lambda m, x, out: 2 * out)


def decorated(scale):
    def decorate(f):
        @functools.wraps(f)
        def wrapper(t, y):
            return f(t, y) * scale[0]

        wrapper.scale = scale
        return wrapper

    return decorate(lambda t, y: y)


def bound(x, name):
    return getattr(x, name)


def functional(net):
    def call(t, y, net, weights):
        return torch.func.functional_call(net, weights, (y,))

    return functools.partial(call, net=net, weights=dict(net.named_parameters()))


CHANGES = {
    # ---------------------------------------------------------- modules
    "training mode": (Noisy, lambda f: f.eval()),
    "an attribute": (Field, lambda f: setattr(f, "gain", 2.0)),
    "the sign of a zero": attribute(
        lambda: 0.0, lambda x: torch.copysign(torch.ones(()), torch.tensor(x)), set_x(-0.0)
    ),
    "an int for a float": attribute(lambda: 3, lambda x: 2.0 if isinstance(x, int) else 1.0, set_x(3.0)),
    "a buffer replaced": (Field, lambda f: setattr(f, "buffer", 2 * f.buffer)),
    "a buffer registered again": (Field, lambda f: f.register_buffer("buffer", torch.full((2,), 3.0))),
    "a parameter replaced": (Field, lambda f: setattr(f.net[0], "weight", nn.Parameter(torch.ones(3, 2)))),
    "another storage of a parameter": (Field, lambda f: setattr(f.net[0].weight, "data", torch.ones(3, 2))),
    "a tensor of another dtype": attribute(lambda: torch.ones(2), lambda x: x, lambda f: setattr(f, "x", f.x.double())),
    "a submodule replaced": (Field, lambda f: setattr(f, "net", nn.Linear(2, 2))),
    "a submodule of another type": (Field, lambda f: f.net.__setitem__(1, nn.Sigmoid())),
    "the other of two submodules": (Routed, lambda f: setattr(f, "chosen", f.b)),
    "modules in another order": attribute(
        lambda: nn.ModuleDict({"none": Times(1.0), "nil": Plus(0.0), "twice": Times(2.0), "more": Plus(1.0)}),
        lambda x: functools.reduce(lambda y, m: m(y), x.values(), torch.ones(())),
        lambda f: f.x._modules.update(twice=f.x._modules.pop("twice")),
    ),
    "one of several in a list": attribute(
        lambda: (lambda a, b: [a, b, a])(Options(1.0), Options(2.0)),
        lambda x: x[0].scale + 2 * x[1].scale + 4 * x[2].scale,
        lambda f: f.x.__setitem__(2, f.x[1]),
    ),
    "a class attribute": (Field, patched(Field, "rate", 2.0)),
    "a method": (Field, patched(Field, "helper", lambda self, y: y)),
    "what a method of a base class names": (Child, replaced("SCALE", 2.0)),
    "what a property names": (Field, replaced("SCALE", 2.0)),
    "forward of an instance": (Field, lambda f: setattr(f, "forward", lambda t, y: y)),
    # ---------------------------------------------------------- hooks and parametrizations
    "a hook": (Field, lambda f: f.net.register_forward_hook(lambda m, x, out: 2 * out)),
    "a hook before": (Field, lambda f: f.net.register_forward_pre_hook(lambda m, x: (2 * x[0],))),
    "what a hook computes with": (lambda: hooked(Options()), lambda f: setattr(f.options[0], "scale", 3.0)),
    "a hook of all modules": (Field, lambda f, patch: everywhere(patch)),
    "the direction of weight_norm": (
        reweighted(parametrizations.weight_norm),
        lambda f: setattr(f.net[0].parametrizations.weight, "original1", nn.Parameter(torch.ones(3, 2))),
    ),
    "a parametrization": (Field, lambda f: parametrize.register_parametrization(f.net[0], "weight", Doubled())),
    "a parametrization left away": (
        reweighted(lambda m: parametrize.register_parametrization(m, "weight", Doubled())),
        lambda f: parametrize.remove_parametrizations(f.net[0], "weight", leave_parametrized=False),
    ),
    "a class attribute of a parametrization": (
        reweighted(lambda m: parametrize.register_parametrization(m, "weight", Doubled())),
        patched(Doubled, "factor", 3.0),
    ),
    "an adapter": (Field, lambda f: f.net.__setitem__(2, Wrap(f.net[2]))),
    "the scale of an adapter": (lambda: Low(nn.Linear(2, 2)), lambda f: setattr(f, "scale", 2.0)),
    # ---------------------------------------------------------- plain Python
    "a nested attribute": attribute(
        lambda: types.SimpleNamespace(a=types.SimpleNamespace(b=1.0)),
        lambda x: x.a.b,
        lambda f: setattr(f.x.a, "b", 2.0),
    ),
    "an item of a list": attribute(lambda: [1.0, 2.0], sum, lambda f: f.x.__setitem__(1, 3.0)),
    "an item of a long list": attribute(lambda: [1.0] * 1000, sum, lambda f: f.x.__setitem__(500, 3.0)),
    "a tensor in a long dict": attribute(
        lambda: {i: torch.ones(2) for i in range(1000)},
        lambda x: x[500],
        lambda f: f.x.__setitem__(500, torch.zeros(2)),
    ),
    "an item of a deque": attribute(lambda: collections.deque([1.0]), lambda x: x[0], lambda f: f.x.appendleft(2.0)),
    "an item of a dict": attribute(lambda: {"a": {"b": 1.0}}, lambda x: x["a"]["b"], lambda f: f.x["a"].update(b=2.0)),
    "keys that look alike": attribute(lambda: {1: 1.0, "1": 2.0}, lambda x: x[1], lambda f: f.x.update({1: 3.0})),
    "a dict in another order": attribute(
        lambda: {"a": 1.0, "b": 2.0}, lambda x: next(iter(x.values())), lambda f: f.x.update(a=f.x.pop("a"))
    ),
    "an element of a set": attribute(lambda: {1.0, 2.0}, sum, lambda f: f.x.symmetric_difference_update({2.0, 3.0})),
    "a member of an enum": attribute(lambda: Mode.SLOW, lambda x: x.value, set_x(Mode.FAST)),
    "a slot": attribute(Slotted, lambda x: x.scale, lambda f: setattr(f.x, "scale", 2.0)),
    "a dataclass": attribute(Options, lambda x: x.scale, lambda f: setattr(f.x, "scale", 2.0)),
    "a range": attribute(lambda: range(3), sum, set_x(range(4))),
    "a class attribute of a plain object": attribute(Config, lambda x: x.scale, patched(Config, "scale", 2.0)),
    "a class": attribute(lambda: Config, lambda x: x.scale, patched(Config, "scale", 2.0)),
    "an object behind a weak reference": attribute(
        lambda: weakref.ref(Config), lambda x: x().scale, patched(Config, "scale", 2.0)
    ),
    "a lambda in a list": attribute(
        lambda: [lambda y: y, lambda y: 2 * y], lambda x: x[1](1.0), lambda f: f.x.__setitem__(1, lambda y: 3 * y)
    ),
    "the closure of a lambda in a list": attribute(
        lambda: [closure([1.0])],
        lambda x: x[0](0.0, 1.0),
        lambda f: f.x[0].__closure__[0].cell_contents.__setitem__(0, 2.0),
    ),
    "a bound method's object": attribute(
        lambda: Multiplier(1.0).times, lambda x: x(1.0), lambda f: setattr(f.x.__self__, "factor", 2.0)
    ),
    # ---------------------------------------------------------- numpy and tensors
    "an element of an array": attribute(
        lambda: np.ones(3), lambda x: float(x.sum()), lambda f: f.x.__setitem__(1, 2.0)
    ),
    "a numpy scalar": attribute(lambda: np.float32(1), float, set_x(np.float32(2))),
    "a numpy int": attribute(lambda: np.int64(1), int, set_x(np.int64(2))),
    "a number in a tensor of the host": attribute(
        lambda: torch.tensor(1.0), lambda x: x.item(), lambda f: f.x.fill_(2.0)
    ),
    "a view of another part": attribute(
        lambda: torch.arange(4.0)[:2], lambda x: x, lambda f: setattr(f, "x", f.x._base[2:])
    ),
    "a transposed matrix": attribute(
        lambda: torch.arange(4.0).view(2, 2), lambda x: x[0], lambda f: setattr(f, "x", f.x.T)
    ),
    "a conjugate": attribute(
        lambda: torch.tensor([1 + 1j, 2j]), lambda x: x.imag, lambda f: setattr(f, "x", f.x.conj())
    ),
    "an imaginary part of a conjugate": attribute(
        lambda: torch.tensor([1 + 1j, 2j]).imag, lambda x: x, lambda f: setattr(f, "x", f.x._base.conj().imag)
    ),
    "a sparse matrix": attribute(
        lambda: torch.eye(2).to_sparse(), lambda x: x @ torch.ones(2, 1), set_x(2 * torch.eye(2).to_sparse())
    ),
    # ---------------------------------------------------------- functions
    "a global number": (lambda: global_function, replaced("SCALE", 2.0)),
    "a global number of a function that is called": (lambda: lambda t, y: _indirect(y), replaced("SCALE", 2.0)),
    "a global function": (lambda: global_function, replaced("_indirect", lambda y: 3 * y)),
    "a global in a comprehension": (lambda: in_a_comprehension, replaced("SCALE", 2.0)),
    "a tensor in a global list": (
        lambda: in_a_comprehension,
        lambda f, patch: patch.setitem(globals(), "WEIGHTS", [WEIGHTS[0], torch.zeros(2)]),
    ),
    "an item of a global dict": (lambda: by_a_table, lambda f, patch: patch.setitem(TABLE, "scale", 2.0)),
    "a nested item of a global dict": (
        lambda: by_a_table,
        lambda f, patch: patch.setitem(TABLE["nested"][0], "deep", 2.0),
    ),
    "a number of another file": (lambda: by_a_module, patched(settings, "scale", 2.0)),
    "an attribute of a global class": (lambda: by_a_class, patched(Config, "scale", 2.0)),
    "an attribute of a function": (lambda: with_attributes, patched(with_attributes, "scale", 2.0)),
    "a default": (lambda: with_defaults, patched(with_defaults, "__defaults__", (2.0,))),
    "a default by keyword": (lambda: with_defaults, patched(with_defaults, "__kwdefaults__", {"shift": 1.0})),
    "the code": (lambda: with_defaults, patched(with_defaults, "__code__", (lambda t, y, s=1.0: 2 * y).__code__)),
    "a closure": (lambda: closure([1.0]), lambda f: f.__closure__[0].cell_contents.__setitem__(0, 2.0)),
    "the keywords of a partial": (
        lambda: functools.partial(with_defaults, scale=1.0),
        lambda f: f.keywords.update(scale=2.0),
    ),
    "a partial of a partial": (
        lambda: functools.partial(functools.partial(lambda a, t, y: a[0] * y, [1.0])),
        lambda f: f.args[0].__setitem__(0, 2.0),
    ),
    "what a decorated function computes with": (lambda: decorated([1.0]), lambda f: f.scale.__setitem__(0, 2.0)),
    "what a callable object names": (Called, replaced("SCALE", 2.0)),
    "what a bound method names": (lambda: bound(Called(), "__call__"), replaced("SCALE", 2.0)),
    "a module inside a closure": (
        lambda: (lambda net: lambda t, y: net(y))(nn.Linear(2, 2)),
        lambda f: setattr(f.__closure__[0].cell_contents, "bias", nn.Parameter(torch.ones(2))),
    ),
    "weights by functional_call": (
        lambda: functional(nn.Linear(2, 2)),
        lambda f: f.keywords["weights"].update(bias=torch.ones(2)),
    ),
}


def values(func):
    """What the field computes, at a state and, where it is a layer, without a time."""
    with torch.no_grad():
        try:
            return torch.as_tensor(func(T, Y))
        except TypeError:
            return torch.as_tensor(func(Y))


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_changes_with(change, monkeypatch):
    make, alter = CHANGES[change]
    func = make()
    first, before = fingerprint(func, CPU), values(func)
    assert difference(first, fingerprint(func, CPU)) is None, "an evaluation changed it"
    if alter.__code__.co_argcount == 2:
        alter(func, monkeypatch)
    else:
        alter(func)
    assert difference(first, fingerprint(func, CPU)) is not None
    now = values(func)
    assert now.dtype != before.dtype or not torch.equal(now, before), "the change makes no difference to the field"


def test_of_a_change_the_place_is_told():
    func = Field()
    first = fingerprint(func, CPU)
    func.net[2].bias = nn.Parameter(torch.ones(2))
    assert difference(first, fingerprint(func, CPU)) == "net.2.bias"
    func = attribute(lambda: types.SimpleNamespace(a=1.0), lambda x: x.a, None)[0]()
    first = fingerprint(func, CPU)
    func.x.a = 2.0
    assert difference(first, fingerprint(func, CPU)) == "x.a"


# ------------------------------------------------------------------ what changes nothing
def step(func):
    optimizer = torch.optim.Adam(func.parameters(), foreach=False)
    func(T, Y).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


SAME = {
    "an evaluation": (Field, values),
    "a training step": (Field, step),
    "weights written in place": (Field, lambda f: nn.init.ones_(f.net[0].weight.data)),
    "a state that is loaded": (Field, lambda f: f.load_state_dict({k: 2 * v for k, v in f.state_dict().items()})),
    "a gradient that is there": (Field, lambda f: f(T, Y).sum().backward()),
    "a hook of the backward pass": (Field, lambda f: f.register_full_backward_hook(lambda *_: None)),
    "a global that the field does not name": (Field, replaced("TABLE", {})),
    "an attribute that has the name of a global": (
        lambda: attribute(lambda: 1.0, lambda x: x, None)[0](),
        lambda f, patch: patch.setitem(globals(), "x", object()),
    ),
    "a method that is not called": (
        Called,
        lambda f, patch: patch.setattr(Called, "unused", lambda: SCALE, raising=False),
    ),
    "an equal number": (Field, lambda f: setattr(f, "gain", float("1"))),
    "NaN": (attribute(lambda: float("nan"), lambda x: x, None)[0], set_x(-float("nan"))),
    "a random generator": (
        lambda: closure([torch.Generator()]),
        lambda f: f.__closure__[0].cell_contents[0].manual_seed(3),
    ),
    "an evaluation with weight_norm": (reweighted(parametrizations.weight_norm), values),
    "an evaluation of a scripted module": (lambda: torch.jit.script(nn.Linear(2, 2)), lambda f: f(Y)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("change", SAME)
def test_a_fingerprint_does_not_change_with(change, monkeypatch):
    make, alter = SAME[change]
    func = make()
    first = fingerprint(func, CPU)
    if alter.__code__.co_argcount == 2:
        alter(func, monkeypatch)
    else:
        alter(func)
    assert difference(first, fingerprint(func, CPU)) is None


def test_objects_that_refer_to_each_other_are_looked_at_once():
    func, other = Field(), types.SimpleNamespace()
    func.other, other.owner, other.itself = [other], [func], other
    first = fingerprint(func, CPU)
    assert difference(first, fingerprint(func, CPU)) is None
    other.scale = 2.0
    assert difference(first, fingerprint(func, CPU)) == "other.0.scale"


def test_an_object_s_own_equality_is_not_asked():
    class Odd:
        __slots__ = ("__weakref__",)

        def __eq__(self, other):
            raise AssertionError("was asked")

        __hash__ = object.__hash__

    func = Field()
    func.odd, func.many = Odd(), [Odd() for _ in range(of_package.LARGEST + 1)]
    first = fingerprint(func, CPU)
    assert difference(first, fingerprint(func, CPU)) is None
    func.many[3] = Odd()
    assert difference(first, fingerprint(func, CPU)) == "many"


def test_another_object_at_the_same_address_is_another_one():
    """Of a function that was let go the address is given to the next one."""
    func = Field()
    seen = []
    for factor in range(1, 4):
        func.act = eval(f"lambda y: {factor} * y")
        seen.append(fingerprint(func, CPU))
    assert difference(seen[0], seen[1]) and difference(seen[1], seen[2]) and difference(seen[0], seen[2])


def test_a_fingerprint_keeps_nothing_alive_that_may_be_large():
    func = Field()
    func.net[1].register_forward_hook(lambda m, x, out: out)
    func.x, func.many = Options(torch.ones(2)), {i: Slotted() for i in range(1000)}
    gone = [weakref.ref(x) for x in (func, func.net, func.net[0].weight, func.x, func.x.scale)]
    found = fingerprint(func, CPU)
    del func
    gc.collect()
    assert found and [x() for x in gone] == [None] * len(gone)


def test_what_func_writes_itself_is_left_out():
    before, after = {"nfe": 1, "log.length": 0, "gain": 2}, {"nfe": 2, "log.length": 1, "log.0": 3, "gain": 2}
    own = written(before, after)
    assert own == {"nfe", "log.length", "log.0"}
    assert without(after, own) == without(before, own) == {"gain": 2}
    assert without({**after, "log.1": 4, "logged": 1}, own) == {"gain": 2, "logged": 1}
    assert written(after, {"gain": 2}) == {"nfe", "log.length", "log.0"}, "what is gone was written as well"


# ------------------------------------------------------------------ torch's own
SURROUNDINGS = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "the precision of matrix products": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        "high",
    ),
    "cudnn.allow_tf32": (
        lambda: torch.backends.cudnn.allow_tf32,
        lambda on: setattr(torch.backends.cudnn, "allow_tf32", on),
        False,
    ),
    "cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda on: setattr(torch.backends.cudnn, "benchmark", on),
        True,
    ),
    "sums of half products": (
        lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        lambda on: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", on),
        False,
    ),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_torch_is_told_is_seen(name):
    get, put, other = SURROUNDINGS[name]
    was = get()
    put(was)  # what was not set yet has another name
    before = surroundings("cuda")
    put(other)
    try:
        assert surroundings("cuda") != before
    finally:
        put(was)
    assert surroundings("cuda") == before


def test_autocast_and_a_default_device_are_seen_where_they_are():
    before = surroundings("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        inside = surroundings("cpu")
    with torch.device("meta"):
        on_meta = surroundings("cpu")
    assert len({before, inside, on_meta}) == 3 and surroundings("cpu") == before
    with torch.autocast("cpu", torch.float16):
        assert surroundings("cpu") != inside
