"""Fixed grids: the points of the grid, and the selector that steps from one point to the next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from node_cuda import options as opt
from node_cuda._torch_modes import numbers, recorded
from node_cuda.methods.step import ProposedStep, Step
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import InvalidInput, SolveError, Status


class GridSteps:
    """Steps from one point of a grid to the next. All steps are accepted.

    points: ascending solver times. tensors: the first of the points, at least one, as tensors in the user's time, where
    autograd records them. A step from the last of these to a later point starts at a tensor and ends at a number.
    jumps: the field may be discontinuous at every point, so that no step may use an evaluation of the one before.
    """

    def __init__(
        self,
        problem: Problem,
        points: Iterable[float],
        stats: Stats,
        tensors: Tensor | None = None,
        *,
        jumps: bool = False,
    ) -> None:
        self.problem = problem
        self.stats = stats
        self.tensors = tensors
        self.starts_at_jump = self.jumps = jumps
        self.judges = False
        self.ratio = math.nan
        self._points = iter(points)
        self._index = 0

    def start(self, t: float, y: Tensor, k1: Tensor | None) -> None:
        """Skip the first point, where the solve starts."""
        next(self._points)

    def propose(self, t: float, y: Tensor) -> ProposedStep | None:
        """Return the step to the next point, or None after the last point."""
        t1 = next(self._points, None)
        if t1 is None:
            return None
        if self.problem.callbacks:
            self.problem.callback("callback_step", t, y, t1 - t, self.problem.t.dtype)
        i = self._index
        self._index += 1
        if self.tensors is None or i >= len(self.tensors):
            return ProposedStep(t1, t1 - t)
        start = self.tensors[i]
        stop = self.tensors[i + 1] if i + 1 < len(self.tensors) else start.new_tensor(self.problem.direction * t1)
        return ProposedStep(t1, t1 - t, (start, stop))

    def judge(self, step: Step) -> bool:
        """Accept every step. Raises SolveError if the equations of an implicit step could not be solved."""
        if step.unsolved:
            self.stats.nfe = self.problem.field.nfe
            detail = f"The step was {step.at.h:.3g}; take a smaller step_size."
            raise SolveError(Status.NOT_SOLVED, self.problem.direction * step.t0, self.stats, detail)
        step.jump = self.jumps
        self.stats.accepted += 1
        return True


def endless_grid(problem: Problem, options: opt.FixedOptions) -> tuple[Iterable[float], Tensor | None]:
    """Return a grid without an end. Only its first point depends on t[0] for autograd; the solver chose the others."""
    if options.step_size is None:
        raise InvalidInput(
            "Event handling for fixed step solvers requires `step_size`; got none. "
            "Use for example options=dict(step_size=0.01)."
        )
    start, step = problem.times[0], options.step_size
    return (start + i * step for i in itertools.count()), problem.t[:1] if recorded(problem.t) else None


def grid_of(problem: Problem, options: opt.FixedOptions) -> tuple[list[float], Tensor | None]:
    """Return the grid as solver times, and also as tensors of the user's times if t needs a gradient."""
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
    points = [problem.direction * value for value in numbers(grid.detach().cpu().double())]
    if any(not a < b for a, b in itertools.pairwise(points)):
        raise InvalidInput(f"grid_constructor must return strictly monotonic times in the direction of t; got {grid}.")
    return points, grid if recorded(t) else None


def _uniform_grid(t: Tensor, step: float) -> Tensor:
    """Return t[0], t[0] + step, ..., t[-1] in double precision, with as many points as in torchdiffeq."""
    first, last = t[0].detach().cpu(), t[-1].detach().cpu()
    steps = int(torch.ceil((last - first) / step + 1).item()) - 1
    t = t.cpu().double()  # some devices have no double precision
    inner = torch.arange(0, max(steps, 1), dtype=t.dtype, device=t.device) * step + t[0]
    # Rounding may move the last inner point onto the end.
    inner = inner[: max(int(((t[-1].detach() - inner.detach()) * step > 0).sum()), 1)]
    return torch.cat([inner, t[-1:]])
