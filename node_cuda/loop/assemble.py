"""Assembles a solve from the problem and the method: arithmetic, stepper, step selector and interpolant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from node_cuda import options as opt
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.backend import make_arithmetic
from node_cuda.kernels.step_log import StepLog
from node_cuda.loop.events import solve_event
from node_cuda.loop.grids import GridSteps, endless_grid, grid_of
from node_cuda.loop.host_loop import HostLoop
from node_cuda.loop.progress import Progress
from node_cuda.loop.step_control import AdaptiveSteps, StepSelector
from node_cuda.loop.stiffness import stiffness_test
from node_cuda.methods.adams import Adams
from node_cuda.methods.explicit_rk import ExplicitRK
from node_cuda.methods.implicit.steps import ImplicitSteps, implicit_steps
from node_cuda.methods.implicit.tableau import FullyImplicit, order_of_error
from node_cuda.methods.interpolation import Interpolant, cubic_hermite, linear, of_implicit, of_method
from node_cuda.methods.registry import Method
from node_cuda.methods.step import Quadrature, Step, Stepper
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats

MAX_EVENT_STEPS = 20000
"""The number of steps after which a fixed grid stops looking for an event, as in torchdiffeq."""


def arithmetic_of(problem: Problem) -> Arithmetic:
    """Return the arithmetic of a solve of this problem, on the path that the problem selects."""
    return make_arithmetic(problem.backend, problem.y0, problem.direction, problem.norm, problem.times)


def make_loop(
    problem: Problem,
    method: Method,
    stats: Stats,
    *,
    endless: bool = False,
    anywhere: bool = False,
    stops: Sequence[float] = (),
    pauses: bool = False,
    quadrature: Quadrature | None = None,
    arithmetic: Arithmetic | None = None,
    points: Iterable[float] | None = None,
    tape: StepLog | None = None,
    backwards: bool = False,
) -> tuple[HostLoop, Interpolant]:
    """Return a solve that is ready to run, and the interpolant of its outputs.

    endless: the solve continues past the last time, for events. anywhere: outputs at any times are needed later. stops:
    times that a step must end at. pauses: if the device controls the steps, it waits at every output. quadrature: an
    integral that is computed with the state; its error takes part in the norm. arithmetic: reuse the arithmetic of a
    finished solve of the same state and norm; allowed if this solve evaluates no outputs. points: the points of
    `grid_of`, if they are known. tape: if the device controls the steps, it records them there. backwards: it is
    the solve of a backward pass, for the words of a bar.
    """
    options, tableau = method.options, method.tableau
    arithmetic = arithmetic_of(problem) if arithmetic is None else arithmetic
    y0 = arithmetic.as_contiguous(problem.y0)
    problem = problem if y0 is problem.y0 else problem._replace(y0=y0)
    stepper: Stepper
    selector: StepSelector
    if isinstance(options, opt.AdaptiveOptions) and tableau is not None:
        stepper = ExplicitRK(
            problem, arithmetic, tableau, estimate=True, quadrature=quadrature, compensated=options.compensated
        )
        selector = AdaptiveSteps(
            problem,
            arithmetic,
            tableau.order,
            options,
            stats,
            stops,
            quadrature,
            endless=endless,
            pauses=pauses,
            tape=tape,
        )
        interpolant = of_method(stepper, tableau, options.dense)
    elif method.implicit is not None:
        assert isinstance(options, (opt.ImplicitOptions, opt.FixedImplicitOptions)) and quadrature is None
        everywhere = endless or anywhere
        stepper = implicit_steps(problem, arithmetic, method.implicit, options, stats, everywhere=everywhere)
        if isinstance(options, opt.FixedImplicitOptions):
            selector = _grid_steps(problem, options, stats, points, endless=endless, jumps=options.perturb)
            interpolant = of_implicit(stepper, chord=options.interp == "linear")
        else:
            assert not isinstance(method.implicit, FullyImplicit)
            order = order_of_error(method.implicit)
            selector = AdaptiveSteps(problem, arithmetic, order, options, stats, stops, endless=endless, pauses=pauses)
            interpolant = of_implicit(stepper)
    else:
        assert isinstance(options, opt.FixedOptions)
        if tableau is not None:
            stepper = ExplicitRK(
                problem,
                arithmetic,
                tableau,
                estimate=False,
                inside=options.perturb,
                quadrature=quadrature,
                compensated=options.compensated,
            )
        else:
            assert isinstance(options, opt.AdamsOptions)
            implicit = method.name != "explicit_adams"
            stepper = Adams(problem, arithmetic, options, stats, implicit=implicit, quadrature=quadrature)
        selector = _grid_steps(problem, options, stats, points, endless=endless)
        interpolant = linear(arithmetic) if options.interp == "linear" else cubic_hermite(arithmetic, stepper)
    loop = HostLoop(problem, stepper, selector, stats, record=options.record_steps)
    if isinstance(stepper, ExplicitRK) and method.adaptive and quadrature is None:
        test = stiffness_test(stepper, stats, problem.direction)
        loop.watch = None if test is None else test.look
    if options.progress:
        bar = Progress(problem.times, problem.direction, endless=endless, backwards=backwards)
        loop.tried, loop.ended = show_steps(bar, problem, stats), bar.close
    return loop, interpolant


def show_steps(bar: Progress, problem: Problem, stats: Stats) -> Callable[[Step, bool], None]:
    """Return a function that shows a tried step in the bar."""

    def show(step: Step, accepted: bool) -> None:
        bar.show(step.t1 if accepted else step.t0, problem.direction * step.at.h, problem.field.nfe, stats.rejected)

    return show


def _grid_steps(
    problem: Problem,
    options: opt.FixedOptions,
    stats: Stats,
    points: Iterable[float] | None,
    *,
    endless: bool,
    jumps: bool = False,
) -> GridSteps:
    tensors = None
    if points is None:
        points, tensors = endless_grid(problem, options) if endless else grid_of(problem, options)
    return GridSteps(problem, points, stats, tensors, jumps=jumps)


def find_event(
    loop: HostLoop, interpolant: Interpolant, method: Method, event_fn: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, Tensor]:
    """Return the time and state of an event. loop, interpolant: the results of `make_loop` with endless=True."""
    stepper, options = loop.stepper, method.options
    assert isinstance(options, (opt.AdaptiveOptions, opt.FixedOptions))
    if method.adaptive and isinstance(stepper, ImplicitSteps):
        most, search = None, interpolant  # which costs nothing
    elif method.adaptive and isinstance(stepper, ExplicitRK):
        most, search = None, of_method(stepper, stepper.tableau, "default")
    else:
        assert isinstance(stepper, ExplicitRK | Adams | ImplicitSteps)
        most, search = MAX_EVENT_STEPS, linear(stepper.arithmetic)
    return solve_event(loop, interpolant, event_fn, most, search, options.event_checks)
