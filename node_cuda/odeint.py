"""The public solvers: torchdiffeq's `odeint`, `odeint_adjoint` and `odeint_dense`, and `solve`, the full interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from node_cuda._arguments import (
    ATOL,
    RTOL,
    check_event_fn,
    check_gradient,
    refuse_callbacks,
    refuse_unknown,
    tolerances_of_a_grid,
    warn_of_callbacks,
    warn_of_one_time,
    warn_of_scipy,
    warn_of_tolerances,
    with_graphs,
    with_native,
)
from node_cuda._eager import eager
from node_cuda._typing import (
    AdjointArguments,
    EventFunc,
    Func,
    GradientName,
    MethodName,
    NoArguments,
    S,
    SolverArguments,
    State,
)
from node_cuda.cuda_graphs.cache import refuse_in_capture
from node_cuda.gradients.event_time import Crossing, moving
from node_cuda.gradients.registry import GRADIENTS
from node_cuda.integrals.integral import AugmentedField, Integral, event_of, with_integral
from node_cuda.integrals.regularized import Regularized, refuse_regularized
from node_cuda.loop.dense import DenseSolution, solve_dense
from node_cuda.loop.request import AdjointSpec, SolveSpec
from node_cuda.methods.registry import SCIPY, for_one_output, lookup
from node_cuda.problem.problem import Problem, combined_event, make_problem
from node_cuda.solution import Solution, Stats
from node_cuda.status import InvalidInput, SolveError, Status

if TYPE_CHECKING:
    from typing_extensions import Unpack

AS_FORWARD = AdjointSpec()
"""No adjoint_* arguments."""


@overload
def odeint(func: Func, y0: S, t: Tensor, *, event_fn: None = None, **solver: Unpack[SolverArguments]) -> S: ...
@overload
def odeint(
    func: Func, y0: S, t: Tensor, *, event_fn: EventFunc, **solver: Unpack[SolverArguments]
) -> tuple[Tensor, S]: ...
@eager
def odeint(
    func: Func,
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = RTOL,
    atol: Any = ATOL,
    method: MethodName | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: EventFunc | None = None,
    **unknown: Any,
) -> Any:
    """Solve dy/dt = func(t, y), y(t[0]) = y0, and return y at the times t; differentiable through the solver.

    Equivalent to torchdiffeq's `odeint`. Memory for gradients grows with the number of steps; `odeint_adjoint` avoids
    that.

    func: maps a 0-d tensor t and the state y to dy/dt, of y's structure, shapes and dtype. y0: a tensor of any shape,
    floating point or complex, or a tuple of such. t: 1-D, floating point, strictly increasing or decreasing. rtol,
    atol: numbers, tensors that broadcast against y0, or for a tuple y0 one of these for each component. method: one of
    `node_cuda.METHODS`, by default "dopri5"; "rodas5p" for a stiff func. options: see `node_cuda.options`. event_fn:
    stop where an element of event_fn(t, y) changes its sign; t is then (t0, anything in the direction of time).

    Returns y of shape (len(t), *y0.shape) in y0's dtype, or a tuple of such; with event_fn (event_t, y) where y holds
    y0 and y(event_t).

    Raises InvalidInput, InvalidType, InvalidState, InvalidField or ValueError for a caller's mistake, SolveError if
    the solve fails. Source: Hairer, Norsett and Wanner, Solving ODEs I.
    """
    if unknown:
        refuse_unknown("odeint", unknown)
    if isinstance(func, Regularized):
        refuse_regularized(func, "odeint")
    solution = _solve(func, y0, t, rtol, atol, method, options, event_fn, wants_status=False)
    return solution.ys if event_fn is None else (solution.event_t, solution.ys)


@overload
def odeint_adjoint(func: Func, y0: S, t: Tensor, *, event_fn: None = None, **solver: Unpack[AdjointArguments]) -> S: ...
@overload
def odeint_adjoint(
    func: Func, y0: S, t: Tensor, *, event_fn: EventFunc, **solver: Unpack[AdjointArguments]
) -> tuple[Tensor, S]: ...
@eager
def odeint_adjoint(
    func: Func,
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = RTOL,
    atol: Any = ATOL,
    method: MethodName | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: EventFunc | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: MethodName | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    gradient: GradientName = "adjoint",
    checkpoints: int | Literal["auto"] | None = None,
    **unknown: Any,
) -> Any:
    """Solve as `odeint` does; the continuous adjoint method gives gradients of y0, t and parameters in constant memory.

    Equivalent to torchdiffeq's `odeint_adjoint`. gradient, checkpoints: as those of `solve`; "discrete" is exact for
    the computed steps. adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: those of
    the backward solve, by default the forward ones (but for options["norm"]). adjoint_options["norm"]: "seminorm"
    leaves the parameters' gradients out of the error norm; a callable gets (t, y, adj_y, *adj_params).
    adjoint_params: the tensors to differentiate by, by default func.parameters(); needed if func is not an nn.Module.

    Returns and raises as `odeint` does, and ValueError if the parameters cannot be found. Differentiable once.
    Source: Chen et al. 2018, arXiv:1806.07366; seminorm: Kidger, Chen and Lyons 2021, arXiv:2009.09457.
    """
    if unknown:
        refuse_unknown("odeint_adjoint", unknown)
    if isinstance(func, Regularized):
        refuse_regularized(func, "odeint_adjoint")
    given = AdjointSpec(adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, adjoint_params)
    solution = _solve(
        func, y0, t, rtol, atol, method, options, event_fn, gradient, checkpoints, given, wants_status=False
    )
    return solution.ys if event_fn is None else (solution.event_t, solution.ys)


@eager
def solve(
    func: Func,
    y0: S,
    t: Tensor,
    *,
    rtol: Any = RTOL,
    atol: Any = ATOL,
    method: MethodName | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: EventFunc | None = None,
    gradient: GradientName = "backprop",
    checkpoints: int | Literal["auto"] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: MethodName | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    integral: Callable[[Tensor, Any, Any], Tensor] | None = None,
    **unknown: Unpack[NoArguments],
) -> Solution[S]:
    """Solve dy/dt = func(t, y), y(t[0]) = y0: the full interface, with statistics and status.

    Arguments as those of `odeint` and `odeint_adjoint`. gradient: "backprop" (autograd through the solver), "adjoint"
    (the continuous adjoint method; only it reads the adjoint_* arguments), "discrete" (the exact gradient of the
    computed steps, from one state a step; of Runge-Kutta methods, and of these arguments only adjoint_params)
    or "auto" ("discrete" where method, field and arguments allow it, else "adjoint", for the reason in
    `stats.why_gradient`). checkpoints, of "discrete": at most so many states are held, and others computed again;
    "auto": as many as fit a quarter of the free memory; None: all, with gradient="auto" as "auto". With
    options=dict(throw=False) a solve that fails returns its status, and NaN in what was not reached, instead of raising
    SolveError.

    integral: a function g(t, y, dy) of y and dy = func(t, y), both in y0's structure. It returns a tensor of any shape,
    the same one at each call. `Solution.integral` is its integral from t[0] to each t, of shape (len(t), *g.shape) and
    zero at t[0]. The step control counts it as one more component of y, with the smallest of rtol and of atol. It is
    differentiable as y is. The default parameters are those of func, and those of integral if it is an nn.Module. func
    is evaluated once for both. integral is evaluated once more, with a dy of zeros, for its shape. Callbacks, event_fn
    and norms see y alone. A func that `regularized` made has an integral already.

    Returns Solution(ts, ys, stats, status, event_t, integral); ys of shape (len(t), *y0.shape) in y0's dtype, or a
    tuple of such; the integral in the dtype of y0, in its real one if g is real. Raises as `odeint` does.
    """
    if unknown:
        refuse_unknown("solve", unknown)
    given = AdjointSpec(adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, adjoint_params)
    return _solve(func, y0, t, rtol, atol, method, options, event_fn, gradient, checkpoints, given, integral)


def _solve(
    func: Any,
    y0: Any,
    t: Tensor,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: Mapping[str, Any] | None,
    event_fn: EventFunc | None,
    gradient: str = "backprop",
    checkpoints: int | str | None = None,
    given: AdjointSpec = AS_FORWARD,
    integral: Callable[[Tensor, Any, Any], Tensor] | None = None,
    *,
    wants_status: bool = True,
) -> Solution[Any]:
    """Solve, for every public solver. wants_status: the caller reads `Solution.status`: one host read on a grid."""
    if gradient not in GRADIENTS or checkpoints is not None:
        check_gradient(gradient, checkpoints)
    refuse_in_capture(y0)
    if options is not None:
        options = with_native(with_graphs(options, func), func)
    chosen = lookup(method, options)
    if event_fn is not None:
        check_event_fn(event_fn)
        chosen = for_one_output(chosen)
    if chosen.options.check_reconstruction and gradient not in ("adjoint", "auto"):
        raise InvalidInput(
            'options["check_reconstruction"] belongs to gradient="adjoint", which reconstructs y backwards; got '
            f"gradient={gradient!r}, which stores it. Drop the option."
        )
    none = rtol is None or atol is None
    if none and not (given.method or chosen.reads_tolerances or chosen.options.check_reconstruction):
        rtol, atol = tolerances_of_a_grid(rtol, atol, event_fn)
    if event_fn is not None and chosen.options.clip:
        raise InvalidInput(
            'options["clip"] keeps func within [t[0], t[-1]], and with an event_fn t[1] only gives the direction of '
            "time. Drop clip, and use options=dict(max_step=...) for a func that is not defined everywhere."
        )
    endless, of_y = event_fn is not None, func.func if isinstance(func, Regularized) else func
    problem = make_problem(of_y, y0, t, rtol, atol, chosen.options.norm, clip=chosen.clips, endless=endless)
    stats = Stats(host_reads=1)
    if chosen.adaptive:
        warn_of_tolerances(problem, chosen, stats)
    if problem.callbacks:
        warn_of_callbacks(problem, chosen)
        refuse_callbacks(problem, chosen)
    if isinstance(given.params, Tensor):
        given = given._replace(params=(given.params,))  # its rows are not parameters
    if given.options is not None:
        options_ = with_graphs(given.options, func, "adjoint_options")
        given = given._replace(options=with_native(options_, func, "adjoint_options"))
    beside = None
    if integral is not None or of_y is not func:
        beside = _beside(func, problem, integral)
        problem, chosen, given = with_integral(problem, chosen, given, beside)
    request = SolveSpec(problem, chosen, stats, method, options, given, checkpoints, wants_status)
    if event_fn is not None:
        return _until_event(request, beside, event_fn, gradient)
    if len(problem.times) == 1:
        warn_of_one_time(problem)
    if chosen.name == SCIPY:
        warn_of_scipy(problem, gradient)
    ys, status = GRADIENTS[gradient].outputs(request)
    if beside is None and problem.layout.shapes is None and stats.reached is None:
        return Solution(t, ys, stats, status)
    return _solution(request, beside, t, ys, status)


def _until_event(
    request: SolveSpec, beside: AugmentedField | None, event_fn: EventFunc, gradient: str
) -> Solution[Any]:
    """Solve until an element of event_fn changes its sign. Its time and y there have gradients."""
    problem, t = request.problem, request.problem.t
    if len(t) != 2:
        raise ValueError(
            f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}. t[1] only gives the "
            "direction of time: `torch.stack([t0, t0 + 1])`."
        )
    status = Status.SUCCESS
    try:
        of_state = event_fn if beside is None else event_of(beside, event_fn)
        event_t, ys = GRADIENTS[gradient].event(request, combined_event(of_state, problem))
        if gradient != "backprop":  # users of plain odeint call event_t.numpy()
            crossing = Crossing(problem.func, of_state, problem.layout, t[0], problem.y0)
            event_t, _ = moving(crossing, event_t, ys[-1], event_fn)
    except SolveError as failure:
        if request.method.options.raises:
            raise
        status, event_t = failure.status, t[0].detach() * torch.nan
        ys = torch.stack([problem.y0, torch.full_like(problem.y0, torch.nan)])
    ts = torch.stack([t[0].detach(), event_t])
    return _solution(request, beside, ts, ys, status, event_t)


@eager
def odeint_dense(
    func: Func,
    y0: S,
    t0: float | Tensor,
    t1: float | Tensor,
    *,
    rtol: Any = RTOL,
    atol: Any = ATOL,
    method: MethodName | None = None,
    options: Mapping[str, Any] | None = None,
    **unknown: Unpack[NoArguments],
) -> DenseSolution[S]:
    """Solve from t0 to t1 and return y as a function of time, callable with times of any shape between them.

    Equivalent to torchdiffeq's `odeint_dense`, and also takes every method, tuple states and both directions of time.
    t0, t1: 0-d tensors or numbers. dopri8 uses its accurate interpolant: the order of its default one is much lower.
    Raises as `odeint` does, also with options=dict(throw=False): a partial dense solution is never returned.
    """
    if unknown:
        refuse_unknown("odeint_dense", unknown)
    refuse_regularized(func, "odeint_dense")
    refuse_in_capture(y0)
    chosen = lookup(method, options)
    if not (isinstance(t0, Tensor) and t0.is_floating_point()):
        t0 = torch.as_tensor(t0, dtype=torch.float64)
    t = torch.stack([t0.reshape(()), torch.as_tensor(t1, dtype=t0.dtype, device=t0.device).reshape(())])
    problem = make_problem(func, y0, t, rtol, atol, chosen.options.norm, clip=chosen.clips)
    warn_of_callbacks(problem, chosen)
    stats = Stats(host_reads=1)
    warn_of_tolerances(problem, chosen, stats)
    return solve_dense(problem, chosen, stats)


def _beside(func: Func, problem: Problem, integral: Any) -> AugmentedField:
    """Return the field of y and of its integral."""
    if not isinstance(func, Regularized):
        return Integral(func, problem, integral)
    if integral is not None:
        raise InvalidInput(
            "integral was given together with regularized(...), which is an integral itself; a solve has only one. Use "
            "`solve(func, ..., integral=...)` with both in a tensor, e.g. 0.01 * dy.square().sum(), or drop one."
        )
    return func.beside(problem)


def _solution(
    request: SolveSpec,
    beside: AugmentedField | None,
    ts: Tensor,
    ys: Tensor,
    status: Status,
    event_t: Tensor | None = None,
) -> Solution[Any]:
    """Return the solution in the structure of y0."""

    def as_given(flat: Tensor, lead: tuple[int, ...] = ()) -> tuple[State, Tensor | None]:
        state = request.problem.layout.unflatten(flat, lead)
        return (state, None) if beside is None else beside.split(state)

    reached = request.stats.reached
    if reached is not None:
        reached = torch.tensor(reached[0], dtype=ts.dtype, device=ts.device), as_given(reached[1])[0]
    state, integral = as_given(ys, (len(ts),))
    return Solution(ts, state, request.stats, status, event_t, integral, reached)
