"""The public solvers: torchdiffeq's `odeint`, `odeint_adjoint` and `odeint_dense`, and `solve`, which they rest on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from node_cuda import methods
from node_cuda._typing import EventFunc, Func, State
from node_cuda.dense import DenseSolution, solve_dense
from node_cuda.gradients import adjoint, backprop
from node_cuda.methods import Method
from node_cuda.problem import Problem, combined_event, make_problem
from node_cuda.solution import Solution, Stats
from node_cuda.status import InvalidInput, Status

GRADIENTS = ("backprop", "adjoint")


def odeint(
    func: Func,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: EventFunc | None = None,
) -> Any:
    """Solve dy/dt = func(t, y), y(t[0]) = y0, and return y at the times t; differentiable through the solver.

    Equivalent to torchdiffeq's `odeint`. Memory for gradients grows with the number of steps; `odeint_adjoint` avoids
    that.

    func: maps a 0-d tensor t and the state y to dy/dt, of y's structure, shapes and dtype. y0: a tensor of any shape,
    floating point or complex, or a tuple of such. t: 1-D, floating point, strictly increasing or decreasing. rtol,
    atol: numbers, tensors that broadcast against y0, or for a tuple y0 one of these for each component. method: one of
    `node_cuda.METHODS`, by default "dopri5". options: see `node_cuda.options`. event_fn: stop where an element of
    event_fn(t, y) changes its sign; t is then (t0, anything in the direction of time).

    Returns y of shape (len(t), *y0.shape) in y0's dtype, or a tuple of such; with event_fn (event_t, y) where y holds
    y0 and y(event_t).

    Raises InvalidInput, InvalidType, InvalidState, InvalidField or ValueError for a caller's mistake, SolveError if
    the solve fails. Source: Hairer, Norsett and Wanner, Solving ODEs I.
    """
    return _as_torchdiffeq(
        solve(func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn), event_fn
    )


def odeint_adjoint(
    func: Func,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: EventFunc | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """As `odeint`, with gradients for y0, t and the parameters by the continuous adjoint method, in constant memory.

    Equivalent to torchdiffeq's `odeint_adjoint`. adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: those of
    the backward solve, by default the forward ones (but for options["norm"]). adjoint_options["norm"]: "seminorm"
    leaves the parameters' gradients out of the error norm; a callable gets (t, y, adj_y, *adj_params).
    adjoint_params: what to differentiate by, by default func.parameters(); needed if func is no nn.Module.

    Source: Chen et al. 2018, arXiv:1806.07366; seminorm: Kidger, Chen and Lyons 2021, arXiv:2009.09457.
    """
    return _as_torchdiffeq(
        solve(
            func,
            y0,
            t,
            rtol=rtol,
            atol=atol,
            method=method,
            options=options,
            event_fn=event_fn,
            gradient="adjoint",
            adjoint_rtol=adjoint_rtol,
            adjoint_atol=adjoint_atol,
            adjoint_method=adjoint_method,
            adjoint_options=adjoint_options,
            adjoint_params=adjoint_params,
        ),
        event_fn,
    )


def solve(
    func: Func,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: EventFunc | None = None,
    gradient: str = "backprop",
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Solution:
    """Solve dy/dt = func(t, y), y(t[0]) = y0: the full interface, with statistics and status.

    Arguments as those of `odeint` and `odeint_adjoint`. gradient: "backprop" (autograd through the solver) or "adjoint"
    (the continuous adjoint method; only it reads the adjoint_* arguments). With options=dict(throw=False) a solve that
    fails returns its status, and NaN in what was not reached, instead of raising SolveError.
    """
    if gradient not in GRADIENTS:
        raise InvalidInput(f"gradient must be one of {', '.join(map(repr, GRADIENTS))}; got {gradient!r}.")
    if gradient == "adjoint" and adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError(
            f"func must be an nn.Module to find its parameters by the adjoint method; got a {type(func).__name__}. Pass "
            "the tensors to differentiate by as `adjoint_params=(...)`, or `adjoint_params=()` if there are none."
        )
    chosen = methods.lookup(method, options)
    problem = make_problem(func, y0, t, rtol, atol, chosen.options.norm)
    _warn_of_callbacks(problem, chosen)
    stats = Stats(host_reads=1)
    settings = None
    if gradient == "adjoint":
        settings = _adjoint_settings(
            problem, chosen, method, options, adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options,
            func.parameters() if adjoint_params is None else adjoint_params,
        )  # fmt: skip
    if event_fn is not None:
        return _solve_event(problem, chosen, stats, event_fn, settings)
    if settings is None:
        ys, status = backprop.outputs(problem, chosen, stats)
    else:
        ys, status = adjoint.outputs(problem, chosen, stats, settings)
    return Solution(t, problem.layout.unflatten(ys, (len(t),)), stats, status)


def odeint_dense(
    func: Func,
    y0: State,
    t0: Tensor,
    t1: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> DenseSolution:
    """Solve from t0 to t1 and return y as a function of time, callable with times of any shape between them.

    As torchdiffeq's `odeint_dense`, but for every method, tuple states and both directions. t0, t1: 0-d tensors or
    numbers. Raises as `odeint` does.
    """
    chosen = methods.lookup(method, options)
    t0 = torch.as_tensor(t0)
    t = torch.stack([t0, torch.as_tensor(t1, dtype=t0.dtype, device=t0.device)])
    problem = make_problem(func, y0, t, rtol, atol, chosen.options.norm)
    _warn_of_callbacks(problem, chosen)
    return solve_dense(problem, chosen, Stats(host_reads=1))


def _solve_event(
    problem: Problem, method: Method, stats: Stats, event_fn: EventFunc, settings: adjoint.Settings | None
) -> Solution:
    if len(problem.times) != 2:
        raise ValueError(
            f"We require len(t) == 2 when in event handling mode, but got len(t)={len(problem.times)}. t[1] only gives "
            "the direction of time: `torch.stack([t0, t0 + 1])`."
        )
    event = combined_event(event_fn, problem)
    if settings is None:
        at, y = backprop.event(problem, method, stats, event)
        event_t, ys = torch.tensor(at, dtype=problem.t.dtype, device=problem.t.device), torch.stack([problem.y0, y])
    else:
        event_t, ys = adjoint.event(problem, method, stats, event, settings)
    ts = torch.stack([problem.t[0].detach(), event_t])
    return Solution(ts, problem.layout.unflatten(ys, (2,)), stats, Status.SUCCESS, event_t)


def _adjoint_settings(
    problem: Problem,
    chosen: Method,
    method: str | None,
    options: Mapping[str, Any] | None,
    adjoint_rtol: Any,
    adjoint_atol: Any,
    adjoint_method: str | None,
    adjoint_options: Mapping[str, Any] | None,
    adjoint_params: Iterable[Tensor],
) -> adjoint.Settings:
    adjoint_method = method if adjoint_method is None else adjoint_method
    if adjoint_method != method and options is not None and adjoint_options is None:
        raise ValueError(
            f"If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`; got {adjoint_method!r} "
            f"and {method!r}. Pass `adjoint_options=dict(...)` as well."
        )
    inherited = {name: value for name, value in (options or {}).items() if name != "norm"}
    backward_options = inherited if adjoint_options is None else dict(adjoint_options)
    every = _parameters(problem, adjoint_params)
    params = tuple(p for p in every if p.requires_grad)
    norm = backward_options.get("norm")
    if callable(norm) and len(params) < len(every):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will be excluded from the "
            "adjoint pass, and will not appear as a tensor in the adjoint norm.",
            stacklevel=4,
        )
    methods.lookup(adjoint_method, {name: value for name, value in backward_options.items() if name != "norm"})
    backward_options["norm"] = _adjoint_norm(problem, norm, chosen.options.norm)
    tolerances = make_problem(
        problem.field.func, problem.layout.unflatten(problem.y0.detach()), problem.t.detach(),
        problem.norm.rtol if adjoint_rtol is None else adjoint_rtol,
        problem.norm.atol if adjoint_atol is None else adjoint_atol,
    ).norm  # fmt: skip
    return adjoint.Settings(
        tolerances.rtol,
        tolerances.atol,
        lambda options: methods.lookup(adjoint_method, options, quiet=True),
        backward_options,
        params,
    )


def _parameters(problem: Problem, params: Iterable[Tensor]) -> tuple[Tensor, ...]:
    func = problem.field.func
    # In a replica of DataParallel the parameters are plain tensor attributes, which parameters() does not find.
    if isinstance(func, nn.Module) and getattr(func, "_is_replica", False) and not (params := tuple(params)):
        found = func._named_members(
            lambda module: [(k, v) for k, v in module.__dict__.items() if isinstance(v, Tensor) and v.requires_grad]
        )
        return tuple(tensor for _, tensor in found)
    return tuple(params)


def _adjoint_norm(problem: Problem, norm: Any, user_norm: Any) -> Callable[[Any], Any]:
    layout = problem.layout
    if norm is None or norm == "seminorm":
        return adjoint.AdjointNorm(layout, user_norm, params=norm is None)
    if not callable(norm):
        raise InvalidInput(f'adjoint_options["norm"] must be "seminorm" or a callable; got {norm!r}.')
    if layout.shapes is None:
        return norm

    def of_tuple(parts: Any) -> Any:
        t, y, adj_y, *adj_params = parts
        return norm((t, *layout.unflatten(y), *layout.unflatten(adj_y), *adj_params))

    return of_tuple


def _warn_of_callbacks(problem: Problem, method: Method) -> None:
    unsupported = set(problem.callbacks) - methods.supported_callbacks(method)
    if unsupported:
        warnings.warn(f"Solver '{method.name}' does not support callbacks {unsupported}", stacklevel=3)


def _as_torchdiffeq(solution: Solution, event_fn: EventFunc | None) -> Any:
    return solution.ys if event_fn is None else (solution.event_t, solution.ys)
