"""Solves by node_cuda whose steps are repeated by the host or by the device, for device_loop.py and its cells."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parts.common import libraries
from parts.common.libraries import FUSED, OURS
from parts.common.modes import DISCRETE
from parts.common.timing import seconds
from parts.solve.solving import Problem, Quantities, Solved, flat_gradient, loss_of

LEARNING_RATE = 1e-6  # small: the problem stays the same, so that every training step costs as much as the one before


class Loop(NamedTuple):
    """Who repeats the steps, which the kernels compute. tier: a word of node_cuda.graphs; None: the host. deferred:
    nothing is read back, and the times are on the CPU, where they can be read for nothing."""

    name: str
    tier: str | None
    deferred: bool = False

    def options(self) -> dict[str, Any]:
        """Those of a solve that keeps what it captures with these options."""
        if self.tier is None:
            return {}
        graphs = libraries.function(f"{OURS}.cuda_graphs.cache", "GraphCache")
        return {"cuda_graph": graphs(tier=self.tier), **({"throw": "deferred"} if self.deferred else {})}

    def times(self, t: Tensor) -> Tensor:
        """As this loop wants them."""
        return t.cpu() if self.deferred else t

    def require(self, stats: Any, gradient: str | None) -> None:
        """Raises RuntimeError where another loop did it: a time of the wrong one says nothing."""
        if self.tier is None:
            return
        # The discrete adjoint records its steps on the way forwards; its backward pass is what is captured.
        if stats.loop != self.tier and gradient != DISCRETE:
            raise RuntimeError(f'it was repeated by "{stats.loop}", not "{self.tier}": {stats.why}')
        if gradient is not None and stats.loop_backward == "host":
            raise RuntimeError(f"the host repeated the backward pass: {stats.why_backward}")


LOOPS = {
    loop.name: loop
    for loop in (
        Loop("host", None),
        Loop("batches", "batches"),
        Loop("while", "while"),
        Loop("while, deferred", "while", deferred=True),
    )
}


class Ran(NamedTuple):
    """A solve that was begun, and where it started."""

    solution: Any
    start: Tensor


class Run:
    """One problem by one loop, with what it captured: `run()` solves. gradient: and differentiates, in this way."""

    def __init__(
        self, loop: Loop, field: nn.Module, y0: Tensor, t: Tensor, *, gradient: str | None = None, **solver: Any
    ) -> None:
        self.loop, self.y0, self.gradient = loop, y0, gradient
        options = {**solver.pop("options", {}), **loop.options()}
        if gradient is not None:
            solver["gradient"] = gradient
        solve = libraries.function(OURS, "solve")
        self._solve: Callable[[Tensor], Any] = functools.partial(
            solve, field, t=loop.times(t), options=options, **solver
        )

    def __call__(self) -> Ran:
        """To be called where node_cuda's path is `libraries.FUSED`."""
        if self.gradient is None:
            with torch.no_grad():
                return Ran(self._solve(self.y0), self.y0)
        start = self.y0.clone().requires_grad_()
        solution = self._solve(start)
        loss_of(solution.ys, len(start)).backward()
        return Ran(solution, start)

    def checked(self) -> Ran:
        """One run that ended well, by the loop that it is to be."""
        with libraries.path(FUSED):
            ran = self()
            ran.solution.check()
        self.loop.require(ran.solution.stats, self.gradient)
        return ran


class CapturedSolve:
    """A forward case; see `solving.Contestant`. loops: who repeated the steps of the last that was checked."""

    def __init__(self, problem: Problem, loop: Loop) -> None:
        self.problem = problem
        self.loops = ""
        self.run = run_of(problem, loop, problem.field.field)

    def solved(self) -> Solved:
        """See `solving.Contestant`. The device counts what it evaluates."""
        solution = self.run.checked().solution
        stats = solution.stats
        self.loops = stats.loop
        return Solved(Quantities(solution.ys), stats.nfe, 0, stats.accepted)

    def timed(self) -> float:
        """See `solving.Contestant`."""
        with libraries.path(FUSED):
            return seconds(self.run, self.problem.y0.device)


class Training:
    """A training step: a solve, its gradient, and Adam with parameters of this contestant's own."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem._replace(field=copy.deepcopy(problem.field))
        self.optimizer = torch.optim.Adam(self.problem.field.parameters(), lr=LEARNING_RATE)

    def timed(self) -> float:
        """See `solving.Contestant`."""
        with libraries.path(FUSED):
            return seconds(self._step, self.problem.y0.device)

    def differentiate(self) -> None:
        """Solve, and leave the gradients with the parameters."""
        raise NotImplementedError

    def _step(self) -> None:
        self.optimizer.zero_grad()
        self.differentiate()
        self.optimizer.step()


class OurTraining(Training):
    """By node_cuda; see `solving.Contestant`. loops: who repeated the steps forwards and backwards."""

    def __init__(self, problem: Problem, loop: Loop, gradient: str) -> None:
        super().__init__(problem)
        self.loops = ""
        self.run = run_of(self.problem, loop, self.problem.field.field, gradient=gradient)

    def solved(self) -> Solved:
        """See `solving.Contestant`."""
        self.optimizer.zero_grad()
        solution, start = self.run.checked()
        stats = solution.stats
        self.loops = f"{stats.loop}, {stats.loop_backward}"
        quantities = Quantities(solution.ys.detach(), start.grad, flat_gradient(self.problem.field))
        return Solved(quantities, stats.nfe, stats.nfe_backward, stats.accepted)

    def differentiate(self) -> None:
        """See `Training`."""
        self.run()


class TheirTraining(Training):
    """By torchdiffeq's adjoint; see `solving.Contestant`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        case = problem.case
        self.solver = functools.partial(
            libraries.function(libraries.RIVAL, "odeint_adjoint"),
            t=problem.t,
            rtol=case.rtol,
            atol=case.atol,
            method="dopri5",
        )

    def solved(self) -> Solved:
        """See `solving.Contestant`. Its accepted steps are those of the whole solve in the table above."""
        field = self.problem.field
        self.optimizer.zero_grad()
        start = self.problem.y0.clone().requires_grad_()
        field.reset()
        ys = self.solver(field, start)
        nfe = field.reset()
        loss_of(ys, self.problem.case.batch).backward()
        quantities = Quantities(ys.detach(), start.grad, flat_gradient(field))
        return Solved(quantities, nfe, field.reset(), None)

    def differentiate(self) -> None:
        """See `Training`."""
        start = self.problem.y0.clone().requires_grad_()
        loss_of(self.solver(self.problem.field, start), self.problem.case.batch).backward()


def run_of(problem: Problem, loop: Loop, field: nn.Module, **more: Any) -> Run:
    """A case's problem by a loop. field: without its counter, whose Python a captured solve does not run."""
    case = problem.case
    return Run(loop, field, problem.y0, problem.t, method="dopri5", rtol=case.rtol, atol=case.atol, **more)
