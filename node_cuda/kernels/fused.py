"""The arithmetic of a solve by the compiled kernels: the same primitives, one launch each, through one plan.

Where autograd records, a call takes the plain PyTorch path, because autograd cannot record what a kernel writes. Every
result is a new tensor that no other object holds. If a kernel writes into it again, its version counter is raised, so
that autograd's own check finds a graph that saved it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from node_cuda._typing import Row
from node_cuda._typing import Tolerance as Tol
from node_cuda.kernels.arithmetic import Arithmetic, ErrorTerm, FieldCall, Polynomials, Stage
from node_cuda.kernels.control import DeviceStepControl
from node_cuda.kernels.fused_sums import FusedGradientAccumulator
from node_cuda.kernels.memory import address, has_address, resolved
from node_cuda.kernels.norms import HALF, ErrorNorm
from node_cuda.kernels.reference import ControllerParams, DenseCotangents
from node_cuda.kernels.stage_times import Interval
from node_cuda.kernels.step_control import ControlSpec, StepControl
from node_cuda.kernels.step_log import StepLog
from node_cuda.kernels.sums import GradientAccumulator
from node_cuda.status import InvalidField

# csrc/launchers.h, enum Dtype.
DTYPES = {
    dtype: code
    for code, dtype in enumerate(
        (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
    )
}
Launch = tuple[int, int]
"""The address of a stream and the index of a device."""


class Fused(Arithmetic):
    """The primitives on the device of `y0`, in the stream `on`. module: the compiled module."""

    def __init__(
        self, module: ModuleType, on: Launch, y0: Tensor, direction: float, norm: ErrorNorm, times: Sequence[float]
    ) -> None:
        super().__init__(y0, direction, norm, times)
        self.module = module
        self.on = on
        self.device = y0.device
        self.dtype = y0.dtype
        self.shape = y0.shape
        self.acc_dtype = torch.float32 if y0.dtype in HALF else y0.dtype
        self.plan = module.SolveContext(
            DTYPES[y0.dtype], y0.numel(), y0.itemsize, self.acc_dtype.itemsize, on, float(direction)
        )
        # Made once in a solve: the data that the kernels read on the device.
        self.device_times = torch.tensor(times, dtype=torch.float64, device=y0.device)
        self._held = self._bind_norm()
        self._stages: dict[Any, Stage] = {}
        self._polynomials: dict[Polynomials, Polynomials] = {}
        self._dot_workspace: Tensor | None = None

    def contiguous(self, field: FieldCall) -> FieldCall:
        return lambda t, y: self.as_contiguous(field(t, y))

    def as_contiguous(self, x: Tensor) -> Tensor:
        """Return x on this device, contiguous and with conjugation applied; x itself if that is already true."""
        if x.device != self.device:
            raise InvalidField(
                f"func must return dy/dt on the state's device, {self.device}; got {x.device}. "
                f"Use `.to({str(self.device)!r})`, or `func.to({str(self.device)!r})` for a module."
            )
        x = resolved(x).contiguous()
        address(x, "what func returned")
        return x

    # ------------------------------------------------------------------ time

    def interval(self, t0: float, t1: float, h: float, dt: Tensor | None = None) -> Interval:
        signed = self.direction * h
        if dt is not None:
            return Interval(t0, t1, h, signed, dt)
        return Interval(t0, t1, h, signed, signed, self.plan.interval(t0, t1, h))

    def current(self) -> Interval:
        """Return the step that the device control holds when a kernel runs. The host does not know it."""
        unknown = math.nan
        return Interval(unknown, unknown, unknown, unknown, unknown, self.plan.current())

    def times(self, at: Interval, nodes: Sequence[float], side: int) -> tuple[Tensor, ...]:
        """Return the 0-d tensors t at these nodes. One launch, without a copy from the host, which would wait."""
        slots = torch.empty(len(nodes), dtype=self.clock.dtype, device=self.device).unbind()
        self.plan.stage_times(self.native(at), nodes, side, [t.data_ptr() for t in slots])
        return slots

    def slots(self, at: Interval, nodes: Sequence[float], side: int) -> tuple[Tensor, ...]:
        """Return the same tensors, not filled: `rk_stage` and `rk_finish` fill them. No launch.

        Where autograd records, plain PyTorch computes the stages and fills no slots. Then one launch fills them here.
        """
        if torch.is_grad_enabled():
            return self.times(at, nodes, side)
        return torch.empty(len(nodes), dtype=self.clock.dtype, device=self.device).unbind()

    # ------------------------------------------------------------------ stages

    def stage(self, row: Row, node: float, side: int) -> Stage:
        return self._prepared(super().stage(row, node, side))

    def last_stage(self, b: Row, err_row: Row | None, node: float, side: int) -> Stage:
        return self._prepared(super().last_stage(b, err_row, node, side))

    def _prepared(self, stage: Stage) -> Stage:
        key = (tuple(stage.row), stage.err_row and tuple(stage.err_row), *stage[2:4])
        if key not in self._stages:
            entries = {j for j, _ in (*stage.row, *(stage.err_row or ()))}
            if len(entries) <= self.module.MAX_TERMS:
                native = self.plan.row(stage.row, stage.err_row or (), stage.node, stage.side)
                stage = stage._replace(native=native)
            self._stages[key] = stage
        return self._stages[key]

    def rk_stage(self, stage: Stage, at: Interval, y0: Tensor, k: Sequence[Tensor], t: Tensor) -> Tensor:
        """Return z = y0 + dt sum_j a_j k_j, and write its time into t. One launch."""
        if stage.native is None or _recorded(at, y0, k):
            self._fill(stage, at, t)
            return super().rk_stage(stage, at, y0, k, t)
        z = torch.empty_like(y0)
        self.plan.rk_stage(
            stage.native, at.native, z.data_ptr(), y0.data_ptr(), [x.data_ptr() for x in k], t.data_ptr()
        )
        return z

    def rk_finish(
        self, stage: Stage, at: Interval, y0: Tensor, k: Sequence[Tensor], t: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return y1 = y0 + dt sum_j b_j k_j and the partial error, and write the time of y1 into t. One launch."""
        if stage.native is None or _recorded(at, y0, k):
            if t is not None:
                self._fill(stage, at, t)
            return super().rk_finish(stage, at, y0, k, t)
        y1 = torch.empty_like(y0)
        error = None if stage.err_row is None else torch.empty_like(y0, dtype=self.acc_dtype)
        self.plan.rk_finish(
            stage.native,
            at.native,
            y1.data_ptr(),
            0 if error is None else error.data_ptr(),
            y0.data_ptr(),
            [x.data_ptr() for x in k],
            0 if t is None else t.data_ptr(),
        )
        return y1, error

    def _fill(self, stage: Stage, at: Interval, t: Tensor) -> None:
        """Fill a slot if no kernel of the stage fills it; see `slots`."""
        if not torch.is_grad_enabled():
            self.plan.stage_times(at.native, (stage.node,), stage.side, [t.data_ptr()])

    def combine(self, y0: Tensor, k: Sequence[Tensor], row: Row, h: float | Tensor) -> Tensor:
        """Return y0 + h sum_j a_j k_j for coefficients that differ in each step. One launch."""
        terms = [(k[j], a) for j, a in row if isinstance(a, Tensor) or a != 0.0]
        tensors = [x for x, _ in terms]
        weights = [a for _, a in terms]
        if (
            isinstance(h, Tensor)
            or any(isinstance(a, Tensor) for a in weights)
            or len(terms) > self.module.MAX_TERMS
            or _on_tape(y0, tensors)
        ):
            return super().combine(y0, k, row, h)
        out = torch.empty_like(y0)
        self.plan.combine(h, out.data_ptr(), y0.data_ptr(), [x.data_ptr() for x in tensors], weights)
        return out

    # ------------------------------------------------------------------ error

    def control(
        self, spec: ControlSpec, *, pauses: bool = False, tape: StepLog | None = None
    ) -> DeviceStepControl | StepControl:
        """Return step-size control on the device, or on the host if the spec has a rule."""
        if spec.rule is not None:
            return super().control(spec)
        measures = self.norm.custom is None and spec.limit == math.inf
        outputs = self.device_times[1:]
        return DeviceStepControl(self.module, self.plan, spec, outputs, measures=measures, pauses=pauses, tape=tape)

    def control_step(
        self,
        control: DeviceStepControl | StepControl,
        at: Interval,
        error: Tensor,
        last: tuple[Tensor, float] | None,
        y0: Tensor,
        y1: Tensor,
        errors: ErrorTerm | None,
    ) -> None:
        """Judge the step by the norm of its error, and choose the next step. One launch and no read.

        A norm of the user needs more launches; a rule of the user needs one read.
        """
        if isinstance(control, StepControl):
            return super().control_step(control, at, error, last, y0, y1, errors)
        with torch.no_grad():
            if self.norm.custom is None:
                return self.judge(at, error, last, y0, y1, None if errors is None else errors.device_ratio())
            scaled = self.scaled_error(at, error, last, y0, y1)
            norm = self.norm.by_user(scaled, () if errors is None else errors.scaled_errors())
            ratio = norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64, device="cpu")
            control.judge_ratio(ratio.to(scaled.device, torch.float64).abs().reshape(1))
        return None

    def grid_control(
        self, points: Sequence[float], *, pauses: bool = False, tape: StepLog | None = None
    ) -> DeviceStepControl:
        """Return the control of steps from point to point of a grid, on the device."""
        law = ControllerParams((0.0, 0.0, 0.0), 1.0, 1.0, 1.0, False, 0.0, math.inf)
        outputs = self.device_times[1:]
        return DeviceStepControl(
            self.module, self.plan, ControlSpec(law, 1, ends=True), outputs, points, pauses=pauses, tape=tape
        )

    def commit(self, to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
        """Copy to_i = source_i if the last step that was judged was accepted. One launch."""
        for x in to:
            _written(x)
        self.plan.commit([x.data_ptr() for x in to], [x.data_ptr() for x in source])

    def scaled_error(
        self, at: Interval, error: Tensor, last: tuple[Tensor, float] | None, y0: Tensor, y1: Tensor
    ) -> Tensor:
        """Return (error + dt e k) / (atol + rtol max(|y0|, |y1|)), written over `error`, for a norm of the user."""
        _written(error)
        self.plan.scaled_error(
            self.native(at), error.data_ptr(), error.data_ptr(), *_addresses(last), y0.data_ptr(), y1.data_ptr()
        )
        return error

    def judge(
        self,
        at: Interval,
        error: Tensor,
        last: tuple[Tensor, float] | None,
        y0: Tensor,
        y1: Tensor,
        also: Tensor | None,
    ) -> None:
        """Compute the norm of the error, and control the step with it and with the norm `also`. One launch."""
        if also is not None:
            also = also.to(self.device)  # parameters may be on another device
        norms = (0, 0) if also is None else (also.data_ptr(), also.numel())
        self.plan.judge(self.native(at), error.data_ptr(), *_addresses(last), y0.data_ptr(), y1.data_ptr(), norms)

    def native(self, at: Interval) -> Any:
        """Return the interval as the module's type, also for a step that autograd records."""
        return at.native or self.plan.interval(at.t0, at.t1, at.h)

    # ------------------------------------------------------------------ outputs

    def polynomials(self, rows: Sequence[tuple[int, tuple[float, ...]]], end: tuple[float, ...] = ()) -> Polynomials:
        plain = super().polynomials(rows, end)
        if plain not in self._polynomials:
            degree = max(len(weights) for weights in (*(weights for _, weights in rows), end))
            native = None
            if len(rows) <= self.module.MAX_TERMS and degree <= self.module.MAX_DEGREE:
                weights = [w for _, weights in rows for w in weights]
                native = self.plan.polynomials([j for j, _ in rows], weights, end, degree)
            self._polynomials[plain] = plain._replace(native=native)
        return self._polynomials[plain]

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
        """Write the outputs from index `first` on into the rows of `out`. One launch for any number of outputs."""
        if polynomials.native is None or at.taped:
            return super().dense_outputs(polynomials, at, y0, y1, k, first, out)
        _written(out)
        self.plan.dense_eval(
            polynomials.native,
            at.native,
            out.data_ptr(),
            self.device_times.data_ptr(),
            first,
            first + len(out),
            y0.data_ptr(),
            y1.data_ptr(),
            [x.data_ptr() for x in k],
        )
        return None

    # ------------------------------------------------------------------ adjoint

    def sums(self, like: Sequence[Tensor], *, with_error: bool) -> GradientAccumulator:
        """Return accumulators that use one launch for each list."""
        if not (like and can_sum(like, self.device)):
            return super().sums(like, with_error=with_error)
        return FusedGradientAccumulator(like, self.module, self.on, DTYPES, with_error=with_error)

    def adjoint_stage(
        self, base: Tensor | None, x: Sequence[Tensor], row: Sequence[float], at: Interval | None
    ) -> Tensor:
        """Return kappa = base + dt sum_j a_j x_j. One launch for every MAX_TERMS terms."""
        where = self.module.ONE if at is None else self.native(at)
        terms, most = [(v, a) for v, a in zip(x, row, strict=True) if a != 0.0], self.module.MAX_TERMS
        out = torch.empty_like(x[0])
        for i in range(0, max(len(terms), 1), most):  # a longer sum is continued in place
            part = terms[i : i + most]
            pointers = [v.data_ptr() for v, _ in part]
            self.plan.sum(where, out.data_ptr(), _address(out if i else base), pointers, [a for _, a in part])
        return out

    def dense_adjoint(
        self, polynomials: Polynomials, at: Interval, lam: Tensor, first: int, gradients: Tensor
    ) -> DenseCotangents:
        """Return the cotangents that the outputs in a step give. One launch for any number of outputs.

        With the current step the kernel finds the outputs in it among all rows.
        """
        if polynomials.native is None or self.acc_dtype != self.dtype:
            return super().dense_adjoint(polynomials, at, lam, first, gradients)
        lam, gradients = self.as_contiguous(lam), self.as_contiguous(gradients)
        out = [torch.empty_like(lam) for _ in range(2 + len(polynomials.rows))]
        self.plan.dense_adjoint(
            polynomials.native,
            self.native(at),
            [x.data_ptr() for x in out],
            lam.data_ptr(),
            self.device_times.data_ptr(),
            gradients.data_ptr(),
            first,
            first + len(gradients),
        )
        return DenseCotangents(out[0], out[1], out[2:])

    def pack_adjoint(self, f: Tensor, vjp: Tensor | None) -> Tensor:
        """Return [f, -vjp], the flat derivative of [y, a]. One launch."""
        f, vjp = self.as_contiguous(f), None if vjp is None else self.as_contiguous(vjp)
        row = f.new_empty(2 * f.numel())
        self.module.pack_adjoint(
            DTYPES[f.dtype], f.numel(), row.data_ptr(), f.data_ptr(), 0 if vjp is None else vjp.data_ptr(), self.on
        )
        return row

    def real_dot(self, g: Tensor, f: Tensor) -> Tensor:
        """Return Re sum conj(g) f, computed in double. One launch."""
        dot = torch.empty((), dtype=torch.float64, device=self.device)
        g, f, n = self.as_contiguous(g), self.as_contiguous(f), g.numel()
        if self._dot_workspace is None:
            self._dot_workspace = self._zeros(self.module.reduce_workspace(n, 0))
        self.module.jump(
            DTYPES[g.dtype], n, 0, g.data_ptr(), f.data_ptr(), dot.data_ptr(), self._dot_workspace.data_ptr(), self.on
        )
        return dot

    # ------------------------------------------------------------------ binding

    def _bind_norm(self) -> tuple[Tensor | None, ...]:
        """Give the plan the norm, and return the tensors that must be kept alive for it."""
        norm = self.norm
        rtol, rtol_each = self._tolerance(norm.rtol)
        atol, atol_each = self._tolerance(norm.atol)
        sizes = norm.sizes if norm.sizes is not None and len(norm.sizes) > 1 else ()
        ends = torch.tensor(sizes, dtype=torch.int64, device="cpu").cumsum(0)
        device_ends = ends.to(self.device) if sizes else None
        self.plan.set_norm(
            rtol, atol, *(_address(x) for x in (rtol_each, atol_each)), ends.tolist(), _address(device_ends)
        )
        workspace = self._zeros(self.plan.workspace_size())
        self.plan.set_workspace(workspace.data_ptr())
        return rtol_each, atol_each, device_ends, workspace

    def set_tolerances(self, norm: ErrorNorm) -> None:
        """Write other tolerances where they are tensors. Numbers are part of the launches and cannot change."""
        for tol, held in zip((norm.rtol, norm.atol), self._held, strict=False):
            if isinstance(tol, Tensor) and held is not None:
                held.copy_(tol.expand(self.shape))

    def _tolerance(self, tol: Tol) -> tuple[float, Tensor | None]:
        """Return a number, or a tensor with one number for each element of the state, in its real dtype.

        It is never the user's tensor, because `set_tolerances` writes into it.
        """
        if not isinstance(tol, Tensor):
            return tol, None
        each = tol.to(self.device, self.clock.dtype).expand(self.shape)
        return 0.0, each.clone(memory_format=torch.contiguous_format)

    def _zeros(self, size: int) -> Tensor:
        """Return workspace, set to zero once."""
        return torch.zeros(size, dtype=torch.uint8, device=self.device)


def can_sum(tensors: Sequence[Tensor], device: torch.device) -> bool:
    """Return whether the kernels can sum tensors like these."""
    return all(x.dtype in DTYPES and x.device == device and has_address(x) for x in tensors)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _addresses(last: tuple[Tensor, float] | None) -> tuple[int, float]:
    return (0, 0.0) if last is None else (last[0].data_ptr(), last[1])


def _on_tape(y0: Tensor, k: Sequence[Tensor]) -> bool:
    """Return whether autograd records operations on these."""
    return torch.is_grad_enabled() and (y0.requires_grad or any(x.requires_grad for x in k))


def _recorded(at: Interval, y0: Tensor, k: Sequence[Tensor]) -> bool:
    """Return whether autograd records operations on these in this step."""
    return at.taped or _on_tape(y0, k)


def _written(x: Tensor) -> None:
    """Tell autograd that a kernel writes into x, which was made earlier."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
