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
    """dy/dt = func(t, y) on flat states. The result has y's shape and dtype, and no other code writes into it.

    nfe: evaluations so far. The first two evaluations (`probes`) show how the user's function treats memory: if it
    returns the same buffer every time, its output is copied; if it writes into its argument, it gets a copy.
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
        self._last_output: Tensor | None = None

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt at the 0-d tensor t and the state y, which is not changed."""
        self.nfe += 1
        if self.bounds is not None:
            t = t.clamp(*self.bounds)
        if self.nfe <= self.probes:
            return self._probe(t, y)
        if self._copies_input:
            y = y.clone()
            return self._checked(self._call(t, y), y)
        version = None if y.is_inference() else y._version
        out = self._call(t, y)
        if version is not None and y._version != version:
            raise InvalidField(
                f"func wrote into its argument y at t = {float(t):.6g}, but not in its first calls. "
                "Write `y = y.clone()` at its beginning, or use operations that are not in place."
            )
        if isinstance(out, Tensor) and out.shape == y.shape and out.dtype is y.dtype and not self.copies_output:
            # func may enable autograd for itself; its graph is not kept in a step that autograd does not record
            return out.detach() if out.requires_grad and not torch.is_grad_enabled() else out
        return self._checked(out, y)

    def watch_again(self) -> None:
        """Probe the next two evaluations as the first two: func may act differently when autograd records."""
        self.probes = self.nfe + 2

    def release(self) -> None:
        """Drop the references to the user's function and to its output. The field cannot be evaluated after this."""
        self.func = _released
        self._last_output = None

    def _call(self, t: Tensor, y: Tensor) -> Any:
        shapes = self.layout.shapes
        state = y if shapes is None else self.layout.unflatten(y)
        try:
            out = self.func(t, state)
        except Exception as error:
            tell(error, "func", self.func, self.ends, t=t, y=state)
            raise
        if shapes is None:
            return out
        if not isinstance(out, (tuple, list)) or len(out) != len(shapes):
            got = f"{len(out)} of them" if isinstance(out, (tuple, list)) else f"a {type(out).__name__}"
            raise InvalidField(
                f"func must return a tuple of {len(shapes)} tensors, as many as the state y0 has; got {got}."
            )
        for part, shape in zip(out, shapes, strict=True):
            _check(part, shape, self.func)
        return self.layout.flatten(out)

    def _checked(self, out: Any, y: Tensor) -> Tensor:
        if not isinstance(out, Tensor) or out.shape != y.shape:
            _check(out, y.shape, self.func)
        if out.dtype is not y.dtype:
            if out.is_complex() and not y.is_complex():
                raise InvalidField(
                    f"func returned {out.dtype} for a state of {y.dtype}: the imaginary part would be lost. "
                    f"Start from a complex state, `y0.to({out.dtype})`, or return `out.real`."
                )
            return out.to(y.dtype)
        if self.copies_output:
            return out.clone()
        return out.detach() if out.requires_grad and not torch.is_grad_enabled() else out

    def _probe(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate with copies, and check how the function treats memory."""
        argument = y.clone()
        version = None if argument.is_inference() else argument._version
        raw = self._call(t, argument)
        if not isinstance(raw, Tensor) or raw.shape != y.shape:
            _check(raw, y.shape, self.func)
        wrote = not torch.equal(argument, y) if version is None else argument._version != version
        self._copies_input = self._copies_input or wrote
        # Both are alive here, so that an equal address means the same buffer.
        if self._last_output is not None and _storage(raw) == _storage(self._last_output):
            self.copies_output = True
        if self.nfe < self.probes:
            self._last_output = raw.detach()
            # Its memory may be written again by the next evaluation.
            return raw.clone() if raw.dtype is y.dtype else self._checked(raw, y)
        self._last_output = None
        return self._checked(raw, y)


def _released(*_: Any) -> NoReturn:
    raise AssertionError("a captured solve evaluated its field after the capture")


def version_of(x: Tensor) -> int | None:
    """Return how often x was written to, or None for a tensor made in inference mode, which has no counter."""
    return None if x.is_inference() else x._version


def _storage(x: Tensor) -> int:
    try:
        return x.untyped_storage().data_ptr()
    # a tensor under a torch.func transform has no storage, and is always new
    except (NotImplementedError, RuntimeError):
        return id(x)


def share_memory(tensors: Sequence[Tensor]) -> bool:
    """Return whether two of these tensors start at the same address."""
    try:
        return len({x.data_ptr() for x in tensors}) < len(tensors)
    except (NotImplementedError, RuntimeError):
        return False


def _check(out: Any, shape: torch.Size, func: Func) -> None:
    """Raise if `out`, which func returned, is not a tensor of this shape."""
    if not isinstance(out, Tensor):
        hint = " Did it forget `return`?" if out is None else ""
        raise InvalidField(
            f"func must return a tensor dy/dt of shape {tuple(shape)}; got a {type(out).__name__}.{hint} "
            "Wrap a number as `torch.full_like(y, number)`."
        )
    if out.shape != shape:
        raise InvalidField(
            f"func must return dy/dt of the state's shape {tuple(shape)}; got {tuple(out.shape)}. "
            f"{order_mend(func) or 'Return a tensor shaped like y, e.g. `out.reshape(y.shape)` or `out.expand_as(y)`.'}"
        )
