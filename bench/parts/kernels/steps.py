"""The launches of a forward solve, and the same in PyTorch where node_cuda.kernels.reference has no such function.

Steps are given by value. Only error_ratio has a controller state, which its last block updates, as in a solve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from node_cuda.kernels import reference
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.methods.tableaus import TABLEAUS
from parts.kernels.launching import Launch, Workplace, numbers, packed, pointers

DOPRI5 = TABLEAUS["dopri5"]
T0, H = 0.5, 0.01
RTOL, ATOL = 0.1, 1.0  # so large that the reference may scale its error in place many times


def where() -> Tensor:
    """The step from T0 to T0 + H."""
    return packed("StepRef", None, T0, T0 + H, H, H, 1.0)


def tolerance() -> Tensor:
    """RTOL and ATOL."""
    return packed("Tolerance", RTOL, ATOL)


def weights(count: int) -> list[float]:
    """Weights, none of them zero."""
    return [(-1) ** j * 0.3 * (j + 1) / count for j in range(count)]


def rk_stage(place: Workplace, terms: int) -> Launch:
    """z = y0 + h sum_j a_j k_j."""
    z, y0, *k = place.states(terms + 2)
    a = weights(terms)
    kernel = place.bind("rk_stage", *place.sized, z, y0, terms, pointers(k), numbers(a), where(), None)
    return Launch(kernel, (y0, k, list(enumerate(a)), H), (y0, *k, z), (z,))


def rk_finish(place: Workplace) -> Launch:
    """The end of a step of dopri5: y1, and the error of the stages before the last one."""
    known = DOPRI5.stages - 1
    b, b_err = dict(DOPRI5.b_row), dict(DOPRI5.err_row or ())
    entries = sorted(j for j in {*b, *b_err} if j < known)
    y0, y1, *read = place.states(len(entries) + 2)
    error = place.error()
    k = [read[entries.index(j)] if j in entries else y0 for j in range(known)]
    rows = [numbers([row.get(j, 0.0) for j in entries]) for row in (b, b_err)]
    kernel = place.bind("rk_finish", *place.sized, y1, error, y0, len(entries), pointers(read), *rows, where(), None)
    return Launch(kernel, (y0, k, DOPRI5.b_row, DOPRI5.err_row, H), (y0, *read, y1, error), (y1, error))


def error_ratio(place: Workplace) -> Launch:
    """The norm of the error, and step control with parameters that keep the step size at H."""
    error, ratio, (last, y0, y1) = place.error(), place.doubles(), place.states(3)
    weight = dict(DOPRI5.err_row or ())[DOPRI5.stages - 1]
    ctl = torch.zeros(place.launchers.ControllerState.SIZE, dtype=torch.uint8, device=place.device)
    law = (0.2, 0.0, 0.0, 0.9, 10.0, 0.2, H, H, 5.0, 2**31 - 1)
    place.bind("start_control", ctl, packed("ControllerParams", *law), 1.0, 0, T0, H)()
    finish = packed("Finish", ratio, ctl, None, 0, *law)
    kernel = place.bind(
        "error_ratio", *place.sized, error, last, weight, y0, y1, tolerance(), None, place.workspace(), where(), finish
    )
    arguments = (error.clone(), (last, H * weight), y0, y1, ErrorNorm(RTOL, ATOL))
    return Launch(kernel, arguments, (error, last, y0, y1), (ratio,), ctl)


def scaled_error(place: Workplace) -> Launch:
    """The scaled error, element by element."""
    error, out, (last, y0, y1) = place.error(), place.error(), place.states(3)
    kernel = place.bind("scaled_error", *place.sized, out, error, last, 0.3, y0, y1, tolerance(), where())
    return Launch(kernel, (error, last, 0.3 * H, y0, y1), (error, last, y0, y1, out), (out,))


def plain_scaled_error(error: Tensor, last: Tensor, weight: float, y0: Tensor, y1: Tensor) -> Tensor:
    """(error + weight last) / (atol + rtol max(|y0|, |y1|))."""
    scale = ErrorNorm(RTOL, ATOL).scale(torch.maximum(y0.abs(), y1.abs()))
    return torch.add(error, last, alpha=weight).div_(scale)


def initial_norms(place: Workplace) -> Launch:
    """The norms of y0 and f0, from which the first step size is computed."""
    y0, f0 = place.states(2)
    norms = place.doubles(2)
    kernel = place.bind("initial_norms", *place.sized, y0, f0, tolerance(), None, place.workspace(), norms, None)
    return Launch(kernel, (y0, f0, ErrorNorm(RTOL, ATOL)), (y0, f0), norms.split(1))


def initial_change(place: Workplace) -> Launch:
    """The norm of f1 - f0."""
    norm, (y0, f0, f1) = place.doubles(), place.states(3)
    kernel = place.bind(
        "initial_change", *place.sized, y0, f0, f1, tolerance(), None, place.workspace(), norm, None, None
    )
    return Launch(kernel, (y0, f0, f1, ErrorNorm(RTOL, ATOL)), (y0, f0, f1), (norm,))


def dense_eval(place: Workplace, outputs: int) -> Launch:
    """Outputs inside a step of dopri5, so that y1 is not read."""
    assert DOPRI5.dense is not None
    rows = DOPRI5.dense.weight_rows
    y0, *read = place.states(len(rows) + 1)
    stage = {j: x for (j, _), x in zip(rows, read, strict=True)}
    k = [stage.get(j, y0) for j in range(DOPRI5.stages)]
    positions = [(i + 1) / (outputs + 1) for i in range(outputs)]
    times = torch.tensor([T0 + x * H for x in positions], dtype=torch.float64, device=place.device)
    out = torch.zeros(outputs, place.n, dtype=place.dtype, device=place.device)
    polynomials = numbers([weight for _, row in rows for weight in row])
    kernel = place.bind(
        "dense_eval", *place.sized, out, times, 0, outputs, y0, None, len(rows), len(rows[0][1]), pointers(read),
        polynomials, None, where(),
    )  # fmt: skip
    at = [[(j, reference.polynomial(row, x)) for j, row in rows] for x in positions]
    return Launch(kernel, (y0, k, at, torch.zeros_like(out)), (y0, *read, out), (out,))


def plain_dense_eval(y0: Tensor, k: Sequence[Tensor], at: Sequence[Any], out: Tensor) -> Tensor:
    """One output after another."""
    for row, to in zip(at, out, strict=True):
        reference.dense_eval(y0, k, row, H, to)
    return out


def commit(place: Workplace) -> Launch:
    """The two copies after an accepted step: y1 to y0, and the last stage to the first."""
    source, to, plain_to = (place.states(2) for _ in range(3))
    size = place.n * place.dtype.itemsize
    kernel = place.bind("commit", size, len(to), pointers(to), pointers(source), None)
    return Launch(kernel, (plain_to, source), (*source, *to), tuple(to))


def plain_commit(to: list[Tensor], source: list[Tensor]) -> list[Tensor]:
    """to[i] = source[i]."""
    torch._foreach_copy_(to, source)
    return to
