"""Initial value problems for the tests: rows of name, field, initial state, output times, exact solution (or None).

All in float64. `make()` of a row builds a new field, so that tests do not share parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from node_cuda import TABLEAUS
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS
from node_cuda.methods.tableau import Tableau, row, rows

F64 = torch.float64
State = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """y' = make()(t, y), y(t[0]) = y0. `exact(t)` is y(t) for a 0-d t; None if there is no closed form."""

    name: str
    make: Callable[[], Callable]
    y0: State
    t: Tensor
    exact: Callable[[Tensor], State] | None = None

    @property
    def reversed(self) -> bool:
        return bool(self.t[0] > self.t[-1])


class Counting(nn.Module):
    """Counts the evaluations of a field. `before` is called with (t, y) at each evaluation."""

    def __init__(self, func: Callable, before: Callable | None = None):
        super().__init__()
        if isinstance(func, nn.Module):
            self.func = func
        else:
            self.__dict__["func"] = func
        self.before = before
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        if self.before is not None:
            self.before(t, y)
        return self.func(t, y)


class MLP(nn.Module):
    """The small field of most neural ODEs: tanh between two linear layers, autonomous unless `timed`."""

    def __init__(self, dim: int = 2, hidden: int = 16, *, timed: bool = False, seed: int = 0, dtype=F64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w1 = nn.Parameter(torch.randn(hidden, dim, generator=generator, dtype=F64).to(dtype) / dim**0.5)
        self.b1 = nn.Parameter(torch.randn(hidden, generator=generator, dtype=F64).to(dtype))
        self.w2 = nn.Parameter(torch.randn(dim, hidden, generator=generator, dtype=F64).to(dtype) / hidden**0.5)
        self.timed = timed

    def forward(self, t, y):
        hidden = torch.tanh(y @ self.w1.T + self.b1)
        dy = hidden @ self.w2.T
        return dy * torch.cos(3 * t) if self.timed else dy


class TimedLinear(nn.Module):
    """y' = cos(t) A y with the solution y(t) = expm((sin t - sin t0) A) y0, so that the gradients for A, y0 and t are
    exact."""

    def __init__(self, dim: int = 2, dtype=F64):
        super().__init__()
        A = torch.randn(dim, dim, generator=torch.Generator().manual_seed(3), dtype=F64)
        self.A = nn.Parameter((A - A.T).to(dtype) + 0.3 * A.to(dtype))

    def forward(self, t, y):
        return torch.cos(t) * (y @ self.A.T)

    def exact(self, y0, t):
        """The solution at every element of t, differentiable in y0, t and A."""
        return torch.stack([y0 @ torch.matrix_exp((torch.sin(s) - torch.sin(t[0])) * self.A.T) for s in t])


def linspace(a: float, b: float, n: int) -> Tensor:
    return torch.linspace(a, b, n, dtype=F64)


_ROTATION = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=F64)
_Y2 = torch.tensor([1.5, -0.5], dtype=F64)


def _lotka_volterra(t, y):
    prey, hunters = y[..., 0], y[..., 1]
    return torch.stack([1.1 * prey - 0.4 * prey * hunters, 0.1 * prey * hunters - 0.4 * hunters], dim=-1)


def _pendulum(t, state):
    angle, speed = state
    return speed, -torch.sin(angle) - 0.1 * speed.sum() * torch.ones_like(angle)


PROBLEMS = (
    Problem(
        "linear",
        lambda: lambda t, y: y @ _ROTATION.T,
        _Y2,
        linspace(0.0, 2.0, 7),
        lambda t: _Y2 @ torch.matrix_exp(t * _ROTATION.T),
    ),
    Problem(
        "stiffish",
        lambda: lambda t, y: -50.0 * (y - torch.cos(t)),
        torch.tensor([0.0, 2.0], dtype=F64),
        linspace(0.0, 0.5, 6),
        lambda t: (
            (2500 * torch.cos(t) + 50 * torch.sin(t)) / 2501
            + (torch.tensor([0.0, 2.0], dtype=F64) - 2500 / 2501) * torch.exp(-50 * t)
        ),
    ),
    Problem(
        "oscillating",
        lambda: lambda t, y: torch.stack([y[1], -9.0 * y[0]]),
        torch.tensor([1.0, 0.0], dtype=F64),
        linspace(0.0, 2.0, 9),
        lambda t: torch.stack([torch.cos(3 * t), -3 * torch.sin(3 * t)]),
    ),
    Problem(
        "nonautonomous",
        lambda: lambda t, y: y * torch.cos(t),
        torch.tensor([1.0, 0.3, -2.0], dtype=F64),
        linspace(0.0, 4.0, 5),
        lambda t: torch.tensor([1.0, 0.3, -2.0], dtype=F64) * torch.exp(torch.sin(t)),
    ),
    Problem(
        "tuple",
        lambda: _pendulum,
        (torch.tensor([[0.5, 1.0], [-0.3, 2.0]], dtype=F64), torch.zeros(2, 2, dtype=F64)),
        linspace(0.0, 2.0, 4),
    ),
    Problem(
        "reversed",
        lambda: lambda t, y: y * (1 - y),
        torch.tensor([0.9, 0.6], dtype=F64),
        linspace(1.0, -2.0, 6),
        lambda t: 1 / (1 + (1 / torch.tensor([0.9, 0.6], dtype=F64) - 1) * torch.exp(1 - t)),
    ),
    Problem(
        "complex",
        lambda: lambda t, y: (-0.2 + 3j) * y * (1 + 0.5 * torch.sin(t)),
        torch.tensor([1.0 + 0.5j, -0.3j], dtype=torch.complex128),
        linspace(0.0, 1.5, 5),
        lambda t: (
            torch.tensor([1.0 + 0.5j, -0.3j], dtype=torch.complex128)
            * torch.exp((-0.2 + 3j) * (t + 0.5 * (1 - torch.cos(t))))
        ),
    ),
    Problem(
        "mlp",
        lambda: MLP(dim=3, seed=1),
        torch.randn(5, 3, generator=torch.Generator().manual_seed(5), dtype=F64),
        linspace(0.0, 2.0, 8),
    ),
    Problem("lotka_volterra", lambda: _lotka_volterra, torch.tensor([10.0, 5.0], dtype=F64), linspace(0.0, 3.0, 4)),
    Problem(
        "reversed_timed_mlp",
        lambda: MLP(dim=2, seed=2, timed=True),
        torch.ones(4, 2, dtype=F64),
        linspace(1.0, -1.0, 5),
    ),
)
BY_NAME = {problem.name: problem for problem in PROBLEMS}


def as_tuple(state: State) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def flat(state: State) -> Tensor:
    """Return all components of a solution in one vector, to compare solutions of any kind."""
    return torch.cat([component.reshape(-1) for component in as_tuple(state)])


def max_difference(a: State, b: State) -> float:
    return float((flat(a) - flat(b)).abs().max())


def relative_difference(a: State, b: State) -> float:
    """Return the largest difference divided by the largest value of b, for states of any kind and size."""
    return max_difference(a, b) / max(float(flat(b).abs().max()), 1e-300)


def loss_of(ys: State) -> Tensor:
    """Return a loss in which every output has a different weight (real, also for complex states)."""
    total = torch.zeros((), dtype=F64)
    for component in as_tuple(ys):
        real = torch.view_as_real(component) if component.is_complex() else component
        weights = torch.linspace(0.5, 1.5, real.numel(), dtype=F64).reshape(real.shape)
        total = total + (weights * real.to(F64)).sum()
    return total


class Parted(nn.Module):
    """Uses one parameter, ignores another, and has a third that requires no gradient."""

    def __init__(self, weight):
        super().__init__()
        self.used = nn.Parameter(weight.clone())
        self.unused = nn.Parameter(torch.ones(3, 2, dtype=F64))
        self.fixed = nn.Parameter(torch.ones(2, dtype=F64), requires_grad=False)

    def forward(self, t, y):
        return torch.tanh(y @ self.used.T) * self.fixed


KUTTA3 = Tableau(
    "kutta3",
    order=3,
    embedded_order=2,
    c=row("0 1/2 1"),
    a=rows("", "1/2", "-1 2"),
    b=row("1/6 2/3 1/6"),
    b_hat=row("0 1 0"),
    source="Kutta, Z. Math. Phys. 46 (1901) 435",
)
"""Three stages of third order, with an embedded row; not FSAL, and without an interpolant."""


def is_adaptive(method: str) -> bool:
    """The method chooses its steps by an error estimate."""
    tableau = IMPLICIT_TABLEAUS.get(method) or TABLEAUS.get(method)
    return tableau is not None and tableau.adaptive


def order_of(method: str) -> int:
    """Of a method with a tableau."""
    return (IMPLICIT_TABLEAUS if method in IMPLICIT_TABLEAUS else TABLEAUS)[method].order


def precise(method: str) -> dict:
    """Return the arguments for a method that make a solve precise enough for the tests of events and of dense
    output."""
    if is_adaptive(method):
        rtol = 1e-5 if order_of(method) < 3 else 1e-8
        # (the default interpolant of bosh3 has order 2 only, and its steps through a parabola keep growing)
        options = dict(max_step=0.05) if method == "bosh3" else {}
        return dict(method=method, rtol=rtol, atol=rtol, options=options)
    extra = dict(max_order=4) if "adams" in method else {}
    # (on a fixed grid the state between steps is linear unless cubic is set)
    return dict(method=method, rtol=1e-8, atol=1e-8, options=dict(step_size=0.01, interp="cubic", **extra))
