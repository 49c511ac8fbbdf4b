"""A device without float64, like Apple's GPUs: no solve of a float32 state makes a double there.

The device is simulated by "meta" tensors with numbers on the CPU, and by a mode that refuses doubles among them.
"""

from __future__ import annotations

import pytest
import torch
from problems import is_adaptive
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from node_cuda import METHODS, odeint_adjoint, odeint_dense, odeint_event, solve

DEVICE = torch.device("meta")
MODES = ("backprop", "adjoint", "discrete")


class OnDevice(torch.Tensor):
    """A tensor on the device. numbers: the tensor on the CPU that holds its numbers."""

    @staticmethod
    def __new__(cls, numbers):
        assert numbers.dtype not in (torch.float64, torch.complex128), "a double on a device that has none"
        kind = dict(strides=numbers.stride(), dtype=numbers.dtype, device=DEVICE)
        x = torch.Tensor._make_wrapper_subclass(cls, numbers.size(), **kind)
        x.numbers = numbers
        return x

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        return self.numbers.tolist()


class Device(TorchDispatchMode):
    """Simulates tensors that are made on the device or moved to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    there = any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs)))
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.numbers if isinstance(x, OnDevice) else x, (args, kwargs))
    return tree_map(lambda x: OnDevice(x) if there and isinstance(x, torch.Tensor) else x, func(*args, **kwargs))


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """Pretend that the device exists: factory functions check its library before they call a mode."""

    def moved(make):
        return lambda *args, device=None, **kwargs: make(*args, **kwargs).to("cpu" if device is None else device)

    for name in ("tensor", "as_tensor", "zeros", "empty", "full", "arange"):
        monkeypatch.setattr(torch, name, moved(getattr(torch, name)))
    with Device():
        yield


def field(t, y):
    return -y * torch.cos(t)


def settings(method):
    return dict(method=method, rtol=1e-3, atol=1e-3, options={} if is_adaptive(method) else dict(step_size=0.1))


def inputs(wants_t, dtype=torch.float32):
    y0 = OnDevice(torch.linspace(0.5, 1.5, 3).to(dtype)).requires_grad_()
    return y0, OnDevice(torch.tensor([0.0, 0.5, 1.0])).requires_grad_(wants_t)


def test_a_double_would_be_found():
    with pytest.raises(AssertionError, match="a double"):
        inputs(False)[0].double()


# fixed_adams is implicit_adams, and the discrete adjoint supports only Runge-Kutta methods.
# One of each kind of the implicit methods on fixed grids.
SAME_CODE = ("implicit_euler", "implicit_midpoint", "radauIIA3", "gl4", "radauIIA5", "trbdf2")
EVERY = [method for method in METHODS if method not in ("scipy_solver", "fixed_adams", *SAME_CODE)]
CASES = [(method, True) for method in EVERY] + [("dopri5", False), ("rk4", False)]
ROWS = [(method, wants_t, mode) for method, wants_t in CASES for mode in MODES]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "wants_t", "gradient"), [row for row in ROWS if "adams" not in row[0] or row[2] != "discrete"]
)
def test_no_method_and_no_gradient_makes_a_double_on_the_device(method, wants_t, gradient):
    y0, t = inputs(wants_t)
    solution = solve(field, y0, t, gradient=gradient, adjoint_params=(), **settings(method))
    found = torch.autograd.grad(solution.ys[-1].sum(), (y0, t) if wants_t else (y0,))
    right = torch.full_like(found[0].numbers, float(torch.exp(-torch.sin(torch.ones(())))))
    torch.testing.assert_close(found[0].numbers, right, rtol=7e-2, atol=0)  # the accuracy of ten steps of euler


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gradient", MODES)
def test_half_states_make_no_double_either(gradient, dtype):
    y0, t = inputs(True, dtype)
    solution = solve(field, y0, t, gradient=gradient, adjoint_params=(), **settings("dopri5"))
    torch.autograd.grad(solution.ys[-1].sum(), (y0, t))


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
def test_events_dense_output_and_integrals_make_no_double(method):
    y0, t = inputs(True)
    solver = settings(method)
    event_t, y = odeint_event(field, y0, t[0], event_fn=lambda t, y: y[0] - 0.4, odeint_interface=odeint_adjoint,
                              adjoint_params=(), **solver)  # fmt: skip
    torch.autograd.grad(event_t + y.sum(), (y0, t))
    odeint_dense(field, y0, t[0], t[2], **solver)(t)
    mixed = solve(lambda t, y: (-y[0], y[1] * t), (y0, y0.half()), t, integral=lambda t, y, dy: y[0].sum(), **solver)
    torch.autograd.grad(mixed.integral[-1], (y0, t), allow_unused=True)
    if method != "rk4":
        solver["options"] = dict(step_t=t[1:2].detach(), jump_t=OnDevice(torch.tensor([0.25])), clip=True)
        solve(field, y0, t, **solver)
