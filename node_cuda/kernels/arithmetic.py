"""The arithmetic of a solve: the primitives of `kernels.reference`, bound to the constants of that solve.

`Arithmetic` is plain PyTorch. `kernels.fused.Fused` has the same methods and calls compiled kernels. Rows and
polynomials, which every step uses, are prepared once. The prepared object also holds the coefficients that it was made
from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from node_cuda._typing import Row
from node_cuda.kernels import reference
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.reference import DenseCotangents
from node_cuda.kernels.stage_times import Clock, Interval
from node_cuda.kernels.step_control import ControlSpec, StepControl
from node_cuda.kernels.sums import GradientAccumulator


class Stage(NamedTuple):
    """A prepared row of coefficients, and the time of its stage.

    row: nonzero entries (j, a_j). err_row: nonzero entries of b - b_hat over the stages known by then; None without an
    estimate. node, side: its time, t0 + node h, at this side of the step's ends (see `kernels.stage_times`).
    """

    row: Row
    err_row: Row | None
    node: float
    side: int
    native: int | None = None


class Polynomials(NamedTuple):
    """A prepared interpolant: y0 + P(x) (y1 - y0) + dt sum_j B_j(x) k_j.

    rows: (j, weights of x, x^2, ...) for every nonzero B_j. end: the weights of P, empty for P = 0.
    """

    rows: tuple[tuple[int, tuple[float, ...]], ...]
    end: tuple[float, ...]
    native: int | None = None


class ErrorTerm(Protocol):
    """Further errors that take part in the norm, such as those of the parameters' gradients."""

    def scaled_errors(self) -> Sequence[Tensor]:
        """Return the scaled errors of the step that was just taken."""
        ...

    def device_ratio(self) -> Tensor | None:
        """Return the largest of their rms, as a double on the device of the state, or None if there are none."""
        ...


FieldCall = Callable[[Tensor, Tensor], Tensor]


class Arithmetic:
    """The primitives for states like `y0`, in plain PyTorch.

    times: the output times, in solver time s; the user's time is t = direction * s.
    """

    def __init__(self, y0: Tensor, direction: float, norm: ErrorNorm, times: Sequence[float]) -> None:
        self.direction = direction
        self.norm = norm
        self.output_times = times
        self.clock = Clock(direction, y0.dtype.to_real(), y0.device)

    def as_contiguous(self, x: Tensor) -> Tensor:
        """Return x in a form that the primitives can read."""
        return x

    def contiguous(self, field: FieldCall) -> FieldCall:
        """Return the field with its output in a form that the primitives can read."""
        return field

    # ------------------------------------------------------------------ time

    def interval(self, t0: float, t1: float, h: float, dt: Tensor | None = None) -> Interval:
        """Return a step. dt: its signed size, if autograd records it."""
        signed = self.direction * h
        return Interval(t0, t1, h, signed, signed if dt is None else dt)

    def times(self, at: Interval, nodes: Sequence[float], side: int) -> tuple[Tensor, ...]:
        """Return the 0-d tensors t that the field gets at these nodes."""
        return self.clock.at_nodes(at, nodes, side)

    def slots(self, at: Interval, nodes: Sequence[float], side: int) -> tuple[Tensor, ...]:
        """Return the same tensors, but the `rk_stage` or `rk_finish` that gets a tensor may fill it in later."""
        return self.clock.at_nodes(at, nodes, side)

    # ------------------------------------------------------------------ stages

    def stage(self, row: Row, node: float, side: int) -> Stage:
        """Prepare a row for `rk_stage`."""
        return Stage(row, None, node, side)

    def last_stage(self, b: Row, err_row: Row | None, node: float, side: int) -> Stage:
        """Prepare the rows for `rk_finish`."""
        return Stage(b, err_row, node, side)

    def rk_stage(self, stage: Stage, at: Interval, y0: Tensor, k: Sequence[Tensor], t: Tensor) -> Tensor:
        """Return z = y0 + dt sum_j a_j k_j, and write its time into t."""
        return reference.combine(y0, k, stage.row, at.dt)

    def rk_finish(
        self, stage: Stage, at: Interval, y0: Tensor, k: Sequence[Tensor], t: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return y1 = y0 + dt sum_j b_j k_j and the partial error, and write the time of y1 into t."""
        return reference.rk_finish(y0, k, stage.row, stage.err_row, at.dt)

    def combine(self, y0: Tensor, k: Sequence[Tensor], row: Row, h: float | Tensor) -> Tensor:
        """Return y0 + h sum_j a_j k_j for coefficients that differ in each step."""
        return reference.combine(y0, k, row, h)

    # ------------------------------------------------------------------ error

    def error_ratio(
        self,
        at: Interval,
        error: Tensor,
        last: tuple[Tensor, float] | None,
        y0: Tensor,
        y1: Tensor,
        also: Sequence[Tensor] = (),
    ) -> float:
        """Return the norm of the error after adding `last`, a stage and its b - b_hat. One host read."""
        weighted = None if last is None else (last[0], at.signed * last[1])
        return reference.error_ratio(error, weighted, y0, y1, self.norm, also)

    def control(self, spec: ControlSpec, *, pauses: bool = False, tape: Any = None) -> Any:
        """Return the step-size control of a solve. pauses, tape: only for control on the device (`kernels.control`)."""
        assert not pauses and tape is None
        return StepControl(spec, self.norm, self.output_times[1:])

    def control_step(
        self,
        control: Any,
        at: Interval,
        error: Tensor,
        last: tuple[Tensor, float] | None,
        y0: Tensor,
        y1: Tensor,
        errors: ErrorTerm | None,
    ) -> None:
        """Judge the step by the norm of its error (as `error_ratio`), and choose the next step."""
        also = () if errors is None else errors.scaled_errors()
        control.judge_ratio(self.error_ratio(at, error, last, y0, y1, also))

    # ------------------------------------------------------------------ outputs

    def polynomials(self, rows: Sequence[tuple[int, tuple[float, ...]]], end: tuple[float, ...] = ()) -> Polynomials:
        """Prepare an interpolant for `dense_eval` and `dense_outputs`."""
        return Polynomials(tuple(rows), end)

    def dense_eval(
        self,
        polynomials: Polynomials,
        at: Interval,
        y0: Tensor,
        y1: Tensor,
        k: Sequence[Tensor],
        x: float | Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return y at t0 + x h, 0 <= x <= 1; x is a 0-d tensor where autograd records it."""
        row: list[tuple[int, float | Tensor]] = [
            (j, at.dt * reference.polynomial(weights, x)) for j, weights in polynomials.rows
        ]
        if polynomials.end:
            row.append((len(k), reference.polynomial(polynomials.end, x)))
            k = [*k, y1 - y0]
        return reference.dense_eval(y0, k, row, 1.0, out)

    def dense_outputs(
        self,
        polynomials: Polynomials,
        at: Interval,
        y0: Tensor,
        y1: Tensor,
        k: Sequence[Tensor],
        first: int,
        out: Tensor,
    ) -> None:
        """Write the outputs from index `first` on, which all lie in this step, into the rows of `out`."""
        for i, row in enumerate(out):
            s = self.output_times[first + i]
            if s == at.t1:
                row.copy_(y1)
            else:
                self.dense_eval(polynomials, at, y0, y1, k, position(at, s), row)

    # ------------------------------------------------------------------ adjoint

    def sums(self, like: Sequence[Tensor], *, with_error: bool) -> GradientAccumulator:
        """Return accumulators for a list of tensors like these."""
        return GradientAccumulator(like, with_error=with_error)

    def adjoint_stage(
        self, base: Tensor | None, x: Sequence[Tensor], row: Sequence[float], at: Interval | None
    ) -> Tensor:
        """Return kappa = base + dt sum_j a_j x_j, a cotangent of the discrete adjoint. base None: 0. at None: dt is
        1."""
        return reference.adjoint_stage(base, x, row, 1.0 if at is None else at.signed)

    def dense_adjoint(
        self, polynomials: Polynomials, at: Interval, lam: Tensor, first: int, gradients: Tensor
    ) -> DenseCotangents:
        """Return the cotangents that the outputs in a step give, the transpose of `dense_outputs`.

        They are the cotangents of y1 (added to lam), of y0, and of the stages in the polynomials' rows, in their order.
        gradients: one row for each output time from index `first` on, all in this step. Not for half precision.
        """
        end, times = polynomials.end, self.output_times[first : first + len(gradients)]
        inner = [(position(at, s), g) for s, g in zip(times, gradients, strict=True) if s != at.t1]
        return reference.dense_adjoint(
            lam,
            [g for _, g in inner],
            [float(reference.polynomial(end, x)) for x, _ in inner],
            [[float(reference.polynomial(weights, x)) for x, _ in inner] for _, weights in polynomials.rows],
            [g for s, g in zip(times, gradients, strict=True) if s == at.t1],
            at.signed,
        )

    def pack_adjoint(self, f: Tensor, vjp: Tensor | None) -> Tensor:
        """Return [f, -vjp], the flat derivative of [y, a]. vjp None: zeros."""
        vjp = torch.zeros_like(f) if vjp is None else vjp
        return torch.cat([f.reshape(-1), vjp.reshape(-1).neg()])

    def jump(self, y: Tensor, a: Tensor, g: Tensor) -> Tensor:
        """Return the flat state [y, a + g] after an output with the gradient g."""
        return torch.cat([y.reshape(-1), (a + g).reshape(-1)])

    def real_dot(self, g: Tensor, f: Tensor) -> Tensor:
        """Return Re sum conj(g) f, which is dL for a change f of y where dL/dy = g."""
        return reference.real_dot(g, f)


def position(at: Interval, s: float) -> float:
    """Return x in [0, 1] of the solver time s in a step."""
    return min((s - at.t0) / (at.t1 - at.t0), 1.0)
