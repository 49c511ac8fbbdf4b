"""The error norm of the backward solve, of y, a and the parameters' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from node_cuda._typing import Norm, Tolerance
from node_cuda.kernels.norms import ErrorNorm, rms
from node_cuda.problem.field import Layout
from node_cuda.problem.problem import Problem
from node_cuda.status import InvalidInput


class AdjointNorm:
    """The default norm of the backward solve: the largest rms of y, of a and, with params=True, of each gradient.

    user_norm: the user's norm of the forward solve. If given, it measures y and a. As in torchdiffeq, the norm is
    called with a tuple (t, y, adj_y, *adj_params) of flat tensors, and returns a 0-d tensor.
    """

    def __init__(self, layout: Layout, user_norm: Norm | None, *, params: bool) -> None:
        self.layout = layout
        self.user_norm = user_norm
        self.params = params

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        t, y, adj_y, *adj_params = parts
        values = [t.abs(), self._of_state(y), self._of_state(adj_y), rms(adj_params) if self.params else 0.0]
        return torch.stack([torch.as_tensor(value).detach().to(t).abs() for value in values]).amax()

    def _of_state(self, y: Tensor) -> Tensor | float:
        parts = self.layout.unflatten(y)
        if self.user_norm is not None:
            return self.user_norm(parts)
        return rms(parts if isinstance(parts, tuple) else (parts,))


def chosen_norm(layout: Layout, norm: Any, user_norm: Norm | None) -> Norm:
    """Return the norm that adjoint_options["norm"] (None, "seminorm" or a callable) selects.

    It is called with the flat tensors (t, y, adj_y, *adj_params).
    """
    if norm is None or norm == "seminorm":
        return AdjointNorm(layout, user_norm, params=norm is None)
    if not callable(norm):
        raise InvalidInput(f'adjoint_options["norm"] must be "seminorm" or a callable; got {norm!r}.')
    if layout.shapes is None:
        return cast(Norm, norm)

    def of_tuple(parts: Sequence[Tensor]) -> Any:
        t, y, adj_y, *adj_params = parts
        return norm((t, *layout.unflatten(y), *layout.unflatten(adj_y), *adj_params))

    return of_tuple


def backward_error_norm(
    problem: Problem, rtol: Tolerance, atol: Tolerance, norm: Any, params: Sequence[Tensor]
) -> ErrorNorm:
    """Return the norm of the backward solve as a norm of the flat state [y, a] and of the parameters' scaled errors."""
    shape, n = problem.y0.shape, problem.y0.numel()
    rtol, atol = (_doubled(tol, problem) for tol in (rtol, atol))
    if isinstance(norm, AdjointNorm) and norm.user_norm is None:
        return ErrorNorm(rtol, atol, (problem.layout.sizes or (n,)) * 2)

    zeros: list[Tensor] = []

    def custom(scaled: Tensor, also: Sequence[Tensor]) -> Tensor | float:
        y, a = (part.view(shape) for part in scaled.chunk(2))
        if not also and params:
            zeros.extend(torch.zeros_like(p) for p in params[len(zeros) :])
        return norm((scaled.new_zeros(()).real, y, a, *(also or zeros)))

    return ErrorNorm(rtol, atol, None, custom)


def _doubled(tol: Tolerance, problem: Problem) -> Tolerance:
    """Return the tolerance of [y, a], from that of the state."""
    if not isinstance(tol, Tensor):
        return tol
    flat = tol.expand(problem.y0.shape).reshape(-1)
    return torch.cat([flat, flat])


def smallest(tol: Tolerance) -> float:
    return float(tol.min()) if isinstance(tol, Tensor) else float(tol)
