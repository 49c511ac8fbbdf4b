"""`diagnose`: solves one problem in several ways, and says which tolerance, method and gradient to use for it."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from node_cuda._parse_options import check_mapping
from node_cuda._typing import Func
from node_cuda.loop.stiffness import ENOUGH
from node_cuda.odeint import solve
from node_cuda.solution import Solution
from node_cuda.status import InvalidInput, SolveError, Status

TOLERANCES = {torch.float64: (1e-3, 1e-6, 1e-9), torch.float32: (1e-2, 1e-4, 1e-6)}
"""rtol = atol of the three solves, by the real dtype of y0. Other dtypes have no room for three."""

REFERENCE = 1e-12
"""rtol = atol of the solve that the others are compared with, in double precision."""

MOST = 20_000
"""About the number of steps after which a solve is given up."""

GROWN = 1e3
"""A failed solve that ends with |y| larger than this many times 1 + |y0| has a solution that becomes infinite."""

EXPLICIT, IMPLICIT = "dopri5", "rodas5p"
MODES = ("discrete", "adjoint", "backprop")


@dataclass
class Run:
    """One solve. error: of y or of its gradient, relative to the largest element of the reference. None: unknown.

    failure: the name of the status of a failed solve; reached: the time that it came to, and the largest |y| there.
    """

    name: str
    accepted: int = 0
    rejected: int = 0
    nfe: int = 0
    nfe_backward: int = 0
    stiff_steps: int = 0
    error: float | None = None
    seconds: float | None = None
    failure: str | None = None
    reached: tuple[float, float] | None = None


@dataclass
class Diagnosis:
    """What `diagnose` found; print it. line: what to type, or None if no solve reached the end. notes: why, and more.

    solves: one solve for each tolerance. gradients: one for each gradient mode, at `tolerance`; none without a line.
    stiff: stability limits the steps of an explicit method. implicit: a solve by an implicit method, if func is stiff
    or an explicit solve failed. reference: how the reference was solved, or why there is none.
    """

    line: str | None
    notes: list[str]
    solves: list[Run]
    gradients: list[Run]
    tolerance: float
    stiff: bool
    implicit: Run | None
    reference: str

    def __repr__(self) -> str:
        lines = ["Steps at three tolerances, and the error of y:"]
        lines += _table(self.solves + ([] if self.implicit is None else [self.implicit]), backwards=False)
        if self.gradients:
            lines += ["", f"Gradients at rtol = atol = {self.tolerance:g}, and the error of dL/dy0 and dL/dtheta:"]
            lines += _table(self.gradients, backwards=True)
        lines += ["", f"Compared with {self.reference}.", *self.notes]
        if self.line is not None:
            lines += ["", "Use:", f"    {self.line}"]
        return "\n".join(lines)


def diagnose(
    func: Func, y0: Any, t: Tensor, *, error: float = 1e-3, options: dict[str, Any] | None = None
) -> Diagnosis:
    """Solve dy/dt = func(t, y) in several ways, and return what was found with the line to type; `print` shows it.

    The line names func, y0, t and options as the arguments of this call. A problem that no method solves, because its
    solution becomes infinite for example, gets no line: the notes say where it ends, and what to check.

    It solves at three tolerances, looks for stiffness, computes a gradient in each mode, compares all with a solve at
    1e-12 in double precision, and takes the time of each. The loss is a sum of all outputs with random weights. It
    changes no .grad and no random state. The times are those of one run after one that warms up.

    func, y0, t: as those of `solve`; the parameters of a func that is no nn.Module are not seen. error: the relative
    error of y that you accept. options: those of each solve, e.g. dict(jump_t=...). Raises as `solve`, but a solve that
    fails is a line of the result.
    """
    if isinstance(error, bool) or not isinstance(error, (int, float)) or not 0 < error < 1:
        raise InvalidInput(f"error must be a relative error between 0 and 1; got {error!r:.60}. Use 1e-3.")
    check_mapping(options)
    dtype = (y0[0] if isinstance(y0, (tuple, list)) else y0).dtype
    tolerances = TOLERANCES.get(dtype.to_real())
    if tolerances is None:
        raise InvalidInput(
            f"diagnose compares solves in single or double precision; got y0 of {dtype}. Use y0.float() or y0.double()."
        )
    task = _Task(func, _each(y0, lambda x: x.detach().clone()), t.detach(), dict(options or {}))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # the result says what they would say
        task.run("warm-up", rtol=tolerances[0], atol=tolerances[0])
        return _found(task, tolerances, error)


class _Task:
    """The problem, and the solves of it."""

    def __init__(self, func: Func, y0: Any, t: Tensor, options: dict[str, Any]) -> None:
        self.func, self.y0, self.t, self.given = func, y0, t, bool(options)
        self.options = {"max_num_steps": max(MOST // max(len(t) - 1, 1), 100), **options}

    def in_double(self) -> _Task:
        """Return the same problem in double precision."""
        wide = _Task(self.func, _each(self.y0, _in_double), self.t.double(), self.options)
        if isinstance(self.func, nn.Module):
            wide.func = copy.deepcopy(self.func).double()
        return wide

    def run(self, name: str, **solver: Any) -> tuple[Run, Any]:
        """Solve, and return the run with y at the outputs, or None for a solve that failed."""
        run = Run(name)

        def forwards() -> Any:
            with torch.no_grad():
                return solve(self.func, self.y0, self.t, options=self.options, **solver)

        solution = self._timed(run, forwards)
        return run, None if solution is None else solution.ys

    def gradient(self, name: str, seed: int = 0, **solver: Any) -> tuple[Run, Any]:
        """Solve, and return the run with the gradients of y0 and of the parameters, or None if it failed."""
        run, found = Run(name), []
        y0 = _each(self.y0, lambda x: x.requires_grad_())
        named = tuple(p for p in self.func.parameters() if p.requires_grad) if isinstance(self.func, nn.Module) else ()
        given = {} if isinstance(self.func, nn.Module) else {"adjoint_params": ()}
        wanted = (*_parts(y0), *named)

        def both() -> Any:
            with torch.enable_grad():
                solution = solve(self.func, y0, self.t, options=self.options, **given, **solver)
                loss = _loss(solution.ys, seed)
                found.extend(torch.autograd.grad(loss, wanted, allow_unused=True))
            return solution

        ended = self._timed(run, both)
        _each(self.y0, lambda x: x.requires_grad_(False))
        zeros = [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=False)]
        return run, None if ended is None else tuple(zeros)

    def _timed(self, run: Run, work: Callable[[], Solution[Any]]) -> Solution[Any] | None:
        """Do the work, and fill in the run. Return None, with the failure, if the solve failed."""
        _wait(self.y0)
        began = time.perf_counter()
        try:
            solution = work()
        except SolveError as failure:
            run.failure, stats = failure.status.name, failure.stats
            t, y = failure.t, None if stats.reached is None else stats.reached[1]
            run.reached = t, float("nan") if y is None else float(y.abs().max())
            solution = None
        else:
            stats = solution.stats
        _wait(self.y0)
        run.seconds = time.perf_counter() - began
        run.accepted, run.rejected, run.nfe = stats.accepted, stats.rejected, stats.nfe
        run.nfe_backward, run.stiff_steps = stats.nfe_backward, stats.stiff_steps
        return solution


def _found(task: _Task, tolerances: Sequence[float], error: float) -> Diagnosis:
    """Return the diagnosis of a task."""
    solved = [task.run(f"{EXPLICIT}, {tol:g}", rtol=tol, atol=tol, method=EXPLICIT) for tol in tolerances]
    runs, middle = [run for run, _ in solved], tolerances[1]
    limited = any(run.stiff_steps >= ENOUGH for run in runs)
    implicit = ys = None
    if limited or any(run.failure for run in runs):
        implicit, ys = task.run(f"{IMPLICIT}, {middle:g}", rtol=middle, atol=middle, method=IMPLICIT)
    ended = [tol for tol, run in zip(tolerances, runs, strict=True) if run.failure is None]
    # A loose solve may step over a time at which tighter ones fail.
    short_of_steps = middle in ended and runs[-1].failure == Status.MAX_STEPS.name
    solvable = ys is not None or tolerances[-1] in ended or short_of_steps
    stiff = limited or not ended
    method = IMPLICIT if stiff and ys is not None else EXPLICIT
    if not solvable:
        notes = _where_it_fails([*runs, *([] if implicit is None else [implicit])], task, middle)
        return Diagnosis(None, notes, runs, [], middle, False, implicit, "nothing: no solve came to the end of t")
    exact, reference = _reference(task, method)
    if exact is not None:
        for run, its in (*solved, *([] if implicit is None else [(implicit, ys)])):
            run.error = None if its is None else _distance(_parts(its), exact[0])
    close = [tol for tol, run in zip(tolerances, runs, strict=True) if run.error is not None and run.error <= error]
    tolerance = middle if method == IMPLICIT else [*close[:1], *([middle] if middle in ended else ended[-1:])][0]
    gradients = []
    for mode in MODES:
        run, found = task.gradient(mode, gradient=mode, method=method, rtol=tolerance, atol=tolerance)
        run.error = None if exact is None or found is None else _distance(found, exact[1])
        gradients.append(run)
    notes = _notes(gradients, implicit if stiff else None, limited, error, bool(close), exact is not None)
    more = f', method="{IMPLICIT}"' if method == IMPLICIT else ""
    more += ', gradient="auto"' + ("" if isinstance(task.func, nn.Module) else ", adjoint_params=()")
    more += ", options=options" if task.given else ""
    line = f"node_cuda.solve(func, y0, t, rtol={tolerance:g}, atol={tolerance:g}{more})"
    return Diagnosis(line, notes, runs, gradients, tolerance, stiff, implicit, reference)


def _reference(task: _Task, method: str) -> tuple[tuple[Any, Any] | None, str]:
    """Return y and the gradients in double precision at 1e-12 with words for it, or None with the reason."""
    solver: dict[str, Any] = dict(rtol=REFERENCE, atol=REFERENCE, method=method)
    try:
        wide = task.in_double()
        run, ys = wide.run("reference", **solver)
        _, found = wide.gradient("reference", gradient="discrete", checkpoints="auto", **solver)
    except (RuntimeError, TypeError, ValueError) as error:
        return None, f"nothing: func does not compute in double precision ({type(error).__name__})"
    if ys is None or found is None:
        return None, f"nothing: the solve at {REFERENCE:g} did not end ({run.failure})"
    words = f"{method} at {REFERENCE:g} in double precision ({run.accepted} steps), its gradient by discrete"
    return (_parts(ys), found), words


def _notes(
    gradients: list[Run], implicit: Run | None, limited: bool, error: float, reached: bool, compared: bool
) -> list[str]:
    """Return sentences about what was found. implicit: the solve by an implicit method of a stiff field.

    limited: stability limited the steps of the explicit method.
    """
    notes = ["func is not stiff here."]
    if implicit is not None:
        why = f"stability, not accuracy, limits the steps of {EXPLICIT}" if limited else f"{EXPLICIT} fails"
        instead = f"takes {implicit.accepted} steps" if implicit.failure is None else f"failed too ({implicit.failure})"
        notes = [f"func is stiff: {why}; {IMPLICIT} {instead}."]
    elif compared and not reached:
        notes.append(f"No tolerance reached the error {error:g}: use y0.double(), or look for jumps in func (jump_t).")
    by = {run.name: run for run in gradients}
    discrete, adjoint = by["discrete"], by["adjoint"]
    if discrete.error and adjoint.error and adjoint.error > 3 * discrete.error:
        notes.append(f'The error of "adjoint" is {adjoint.error / discrete.error:.2g} times that of "discrete".')
    return notes


def _where_it_fails(runs: list[Run], task: _Task, tolerance: float) -> list[str]:
    """Return where and how the solves of a problem fail that no method solves, and what to check."""
    notes = [_at_the_end(runs, task.y0)]
    if any(y.dtype.to_real() is torch.float32 for y in _parts(task.y0)):
        with contextlib.suppress(RuntimeError, TypeError, ValueError):  # func does not compute in double precision
            _, ys = task.in_double().run("in double", rtol=tolerance, atol=tolerance, method=EXPLICIT)
            if ys is not None:
                notes.append("In double precision it comes to the end of t: use y0.double(), and func.double().")
    return notes


def _at_the_end(runs: list[Run], y0: Any) -> str:
    """Return how the tightest solve ended that did not run out of steps, if there is one."""
    failed = [run for run in runs if run.failure]
    run = next((run for run in reversed(failed) if run.failure != Status.MAX_STEPS.name), failed[-1])
    assert run.failure is not None and run.reached is not None
    status, (t, size) = Status[run.failure], run.reached
    at, start = f"t = {t:.4g}", max(float(y.detach().abs().max()) for y in _parts(y0) if y.numel())
    if status is Status.NON_FINITE and not run.accepted:
        return f"y0 or dy/dt is NaN or infinite at {at}. Look at `y0` and at `func(t[0], y0)`."
    if status is Status.MAX_STEPS:
        return (
            f"No solve came to the end of t: {run.name} took {run.accepted + run.rejected} steps to {at}, where |y| is "
            f"up to {size:.2g}. Check whether y or dy/dt becomes infinite there; if not, raise "
            "options=dict(max_num_steps=...), or use a shorter t."
        )
    if size > GROWN * (1.0 + start):
        return (
            f"The solution seems to become infinite near {at}: |y| grows from {start:.2g} to {size:.2g}. End t before "
            "that time, or check func: the sign of dy/dt, and terms that grow faster than y, such as y**2."
        )
    if status is Status.NON_FINITE:
        return (
            f"func returns NaN or infinity near {at}, where |y| is up to {size:.2g}. Check func there for a division "
            "by 0, or for a sqrt or log of a negative number."
        )
    if status in (Status.STEP_UNDERFLOW, Status.NOT_SOLVED):
        return (
            f"The step size goes to zero near {at}, where |y| is up to {size:.2g}. Check func there: dy/dt may become "
            "infinite, or jump. Name the time of a jump: options=dict(jump_t=[...])."
        )
    return str(status)


def _table(runs: Sequence[Run], *, backwards: bool) -> list[str]:
    """Return the lines of a table with a row for each run."""
    names = ["", "steps", "rejected", "nfe", *(["backward"] if backwards else []), "error", "seconds"]
    rows = [names]
    for run in runs:
        counts: list[Any] = [run.accepted, run.rejected, run.nfe]
        if backwards:  # autograd's backward pass evaluates nothing again
            counts.append(run.nfe_backward or "-")
        shown = "unknown" if run.error is None else f"{run.error:.1e}"
        seconds = "" if run.seconds is None else f"{run.seconds:.3g}"
        rows.append([run.name, *map(str, counts), run.failure or shown, seconds])
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        lines.append("    " + "  ".join(cells))
    return lines


def _loss(ys: Any, seed: int) -> Tensor:
    """Return a sum of all outputs with random weights of a fixed seed, the same ones in each precision."""
    made = torch.Generator().manual_seed(seed)
    parts = [(y, torch.randn(y.shape, generator=made, dtype=torch.float64)) for y in _parts(ys)]
    sums = [(y * w.to(y.device, y.dtype.to_real())).sum() for y, w in parts]
    total = torch.stack(sums).sum()
    return total.real + total.imag if total.is_complex() else total


def _distance(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest element of the truth; the worst of the parts."""
    worst = 0.0
    for x, exact in zip(found, truth, strict=True):
        if exact.numel():
            size = float(exact.detach().abs().max())
            worst = max(worst, float((x.detach().to(exact.dtype) - exact.detach()).abs().max()) / (size or 1.0))
    return worst


def _parts(state: Any) -> tuple[Tensor, ...]:
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)


def _each(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tuple(change(x) for x in state) if isinstance(state, (tuple, list)) else change(state)


def _in_double(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _wait(state: Any) -> None:
    """Wait for the device, so that a time holds all of its work."""
    device = _parts(state)[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
