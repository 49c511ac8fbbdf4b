"""The `options` of each family of methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from node_cuda._typing import Norm
from node_cuda.status import InvalidInput, InvalidType


@dataclass(frozen=True)
class Common:
    """Options of every method.

    throw: True raises SolveError if the solve fails. False returns NaN for the times that it did not reach. "deferred"
    also returns NaN, without waiting for the device, and `Solution.check()` raises; it needs cuda_graph. record_steps:
    keep the accepted times in `stats.step_times`, and all tried steps in `stats.steps`, which `stats.plot()` shows.
    progress: show a bar of the share of the interval, the step size h, and the counts of evaluations and of rejected
    steps, in both passes; it needs tqdm. norm: the norm of the scaled error. check_reconstruction: with
    gradient="adjoint", compare the y that the backward solve reconstructs with the outputs, and warn if they differ too
    much. cuda_graph: capture a step and repeat it on the device, if that is possible; a `cuda_graphs.cache.GraphCache`
    keeps the captured graphs, True keeps them with func. compile: run the loop over steps as native code on the CPU, if
    that is possible; "require" raises an error if it is not; a `native.cache.NativeCache` keeps the code. clip: never
    evaluate func at a time outside of [t[0], t[-1]], and end the last step at t[-1]. By default a step may go past
    t[-1], as in torchdiffeq, and y at t[-1] is interpolated. Fixed grids never go past it. compensated: sum y over the
    steps with compensation (Kahan): each step adds what the rounding of y lost in the step before. So the rounding
    errors of many small steps do not add up, in a long float32 solve or with a half-precision state. Of explicit
    Runge-Kutta methods, and of y alone.
    """

    throw: bool | Literal["deferred"] = True
    progress: bool = False
    record_steps: bool = False
    check_reconstruction: bool = False
    cuda_graph: Any = False
    compile: Any = False
    clip: bool = False
    compensated: bool = False
    norm: Norm | None = None

    @cached_property
    def raises(self) -> bool:
        """Whether the solve itself raises SolveError if it fails."""
        return bool(self.throw) and self.throw != "deferred"


@dataclass(frozen=True)
class AdaptiveOptions(Common):
    """Options of the adaptive Runge-Kutta methods, with torchdiffeq's names and defaults.

    Options that torchdiffeq does not have: dense selects the interpolant. "accurate" has the method's order,
    "torchdiffeq" is that of torchdiffeq, and "default" is the accurate one if it costs no evaluation, else that of
    torchdiffeq. controller is "torchdiffeq", "I", "PI", "PID", a `controllers.Controller` or another
    `controllers.StepSizeController`. event_checks is the number of points inside every step where an event is also
    looked for, on the interpolant.

    max_num_steps counts attempts since the last output time. dtype is the dtype of the times that callbacks get; the
    arithmetic of time is always double.
    """

    min_step: float = 0.0
    max_step: float = math.inf
    first_step: float | None = None
    step_t: Any = None
    jump_t: Any = None
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    max_num_steps: int = 2**31 - 1
    dtype: torch.dtype = torch.float64
    dense: Literal["default", "accurate", "torchdiffeq"] = "default"
    controller: Any = "torchdiffeq"
    event_checks: int = 0


@dataclass(frozen=True)
class EquationOptions:
    """Options of every implicit method.

    jac: a function of (t, y) that returns df/dy as a tensor of (d, d), or (*batch, d, d); by default autograd's.
    batch_dims: the number of the state's first dimensions that count independent samples, each with a separate
    Jacobian. newton_tol: the error, in units of the tolerances, at which the equations of a stage are solved; None:
    0.01, or what the dtype can hold.
    """

    jac: Callable[..., Tensor] | None = None
    batch_dims: int = 0
    newton_tol: float | None = None


@dataclass(frozen=True)
class ImplicitOptions(EquationOptions, AdaptiveOptions):
    """Options of the adaptive implicit methods, beside those of the explicit ones. There is one interpolant, so `dense`
    has no effect. controller is "stiff" by default, "I" for rodas5p; safety is 0.85 for rodas5p, 0.8 for kvaerno5."""

    controller: Any = "stiff"


@dataclass(frozen=True)
class FixedOptions(Common):
    """Options of the fixed-grid methods. Without step_size and grid_constructor the grid is t itself: each interval
    between two output times is one step, however long it is. interp: "linear" or "cubic"; perturb: evaluate at grid
    points on the side of the step's inside. event_checks: as in the adaptive methods, on the chord of the step."""

    step_size: float | None = None
    grid_constructor: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    interp: Literal["linear", "cubic"] = "linear"
    perturb: bool = False
    event_checks: int = 0


@dataclass(frozen=True)
class FixedImplicitOptions(EquationOptions, FixedOptions):
    """Options of the implicit methods on fixed grids. interp="cubic" is the polynomial over the stages of the method.
    max_iters: the most full Newton iterations for the equations of a step, which are the last attempt."""

    max_iters: int = 100


@dataclass(frozen=True)
class AdamsOptions(FixedOptions):
    """Options of the Adams methods. max_order: 4 to 12; None selects the default of the method."""

    max_order: int | None = None
    max_iters: int = 4


@dataclass(frozen=True)
class ScipyOptions(Common):
    """Options of scipy_solver. solver: the `method` of scipy.integrate.solve_ivp."""

    solver: str = "LSODA"
    min_step: float = 0.0
    max_step: float = math.inf


def times_option(name: str, values: Any, direction: float, start: float) -> list[float]:
    """Return step_t or jump_t as ascending solver times from `start` on.

    values: a tensor, list or None, in the user's time. Raises InvalidInput for times that are not finite.
    """
    if values is None:
        return []
    on_host = values.detach().cpu() if isinstance(values, Tensor) else values
    flat = as_times(name, on_host).reshape(-1).tolist()
    if not all(map(math.isfinite, flat)):
        raise InvalidInput(f"options[{name!r}] must be finite times; got {flat}.")
    return sorted(s for s in (direction * value for value in flat) if s >= start)


def as_times(name: str, values: Any) -> Tensor:
    """Return step_t or jump_t as a float64 tensor."""
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidType(
            f'options["{name}"] must be a tensor or a list of times; got {values!r:.60}. E.g. `{name}=[0.5]`.'
        ) from None
