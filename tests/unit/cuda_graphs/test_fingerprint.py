"""A fingerprint changes with everything that a field computes with, and with nothing else.

Each row of CHANGES makes a field and changes something. The values of the field show that it has changed. Work that was
captured before would continue with the old values. Each row of UNSEEN is a value that cannot be inspected.
"""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import datetime
import decimal
import enum
import functools
import gc
import itertools
import operator
import random
import re
import sys
import threading
import types
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing._internal.two_tensor import TwoTensor

from node_cuda.cuda_graphs.fingerprint import (
    difference,
    fingerprint,
    storage,
    structure,
    surroundings,
    without,
    written,
)
from node_cuda.cuda_graphs.parts import LARGEST, Unseen

CPU = torch.device("cpu")
Y = torch.tensor([0.5, -0.25])
T = torch.tensor(0.0)

SCALE = 1.0
TABLE = {"scale": 1.0}
WEIGHTS = [torch.ones(2), torch.ones(2)]
BATCHED = torch.func.vmap(nn.Linear(2, 2))
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
    """Return a function that makes a field with an attribute, from which `use` gets a number, and what changes it."""

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


def by_a_global_net(t, y):
    return BATCHED(y[None])


def with_attributes(t, y):
    return y * with_attributes.scale


with_attributes.scale = 1.0


def with_defaults(t, y, scale=1.0, *, shift=0.0):
    return y * scale + shift


def by_a_table(t, y):
    return y * TABLE["scale"]


class Called:
    """A callable that is no module."""

    def __call__(self, t, y):
        return self.rhs(y)

    def rhs(self, y):
        return y * SCALE


class Child(Field):
    def forward(self, t, y):
        return super().forward(t, y) + 1.0


class Routed(nn.Module):
    """Uses one of two modules."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.chosen = self.a

    def forward(self, t, y):
        return self.chosen(y)


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
    """Replace a global of this file."""
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


class Multiplier:
    def __init__(self, factor):
        self.factor = factor

    def times(self, y):
        return self.factor * y


class Divisor(Multiplier):
    def times(self, y):
        return y / 2.0


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


class Scaled:
    """Implements operators. An operator returns a new object of the class."""

    def __init__(self, y):
        self.y = y * SCALE

    def __matmul__(self, other):
        return Scaled(self.y @ other)


def child_of_the_same_name():
    class Field(globals()["Field"]):
        rate = 1.0

        def forward(self, t, y):
            return y * super().rate

    return Field()


class Listed(list):
    scale = 1.0


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * SCALE


def chain(length):
    """A list of links that is too deep for a recursive search."""
    last = types.SimpleNamespace(scale=1.0)
    first = functools.reduce(lambda link, _: types.SimpleNamespace(link=link), range(length), last)
    return attribute(lambda: (first, last), lambda x: x[1].scale, lambda f: setattr(last, "scale", 2.0))


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
    "True for 1": attribute(lambda: 1, lambda x: 2.0 if x is True else 1.0, set_x(True)),
    "a buffer replaced": (Field, lambda f: setattr(f, "buffer", 2 * f.buffer)),
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
    # ---------------------------------------------------------- plain Python
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
    "another class of an object": attribute(
        lambda: Multiplier(1.0), lambda x: x.times(1.0), lambda f: setattr(f.x, "__class__", Divisor)
    ),
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
    "an attribute of a list": attribute(Listed, lambda x: x.scale, lambda f: setattr(f.x, "scale", 2.0)),
    "the end of a long chain": chain(2000),
    "what an operator and a constructor name": (lambda: lambda t, y: (Scaled(y) @ y).y, replaced("SCALE", 2.0)),
    "an attribute of a base class that has the same name": (child_of_the_same_name, patched(Field, "rate", 2.0)),
    # ---------------------------------------------------------- objects of classes written in C
    "an element of an array of Python's": attribute(
        lambda: array.array("d", [1.0]), lambda x: x[0], lambda f: f.x.__setitem__(0, 2.0)
    ),
    "a decimal number": attribute(lambda: decimal.Decimal(1), float, set_x(decimal.Decimal(2))),
    "an item that an operator gets": attribute(
        lambda: operator.itemgetter(0), lambda x: x([1.0, 2.0]), set_x(operator.itemgetter(1))
    ),
    "a list by its bound method": attribute(
        lambda: [1.0].__getitem__, lambda x: x(0), lambda f: f.x.__self__.__setitem__(0, 2.0)
    ),
    "the place of an iterator": attribute(lambda: iter([1.0, 2.0]), lambda x: x.__length_hint__(), lambda f: next(f.x)),
    "a regular expression": attribute(lambda: re.compile("a"), lambda x: len(x.sub("bb", "a")), set_x(re.compile("c"))),
    "a function of torch": attribute(lambda: torch.sin, lambda x: x(torch.ones(())), set_x(torch.cos)),
    "an operation of torch": attribute(
        lambda: torch.ops.aten.sin, lambda x: x(torch.ones(())), set_x(torch.ops.aten.cos)
    ),
    # ---------------------------------------------------------- numpy and tensors
    "an element of an array": attribute(
        lambda: np.ones(3), lambda x: float(x.sum()), lambda f: f.x.__setitem__(1, 2.0)
    ),
    "a numpy scalar": attribute(lambda: np.float32(1), float, set_x(np.float32(2))),
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
    "a tensor inside a tensor": attribute(
        lambda: TwoTensor(torch.ones(2), torch.ones(2)),
        lambda x: x.a + 2 * x.b,
        lambda f: setattr(f.x, "b", torch.zeros(2)),
    ),
    "an attribute of a tensor": attribute(
        lambda: nn.Parameter(torch.ones(2)),
        lambda x: vars(x).get("scale", 1.0) * x,
        lambda f: setattr(f.x, "scale", 2.0),
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
    "a net that vmap wraps": (
        lambda: (lambda vmapped: lambda t, y: vmapped(y[None]))(torch.func.vmap(nn.Linear(2, 2))),
        lambda f: setattr(f.__closure__[0].cell_contents.__wrapped__, "bias", nn.Parameter(torch.ones(2))),
    ),
    "a net that vmap wraps, as a global": (
        lambda: by_a_global_net,
        lambda f: setattr(BATCHED.__wrapped__, "bias", nn.Parameter(torch.zeros(2))),
    ),
    "what a function names that says it is torch's": (
        lambda: functools.wraps(nn.Linear(2, 2))(lambda t, y: y * SCALE),
        replaced("SCALE", 2.0),
    ),
    "weights by functional_call": (
        lambda: functional(nn.Linear(2, 2)),
        lambda f: f.keywords["weights"].update(bias=torch.ones(2)),
    ),
}


def values(func):
    """Return the values of the field at a state; a layer gets no time."""
    with torch.no_grad():
        try:
            return torch.as_tensor(func(T, Y))
        except TypeError:
            return torch.as_tensor(func(Y))


# For these the structure stays the same. Only the address of the numbers, or a number on the host, changes.
ONLY_STORAGE = {
    "a buffer replaced",
    "a parameter replaced",
    "another storage of a parameter",
    "the direction of weight_norm",
    "a tensor in a long dict",
    "a number in a tensor of the host",
    "a view of another part",
    "a transposed matrix",
    "a tensor in a global list",
    "a tensor inside a tensor",
    "a net that vmap wraps, as a global",
    "a module inside a closure",
    "a net that vmap wraps",
}
# For these, each call makes a new class.
MAKE_A_CLASS = {
    "the direction of weight_norm",
    "a parametrization left away",
    "a class attribute of a parametrization",
    "an attribute of a base class that has the same name",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_changes_with(change, monkeypatch):
    make, alter = CHANGES[change]
    func = make()
    whole, form, before = fingerprint(func, CPU), structure(func), values(func)
    assert difference(whole, fingerprint(func, CPU)) is None, "an evaluation changed it"
    assert (difference(form, structure(make())) is None) == (change not in MAKE_A_CLASS), "an address is in it"
    if alter.__code__.co_argcount == 2:
        alter(func, monkeypatch)
    else:
        alter(func)
    assert difference(whole, fingerprint(func, CPU)) is not None
    assert (difference(form, structure(func)) is None) == (change in ONLY_STORAGE)
    now = values(func)
    assert now.dtype != before.dtype or not torch.equal(now, before), "the change makes no difference to the field"


def test_a_fingerprint_consists_of_structure_and_storage():
    func = Field()
    whole, form, place = fingerprint(func, CPU), structure(func), storage(func, CPU)
    assert place.keys() == {name for name, _ in itertools.chain(func.named_parameters(), func.named_buffers())}
    assert whole == {**form, **{name: (form[name], place[name]) for name in place}}


def test_an_update_of_the_weights_changes_neither_and_a_copy_of_the_field_changes_the_storage():
    func = Field()
    form, place = structure(func), storage(func, CPU)
    step(func)
    assert structure(func) == form and storage(func, CPU) == place
    func.net = nn.Sequential(*(type(m)(2, 3) if i == 0 else m for i, m in enumerate(func.net)))
    assert structure(func) == form and difference(storage(func, CPU), place) == "net.0.weight"


def test_numbers_on_the_host_are_constants_of_a_kernel_elsewhere():
    """On the CPU, only tensors with one number are. For kernels on another device, all host tensors of a field are."""
    func = attribute(lambda: torch.ones(3), lambda x: float(x[1]), None)[0]()
    here, there = storage(func, CPU), storage(func, torch.device("cuda"))
    func.x[1] = 2.0
    assert storage(func, CPU) == here
    assert difference(there, storage(func, torch.device("cuda"))) == "x"
    func.x = torch.ones(LARGEST + 1)
    assert storage(func, CPU)
    with pytest.raises(Unseen, match=r"'x' is a tensor of 1025 numbers on the CPU: move it to cuda"):
        storage(func, torch.device("cuda"))


def test_a_users_file_may_have_the_name_of_a_python_module(monkeypatch, tmp_path):
    code = "scale = 1.0\ndef field(t, y):\n    return scale * y\n"
    (tmp_path / "colorsys.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    import colorsys

    before = structure(colorsys.field)
    colorsys.scale = 2.0
    assert difference(before, structure(colorsys.field)) == "scale"
    del sys.modules["colorsys"]


def test_a_backward_pass_of_the_user_is_searched(monkeypatch):
    def field(t, y):
        return Squared.apply(y)

    before = structure(field)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert difference(before, structure(field)) is not None


def test_a_difference_is_named_by_its_place():
    func = Field()
    first = fingerprint(func, CPU)
    func.net[2].bias = nn.Parameter(torch.ones(2))
    assert difference(first, fingerprint(func, CPU)) == "net.2.bias"
    func = attribute(lambda: types.SimpleNamespace(a=1.0), lambda x: x.a, None)[0]()
    first = fingerprint(func, CPU)
    func.x.a = 2.0
    assert difference(first, fingerprint(func, CPU)) == "x.a"


# ------------------------------------------------------------------ actions that change nothing
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
    "a lock that is taken": (
        lambda: closure([threading.Lock()]),
        lambda f: f.__closure__[0].cell_contents[0].acquire(),
    ),
}


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


def test_objects_that_refer_to_each_other_are_searched_once():
    func, other = Field(), types.SimpleNamespace()
    func.other, other.owner, other.itself = [other], [func], other
    first = fingerprint(func, CPU)
    assert difference(first, fingerprint(func, CPU)) is None
    other.scale = 2.0
    assert difference(first, fingerprint(func, CPU)) == "other[0].scale"


UNSEEN = {
    "a scripted module": lambda: torch.jit.script(nn.Linear(2, 2)),
    "a traced module": lambda: torch.jit.trace(nn.Linear(2, 2), Y),
    "a generator": lambda: (x for x in [1.0]),
    "a context variable": lambda: contextvars.ContextVar("scale"),
    "a view of bytes": lambda: memoryview(b"1"),
    "random numbers of Python": random.Random,
    "random numbers of numpy": np.random.default_rng,
    "a variable of each thread": threading.local,
    "a sparse matrix": lambda: torch.eye(2).to_sparse(),
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2)]),
    "a parameter that has no shape yet": lambda: nn.LazyLinear(2).weight,
    "a long list": lambda: [1.0] * (LARGEST + 1),
    "a long dict": lambda: {i: torch.ones(2) for i in range(LARGEST + 1)},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch.jit and of nested tensors
@pytest.mark.parametrize("name", UNSEEN)
def test_a_value_that_cannot_be_inspected_is_reported(name):
    func = closure([UNSEEN[name]()])
    with pytest.raises(Unseen, match=r"^func's 'box\[0\](\.\w+)*' (is|has) "):
        structure(func)


def test_a_function_of_an_extension_is_compared_by_identity():
    """pybind11 binds its functions to a capsule, which cannot be inspected."""

    class Definition(ctypes.Structure):
        _fields_ = [
            ("name", ctypes.c_char_p),
            ("call", ctypes.c_void_p),
            ("flags", ctypes.c_int),
            ("doc", ctypes.c_char_p),
        ]

    new = ctypes.pythonapi.PyCFunction_NewEx
    new.restype, new.argtypes = ctypes.py_object, [ctypes.POINTER(Definition), ctypes.py_object, ctypes.c_void_p]
    box = [new(ctypes.byref(Definition(b"f", None, 8, None)), datetime.datetime_CAPI, None)]
    before = structure(closure(box))
    assert structure(closure(box)) == before
    box[0] = new(ctypes.byref(Definition(b"f", None, 8, None)), datetime.datetime_CAPI, None)
    assert structure(closure(box)) != before


def test_the_equality_operator_of_an_object_is_not_called():
    class Odd:
        def __eq__(self, other):
            raise AssertionError("was asked")

        __hash__ = object.__hash__

    func = Field()
    func.odd, func.many = Odd(), [Odd(), Odd()]
    first = fingerprint(func, CPU)
    assert difference(first, fingerprint(func, CPU)) is None
    func.many[1].scale = 2.0
    assert difference(first, fingerprint(func, CPU)) == "many[1].scale"


def test_a_new_object_at_the_address_of_an_old_one_is_a_change():
    """Python gives the address of a freed function to the next one."""
    func = Field()
    seen = []
    for factor in range(1, 4):
        func.act = eval(f"lambda y: {factor} * y")
        seen.append(fingerprint(func, CPU))
    assert difference(seen[0], seen[1]) and difference(seen[1], seen[2]) and difference(seen[0], seen[2])


def test_a_fingerprint_keeps_no_large_object_alive():
    func = Field()
    func.net[1].register_forward_hook(lambda m, x, out: out)
    func.x, func.many = Options(torch.ones(2)), {i: Slotted() for i in range(1000)}
    gone = [weakref.ref(x) for x in (func, func.net, func.net[0].weight, func.x, func.x.scale)]
    found = fingerprint(func, CPU)
    del func
    gc.collect()
    assert found and [x() for x in gone] == [None] * len(gone)


def test_values_that_func_writes_itself_are_left_out():
    before = {"nfe": 1, "log.length()": 0, "gain": 2}
    after = {"nfe": 2, "log.length()": 1, "log[0]": 3, "gain": 2}
    own = written(before, after)
    assert own == {"nfe", "log.length()", "log[0]"}
    assert without(after, own) == without(before, own) == {"gain": 2}
    assert without({**after, "log[1]": 4, "logged": 1}, own) == {"gain": 2, "logged": 1}
    assert written(after, {"gain": 2}) == own, "what is gone was written as well"


def test_a_list_and_a_dict_that_func_fills_may_grow():
    func = Field()
    func.log, func.cache = [], {}
    before = fingerprint(func, CPU)
    func.log.append(0.5)
    func.cache["a"] = 0.5
    after = fingerprint(func, CPU)
    own = written(before, after)
    func.log.append(0.75)
    func.cache["b"] = 0.75
    assert difference(without(after, own), without(fingerprint(func, CPU), own)) is None
    func.gain = 2.0
    assert difference(without(after, own), without(fingerprint(func, CPU), own)) == "gain"


# ------------------------------------------------------------------ settings of torch
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
def test_a_change_of_a_setting_of_torch_is_seen(name):
    get, put, other = SURROUNDINGS[name]
    was = get()
    put(was)  # a setting that was never set may have another representation
    before = surroundings("cuda")
    put(other)
    try:
        assert surroundings("cuda") != before
    finally:
        put(was)
    assert surroundings("cuda") == before


def test_autocast_and_a_default_device_are_seen_while_they_are_set():
    before = surroundings("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        inside = surroundings("cpu")
    with torch.device("meta"):
        on_meta = surroundings("cpu")
    assert len({before, inside, on_meta}) == 3 and surroundings("cpu") == before
    with torch.autocast("cpu", torch.float16):
        assert surroundings("cpu") != inside
