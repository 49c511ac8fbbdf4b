"""The methods by name, and what a solve by each is made of: its options, its stepper, its pace and its interpolant."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from node_cuda import options as opt
from node_cuda.controllers import Adaptive, Extra, Grid, Pace
from node_cuda.derivatives import recorded
from node_cuda.device_pace import DeviceAdaptive
from node_cuda.host_loop import HostLoop, solve_event
from node_cuda.interpolation import Interpolant, cubic_hermite, dense_of, linear, of_method
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.backend import make_arithmetic
from node_cuda.kernels.fused import Fused
from node_cuda.kernels.tape import Tape
from node_cuda.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import InvalidInput
from node_cuda.steppers.adams import Adams
from node_cuda.steppers.explicit_rk import ExplicitRK
from node_cuda.steppers.step import Quadrature, Stepper
from node_cuda.tableau import Tableau
from node_cuda.tableaus import TABLEAUS

DEFAULT = "dopri5"
MAX_EVENT_STEPS = 20000
"""How long a fixed grid goes on looking for an event, as in torchdiffeq."""
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
SCIPY = "scipy_solver"
METHODS = (*TABLEAUS, *ADAMS, SCIPY)

# torchdiffeq's repository has these, its release 0.2.5 has not; each with the method to take instead.
IMPLICIT = dict.fromkeys(
    ("implicit_euler", "implicit_midpoint", "trapezoid", "radauIIA3", "gl4", "radauIIA5", "gl6", "sdirk2", "trbdf2"),
    'method="scipy_solver" with options=dict(solver="Radau") for stiff problems, or "implicit_adams"',
)


@dataclass(frozen=True)
class Method:
    """A method as asked for: its name, its parsed options, and its tableau if it has one."""

    name: str
    options: opt.Common
    tableau: Tableau | None = None

    @property
    def adaptive(self) -> bool:
        """Steps are chosen by an error estimate."""
        return isinstance(self.options, opt.AdaptiveOptions)


def lookup(name: str | None, options: Mapping[str, Any] | None, *, quiet: bool = False) -> Method:
    """The method of this name with these options. Raises ValueError for an unknown name, InvalidInput for options;
    warns of options that it does not know unless quiet."""
    name = DEFAULT if name is None else name
    if name in IMPLICIT:
        raise ValueError(
            f'Invalid method "{name}": implicit Runge-Kutta methods are not here yet. Use {IMPLICIT[name]}.'
        )
    if name not in METHODS:
        known = ", ".join(f'"{known}"' for known in METHODS)
        raise ValueError(f'Invalid method "{name}". Must be one of {{{known}}}.')
    if name == SCIPY:
        return Method(name, opt.parse(opt.ScipyOptions, name, options, quiet=quiet))
    if name in ADAMS:
        return Method(name, opt.parse(opt.AdamsOptions, name, options, quiet=quiet))
    tableau = TABLEAUS[name]
    family = opt.AdaptiveOptions if tableau.adaptive else opt.FixedOptions
    return Method(name, opt.parse(family, name, options, quiet=quiet), tableau)


def reads_tolerances(method: Method) -> bool:
    """rtol and atol decide something: steps, or when an iteration ends."""
    return method.adaptive or method.name in (SCIPY, "implicit_adams", "fixed_adams")


def supported_callbacks(method: Method) -> frozenset[str]:
    """The callbacks that this method calls."""
    if method.adaptive:
        return frozenset(("callback_step", "callback_accept_step", "callback_reject_step"))
    return frozenset(("callback_step",) if method.name != SCIPY else ())


def for_one_output(method: Method) -> Method:
    """The method for a solve whose only output lies between two steps: by default the interpolant is then the accurate
    one where torchdiffeq's is two orders below the method's (dopri8)."""
    options, tableau = method.options, method.tableau
    if not isinstance(options, opt.AdaptiveOptions) or tableau is None or options.dense != "default":
        return method
    if dense_of(tableau, options.dense).order + 1 >= tableau.order:
        return method
    return replace(method, options=replace(options, dense="accurate"))


def arithmetic_of(problem: Problem) -> Arithmetic:
    """The arithmetic of a solve of this problem, on the path that is wanted for it."""
    return make_arithmetic(problem.backend, problem.y0, problem.direction, problem.norm, problem.times)


def make_loop(
    problem: Problem,
    method: Method,
    stats: Stats,
    *,
    endless: bool = False,
    stops: Sequence[float] = (),
    pauses: bool = False,
    quadrature: Quadrature | None = None,
    extra: Extra | None = None,
    arithmetic: Arithmetic | None = None,
    points: Iterable[float] | None = None,
    tape: Tape | None = None,
) -> tuple[HostLoop, Interpolant]:
    """A solve that is ready to run, and how its outputs are interpolated.

    endless: it goes on beyond the last time, for events. stops: times to land on. pauses: the device, where it controls
    the steps, waits at every output. quadrature, extra: what is integrated beside the state, and its part in the error
    norm. arithmetic: that of an earlier solve of the same state and norm, over now, if this one evaluates no outputs.
    points: those of `grid_of`, where they are known. tape: where the device, if it controls the steps, records them.
    """
    options, tableau = method.options, method.tableau
    arithmetic = arithmetic_of(problem) if arithmetic is None else arithmetic
    problem = replace(problem, y0=arithmetic.own(problem.y0))
    stepper: Stepper
    pace: Pace
    if isinstance(options, opt.AdaptiveOptions) and tableau is not None:
        stepper = ExplicitRK(problem, arithmetic, tableau, estimate=True, quadrature=quadrature)
        if isinstance(arithmetic, Fused):
            pace = DeviceAdaptive(
                problem,
                arithmetic,
                tableau.order,
                options,
                stats,
                stops,
                extra,
                endless=endless,
                pauses=pauses,
                tape=tape,
            )
        else:
            pace = Adaptive(problem, arithmetic, tableau.order, options, stats, stops, extra)
        interpolant = of_method(stepper, tableau, options.dense)
    else:
        assert isinstance(options, opt.FixedOptions)
        if tableau is not None:
            stepper = ExplicitRK(
                problem, arithmetic, tableau, estimate=False, inside=options.perturb, quadrature=quadrature
            )
        else:
            assert isinstance(options, opt.AdamsOptions)
            implicit = method.name != "explicit_adams"
            stepper = Adams(problem, arithmetic, options, stats, implicit=implicit, quadrature=quadrature)
        tensors = None
        if points is None:
            points, tensors = _endless_grid(problem, options) if endless else grid_of(problem, options)
        pace = Grid(problem, points, stats, tensors)
        interpolant = linear(arithmetic) if options.interp == "linear" else cubic_hermite(arithmetic, stepper)
    return HostLoop(problem, stepper, pace, stats, record=options.record_steps), interpolant


def find_event(
    loop: HostLoop, interpolant: Interpolant, method: Method, event_fn: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, Tensor]:
    """The time and state of an event; loop, interpolant: those of `make_loop`, endless."""
    stepper, options = loop.stepper, method.options
    assert isinstance(stepper, (ExplicitRK, Adams)) and isinstance(options, (opt.AdaptiveOptions, opt.FixedOptions))
    if method.adaptive and isinstance(stepper, ExplicitRK):
        most, search = None, of_method(stepper, stepper.tableau, "default")
    else:
        most, search = MAX_EVENT_STEPS, linear(stepper.arithmetic)
    return solve_event(loop, interpolant, event_fn, most, search, options.event_checks)


def _endless_grid(problem: Problem, options: opt.FixedOptions) -> tuple[Iterable[float], Tensor | None]:
    """Steps without end; on the tape only the first moves with t[0], as the others end where the solver chose."""
    if options.step_size is None:
        raise InvalidInput(
            "Event handling for fixed step solvers requires `step_size`; got none. "
            "Use options=dict(step_size=0.01), say."
        )
    start, step = problem.times[0], options.step_size
    return (start + i * step for i in itertools.count()), problem.t[:1] if recorded(problem.t) else None


def grid_of(problem: Problem, options: opt.FixedOptions) -> tuple[list[float], Tensor | None]:
    """The grid as solver times, and as the user's times on the tape if t needs a gradient."""
    t = problem.t
    if options.grid_constructor is not None:
        grid = options.grid_constructor(lambda t, y, perturb=None: problem.field(t, y), problem.y0, t)
        if not (isinstance(grid, Tensor) and grid.ndim == 1 and grid.numel() >= min(2, len(t))):
            raise InvalidInput(f"grid_constructor must return a tensor of at least two times; got {grid!r:.80}.")
        if grid[0] != t[0] or grid[-1] != t[-1]:
            raise InvalidInput(
                f"grid_constructor must return a grid from t[0] = {float(t[0]):g} to t[-1] = {float(t[-1]):g}; got one "
                f"from {float(grid[0]):g} to {float(grid[-1]):g}. Include both ends exactly."
            )
    elif options.step_size is not None:
        grid = _uniform_grid(t, options.step_size * problem.direction)
    else:
        grid = t
    points = [problem.direction * value for value in grid.detach().cpu().double().tolist()]
    if any(not a < b for a, b in itertools.pairwise(points)):
        raise InvalidInput(f"grid_constructor must return strictly monotonic times in the direction of t; got {grid}.")
    return points, grid if recorded(t) else None


def _uniform_grid(t: Tensor, step: float) -> Tensor:
    """t[0], t[0] + step, ..., and t[-1] as the last point, in double; as many points as torchdiffeq has."""
    first, last = t[0].detach().cpu(), t[-1].detach().cpu()
    steps = int(torch.ceil((last - first) / step + 1).item()) - 1
    t = t.cpu().double()  # not every device has doubles
    inner = torch.arange(0, max(steps, 1), dtype=t.dtype, device=t.device) * step + t[0]
    # Rounding may put the last of the inner points on the end itself.
    inner = inner[: max(int(((t[-1].detach() - inner.detach()) * step > 0).sum()), 1)]
    return torch.cat([inner, t[-1:]])
