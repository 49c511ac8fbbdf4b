"""Solves on a fixed grid that is t itself: plain PyTorch, without an object for each step.

The steps are those of `HostLoop`; a test compares the bits. Short solves by euler, midpoint or rk4 are common (flow
matching, one-step generators). In these solves the bookkeeping of a step would take longer than the step. `HostLoop`
does every solve for which `applies` is False.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from node_cuda._torch_modes import transformed
from node_cuda._user_code import in_step, tell_step
from node_cuda.kernels.backend import is_plain
from node_cuda.kernels.reference import combine, combine_recorded
from node_cuda.kernels.stage_times import Interval
from node_cuda.methods.registry import Method
from node_cuda.methods.step import Step
from node_cuda.methods.tableau import SparseRow
from node_cuda.options import FixedOptions
from node_cuda.problem.field import share_memory
from node_cuda.problem.problem import Field, Problem
from node_cuda.solution import Stats

LARGE = 2**20
"""If the outputs have at least this many elements, they are written into one tensor, unless autograd records."""


def applies(problem: Problem, method: Method) -> bool:
    """Return whether this file can solve the problem.

    It can if a fixed-grid Runge-Kutta method steps from output to output, no callback or option needs the single steps,
    autograd records no derivative by t, and no kernel computes the steps.
    """
    options, tableau = method.options, method.tableau
    return (
        isinstance(options, FixedOptions)
        and tableau is not None
        and not tableau.fsal
        and options.step_size is None
        and options.grid_constructor is None
        and not (options.perturb or options.record_steps or options.progress)
        and not (options.compensated or options.cuda_graph or problem.callbacks)
        and not (problem.t.requires_grad and torch.is_grad_enabled())
        and not transformed()
        and problem.backend != "fused"
        and is_plain(problem.backend, problem.y0)
    )


def solve_grid(
    problem: Problem,
    method: Method,
    stats: Stats,
    accepted: Callable[[Step], None] | None = None,
    begun: list[Tensor] | None = None,
) -> Tensor:
    """Return y at the problem's times, of shape (len(times), *y0.shape).

    accepted: called with the last step. begun: receives the state that each step began with.
    """
    tableau = method.tableau
    assert tableau is not None
    field, times, sign = problem.field, problem.times, problem.direction
    rows, b, stages = tableau.rows, tableau.b_row, tableau.stages
    y = y_before = problem.y0
    t = stage_times(times, sign, tableau.nodes, y)
    # A half y, and stages that are read several times, are widened once.
    half = y.itemsize == 2
    widens = half and max(map(len, (*rows, b))) > 1
    k: list[Tensor] = []
    large = y.numel() * len(times) >= LARGE and not torch.is_grad_enabled()
    ys = _slab(y, len(times)) if large else None
    listed = [y]
    n, h = 0, 0.0
    try:
        for n in range(len(times) - 1):
            h = sign * (times[n + 1] - times[n])
            t_n = t[n * stages : (n + 1) * stages]
            start = y.float() if half else y
            if begun is not None:
                begun.append(y)
            k, terms = _stages(field, t_n, y, start, rows, h, widens)
            if stages > 1 and not field.copies_output and share_memory(k):
                field.copies_output = True  # func returned a buffer that held an earlier stage
                k, terms = _stages(field, t_n, y, start, rows, h, widens)
            y_before, y = y, _half_sum(y, k, b, h, start, terms) if half else combine(y, k, b, h)
            if ys is None:
                listed.append(y)
            else:
                ys[n + 1] = y
    except (Exception, KeyboardInterrupt) as error:
        tell_step(error, in_step(sign * times[n], h, n, 0))
        raise
    stats.accepted += len(times) - 1
    stats.nfe = field.nfe
    if accepted is not None and k:
        t0, t1 = times[-2:]
        accepted(Step(Interval(t0, t1, t1 - t0, sign * (t1 - t0), sign * (t1 - t0)), y_before, y, k))
    return torch.stack(listed) if ys is None else ys


def _stages(
    field: Field, t: Sequence[Tensor], y: Tensor, start: Tensor, rows: Sequence[SparseRow], h: float, widens: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the stages k_i = f(t + c_i h, y + h sum_j a_ij k_j), and the same as terms of the next sums.

    start: y, a half y in float32. widens: the terms are in float32, too.
    """
    k: list[Tensor] = []
    terms = list[Tensor]() if widens else k
    for t_i, row in zip(t, rows, strict=True):
        z = y
        if row:
            z = combine(y, k, row, h) if start is y else _half_sum(y, k, row, h, start, terms)
        k.append(field(t_i, z, spare=z is not y))
        if widens:
            terms.append(k[-1].float())
    return k, terms


def _half_sum(
    y: Tensor, k: Sequence[Tensor], row: SparseRow, h: float, start: Tensor, terms: Sequence[Tensor]
) -> Tensor:
    """Return y + h sum_j a_j k_j of a half state. start: y in float32. terms: k, or the same in float32."""
    if torch.is_grad_enabled():
        return combine_recorded(y, k, row, h, start, terms)
    return combine(start, terms, row, h, torch.empty_like(y))


def stage_times(times: Sequence[float], sign: float, nodes: Sequence[float], y: Tensor) -> tuple[Tensor, ...]:
    """Return the times of all stages of all steps between these solver times, for states like y."""
    values: list[float] = []
    for t0, t1 in itertools.pairwise(times):
        for c in nodes:
            values.append(sign * (t1 if c == 1.0 else t0 + c * (t1 - t0)))
    dtype, device = y.dtype.to_real(), y.device
    if len(values) <= 2:  # a tensor and its views would take twice as long
        return tuple(map(functools.partial(torch.scalar_tensor, dtype=dtype, device=device), values))
    return torch.tensor(values, dtype=dtype, device=device).unbind()


def _slab(y0: Tensor, count: int) -> Tensor:
    """Return memory for all outputs. A list of them and its stack would take twice as much."""
    ys = y0.new_empty((count, *y0.shape))
    ys[0] = y0
    return ys
