"""An integral along the solution: s = int g dt with g = integral(t, y, dy/dt), solved as one more component of the
state.

The state becomes (y, s) with ds/dt = g, so that every method, event and gradient mode integrates s in the same way as
y. The user's functions, and the results that the user gets, have y alone. Derived in docs/integral.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from node_cuda._typing import EventFunc, Func, Norm, State
from node_cuda._typing import Tolerance as Tol
from node_cuda._user_code import tell
from node_cuda.kernels.norms import ErrorNorm, rms
from node_cuda.loop.request import AdjointSpec
from node_cuda.methods.registry import Method
from node_cuda.options import FixedOptions
from node_cuda.problem.field import Layout, VectorField
from node_cuda.problem.problem import Callback, Problem, check_tolerance
from node_cuda.status import InvalidField, InvalidType


class AugmentedField(nn.Module):
    """The field of (y, s): func, and the rate of s, which is evaluated with it.

    It is a module, so that the parameters of both are found. shape: the shape of s. real: s is real, also for a complex
    y. measured: the error of s takes part in the step control.
    """

    measured: ClassVar[bool]

    def __init__(self, func: Func, problem: Problem, shape: torch.Size, *, real: bool) -> None:
        super().__init__()
        self.func = func
        self.layout = problem.layout
        self.shape = shape
        self.real = real
        self.ends = problem.ends
        # The parameters of a replica of DataParallel are found in another way.
        self._is_replica = getattr(func, "_is_replica", False)

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return d(y, s)/dt from the components of y, and s."""
        dy, rate = self.evaluate(t, self.users(state))
        return (*as_tuple(dy), rate)

    def evaluate(self, t: Tensor, y: State) -> tuple[State, Tensor]:
        """Return (dy/dt, ds/dt). func is evaluated once."""
        raise NotImplementedError

    def users(self, state: tuple[Tensor, ...]) -> State:
        """Return the user's y from the components (y, s)."""
        return state[0] if self.layout.shapes is None else state[:-1]

    def split(self, state: State) -> tuple[State, Tensor]:
        """Return (y, s) of a solution in the form that the user gets."""
        assert isinstance(state, tuple)
        s = state[-1]
        return self.users(state), s.real if self.real and s.is_complex() else s

    def asked(self, t: Tensor, y: State) -> State:
        """Return func(t, y). Raises InvalidField if it is not a dy/dt, as a solve without an integral does."""
        try:
            dy = self.func(t, y)
        except Exception as error:
            tell(error, "func", self.func, self.ends, t=t, y=y)
            raise
        wanted, parts = as_tuple(y), as_tuple(dy)
        fits = isinstance(y, Tensor) == isinstance(dy, Tensor) and len(wanted) == len(parts)
        if not fits or not all(_alike(x, part) for x, part in zip(wanted, parts, strict=True)):
            VectorField(lambda *_: dy, self.layout)(t, self.layout.flatten(y))
        return dy if isinstance(dy, Tensor) else parts


class Integral(AugmentedField):
    """The field of (y, s) for the user's integral(t, y, dy)."""

    measured = True

    def __init__(self, func: Func, problem: Problem, integral: Callable[[Tensor, Any, Any], Tensor]) -> None:
        if not callable(integral):
            raise InvalidType(
                f"integral must be callable as integral(t, y, dy); got a {type(integral).__name__}. Use "
                "`lambda t, y, dy: dy.square().sum()`, for example."
            )
        y0 = problem.y0
        with torch.no_grad():
            y = problem.layout.unflatten(y0.detach().clone())
            dy = problem.layout.unflatten(torch.zeros_like(y0))
            rate = _rate(integral, problem.t[0].detach().to(y0.device, problem.time_dtype), y, dy)
        super().__init__(func, problem, rate.shape, real=not rate.is_complex())
        self.integral = integral

    def evaluate(self, t: Tensor, y: State) -> tuple[State, Tensor]:
        before = _versions(y)
        dy = self.asked(t, y)
        if _versions(y) != before:
            raise InvalidField(
                f"func wrote into its argument y at t = {float(t):.6g}, and the integral needs y unchanged. Write "
                "`y = y.clone()` at the beginning of func, or use operations that are not in place."
            )
        before = _versions(dy)
        rate = _rate(self.integral, t, y, dy)
        if _versions(dy) != before:
            raise InvalidField(
                f"integral wrote into its argument dy at t = {float(t):.6g}, which is also the slope of y. "
                "Write `dy = dy.clone()` at its beginning, or use operations that are not in place."
            )
        if rate.shape != self.shape or rate.is_complex() == self.real:
            raise InvalidField(
                f"integral must return the same shape and kind of number each time; got {tuple(rate.shape)} of "
                f"{rate.dtype} at t = {float(t):.6g}, and {tuple(self.shape)} of {'real' if self.real else 'complex'} "
                "numbers from y0 and a dy of zeros. Let them depend on the shapes of y and dy alone."
            )
        return dy, rate


def with_integral(
    problem: Problem, method: Method, given: AdjointSpec, field: AugmentedField
) -> tuple[Problem, Method, AdjointSpec]:
    """Return the problem of (y, s) from the problem of y. The user's functions of y are still called with y alone."""
    y0, layout = problem.y0, Layout((*(problem.layout.shapes or (problem.y0.shape,)), field.shape))
    func = field if isinstance(field.func, nn.Module) else lambda t, state: field(t, state)
    norm = None if method.options.norm is None else _norm(field, method.options.norm)
    options = replace(method.options, norm=norm)
    if isinstance(options, FixedOptions) and options.grid_constructor is not None:
        options = replace(options, grid_constructor=_grid_constructor(y0.shape, options.grid_constructor))
    # Older versions of torch divide four or more complex numbers by infinity, or by nearly the largest number, to NaN.
    fill = None if field.measured else torch.finfo(y0.dtype).max / 4 if y0.is_complex() else math.inf
    rtol, atol = (
        None if tol is None else _extended(check_tolerance(name, tol, problem.layout, y0), problem, field, value)
        for name, tol, value in (("adjoint_rtol", given.rtol, None), ("adjoint_atol", given.atol, fill))
    )
    extended = problem._replace(
        func=func,
        field=VectorField(func, layout, problem.bounds, problem.ends),
        y0=torch.cat([y0.reshape(-1), y0.new_zeros(field.shape.numel())]),
        layout=layout,
        norm=ErrorNorm(
            _extended(problem.norm.rtol, problem, field, None),
            _extended(problem.norm.atol, problem, field, fill),
            layout.sizes,
            None if norm is None else lambda scaled, _: norm(layout.unflatten(scaled)),
        ),
        callbacks={name: _callback(field, call) for name, call in problem.callbacks.items()},
        adjoint_callbacks={
            name: _adjoint_callback(y0.numel(), y0.shape, call) for name, call in problem.adjoint_callbacks.items()
        },
    )
    adjoint = given._replace(rtol=rtol, atol=atol, options=_adjoint_options(problem, given.options))
    return extended, replace(method, options=options), adjoint


def event_of(field: AugmentedField, event_fn: EventFunc) -> EventFunc:
    """Return the user's event function as a function of (t, (y, s))."""

    def of_y(t: Tensor, state: tuple[Tensor, ...]) -> Any:
        y = field.users(state)
        try:
            return event_fn(t, y)
        except Exception as error:
            tell(error, "event_fn", event_fn, t=t, y=y)
            raise

    return of_y


def as_tuple(state: Any) -> tuple[Any, ...]:
    """Return the components of a state."""
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)


def _extended(tol: Tol, problem: Problem, field: AugmentedField, value: float | None) -> Tol:
    """Return a tolerance of y as one of (y, s). The tolerance of s is `value`, by default the smallest one of y."""
    if value is None and not isinstance(tol, Tensor):
        return tol
    y0 = problem.y0
    flat = torch.as_tensor(tol, dtype=y0.dtype.to_real(), device=y0.device).expand(y0.shape).reshape(-1)
    return torch.cat([flat, flat.new_full((field.shape.numel(),), float(flat.min()) if value is None else value)])


def _norm(field: AugmentedField, norm: Norm) -> Norm:
    """Return a norm: the larger of the user's norm of y and the rms of s, which is 0 for an infinite atol."""

    def of_both(state: tuple[Tensor, ...]) -> float:
        value = abs(float(norm(field.users(state))))
        beside = rms(state[-1:])
        return math.nan if math.isnan(beside) else max(value, beside)

    return of_both


def _adjoint_options(problem: Problem, options: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the user's adjoint_options. A norm of (t, *y, *adj_y, *adj_params) is called without s."""
    if options is None or not callable(norm := options.get("norm")):
        return options
    count = len(problem.layout.shapes or (None,))

    def of_y(parts: Sequence[Tensor]) -> Any:
        t, *rest = parts
        y, a, params = rest[:count], rest[count + 1 : 2 * count + 1], rest[2 * count + 2 :]
        return norm((t, *y, *a, *params))

    return {**options, "norm": of_y}


def _callback(field: AugmentedField, callback: Callback) -> Callback:
    return lambda t0, state, dt: callback(t0, field.users(state), dt)


def _adjoint_callback(count: int, shape: torch.Size, callback: Callback) -> Callback:
    def call(t0: Tensor, parts: tuple[Tensor, ...], dt: Tensor) -> Any:
        vjp_t, y, a, *params = parts
        return callback(t0, (vjp_t, *(x[:count].view(shape) for x in (y, a)), *params), dt)

    return call


def _grid_constructor(shape: torch.Size, constructor: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the user's grid constructor, which is called with func and y0 without s."""
    count = shape.numel()

    def construct(func: Callable[..., Tensor], state: Tensor, t: Tensor) -> Tensor:
        def of_y(t: Tensor, y: Tensor, perturb: Any = None) -> Tensor:
            return func(t, torch.cat([y.reshape(-1), state[count:]]))[:count].view(shape)

        return constructor(of_y, state[:count].view(shape), t)

    return construct


def _rate(integral: Callable[[Tensor, Any, Any], Tensor], t: Tensor, y: State, dy: State) -> Tensor:
    """Return the value of integral. Raises InvalidField if a state of y's dtype cannot hold it."""
    try:
        rate: Any = integral(t, y, dy)
    except Exception as error:
        tell(error, "integral", integral, t=t, y=y, dy=dy)
        raise
    dtype = as_tuple(y)[0].dtype
    if not isinstance(rate, Tensor):
        hint = " Did it forget `return`?" if rate is None else ""
        raise InvalidField(
            f"integral must return a tensor; got a {type(rate).__name__}.{hint} Wrap a number as `t.new_tensor(x)`."
        )
    if rate.is_complex() and not dtype.is_complex:
        raise InvalidField(
            f"integral returned {rate.dtype} for a state of {dtype}: the imaginary part would be lost. Start from a "
            f"complex state, `y0.to({rate.dtype})`, or return `out.real`."
        )
    return rate


def _alike(y: Tensor, dy: Any) -> bool:
    return isinstance(dy, Tensor) and dy.shape == y.shape and (y.is_complex() or not dy.is_complex())


def _versions(state: State) -> list[int]:
    """Return how often each component was written to; tensors made in inference mode have no counter."""
    return [x._version for x in as_tuple(state) if not x.is_inference()]
