"""Solves by node_cuda with the loop on the host or on the GPU, for device_loop.py and its cells."""

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

LEARNING_RATE = 1e-6  # small, so that the problem and the cost of a training step hardly change


class Loop(NamedTuple):
    """Where the loop over the steps runs; the kernels compute the steps.

    tier: "batches" or "while", as in `GraphCache`; None: on the host. deferred: the host reads no status, and the times
    are on the CPU, where reading them needs no synchronisation.
    """

    name: str
    tier: str | None
    deferred: bool = False

    def options(self) -> dict[str, Any]:
        """The options of a solve with this loop, with a new cache of captured graphs."""
        if self.tier is None:
            return {}
        graphs = libraries.function(f"{OURS}.cuda_graphs.cache", "GraphCache")
        return {"cuda_graph": graphs(tier=self.tier), **({"throw": "deferred"} if self.deferred else {})}

    def times(self, t: Tensor) -> Tensor:
        """The times on the device that this loop needs."""
        return t.cpu() if self.deferred else t

    def require(self, stats: Any, gradient: str | None) -> None:
        """Raises RuntimeError if another loop ran: its time would be reported under the wrong name."""
        if self.tier is None:
            return
        # The discrete adjoint records its steps in the forward solve; only its backward pass must be captured.
        if stats.loop != self.tier and gradient != DISCRETE:
            raise RuntimeError(f'the loop was "{stats.loop}", not "{self.tier}": {stats.why}')
        if gradient is not None and stats.loop_backward == "host":
            raise RuntimeError(f"the loop of the backward pass was on the host: {stats.why_backward}")


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
    """A solution and its initial state."""

    solution: Any
    start: Tensor


class Run:
    """One problem with one loop and its captured graphs. `run()` solves; with a gradient mode, also differentiates."""

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
        """Solves once. Call it where the path of node_cuda is `libraries.FUSED`."""
        if self.gradient is None:
            with torch.no_grad():
                return Ran(self._solve(self.y0), self.y0)
        start = self.y0.clone().requires_grad_()
        solution = self._solve(start)
        loss_of(solution.ys, len(start)).backward()
        return Ran(solution, start)

    def checked(self) -> Ran:
        """One run. Raises an error if the solve failed or another loop ran."""
        with libraries.path(FUSED):
            ran = self()
            ran.solution.check()
        self.loop.require(ran.solution.stats, self.gradient)
        return ran


class CapturedSolve:
    """A forward case. loops: the loop of the last `solved`."""

    def __init__(self, problem: Problem, loop: Loop) -> None:
        self.problem = problem
        self.loops = ""
        self.run = run_of(problem, loop, problem.field.field)

    def solved(self) -> Solved:
        """One run with its counts, which are made on the device."""
        solution = self.run.checked().solution
        stats = solution.stats
        self.loops = stats.loop
        return Solved(Quantities(solution.ys), stats.nfe, 0, stats.accepted)

    def timed(self) -> float:
        """Seconds of one run."""
        with libraries.path(FUSED):
            return seconds(self.run, self.problem.y0.device)


class Training:
    """A training step: a solve, its gradient, and Adam, with a copy of the parameters."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem._replace(field=copy.deepcopy(problem.field))
        self.optimizer = torch.optim.Adam(self.problem.field.parameters(), lr=LEARNING_RATE)

    def timed(self) -> float:
        """Seconds of one training step."""
        with libraries.path(FUSED):
            return seconds(self._step, self.problem.y0.device)

    def differentiate(self) -> None:
        """Solves and accumulates the gradients in the parameters."""
        raise NotImplementedError

    def _step(self) -> None:
        self.optimizer.zero_grad()
        self.differentiate()
        self.optimizer.step()


class OurTraining(Training):
    """A training step by node_cuda. loops: the loops of the forward and the backward pass of the last `solved`."""

    def __init__(self, problem: Problem, loop: Loop, gradient: str) -> None:
        super().__init__(problem)
        self.loops = ""
        self.run = run_of(self.problem, loop, self.problem.field.field, gradient=gradient)

    def solved(self) -> Solved:
        """One run with its counts."""
        self.optimizer.zero_grad()
        solution, start = self.run.checked()
        stats = solution.stats
        self.loops = f"{stats.loop}, {stats.loop_backward}"
        quantities = Quantities(solution.ys.detach(), start.grad, flat_gradient(self.problem.field))
        return Solved(quantities, stats.nfe, stats.nfe_backward, stats.accepted)

    def differentiate(self) -> None:
        """Solves and differentiates once."""
        self.run()


class TheirTraining(Training):
    """A training step by torchdiffeq's adjoint."""

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
        """One run with its counts, without the accepted steps: the table of solves has them."""
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
        """Solves and differentiates once."""
        start = self.problem.y0.clone().requires_grad_()
        loss_of(self.solver(self.problem.field, start), self.problem.case.batch).backward()


def run_of(problem: Problem, loop: Loop, field: nn.Module, **more: Any) -> Run:
    """A run of a problem with a loop. field: without its counter, as a captured solve does not run its Python."""
    case = problem.case
    return Run(loop, field, problem.y0, problem.t, method="dopri5", rtol=case.rtol, atol=case.atol, **more)
