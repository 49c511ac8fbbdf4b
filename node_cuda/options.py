"""The `options` of each family of methods. Unknown names warn, as in torchdiffeq."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from node_cuda._extras import extra
from node_cuda._typing import Norm
from node_cuda.status import InvalidInput, InvalidType, did_you_mean, users_level


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


T = TypeVar("T", bound=Common)

_SCALARS = ("min_step", "max_step", "first_step", "safety", "ifactor", "dfactor", "step_size")


def parse(family: type[T], method: str, options: Mapping[str, Any] | None, *, quiet: bool = False) -> T:
    """Return the options of one family from the user's dict, which is not changed. Unknown names warn unless quiet.

    Raises InvalidInput, InvalidType or ValueError for an invalid value.
    """
    check_mapping(options)
    options = dict(options or {})
    known = {f.name for f in dataclasses.fields(family)}
    unexpected = {name: value for name, value in options.items() if name not in known}
    if unexpected and not quiet:
        hints = "".join(dict.fromkeys(_hint(name, known) for name in unexpected))
        warnings.warn(
            f"{method}: Unexpected arguments {unexpected} in options.{hints} It knows {', '.join(sorted(known))}.",
            stacklevel=users_level(),
        )
    values = {name: value for name, value in options.items() if name in known}
    for name in _SCALARS:
        if isinstance(values.get(name), Tensor):
            values[name] = float(values[name].detach())
    parsed = family(**values)
    _check(parsed)
    return parsed


def check_mapping(options: Any, name: str = "options") -> None:
    """Raise InvalidType if these options are not a dict. name: the name of the argument."""
    if options is not None and not isinstance(options, Mapping):
        raise InvalidType(
            f"{name} must be a dict; got {options!r:.60}, a {type(options).__name__}. Use for example "
            f"`{name}=dict(clip=True)`."
        )


def times_option(name: str, values: Any, direction: float, start: float) -> list[float]:
    """Return step_t or jump_t as ascending solver times from `start` on.

    values: a tensor, list or None, in the user's time. Raises InvalidInput for times that are not finite.
    """
    if values is None:
        return []
    on_host = values.detach().cpu() if isinstance(values, Tensor) else values
    flat = _as_times(name, on_host).reshape(-1).tolist()
    if not all(map(math.isfinite, flat)):
        raise InvalidInput(f"options[{name!r}] must be finite times; got {flat}.")
    return sorted(s for s in (direction * value for value in flat) if s >= start)


def _as_times(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidType(
            f'options["{name}"] must be a tensor or a list of times; got {values!r:.60}. E.g. `{name}=[0.5]`.'
        ) from None


ARGUMENTS = ("rtol", "atol", "method", "options", "event_fn", "gradient", "checkpoints", "integral", "adjoint_rtol")
ARGUMENTS += ("adjoint_atol", "adjoint_method", "adjoint_options", "adjoint_params")
"""The names of the arguments of a solver, without func, y0 and t."""


def _hint(name: Any, known: set[str]) -> str:
    """Return a hint for an unknown option, with a space before it."""
    if name in ARGUMENTS:
        return f" {name} is an argument and not an option: write `{name}=...` outside of options."
    for family, words in (
        (FixedOptions, 'the fixed grids, e.g. method="rk4"'),
        (AdaptiveOptions, 'the adaptive methods, e.g. method="dopri5"'),
        (AdamsOptions, 'the Adams methods, e.g. method="implicit_adams"'),
        (ScipyOptions, 'method="scipy_solver"'),
        (ImplicitOptions, 'the implicit methods, e.g. method="rodas5p"'),
    ):
        if name in {f.name for f in dataclasses.fields(family)}:
            return f" {name} belongs to {words}."
    return did_you_mean(name, known)


def option_names() -> set[str]:
    """Return the names of the options of all methods."""
    families = (AdaptiveOptions, ImplicitOptions, AdamsOptions, ScipyOptions)
    return {f.name for family in families for f in dataclasses.fields(family)}


def _check(options: Common) -> None:
    for name in (*_SCALARS, "max_num_steps"):
        value = getattr(options, name, None)
        if value is not None and not isinstance(value, (int, float)):
            raise InvalidType(f'options["{name}"] must be a number; got {value!r:.60}.')
    checks = getattr(options, "event_checks", 0)
    if isinstance(checks, bool) or not isinstance(checks, int) or checks < 0:
        raise InvalidInput(
            f'options["event_checks"] must be a number of points inside a step, 0 or more; got {checks!r}. Use 8 for '
            "example."
        )
    if not isinstance(options.clip, bool):
        raise InvalidType(
            f'options["clip"] must be True or False; got {options.clip!r:.60}. True keeps func within [t[0], t[-1]].'
        )
    for name, what in (
        ("progress", "True shows a bar"),
        ("record_steps", "True keeps the accepted times in `stats.step_times`"),
        ("check_reconstruction", "True compares the y that the adjoint method reconstructs"),
        ("compensated", "True adds in each step what the rounding of y lost in the step before"),
        ("perturb", "True evaluates at grid points on the side of the step's inside"),
    ):
        value = getattr(options, name, False)
        if not isinstance(value, bool):
            raise InvalidType(f'options["{name}"] must be True or False; got {value!r:.60}. {what}.')
    for name in ("step_t", "jump_t"):
        value = getattr(options, name, None)
        if value is not None and not isinstance(value, Tensor):
            _as_times(name, value)
    if not isinstance(options.throw, (bool, str)):
        raise InvalidType(f'options["throw"] must be True, False or "deferred"; got {options.throw!r:.60}.')
    if isinstance(options.throw, str) and options.throw != "deferred":
        raise InvalidInput(f'options["throw"] must be True, False or "deferred"; got {options.throw!r}.')
    if options.throw == "deferred" and not options.cuda_graph:
        raise InvalidInput(
            'options["throw"] = "deferred" is only for solves in a CUDA graph; got it without cuda_graph. Add '
            "cuda_graph=True, or take throw=False."
        )
    if options.progress:
        _check_progress(options)
    if options.compile and options.cuda_graph:
        raise InvalidInput(
            "compile=True is for the CPU and cuda_graph=True for CUDA; got both. Drop one of them from options."
        )
    if options.norm is not None and not callable(options.norm):
        raise InvalidType(f'options["norm"] must be a function of the scaled error; got {options.norm!r:.60}.')
    if options.compensated:
        _check_compensated(options)
    if isinstance(options, AdaptiveOptions):
        if options.dense not in ("default", "accurate", "torchdiffeq"):
            raise InvalidInput(
                f'options["dense"] must be "default", "accurate" or "torchdiffeq"; got {options.dense!r}.'
            )
        for name, holds, need in (
            ("first_step", options.first_step is None or 0 < options.first_step < math.inf, "positive and finite"),
            ("safety", 0 < options.safety < math.inf, "positive and finite; torchdiffeq's is 0.9"),
            ("dfactor", 0 < options.dfactor < 1, "between 0 and 1; torchdiffeq's is 0.2"),
            ("ifactor", options.ifactor >= 1, "at least 1; torchdiffeq's is 10"),
            ("max_num_steps", options.max_num_steps >= 0, "a number of steps"),
        ):
            if not holds:
                raise InvalidInput(f'options["{name}"] must be {need}; got {getattr(options, name)}.')
        if not 0 <= options.min_step <= options.max_step or not options.max_step > 0:
            raise InvalidInput(
                f"options must have 0 <= min_step <= max_step and max_step > 0; got min_step = {options.min_step}, "
                f"max_step = {options.max_step}."
            )
    if isinstance(options, EquationOptions):
        _check_implicit(options)
    if isinstance(options, FixedImplicitOptions) and not (isinstance(options.max_iters, int) and options.max_iters > 0):
        raise InvalidInput(
            f'options["max_iters"] must be a number of iterations; got {options.max_iters!r:.60}. Use 100.'
        )
    if isinstance(options, FixedOptions):
        if options.grid_constructor is not None and not callable(options.grid_constructor):
            raise InvalidType(
                f'options["grid_constructor"] must be callable as grid_constructor(func, y0, t); got '
                f"{options.grid_constructor!r:.60}. Use for example `lambda func, y0, t: torch.linspace(...)`."
            )
        if options.interp not in ("linear", "cubic"):
            raise ValueError(f'Unknown interpolation method {options.interp!r}; use interp="linear" or "cubic".')
        if options.step_size is not None and options.grid_constructor is not None:
            raise ValueError("step_size and grid_constructor are mutually exclusive arguments. Drop one of them.")
        if options.step_size is not None and not 0 < options.step_size < math.inf:
            raise InvalidInput(f'options["step_size"] must be positive and finite; got {options.step_size}.')


def _check_progress(options: Common) -> None:
    for holds, where in (
        (bool(options.cuda_graph), "a captured solve (cuda_graph=True), whose steps the device takes"),
        (isinstance(options, ScipyOptions), "scipy_solver, whose steps scipy takes"),
    ):
        if holds:
            raise InvalidInput(
                f'options["progress"] shows the steps that the host takes; got it with {where}. Drop progress=True, '
                'or solve on the host by method="dopri5" without cuda_graph.'
            )
    extra("tqdm", 'options["progress"] = True', "progress")


def _check_compensated(options: Common) -> None:
    """Raise InvalidInput if these options cannot be compensated."""
    for holds, given, why in (
        (isinstance(options, EquationOptions), "an implicit method", "solves its stages to a tolerance above rounding"),
        (isinstance(options, AdamsOptions), "an Adams method", "is not summed with compensation"),
        (isinstance(options, ScipyOptions), 'method="scipy_solver"', "sums its steps in SciPy, in float64"),
        (options.cuda_graph, "cuda_graph=True", "keeps only y between two captured steps"),
    ):
        if holds:
            raise InvalidInput(
                f'options["compensated"] is for explicit Runge-Kutta methods on the host; got it with {given}, which '
                f"{why}. Drop compensated, or use a float64 state, `y0.double()`."
            )


def _check_implicit(options: EquationOptions) -> None:
    if options.jac is not None and not callable(options.jac):
        raise InvalidType(
            f'options["jac"] must be a function of (t, y) that returns df/dy; got {options.jac!r:.60}. Leave it out, '
            "and autograd finds it."
        )
    dims = options.batch_dims
    if isinstance(dims, bool) or not isinstance(dims, int) or dims < 0:
        raise InvalidInput(
            f'options["batch_dims"] must be a number of dimensions, 0 or more; got {dims!r:.60}. Use 1 for a state of '
            "shape (samples, ...)."
        )
    tol = options.newton_tol
    if tol is not None and not (isinstance(tol, (int, float)) and 0 < tol < 1):
        raise InvalidInput(
            f'options["newton_tol"] must be between 0 and 1, in units of the tolerances; got {tol!r:.60}. Use 0.01.'
        )
