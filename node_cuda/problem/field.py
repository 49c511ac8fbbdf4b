"""The user's vector field as the solver calls it: it counts and checks calls, flattens states, and shares no memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from node_cuda._typing import Func, State
from node_cuda._user_code import order_mend, tell
from node_cuda.status import InvalidField


@dataclass(frozen=True)
class Layout:
    """The positions of a tuple of tensors in one flat tensor. `shapes` is None for a state that is a single tensor."""

    shapes: tuple[torch.Size, ...] | None = None

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The number of elements of each component."""
        return None if self.shapes is None else tuple(shape.numel() for shape in self.shapes)

    def flatten(self, parts: Any) -> Tensor:
        """Return the state as one tensor: the state itself, or its components one after another (dtypes promoted)."""
        return parts if self.shapes is None else torch.cat([part.reshape(-1) for part in parts])

    def unflatten(self, flat: Tensor, lead: Sequence[int] = ()) -> State:
        """Return the state from one tensor of shape (*lead, elements), as views: one slice and one view for each
        component."""
        if self.shapes is None:
            return flat
        parts, start = [], 0
        for shape in self.shapes:
            stop = start + shape.numel()
            parts.append(flat[..., start:stop].view((*lead, *shape)))
            start = stop
        return tuple(parts)


ONE_TENSOR = Layout()


class VectorField:
    """dy/dt = func(t, y) on flat states. The result has y's shape and dtype. Nothing writes into one that is kept.

    nfe: evaluations so far. An output that was written in place is copied, because it may be a buffer of the user's
    function. The first two evaluations (`probes`) show how the function treats memory otherwise: if it writes again
    into an output, all outputs are copied; if it writes into its argument, it gets a copy.
    bounds: func is not evaluated at times outside of them. ends: the user's first and last time, for messages.
    """

    def __init__(
        self,
        func: Func,
        layout: Layout,
        bounds: tuple[float, float] | None = None,
        ends: tuple[float, float] | None = None,
    ) -> None:
        self.func = func
        self.layout = layout
        self.bounds = bounds
        self.ends = ends
        self.nfe = 0
        self.probes = 2
        self.copies_output = False  # func returns memory that it writes into again
        self._copies_input = False
        self._first: tuple[Tensor, int, int | None] | None = None  # the output of the first probe, its address, version

    def __call__(self, t: Tensor, y: Tensor, *, spare: bool = False, kept: bool = True) -> Tensor:
        """Return dy/dt at the 0-d tensor t and the state y, which is not changed.

        spare: the caller does not use y again, so a first evaluation needs no copy to see whether func writes into it.
        kept: the caller reads the result after the next evaluation begins, which may write into its memory.
        """
        self.nfe += 1
        if self.bounds is not None:
            t = t.clamp(*self.bounds)
        probes = self.nfe <= self.probes
        spare = spare and not y.is_inference()  # whose writes are only seen in a copy
        argument = y.clone() if self._copies_input or (probes and not spare) else y
        version = None if argument.is_inference() else argument._version
        of_y = None if argument is y or y.is_inference() else y._version
        shapes = self.layout.shapes
        state = argument if shapes is None else self.layout.unflatten(argument)
        try:
            out = self.func(t, state)
        except Exception as error:
            tell(error, "func", self.func, self.ends, t=t, y=state)
            raise
        if shapes is not None:
            out = self._flat(out, shapes)
        wrote = version is not None and argument._version != version
        if wrote and argument is y and not probes:
            raise InvalidField(
                f"func wrote into its argument y at t = {float(t):.6g}, but not in its first calls. "
                "Write `y = y.clone()` at its beginning, or use operations that are not in place. If y0 is a tensor "
                "that func holds and writes into, start from `y0.clone()`."
            )
        if of_y is not None and y._version != of_y and not wrote and not _same(argument, y):
            raise InvalidField(
                "func wrote into y0 itself, not into its argument y: y0 is a tensor that func holds and writes into. "
                "Start from `y0.clone()`."
            )
        if not isinstance(out, Tensor) or out.shape != y.shape:
            _check(out, y.shape, self.func)
        if out.requires_grad and not torch.is_grad_enabled():
            out = out.detach()  # func enables autograd for itself; no graph is kept in a step that is not recorded
        first = False
        if probes:
            self._copies_input = self._copies_input or wrote or (version is None and not torch.equal(argument, y))
            first = kept and self._probe(out)
        if out.dtype is not y.dtype:
            return _converted(out, y)
        # An output that was written in place may be a buffer, which func writes again. (Tensors of inference mode have
        # no version. A buffer among them is only found by its address.)
        if kept and (first or self.copies_output or not (out.is_inference() or out._version == 0)):
            return out.clone()
        return out

    def watch_again(self) -> None:
        """Probe the next two evaluations as the first two: func may act differently when autograd records."""
        self.probes = self.nfe + 2

    def release(self) -> None:
        """Drop the references to the user's function and to its output. The field cannot be evaluated after this."""
        self.func = _released
        self._first = None

    def _flat(self, out: Any, shapes: Sequence[torch.Size]) -> Tensor:
        """Return the components that func returned as one tensor."""
        if not isinstance(out, (tuple, list)) or len(out) != len(shapes):
            got = f"{len(out)} of them" if isinstance(out, (tuple, list)) else f"a {type(out).__name__}"
            raise InvalidField(
                f"func must return a tuple of {len(shapes)} tensors, as many as the state y0 has; got {got}."
            )
        for part, shape in zip(out, shapes, strict=True):
            _check(part, shape, self.func)
        return self.layout.flatten(out)

    def _probe(self, out: Tensor) -> bool:
        """Look whether func writes again into its output. Return True for the first probe: the next one will show."""
        try:
            address = out.untyped_storage().data_ptr()
        except (NotImplementedError, RuntimeError):  # under a torch.func transform, where the output is always new
            address = 0
        if self._first is not None:
            earlier, before, version = self._first
            # Both are alive here, so that an equal address means the same buffer.
            if address == before != 0 or version_of(earlier) != version:
                self.copies_output = True
        first = self.nfe < self.probes
        self._first = (out, address, None if out.is_inference() else out._version) if first else None
        return first


def _converted(out: Tensor, y: Tensor) -> Tensor:
    """Return the output in y's dtype."""
    if out.is_complex() and not y.is_complex():
        raise InvalidField(
            f"func returned {out.dtype} for a state of {y.dtype}: the imaginary part would be lost. "
            f"Start from a complex state, `y0.to({out.dtype})`, or return `out.real`."
        )
    return out.to(y.dtype)


def _released(*_: Any) -> NoReturn:
    raise AssertionError("a captured solve evaluated its field after the capture")


def version_of(x: Tensor) -> int | None:
    """Return how often x was written to, or None for a tensor made in inference mode, which has no counter."""
    return None if x.is_inference() else x._version


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether a and b hold the same values; NaN equals NaN."""
    return torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num())


def share_memory(tensors: Sequence[Tensor]) -> bool:
    """Return whether two of these tensors start at the same address."""
    try:
        return len(set(map(Tensor.data_ptr, tensors))) < len(tensors)
    except (NotImplementedError, RuntimeError):
        return False


def _check(out: Any, shape: torch.Size, func: Func) -> None:
    """Raise if `out`, which func returned, is not a tensor of this shape."""
    if not isinstance(out, Tensor):
        hint = "Wrap a number as `torch.full_like(y, number)`."
        if out is None:
            hint = "Did it forget `return`?"
        elif isinstance(out, (tuple, list)):
            hint = "y is one tensor here: return one, e.g. `torch.stack(...)`, or start from a tuple y0."
        elif hasattr(out, "__array__"):
            hint = "Compute with torch's functions: autograd does not see numpy's."
        raise InvalidField(
            f"func must return a tensor dy/dt of shape {tuple(shape)}; got a {type(out).__name__}. {hint}"
        )
    if out.shape != shape:
        raise InvalidField(
            f"func must return dy/dt of the state's shape {tuple(shape)}; got {tuple(out.shape)}. "
            f"{order_mend(func) or 'Return a tensor shaped like y, e.g. `out.reshape(y.shape)` or `out.expand_as(y)`.'}"
        )
