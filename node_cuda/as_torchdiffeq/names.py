"""The names of `torchdiffeq._impl` that public programs use, with the results that they have there.

What can be computed is computed. torchdiffeq's solver classes are only names here, because the steps are computed in
another way: an instance of one, or of a subclass, raises an error that says what to use instead.
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from node_cuda.kernels.norms import rms
from node_cuda.methods.registry import ELSEWHERE, METHODS
from node_cuda.methods.tableaus import TABLEAUS
from node_cuda.status import Unsupported

INSTEAD = (
    "node_cuda computes the steps in another way, and runs no solver class of torchdiffeq. For a Runge-Kutta method "
    "of your own use `node_cuda.register_method` with its coefficients; for another rule of step sizes "
    "`options=dict(controller=...)` (docs/extending.md); for other solvers run this program without "
    "install_as_torchdiffeq"
)


class Perturb(Enum):
    """On which side of a time the field is evaluated."""

    NONE = 0
    PREV = 1
    NEXT = 2


_ButcherTableau = namedtuple("_ButcherTableau", "alpha, beta, c_sol, c_error")


def _tableau(name: str) -> _ButcherTableau:
    """Return a method's coefficients in torchdiffeq's form, in which the first stage is left out of the nodes."""
    of = TABLEAUS[name]
    assert of.b_err is not None
    return _ButcherTableau(
        alpha=_double(of.c[1:]),
        beta=[_double(row) for row in of.a[1:]],
        c_sol=_double(of.b),
        c_error=_double(of.b_err),
    )


def _double(numbers: Any) -> Tensor:
    return torch.tensor([float(x) for x in numbers], dtype=torch.float64, device="cpu")


_DORMAND_PRINCE_SHAMPINE_TABLEAU = _tableau("dopri5")
DPS_C_MID = _double(TABLEAUS["dopri5"].b_mid)


# ------------------------------------------------------------------ classes that are only names
class OnlyAName:
    """A class of torchdiffeq. An instance raises Unsupported, also one of a subclass."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        raise Unsupported(f"{cls.__name__} is a solver class of torchdiffeq. {INSTEAD}.")


class AdaptiveStepsizeODESolver(OnlyAName):
    """Only a name."""


class AdaptiveStepsizeEventODESolver(AdaptiveStepsizeODESolver):
    """Only a name."""


class RKAdaptiveStepsizeODESolver(AdaptiveStepsizeEventODESolver):
    """Only a name."""


class FixedGridODESolver(OnlyAName):
    """Only a name."""


class Dopri5Solver(RKAdaptiveStepsizeODESolver):
    """Only a name, with the coefficients of the method."""

    order = 5
    tableau = _DORMAND_PRINCE_SHAMPINE_TABLEAU
    mid = DPS_C_MID


class Euler(FixedGridODESolver):
    """Only a name."""

    order = 1


class Midpoint(FixedGridODESolver):
    """Only a name."""

    order = 2


class RK4(FixedGridODESolver):
    """Only a name."""

    order = 4


class OdeintAdjointMethod(OnlyAName):
    """Only a name."""

    @staticmethod
    def apply(*args: Any) -> Any:
        """Raise Unsupported."""
        raise Unsupported(
            "OdeintAdjointMethod.apply is the adjoint of torchdiffeq's inside. Use `odeint_adjoint(func, y0, t, "
            "adjoint_params=(...))`, which has the same gradient."
        )


class _Solvers(MutableMapping[str, Any]):
    """The methods by name, as torchdiffeq's SOLVERS. A class that is added is kept, and refused when it is used."""

    def __init__(self) -> None:
        known: dict[str, type[OnlyAName]] = {"dopri5": Dopri5Solver, "euler": Euler, "midpoint": Midpoint, "rk4": RK4}
        for name in METHODS:
            family = RKAdaptiveStepsizeODESolver if name in TABLEAUS and TABLEAUS[name].adaptive else FixedGridODESolver
            known.setdefault(name, family)
        self._known: dict[str, Any] = dict(known)
        self._added: list[str] = []

    def __getitem__(self, name: str) -> Any:
        return self._known[name]

    def __setitem__(self, name: str, solver: Any) -> None:
        self._known[name] = solver
        if name not in METHODS and name.lower() not in ELSEWHERE:
            self._added.append(name.lower())
            ELSEWHERE[name.lower()] = f"another method: {name!r} was added to torchdiffeq's SOLVERS. {INSTEAD}"

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def forget(self) -> None:
        """Take away the sentences for the added names."""
        for name in self._added:
            ELSEWHERE.pop(name, None)


# ------------------------------------------------------------------ functions
def _flat_to_shape(tensor: Tensor, length: Sequence[int], shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """Return the parts of a flat state, each of shape (*length, *its shape)."""
    parts = tensor.split([shape.numel() for shape in shapes], dim=-1)
    return tuple(part.view((*length, *shape)) for part, shape in zip(parts, shapes, strict=True))


def _rms_norm(tensor: Tensor) -> Tensor:
    """Return the root mean square."""
    return tensor.abs().square().mean().sqrt()


def _mixed_norm(tensors: Sequence[Tensor]) -> float:
    """Return the largest root mean square of the tensors; 0 if there are none."""
    return rms(tensors)


def _check_inputs(*args: Any, **kwargs: Any) -> Any:
    """Raise Unsupported."""
    raise Unsupported(f"_check_inputs prepares the arguments of torchdiffeq's solver classes. {INSTEAD}.")


def _interp_fit(y0: Tensor, y1: Tensor, y_mid: Tensor, f0: Tensor, f1: Tensor, dt: Any) -> list[Tensor]:
    """Return the coefficients of 1, x, ..., x^4 of the polynomial through three values, with the slopes at the ends."""
    whole, half, slopes = y1 - y0 - dt * f0, y_mid - y0 - 0.5 * dt * f0, dt * (f1 - f0)
    return [
        y0,
        dt * f0,
        16 * half - 5 * whole + slopes,
        14 * whole - 32 * half - 3 * slopes,
        16 * half - 8 * whole + 2 * slopes,
    ]


def _interp_evaluate(coefficients: Sequence[Tensor], t0: Tensor, t1: Tensor, t: Tensor) -> Tensor:
    """Return the value at t of the polynomial of `_interp_fit`. Raises AssertionError for a t outside of [t0, t1]."""
    if not (t0 <= t) & (t <= t1):
        raise AssertionError(f"t must lie within the step; got t0 = {t0}, t = {t}, t1 = {t1}.")
    x = ((t - t0) / (t1 - t0)).to(coefficients[0].dtype)
    total = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = coefficient + x * total
    return total


def rk4_alt_step_func(
    func: Callable[..., Tensor],
    t0: Tensor,
    dt: Tensor,
    t1: Tensor,
    y0: Tensor,
    f0: Tensor | None = None,
    perturb: bool = False,
) -> Tensor:
    """Return the change of y in a step by the 3/8 rule."""
    at_start, at_end = ({"perturb": side} if perturb else {} for side in (Perturb.NEXT, Perturb.PREV))
    k1 = func(t0, y0, **at_start) if f0 is None else f0
    k2 = func(t0 + dt / 3, y0 + dt * k1 / 3)
    k3 = func(t0 + dt * 2 / 3, y0 + dt * (k2 - k1 / 3))
    k4 = func(t1, y0 + dt * (k1 - k2 + k3), **at_end)
    return (k1 + 3 * (k2 + k3) + k4) * dt / 8


def find_event(
    interp_fn: Callable[[Tensor], Any],
    sign0: Tensor,
    t0: Tensor,
    t1: Tensor,
    event_fn: Callable[[Tensor, Any], Tensor],
    tol: float | Tensor,
) -> tuple[Tensor, Any]:
    """Return (the time between t0 and t1 at which the sign of event_fn changes from sign0, to within tol; y there)."""
    with torch.no_grad():
        for _ in range(max(math.ceil(math.log2(float(t1 - t0) / float(tol))), 0)):
            middle = (t0 + t1) / 2
            before = torch.sign(event_fn(middle, interp_fn(middle))) == sign0
            t0, t1 = torch.where(before, middle, t0), torch.where(before, t1, middle)
    at = (t0 + t1) / 2
    return at, interp_fn(at)


def find_parameters(module: nn.Module) -> list[Tensor]:
    """Return the parameters of a module, also of a replica of DataParallel, whose parameters() is empty."""
    if not getattr(module, "_is_replica", False):
        return list(module.parameters())
    attributes = (x for part in module.modules() for x in vars(part).values())
    return [x for x in attributes if isinstance(x, Tensor) and x.requires_grad]
