"""A fixed set of problems, solved through the public functions. Their results may change only on purpose.

The fields are sums and products, so that their bits hardly depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from node_cuda import METHODS, TABLEAUS, odeint_dense, odeint_event, regularized, solve
from node_cuda.controllers import Controller

F64 = torch.float64
GRID = [name for name in METHODS if name in TABLEAUS and not TABLEAUS[name].adaptive]
STEPS = [name for name in METHODS if name in TABLEAUS and TABLEAUS[name].adaptive]
ADAMS = ["explicit_adams", "implicit_adams", "fixed_adams"]


class Lotka(nn.Module):
    """A cycle of two species: (a - b y) x, (d x - c) y."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        a, b, c, d = self.a
        x, z = y[..., 0], y[..., 1]
        return torch.stack([(a - b * z) * x, (d * x - c) * z], -1)


class Driven(Lotka):
    """The same with a force that grows in time."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(t, y) + t * 0.125


def pair(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    a, b = y
    return -0.5 * a + 0.25 * b.sum(), 0.125 * b * b


def explodes(t: Tensor, y: Tensor) -> Tensor:
    return y * y


def spiral(t: Tensor, y: Tensor) -> Tensor:
    return (0.25j - 0.125) * y


def largest(y: Tensor) -> Tensor:
    return y.abs().max()


def start(dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor([[1.0, 1.0], [2.0, 0.5]], dtype=dtype)


def times(*t: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(t, dtype=dtype)


T = 0.0, 0.75, 1.0, 2.0


class Problem(NamedTuple):
    """A solve. gradient: also compute the gradients for t, y0 and the parameters."""

    func: Any
    y0: Any
    t: Tensor
    arguments: dict[str, Any]
    gradient: bool = False
    call: Callable[..., Any] = solve


def _problems() -> dict[str, Problem]:
    found: dict[str, Problem] = {}
    for name in STEPS:
        found[f"{name}"] = Problem(Driven(), start(), times(*T), dict(method=name, rtol=1e-5, atol=1e-6))
        for mode in ("backprop", "adjoint", "discrete"):
            arguments = dict(method=name, rtol=1e-4, atol=1e-5, gradient=mode)
            found[f"{name} {mode}"] = Problem(Driven(), start(), times(*T), arguments, True)
    for name in (*GRID, *ADAMS):
        for perturb in (False, True):
            options = dict(step_size=0.0625, perturb=perturb)
            found[f"{name} {perturb}"] = Problem(Driven(), start(), times(*T), dict(method=name, options=options))
        for mode in ("backprop", "adjoint", *(["discrete"] if name in GRID else [])):
            arguments = dict(method=name, options=dict(step_size=0.125), gradient=mode)
            found[f"{name} {mode}"] = Problem(Driven(), start(), times(*T), arguments, True)
    adaptive: dict[str, dict[str, Any]] = {
        "step_t": dict(step_t=times(0.3, 1.1)),
        "jump_t": dict(jump_t=times(0.0, 0.5, 1.1)),
        "limits": dict(first_step=0.01, min_step=1e-3, max_step=0.05),
        "min_step": dict(min_step=0.25),
        "factors": dict(safety=0.8, ifactor=4.0, dfactor=0.5),
        "I": dict(controller="I"),
        "PI": dict(controller="PI"),
        "PID": dict(controller="PID"),
        "own PID": dict(controller=Controller(pcoeff=0.2, icoeff=0.4, dcoeff=0.05)),
        "clip": dict(clip=True),
        "accurate": dict(dense="accurate"),
        "as torchdiffeq": dict(dense="torchdiffeq"),
        "norm": dict(norm=largest),
        "recorded": dict(record_steps=True),
    }
    for name, options in adaptive.items():
        for mode in ("backprop", "adjoint", "discrete"):
            arguments = dict(rtol=1e-4, atol=1e-5, options=options, gradient=mode)
            found[f"{name}, {mode}"] = Problem(Driven(), start(), times(*T), arguments, True)
        found[f"{name}, backwards"] = Problem(Driven(), start(), times(2.0, 1.0, 0.0), dict(rtol=1e-4, options=options))
    backwards: dict[str, Any] = dict(rtol=1e-4, atol=1e-5, gradient="adjoint")
    for name, options in {
        "seminorm": dict(adjoint_options=dict(norm="seminorm")),
        "tolerances": dict(adjoint_rtol=1e-3, adjoint_atol=1e-3),
        "method": dict(adjoint_method="bosh3"),
        "grid": dict(adjoint_method="rk4", adjoint_options=dict(step_size=0.125)),
        "jump": dict(adjoint_options=dict(jump_t=times(0.5))),
        "checked": dict(options=dict(check_reconstruction=True)),
    }.items():
        found[f"adjoint {name}"] = Problem(Driven(), start(), times(*T), {**backwards, **options}, True)
    exact: dict[str, Any] = dict(rtol=1e-5, atol=1e-6, gradient="discrete")
    for n in (1, 3):
        arguments = {**exact, "checkpoints": n}
        found[f"discrete, {n} checkpoints"] = Problem(Driven(), start(), times(*T), arguments, True)
    for name, options in {"rk4": dict(grid_constructor=lambda f, y, t: torch.linspace(0, 2, 9, dtype=F64))}.items():
        found[f"{name} on a given grid"] = Problem(Driven(), start(), times(*T), dict(method=name, options=options))
    for interp in ("linear", "cubic"):
        options = dict(step_size=0.3, interp=interp)
        arguments = dict(method="midpoint", options=options, gradient="discrete")
        found[f"midpoint {interp}"] = Problem(Driven(), start(), times(*T), arguments, True)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = dict(rtol=1e-2, atol=1e-2)
        found[f"{dtype}"] = Problem(Lotka(dtype), start(dtype), times(*T, dtype=torch.float32), arguments)
    two = start()[0], start()[1]
    for tol in (1e-5, (1e-4, 1e-6)):
        arguments = dict(rtol=tol, atol=1e-6, gradient="adjoint", adjoint_params=())
        found[f"a tuple, rtol {tol}"] = Problem(pair, two, times(*T), arguments, True)
    each = torch.tensor([1e-3, 1e-6], dtype=F64)
    found["a tolerance each"] = Problem(
        Driven(), start(), times(*T), dict(rtol=each, atol=each, gradient="adjoint"), True
    )
    complex_y0 = torch.tensor([1.0 + 0.5j], dtype=torch.complex128)
    found["complex"] = Problem(spiral, complex_y0, times(*T), dict(gradient="adjoint", adjoint_params=()), True)
    for mode in ("backprop", "adjoint", "discrete"):
        arguments = dict(rtol=1e-4, atol=1e-5, gradient=mode, integral=lambda t, y, dy: dy.square().sum())
        found[f"integral {mode}"] = Problem(Driven(), start(), times(*T), arguments, True)
        event = dict(rtol=1e-5, atol=1e-6, gradient=mode, event_fn=lambda t, y: y[0, 0] - 2.0)
        found[f"event {mode}"] = Problem(Driven(), start(), times(0.0, 1.0), event, True)
    kinetic = regularized(Driven(), kinetic=0.1)
    found["regularized"] = Problem(kinetic, start(), times(*T), dict(rtol=1e-4, atol=1e-5, gradient="adjoint"), True)
    on_grid = dict(method="rk4", options=dict(step_size=0.125), event_fn=lambda t, y: y[0, 0] - 2.0)
    found["event on a grid"] = Problem(Driven(), start(), times(0.0, 1.0), on_grid)
    checks = dict(options=dict(event_checks=3), event_fn=lambda t, y: t - 0.5, rtol=1e-3, atol=1e-3)
    found["event_checks"] = Problem(Driven(), start(), times(0.0, 1.0), checks)
    found["dense"] = Problem(Driven(), start(), times(0.0, 2.0), dict(rtol=1e-4, atol=1e-5), call=dense)
    found["odeint_event"] = Problem(
        Driven(), start(), times(0.0), dict(event_fn=lambda t, y: y[0, 0] - 2.0), call=at_event
    )
    failing: dict[str, tuple[Any, Any, Tensor, dict[str, Any]]] = {
        "explodes": (explodes, torch.ones(1, dtype=F64), times(0.0, 2.0), {}),
        "too many steps": (Driven(), start(), times(*T), dict(options=dict(max_num_steps=3))),
        "not finite": (lambda t, y: y / 0.0, start(), times(*T), {}),
        "not finite later": (lambda t, y: y * (1.0 if t < 0.5 else float("nan")), start(), times(*T), {}),
        "unknown method": (Driven(), start(), times(*T), dict(method="rk5")),
        "integers": (Driven(), start().long(), times(*T), {}),
        "another shape": (lambda t, y: y[0], start(), times(*T), {}),
        "equal times": (Driven(), start(), times(0.0, 0.0), {}),
        "no event": (
            Driven(),
            start(),
            times(0.0, 1.0),
            dict(event_fn=lambda t, y: t + 1.0, method="euler", options=dict(step_size=1.0)),
        ),
    }
    for name, (func, y0, t, arguments) in failing.items():
        found[name] = Problem(func, y0, t, arguments)
        options = {**arguments.get("options", {}), "throw": False}
        found[f"{name}, not raised"] = Problem(func, y0, t, {**arguments, "options": options})
    return found


def dense(func: Any, y0: Tensor, t: Tensor, **arguments: Any) -> Tensor:
    return odeint_dense(func, y0, t[0], t[1], **arguments)(torch.linspace(0.0, 2.0, 7, dtype=F64))


def at_event(func: Any, y0: Tensor, t: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    return odeint_event(func, y0, t, **arguments)


PROBLEMS = _problems()
