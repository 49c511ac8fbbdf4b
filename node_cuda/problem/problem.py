"""An initial value problem, checked once. All other layers rely on these checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from node_cuda._torch_modes import numbers
from node_cuda._typing import EventFunc, Func, Norm, State
from node_cuda._typing import Tolerance as Tol
from node_cuda._user_code import tell
from node_cuda.kernels import backend
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.stage_times import Clock
from node_cuda.problem.field import ONE_TENSOR, Layout, VectorField
from node_cuda.status import InvalidInput, InvalidState, InvalidType

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
_ADJOINT = "_adjoint"
_CALLBACKS = frozenset((*CALLBACKS, *(name + _ADJOINT for name in CALLBACKS)))


NO_DOUBLES = ("mps",)
"""Device types without float64. There the double times that callbacks get are tensors on the host."""

Callback = Callable[[Tensor, Any, Tensor], Any]


class Field(Protocol):
    """dy/dt of a flat state; counts its evaluations. copies_output: the result is a copy that the caller may keep.
    spare, kept: see `VectorField`."""

    nfe: int
    copies_output: bool

    def __call__(self, t: Tensor, y: Tensor, *, spare: bool = False, kept: bool = True) -> Tensor: ...


class Problem(NamedTuple):
    """dy/dt = field(t, y), y(times[0]) = y0, solved for y at `times`.

    func: the user's function. field: the function that the solver calls. y0: the flat state. times: solver times s in
    ascending order, double; the user's time is direction * s, and a step of s by h > 0 is a step of t by direction * h.
    t: the user's tensor of times, which receives gradients. norm: the norm of errors. callbacks: the user's callbacks
    by name, called with (t0, y0, dt). adjoint_callbacks: those of the backward solve, under the same names. backend:
    the path that computes the steps (see `node_cuda.backend`), stored here because another thread may run the backward
    pass. bounds: the user's times between which func may be evaluated; None: at all times. ends: the user's first and
    last time, for messages; None if t does not say when the solve ends.
    """

    func: Func
    field: Field
    y0: Tensor
    t: Tensor
    times: tuple[float, ...]
    direction: float
    layout: Layout
    norm: ErrorNorm
    callbacks: dict[str, Callback]
    adjoint_callbacks: dict[str, Callback]
    backend: str
    bounds: tuple[float, float] | None = None
    ends: tuple[float, float] | None = None

    def field_of(self, func: Func) -> VectorField:
        """Return a field for this problem from another function."""
        return VectorField(func, self.layout, self.bounds, self.ends)

    @property
    def time_dtype(self) -> torch.dtype:
        """The dtype of the t that func gets: the real dtype of the state."""
        return self.y0.dtype.to_real()

    def callback(self, name: str, t0: float, y0: Tensor, h: float, dtype: torch.dtype) -> None:
        """Call the user's callback of this name, if there is one. t0 and dt become 0-d tensors only for this call."""
        if name in self.callbacks:
            device = "cpu" if y0.device.type in NO_DOUBLES else y0.device
            t0_, dt = torch.tensor([self.direction * t0, h], dtype=dtype, device=device).unbind()
            self.callbacks[name](t0_, self.layout.unflatten(y0), dt)


def make_problem(
    func: Func,
    y0: State,
    t: Tensor,
    rtol: Any,
    atol: Any,
    norm: Norm | None = None,
    *,
    clip: bool = False,
    endless: bool = False,
) -> Problem:
    """Check the user's input and flatten it.

    norm: a function of a tensor, or of a tuple if y0 is a tuple. clip: evaluate func only between the first and the
    last time. endless: an event ends the solve, and not t.

    Raises InvalidType, InvalidInput or InvalidState; the message says what to change.
    """
    if not callable(func) or isinstance(func, type):
        check_func(func, "odeint(func, y0, t)", swapped=callable(y0))
    if isinstance(y0, Tensor):
        layout, flat = ONE_TENSOR, y0
    else:
        layout = Layout(_shapes(y0))
        flat = layout.flatten(y0)
    if not (flat.is_floating_point() or flat.is_complex()):
        raise InvalidState(
            f"y0 must be floating point or complex; got {flat.dtype}. Use `y0.float()` or `y0.double()`."
        )
    try:
        times, direction = check_times(t)
    except (InvalidInput, InvalidType) as error:
        _refuse_swapped(error, y0)
        raise
    rtol = rtol if type(rtol) is float and rtol >= 0.0 else check_tolerance("rtol", rtol, layout, flat)
    atol = atol if type(atol) is float and atol >= 0.0 else check_tolerance("atol", atol, layout, flat)
    error_norm = ErrorNorm(
        rtol,
        atol,
        None if layout is ONE_TENSOR else layout.sizes,
        None if norm is None else lambda scaled, _: norm(layout.unflatten(scaled)),
    )
    if isinstance(rtol, float) and isinstance(atol, float) and rtol == atol == 0.0:
        raise InvalidInput(
            "rtol and atol are both 0, so no step can be accepted; got 0 and 0. Use for example `rtol=1e-12`."
        )
    bounds = _inside(times, direction, flat.dtype.to_real()) if clip else None
    callbacks, adjoint_callbacks = ({}, {}) if _has_no_callbacks(func) else _callbacks(func)
    ends = None if endless else (direction * times[0], direction * times[-1])
    return Problem(
        func=func,
        field=VectorField(func, layout, bounds, ends),
        y0=flat,
        t=t,
        times=times,
        direction=direction,
        layout=layout,
        norm=error_norm,
        callbacks=callbacks,
        adjoint_callbacks=adjoint_callbacks,
        backend=backend.chosen(),
        bounds=bounds,
        ends=ends,
    )


def check_func(func: Any, call: str, *, swapped: bool = False) -> None:
    """Raise InvalidType if func is not callable, or is a class. call: the call to type. swapped: y0 is callable."""
    if isinstance(func, type):
        name = func.__name__
        raise InvalidType(
            f"func must be callable as func(t, y); got the class {name}, whose call makes an object. Make the object "
            f"first: `func = {name}(...)`, then `{call}`."
        )
    if not callable(func):
        words = "func and y0 are swapped: use" if swapped else "Use"
        raise InvalidType(f"func must be callable as func(t, y); got a {type(func).__name__}. {words} `{call}`.")


def _inside(times: tuple[float, ...], direction: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return the smallest and the largest number of this dtype between the first and the last time.

    Both are in the user's time. Raises InvalidInput if there is none.
    """
    low, high = sorted((direction * times[0], direction * times[-1]))
    clock = Clock(1.0, dtype, torch.device("cpu"))
    least, most = (float(x) for x in clock.tensors((low, high)))
    least = clock.after(low) if least < low else least
    most = clock.before(high) if most > high else most
    if least > most:
        raise InvalidInput(
            f'options["clip"] needs a time in {dtype} between the first and the last of t; got none between {low!r} '
            f"and {high!r}. Use a wider state, `y0.double()`, or drop clip."
        )
    return least, most


def _refuse_swapped(error: InvalidInput | InvalidType, y0: State) -> None:
    """If y0 would be valid times, raise the error of `check_times` with a sentence that says so."""
    if not isinstance(y0, Tensor) or y0.ndim != 1 or y0.numel() < 2:
        return
    try:
        check_times(y0)
    except Exception:
        raise error from None
    raise type(error)(
        f"{error} If y0 and t are swapped: y0 comes first, `odeint(func, y0, t)`, `layer(y0, t)`."
    ) from None


def check_times(t: Tensor) -> tuple[tuple[float, ...], float]:
    """Return the user's times as ascending floats, and the direction: t = direction * s."""
    if not isinstance(t, Tensor):
        words = "`torch.as_tensor(t)`" if hasattr(t, "__array__") else "for example `torch.tensor([0.0, 1.0])`"
        raise InvalidType(f"t must be a torch.Tensor; got a {type(t).__name__}. Use {words}.")
    if not t.is_floating_point():
        raise TypeError(f"`t` must be a floating point Tensor; got {t.dtype}. Use `t.float()` or `t.double()`.")
    if t.ndim != 1 or t.numel() == 0:
        raise InvalidInput(
            f"t must be one dimensional, with at least one time; got shape {tuple(t.shape)}. "
            "Use `torch.linspace(t0, t1, n)`."
        )
    try:
        values: list[float] = t.tolist()
    except RuntimeError:
        values = _times_in_a_transform(t)
    direction = -1.0 if len(values) > 1 and values[0] > values[1] else 1.0
    times = tuple(values) if direction > 0.0 else tuple([-value for value in values])
    for i in range(1, len(times)):
        if not times[i - 1] < times[i]:
            if math.isnan(times[i - 1]) or math.isnan(times[i]):
                raise InvalidInput(f"t must be finite; got nan in {values[: i + 1]}. Look at how t is computed.")
            raise InvalidInput(
                f"t must be strictly increasing or decreasing; got t[{i}] = {values[i]:g} after t[{i - 1}] = "
                f"{values[i - 1]:g}. Sort it and drop repeats with `torch.unique(t)`; `.flip(0)` that to go backwards."
            )
    if not (abs(values[0]) < math.inf and abs(values[-1]) < math.inf):  # those between are finite: they ascend
        raise InvalidInput(f"t must be finite; got {values}.")
    return times, direction


def _times_in_a_transform(t: Tensor) -> list[float]:
    """Return the times in a tensor that cannot be read at once. Raises InvalidInput if it cannot be read at all."""
    try:
        return numbers(t)
    except RuntimeError as failure:
        raise InvalidInput(
            "t must be numbers that the host can read, the same for all samples of a vmap; got a tensor without data "
            f"({failure!s:.80}). Solve once for each t, with in_dims=None for it."
        ) from failure


def combined_event(event_fn: EventFunc, problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """Return one event function of (t, flat state) that is positive at the start: min_i c_i sign(c_i(t0, y0))."""
    layout = problem.layout

    def at(t: Tensor, y: Tensor) -> Tensor:
        state = layout.unflatten(y)
        try:
            value = event_fn(t, state)
        except Exception as error:
            tell(error, "event_fn", event_fn, t=t, y=state)
            raise
        return _event_value(value)

    with torch.no_grad():
        signs = torch.sign(at(problem.t[0].to(problem.time_dtype), problem.y0))

    return lambda t, y: torch.min(at(t, y) * signs)


def _event_value(value: Any) -> Tensor:
    """Return the value of event_fn as a tensor. Raises InvalidType or InvalidInput if it has no sign."""
    try:
        value = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        hint = " Did it forget `return`?" if value is None else ""
        raise InvalidType(
            f"event_fn must return a tensor or a number; got a {type(value).__name__}.{hint} Return for example "
            "`y[0] - 1.0`, or `torch.stack([...])` of several such."
        ) from None
    if value.dtype is torch.bool:
        raise InvalidType(
            "event_fn must return numbers that change their sign at the event; got torch.bool. Return "
            "for example `y[0] - 1.0` in place of `y[0] > 1.0`."
        )
    if value.is_complex():
        raise InvalidType(
            f"event_fn must return real numbers, which have a sign; got {value.dtype}. Return for example "
            "`y[0].real` or `y[0].abs() - 1.0`."
        )
    if value.numel() == 0:
        raise InvalidInput(
            f"event_fn must return at least one number; got shape {tuple(value.shape)}. E.g. `y[0] - 1.0`."
        )
    return value


def _shapes(y0: Any) -> tuple[torch.Size, ...] | None:
    if isinstance(y0, Tensor):
        return None
    if not isinstance(y0, tuple):
        words = "`torch.as_tensor(y0)`" if hasattr(y0, "__array__") else "for example `torch.tensor([1.0])`"
        if isinstance(y0, list):
            words = "`tuple(y0)` for a list of tensors, `torch.tensor(y0)` for one of numbers"
        raise InvalidType(f"y0 must be a torch.Tensor or a tuple of them; got a {type(y0).__name__}. Use {words}.")
    if not y0:
        raise InvalidInput("y0 is an empty tuple; a state needs at least one tensor.")
    for i, part in enumerate(y0):
        if not isinstance(part, Tensor):
            raise InvalidType(
                f"y0[{i}] must be a torch.Tensor; got a {type(part).__name__}. Use `torch.as_tensor`. If y0 is an "
                "interval, as in scipy's solve_ivp(func, t_span, y0): here it is `odeint(func, y0, t)`."
            )
    return tuple(part.shape for part in y0)


def check_tolerance(name: str, tol: Any, layout: Layout, flat: Tensor) -> Tol:
    """Return a float if one number is enough, else a tensor that broadcasts against the flat state."""
    if layout.shapes is None or isinstance(tol, Tensor) or not isinstance(tol, Iterable):
        return _tolerance(name, tol, flat.shape, flat)
    tol = tuple(tol)
    if len(tol) != len(layout.shapes):
        raise InvalidInput(
            f"If using tupled {name} it must have the same length as the tuple y0: got {len(tol)}, needed "
            f"{len(layout.shapes)}. Give one number, or one for each component."
        )
    parts = [
        _tolerance(f"{name}[{i}]", x, shape, flat) for i, (x, shape) in enumerate(zip(tol, layout.shapes, strict=True))
    ]
    real = flat.dtype.to_real()
    return torch.cat(
        [
            torch.as_tensor(x, dtype=real, device=flat.device).expand(shape).reshape(-1)
            for x, shape in zip(parts, layout.shapes, strict=True)
        ]
    )


def _tolerance(name: str, tol: Any, shape: torch.Size, flat: Tensor) -> Tol:
    """Return one tolerance of a state, or of a component, of this shape."""
    if not isinstance(tol, (Tensor, float, int)):
        try:
            tol = torch.as_tensor(tol, dtype=flat.dtype.to_real())
        except (TypeError, ValueError, RuntimeError):
            raise InvalidType(f"{name} must be a number or a tensor; got {tol!r:.60}. Use for example 1e-6.") from None
    if isinstance(tol, Tensor) and tol.requires_grad:
        raise InvalidInput(
            f"{name} cannot require gradient, but the tensor that was given does. Pass `{name}.detach()`."
        )
    if isinstance(tol, Tensor) and tol.ndim == 0:
        tol = tol.item()
    if not isinstance(tol, Tensor):
        if isinstance(tol, complex) or not tol >= 0:
            raise InvalidInput(f"{name} must be a number that is not negative; got {tol}. Use for example 1e-6.")
        return float(tol)
    if tol.is_complex() or not bool((tol >= 0).all()):
        raise InvalidInput(f"{name} must be real and not negative; got {tol}.")
    try:
        fits = torch.broadcast_shapes(tol.shape, shape) == shape
    except RuntimeError:
        fits = tol.numel() == shape.numel() and len(shape) != 1
        tol = tol.reshape(shape) if fits else tol
    if not fits:
        raise InvalidInput(
            f"{name} must be a number, or broadcast against the state's shape {tuple(shape)}; got {tuple(tol.shape)}."
        )
    return tol.to(flat.device, flat.dtype.to_real())


def _callbacks(func: Func) -> tuple[dict[str, Callback], dict[str, Callback]]:
    """Return the callbacks of func for the forward solve, and those for the backward solve."""
    found = {name: x for name in _CALLBACKS if (x := getattr(func, name, None)) is not None}
    for name, x in found.items():
        if not callable(x):
            raise InvalidType(
                f"{name} of func must be callable as {name}(t0, y0, dt); got a {type(x).__name__}. Make it a method, "
                "or give the attribute another name."
            )
    return (
        {name: found[name] for name in CALLBACKS if name in found},
        {name: found[name + _ADJOINT] for name in CALLBACKS if name + _ADJOINT in found},
    )


def _has_no_callbacks(func: Any) -> bool:
    """Return True if func is an nn.Module without callbacks: its `getattr` is slow for a name that does not exist."""
    kind = type(func)
    if getattr(kind, "__getattr__", None) is not nn.Module.__getattr__:
        return False
    if not (func.__dict__.keys().isdisjoint(_CALLBACKS) and func._modules.keys().isdisjoint(_CALLBACKS)):
        return False
    for base in kind.__mro__:  # noqa: SIM110 - `all` of a generator calls a Python function for each
        if not base.__dict__.keys().isdisjoint(_CALLBACKS):
            return False
    return True
