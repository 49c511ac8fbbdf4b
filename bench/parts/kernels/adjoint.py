"""The launches of a backward solve, and the same in PyTorch.

A list of parameters has TENSORS tensors of one size, together as large as the state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from node_cuda.kernels import reference
from node_cuda.kernels.norms import ErrorNorm, rms
from parts.kernels.launching import DTYPES, Launch, Workplace, numbers, packed, pointers
from parts.kernels.steps import ATOL, DOPRI5, RTOL, T0, H, where

TENSORS = 8
WEIGHT, ERROR_WEIGHT = 0.3, 0.2


def dense_adjoint(place: Workplace, outputs: int) -> Launch:
    """The gradients of outputs inside a step of dopri5. The cotangents of half-precision states are float32."""
    assert DOPRI5.dense is not None
    place, rows = place._replace(dtype=place.acc), DOPRI5.dense.weight_rows
    lam, *out = place.states(3 + len(rows))
    gradients = torch.stack(place.states(outputs))
    when = [T0 + (i + 1) / (outputs + 1) * H for i in range(outputs)]
    positions = [(s - T0) / ((T0 + H) - T0) for s in when]  # with the rounding of these times
    times = torch.tensor(when, dtype=torch.float64, device=place.device)
    polynomials = numbers([weight for _, row in rows for weight in row])
    kernel = place.bind(
        "dense_adjoint", *place.sized, out[0], out[1], pointers(out[2:]), lam, gradients, times, 0, outputs, len(rows),
        len(rows[0][1]), polynomials, None, where(),
    )  # fmt: skip
    at = [[float(reference.polynomial(row, x)) for x in positions] for _, row in rows]
    return Launch(kernel, (lam, gradients, at), (lam, gradients, *out), tuple(out), out)


def plain_dense_adjoint(lam: Tensor, gradients: Tensor, at: Sequence[Sequence[float]]) -> tuple[Tensor, ...]:
    """One cotangent after another."""
    given = reference.dense_adjoint(lam, gradients.unbind(), [0.0] * len(gradients), at, (), H)
    return given.lam, given.start, *given.extra


def pack_adjoint(place: Workplace) -> Launch:
    """[f, -vjp]."""
    f, vjp = place.states(2)
    row = torch.zeros(2 * place.n, dtype=place.dtype, device=place.device)
    kernel = place.bind("pack_adjoint", *place.sized, row, f, vjp)
    return Launch(kernel, (f, vjp), (f, vjp, row), (row,))


def plain_pack_adjoint(f: Tensor, vjp: Tensor) -> Tensor:
    """[f, -vjp]."""
    return torch.cat([f, vjp.neg()])


def jump(place: Workplace) -> Launch:
    """a += g and the dot of g and f. f is near g, so that the terms of the dot do not cancel."""
    a, g = place.states(2)
    f, dot = g + 0.1 * place.state(), place.doubles()
    arguments = (a.clone(), g, f)
    kernel = place.bind("jump", *place.sized, a, g, f, dot, place.workspace())
    return Launch(kernel, arguments, (a, a, g, f), (a, dot))


def plain_jump(a: Tensor, g: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """a + g in place, and the dot product, in float32 for half precision."""
    acc = torch.promote_types(g.dtype, torch.float32)
    return a.add_(g), torch.dot(g.to(acc), f.to(acc))


class GradientAccumulator:
    """A list of tensors with their sums, errors and totals, in the form that the launchers take."""

    def __init__(self, place: Workplace) -> None:
        size = place.n // TENSORS
        self.x = list(place.state().split(size))
        self.sums, self.errors, self.totals = (list(place.error().split(size)) for _ in range(3))
        self.dtypes = [place.acc] * TENSORS
        chunks = place.launchers.chunks_of(size)
        self.first_chunks = torch.arange(TENSORS, dtype=torch.int64) * chunks
        parts = [
            packed("Part", *tensors, size, i * chunks, DTYPES.index(place.dtype))
            for i, tensors in enumerate(zip(self.sums, self.errors, self.totals, strict=True))
        ]
        self.sized = torch.cat(parts).to(place.device), TENSORS, TENSORS * chunks


def accumulate(place: Workplace, with_error: bool) -> Launch:
    """sum_i += w x_i and, with errors, error_i += v x_i."""
    of = GradientAccumulator(place)
    written = (*of.sums, *of.errors) if with_error else (*of.sums,)
    error_weight = ERROR_WEIGHT if with_error else 0.0
    plain_sums = [x.clone() for x in of.sums]
    plain_errors = [x.clone() for x in of.errors] if with_error else []
    kernel = place.bind("accumulate", *of.sized, of.first_chunks, pointers(of.x), WEIGHT, error_weight, 1, 0, where())
    return Launch(kernel, (plain_sums, plain_errors, of.x, of.dtypes), (*of.x, *written, *written), written, of)


def plain_accumulate(
    sums: list[Tensor], errors: list[Tensor], x: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """sum_i += w x_i and, if there are any, error_i += v x_i."""
    reference.accumulate(sums, x, WEIGHT * H, dtypes)
    if errors:
        reference.accumulate(errors, x, ERROR_WEIGHT * H, dtypes)
    return [*sums, *errors]


def commit_sums(place: Workplace) -> Launch:
    """total_i += sum_i after an accepted step."""
    of = GradientAccumulator(place)
    plain_totals = [x.clone() for x in of.totals]
    kernel = place.bind("commit_sums", *of.sized, None)
    return Launch(kernel, (plain_totals, of.sums), (*of.totals, *of.totals, *of.sums), (*of.totals,), of)


def plain_commit_sums(totals: list[Tensor], sums: list[Tensor]) -> list[Tensor]:
    """total_i += sum_i."""
    torch._foreach_add_(totals, sums)
    return totals


def sums_ratio(place: Workplace) -> Launch:
    """The norm of the errors of the sums."""
    of, ratio = GradientAccumulator(place), place.doubles()
    workspace = place.workspace(place.launchers.sums_workspace(of.sized[2]))
    kernel = place.bind("sums_ratio", *of.sized, RTOL, ATOL, workspace, None, packed("Finish", ratio))
    return Launch(kernel, (of.errors, of.totals, of.sums), (*of.errors, *of.sums, *of.totals), (ratio,), of)


def plain_sums_ratio(errors: list[Tensor], totals: list[Tensor], sums: list[Tensor]) -> float:
    """The largest rms of error_i / (atol + rtol max(|total_i|, |total_i + sum_i|))."""
    after = list(torch._foreach_add(totals, sums))
    return rms(reference.scaled_sums(errors, totals, after, ErrorNorm(RTOL, ATOL)))
