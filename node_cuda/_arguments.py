"""What the public solvers check of their arguments, and what they warn of. `problem.problem` checks func, y0 and t."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from node_cuda._parse_options import ARGUMENTS, check_mapping, option_names
from node_cuda._torch_modes import transformed
from node_cuda._typing import EventFunc
from node_cuda.cuda_graphs.cache import GraphCache, graphs_of
from node_cuda.gradients.registry import GRADIENTS
from node_cuda.methods.registry import Method, supported_callbacks
from node_cuda.native.cache import NativeCache, natives_of
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import InvalidInput, InvalidType, Unsupported, did_you_mean, users_level

RTOL, ATOL = 1e-7, 1e-9
"""torchdiffeq's defaults. A fixed grid, which reads neither, takes them in place of None."""


def refuse_unknown(name: str, unknown: Mapping[str, Any]) -> None:
    """Raise InvalidType for arguments that this function does not have."""
    for argument in unknown:
        if argument in option_names():
            mend = f"{argument} is an option: use `options=dict({argument}=...)`."
        elif argument in ARGUMENTS:
            mend = f"Use `odeint_adjoint` or `solve`, which have {argument}."
        else:
            mend = did_you_mean(argument, ARGUMENTS).strip() or f"It has {', '.join(ARGUMENTS[:5])} and others."
        raise InvalidType(f"{name}() got an unexpected keyword argument {argument!r}. {mend}")


def check_gradient(gradient: str, checkpoints: int | str | None) -> None:
    """Raise InvalidInput if this gradient mode does not exist, or does not take these checkpoints."""
    if gradient not in GRADIENTS:
        known = ", ".join(map(repr, GRADIENTS))
        raise InvalidInput(f"gradient must be one of {known}; got {gradient!r}.{did_you_mean(gradient, GRADIENTS)}")
    if checkpoints is None:
        return
    if gradient not in ("discrete", "auto"):
        raise InvalidInput(
            f'checkpoints={checkpoints!r} belongs to gradient="discrete" and "auto"; got gradient={gradient!r}. Drop '
            'it, or take gradient="discrete".'
        )
    whole = isinstance(checkpoints, int) and not isinstance(checkpoints, bool) and checkpoints >= 1
    if not whole and checkpoints != "auto":
        raise InvalidInput(
            f'checkpoints must be a number of states, at least 1, "auto" or None; got {checkpoints!r}. E.g. 64.'
        )


def check_event_fn(event_fn: Any) -> None:
    """Raise InvalidType if event_fn is not callable."""
    if not callable(event_fn):
        raise InvalidType(
            f"event_fn must be callable as event_fn(t, y); got a {type(event_fn).__name__}. Use for "
            "example `lambda t, y: y[0] - 1.0`."
        )


def tolerances_of_a_grid(rtol: Any, atol: Any, event_fn: EventFunc | None) -> tuple[Any, Any]:
    """Return rtol and atol for a fixed grid, where each may be None if no code reads it. An event reads atol."""
    if atol is None and event_fn is not None:
        raise InvalidType(
            "atol must be a number where there is an event_fn: the event's time is found to within atol. Got None. Use "
            "for example atol=1e-6."
        )
    return RTOL if rtol is None else rtol, ATOL if atol is None else atol


def with_graphs(options: Mapping[str, Any] | None, func: Any, name: str = "options") -> Mapping[str, Any] | None:
    """Return the options with a cache for the captured graphs, which exists as long as func."""
    check_mapping(options, name)
    wanted = None if options is None else options.get("cuda_graph")
    if options is None or not wanted or isinstance(wanted, GraphCache):
        return options
    if wanted is not True:
        raise InvalidType(
            'options["cuda_graph"] must be True, False, or a `node_cuda.cuda_graphs.cache.GraphCache`, which keeps '
            f"the captured graphs; got {wanted!r:.60}."
        )
    return {**options, "cuda_graph": graphs_of(func)}


def with_native(options: Mapping[str, Any] | None, func: Any, name: str = "options") -> Mapping[str, Any] | None:
    """Return the options with a cache for the compiled solves, which exists as long as func."""
    wanted = None if options is None else options.get("compile")
    if options is None or not wanted or isinstance(wanted, NativeCache):
        return options
    if wanted is not True and wanted != "require":
        raise InvalidType(
            f'{name}["compile"] must be True, False, "require" (an error if the solve cannot be compiled), or a '
            f"`node_cuda.native.cache.NativeCache`, which keeps the compiled solves; got {wanted!r:.60}."
        )
    return {**options, "compile": natives_of(func, wanted == "require")}


def refuse_callbacks(problem: Problem, method: Method) -> None:
    called = sorted(set(problem.callbacks) & supported_callbacks(method))
    if method.options.cuda_graph and called:
        raise Unsupported(
            f"func has callbacks, {', '.join(called)}, and the Python of a callback does not run in a captured solve. "
            "Drop cuda_graph=True, or solve with a func without callbacks."
        )


def warn_of_callbacks(problem: Problem, method: Method) -> None:
    unsupported = set(problem.callbacks) - supported_callbacks(method)
    if unsupported:
        warnings.warn(f"Solver '{method.name}' does not support callbacks {unsupported}", stacklevel=users_level())


def warn_of_tolerances(problem: Problem, method: Method, stats: Stats) -> None:
    """Warn if rtol and atol are below the rounding errors of y0's dtype. Reads y0 only if rtol is below them."""
    y0, eps = problem.y0, torch.finfo(problem.time_dtype).eps
    rtol, atol = (
        float(tol.max()) if isinstance(tol, Tensor) else tol for tol in (problem.norm.rtol, problem.norm.atol)
    )
    if not method.adaptive or method.options.throw == "deferred" or rtol >= eps / 8 or y0.numel() == 0 or transformed():
        return
    stats.host_reads += 1
    size = float(y0.detach().abs().max())
    if atol >= eps / 8 * size or not math.isfinite(size):
        return
    wider = "" if problem.time_dtype is torch.float64 else ", or a wider state, e.g. `y0.double()`"
    warnings.warn(
        f"rtol = {rtol:.3g} and atol = {atol:.3g} are less than {y0.dtype} can tell apart for |y0| up to {size:.3g}: "
        f"the steps are chosen by rounding errors. Use rtol={eps:.1g}, atol={eps * size:.1g} or more{wider}.",
        stacklevel=users_level(),
    )


def warn_of_one_time(problem: Problem) -> None:
    warnings.warn(
        f"t holds one time, t[0] = {problem.times[0]:.6g}, at which y is y0: nothing is solved. Use "
        "`torch.tensor([t0, t1])`, and `y[-1]` of the solution.",
        stacklevel=users_level(),
    )


def warn_of_scipy(problem: Problem, gradient: str) -> None:
    if gradient == "backprop" and problem.y0.requires_grad and torch.is_grad_enabled():
        warnings.warn(
            "y0 requires a gradient, and scipy computes outside of autograd: y will have none. Use "
            '`odeint_adjoint(..., method="scipy_solver")`, or `y0.detach()`.',
            stacklevel=users_level(),
        )
