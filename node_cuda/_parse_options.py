"""Parses and checks the `options` that a user gives. Unknown names warn, as in torchdiffeq."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from node_cuda._extras import extra
from node_cuda.options import (
    AdamsOptions,
    AdaptiveOptions,
    Common,
    EquationOptions,
    FixedImplicitOptions,
    FixedOptions,
    ImplicitOptions,
    ScipyOptions,
    as_times,
)
from node_cuda.status import InvalidInput, InvalidType, did_you_mean, users_level

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
        value = values.get(name)
        if isinstance(value, Tensor) and value.numel() == 1:
            values[name] = float(value.detach())
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
    """Raise InvalidInput, InvalidType or ValueError for an invalid value."""
    _check_types(options)
    _check_common(options)
    if isinstance(options, AdaptiveOptions):
        _check_adaptive(options)
    if isinstance(options, EquationOptions):
        _check_equations(options)
    if isinstance(options, FixedOptions):
        _check_grid(options)
    if isinstance(options, AdamsOptions):
        _check_adams(options)
    if isinstance(options, ScipyOptions) and not isinstance(options.solver, (str, type)):
        raise InvalidType(
            f'options["solver"] must be the name of a method of SciPy; got {options.solver!r:.60}. Use "LSODA".'
        )


def _check_types(options: Common) -> None:
    """Check each option that several families have."""
    for name in (*_SCALARS, "max_num_steps"):
        value = getattr(options, name, None)
        missing = value is None and getattr(type(options), name, None) is not None
        if missing or not (value is None or isinstance(value, (int, float))):
            raise InvalidType(f'options["{name}"] must be a number; got {value!r:.60}. Leave it out for the default.')
    checks = getattr(options, "event_checks", 0)
    if isinstance(checks, bool) or not isinstance(checks, int) or checks < 0:
        raise InvalidInput(
            f'options["event_checks"] must be a number of points inside a step, 0 or more; got {checks!r}. Use 8 for '
            "example."
        )
    for name, what in (
        ("clip", "True keeps func within [t[0], t[-1]]"),
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
            as_times(name, value)
    if options.norm is not None and not callable(options.norm):
        raise InvalidType(f'options["norm"] must be a function of the scaled error; got {options.norm!r:.60}.')


def _check_common(options: Common) -> None:
    """Check what the options of all methods may be together."""
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
    if options.compensated:
        _check_compensated(options)


def _check_adaptive(options: AdaptiveOptions) -> None:
    if options.dense not in ("default", "accurate", "torchdiffeq"):
        raise InvalidInput(f'options["dense"] must be "default", "accurate" or "torchdiffeq"; got {options.dense!r}.')
    for name, holds, need in (
        ("first_step", options.first_step is None or 0 < options.first_step < math.inf, "positive and finite"),
        ("safety", 0 < options.safety < math.inf, "positive and finite; torchdiffeq's is 0.9"),
        ("dfactor", 0 < options.dfactor < 1, "between 0 and 1; torchdiffeq's is 0.2"),
        ("ifactor", options.ifactor >= 1, "at least 1; torchdiffeq's is 10"),
        ("max_num_steps", options.max_num_steps >= 0, "a number of steps"),
    ):
        if not holds:
            raise InvalidInput(f'options["{name}"] must be {need}; got {getattr(options, name)}.')
    if not isinstance(options.dtype, torch.dtype):
        raise InvalidType(f'options["dtype"] must be a torch.dtype; got {options.dtype!r:.60}. Use torch.float64.')
    if not 0 <= options.min_step <= options.max_step or not options.max_step > 0 or options.min_step == math.inf:
        raise InvalidInput(
            "options must have 0 <= min_step <= max_step, a finite min_step and max_step > 0; got min_step = "
            f"{options.min_step}, max_step = {options.max_step}."
        )


def _check_grid(options: FixedOptions) -> None:
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


def _check_adams(options: AdamsOptions) -> None:
    for name, value in (("max_order", options.max_order or 0), ("max_iters", options.max_iters)):
        if not (isinstance(value, (int, float)) and value == value // 1 >= 0):
            raise InvalidType(f'options["{name}"] must be a whole number, 0 or more; got {value!r:.60}. Use 4.')


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


def _check_equations(options: EquationOptions) -> None:
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
    if isinstance(options, FixedImplicitOptions) and not (isinstance(options.max_iters, int) and options.max_iters > 0):
        raise InvalidInput(
            f'options["max_iters"] must be a number of iterations; got {options.max_iters!r:.60}. Use 100.'
        )
