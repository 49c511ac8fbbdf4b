"""Solves on a fixed grid that is t itself: plain PyTorch, without an object for each step.

The steps are those of `HostLoop`; a test compares the bits. Short solves by euler, midpoint or rk4 are common (flow
matching, one-step generators). In these solves the bookkeeping of a step would take longer than the step. `HostLoop`
does every solve for which `applies` is False.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from node_cuda._torch_modes import set_recording, transformed
from node_cuda._user_code import in_step, tell_step
from node_cuda.kernels.backend import is_plain
from node_cuda.kernels.norms import HALF
from node_cuda.kernels.reference import add_sum, combine, recorded_sum
from node_cuda.kernels.stage_times import Interval
from node_cuda.methods.registry import Method
from node_cuda.methods.step import Step
from node_cuda.methods.tableau import SparseRow
from node_cuda.problem.field import share_memory
from node_cuda.problem.problem import Field, Problem
from node_cuda.solution import Stats

LARGE = 2**20
"""If the outputs have at least this many elements, they are written into one tensor, unless autograd records."""

Sum = Callable[[Tensor, Sequence[Tensor], SparseRow, float], Tensor]
"""y + h sum_j a_j k_j of (y, k, row, h)."""


def applies(problem: Problem, method: Method) -> bool:
    """Return whether this file can solve the problem.

    It can if a fixed-grid Runge-Kutta method steps from output to output, no callback or option needs the single steps,
    autograd records no derivative by t, and no kernel computes the steps.
    """
    return (
        method.steps_are_outputs
        and not problem.callbacks
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
    add: Sum = combine if torch.is_grad_enabled() else add_sum
    if y.dtype in HALF:
        add = _HalfSums(widens=tableau.longest_sum > 1).add
    kept = accepted is not None or not tableau.reads_last_stage_only
    k: list[Tensor] = []
    large = y.numel() * len(times) >= LARGE and not torch.is_grad_enabled()
    ys = _slab(y, len(times)) if large else None
    listed = [y]
    n, h = 0, 0.0
    try:
        for n in range(len(times) - 1):
            h = sign * (times[n + 1] - times[n])
            t_n = t[n * stages : (n + 1) * stages]
            if begun is not None:
                begun.append(y)
            k = _stages(field, t_n, y, rows, h, add, kept)
            if kept and stages > 1 and not field.copies_output and share_memory(k):
                field.copies_output = True  # func returned a buffer that held an earlier stage
                k = _stages(field, t_n, y, rows, h, add, kept)
            y_before, y = y, add(y, k, b, h)
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
    field: Field, t: Sequence[Tensor], y: Tensor, rows: Sequence[SparseRow], h: float, add: Sum, kept: bool
) -> list[Tensor]:
    """Return the stages k_i = f(t + c_i h, y + h sum_j a_ij k_j). kept: one is read after the next begins."""
    k: list[Tensor] = []
    f = field.__call__  # faster than calls of the object, for which Python puts the keywords into a dict
    for t_i, row in zip(t, rows, strict=True):
        z = add(y, k, row, h) if row else y
        k.append(f(t_i, z, spare=z is not y, kept=kept))
    return k


class _HalfSums:
    """The sums of the steps of a half state, in float32.

    widens: the stages are widened too, each once a step. If not, only y is: a sum with one term widens that by itself.
    """

    def __init__(self, *, widens: bool) -> None:
        self.widens = widens
        self.k: Sequence[Tensor] = ()  # the stages of this step
        self.wide: list[Tensor] = []  # y and the first of them in float32

    def add(self, y: Tensor, k: Sequence[Tensor], row: SparseRow, h: float) -> Tensor:
        """Return y + h sum_j a_j k_j. k: the list of this step; another list object is another step."""
        recording = torch.is_grad_enabled()
        out = recorded_sum(y, k, row, h) if recording else None
        set_recording(False)
        try:
            if k is not self.k:
                self.k, self.wide = k, [y.float()]
            wide = self.wide
            if self.widens:
                for x in k[len(wide) - 1 :]:
                    wide.append(x.float())
            sum_ = add_sum(wide[0], wide[1:] if self.widens else k, row, h)
            return sum_.type_as(y) if out is None else out.copy_(sum_)
        finally:
            set_recording(recording)


def stage_times(times: Sequence[float], sign: float, nodes: Sequence[float], y: Tensor) -> tuple[Tensor, ...]:
    """Return the times of all stages of all steps between these solver times, for states like y."""
    dtype, device = y.dtype.to_real(), y.device
    few = (len(times) - 1) * len(nodes) <= 8  # then a tensor and its views would take longer
    values: list[Any] = []
    for t0, t1 in itertools.pairwise(times):
        for c in nodes:
            value = sign * (t1 if c == 1.0 else t0 + c * (t1 - t0))
            values.append(torch.scalar_tensor(value, dtype=dtype, device=device) if few else value)
    return tuple(values) if few else torch.tensor(values, dtype=dtype, device=device).unbind()


def _slab(y0: Tensor, count: int) -> Tensor:
    """Return memory for all outputs. A list of them and its stack would take twice as much."""
    ys = y0.new_empty((count, *y0.shape))
    ys[0] = y0
    return ys
