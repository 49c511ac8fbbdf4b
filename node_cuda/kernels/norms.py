"""The norm of an error: its scale from the tolerances, and the reduction of a vector to one number.

The norms here return Python floats and cost exactly one read from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from node_cuda._torch_modes import forward_mode, numbers
from node_cuda._typing import Tolerance
from node_cuda._user_code import tell

HALF = (torch.float16, torch.bfloat16)
"""The dtypes whose sums are in float32."""


def rms(tensors: Sequence[Tensor]) -> float:
    """Return the largest root mean square, max_i sqrt(mean |x_i|^2), over tensors of any shape; empty ones count as 0.

    It is NaN if any of the tensors contains NaN. (A plain `max` may lose it, depending on the order.)
    """
    tensors = [x for x in tensors if x.numel()]
    if not tensors:
        return 0.0
    if len(tensors) == 1:
        return _norm(tensors[0]).item() / math.sqrt(tensors[0].numel())
    norms = [_norm(x) for x in tensors] if _mixed(tensors) else torch._foreach_norm(tensors)
    widest = max((x.dtype for x in norms), key=lambda dtype: dtype.itemsize)
    values = numbers(torch.stack([x.to(widest) for x in norms]))
    values = [v / math.sqrt(x.numel()) for v, x in zip(values, tensors, strict=True)]
    return math.nan if any(map(math.isnan, values)) else max(values)


def _mixed(tensors: Sequence[Tensor]) -> bool:
    return any(x.dtype in HALF or x.dtype != tensors[0].dtype for x in tensors)


def _norm(x: Tensor) -> Tensor:
    # A sum of squares in half precision overflows at 65504.
    return torch.linalg.vector_norm(x, dtype=torch.float32) if x.dtype in HALF else torch.linalg.vector_norm(x)


@dataclass(eq=False)
class ErrorNorm:
    """The scaled norm of an error: the rms over a segment of |e_i| / (atol_i + rtol_i |y_i|), the maximum over
    segments.

    rtol, atol: numbers, or tensors that broadcast against the state. sizes: the lengths of the segments of a flat state
    (one for each component of a tuple); None for a single segment. custom: a norm that replaces the rms; a function of
    the scaled error in the state's shape and of the list of further scaled errors.
    """

    rtol: Tolerance
    atol: Tolerance
    sizes: tuple[int, ...] | None = None
    custom: Callable[[Tensor, Sequence[Tensor]], Tensor | float] | None = None
    _zero_d: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    def scale(self, magnitude: Tensor) -> Tensor:
        """Return atol + rtol * magnitude, for a real non-negative magnitude of the state's shape."""
        if magnitude.dtype in HALF:
            magnitude = magnitude.float()  # float32, where rtol |y| underflows later
        if isinstance(self.rtol, Tensor):
            return self.atol + self.rtol.to(magnitude) * magnitude
        return torch.add(self._atol_like(magnitude), magnitude, alpha=self.rtol)

    def __call__(self, scaled: Tensor, also: Sequence[Tensor] = ()) -> float:
        """Return the norm of a scaled error, and of further scaled errors. One host read."""
        if forward_mode():  # the choice of a step has no tangent
            scaled, also = scaled.detach(), [x.detach() for x in also]
        if self.custom is not None:
            return abs(float(self.by_user(scaled, also)))
        if self.sizes is None and not also and (count := scaled.numel()):
            return _norm(scaled).item() / math.sqrt(count)
        segments = (scaled,) if self.sizes is None else scaled.split(self.sizes)
        return rms((*segments, *also))

    def by_user(self, scaled: Tensor, also: Sequence[Tensor] = ()) -> Tensor | float:
        """The user's norm of an already scaled error, and of further scaled ones."""
        assert self.custom is not None
        try:
            return self.custom(scaled, also)
        except Exception as error:
            tell(error, 'options["norm"]', self.custom, scaled_error=scaled)
            raise

    def _atol_like(self, magnitude: Tensor) -> Tensor:
        """Return atol as a tensor, made once for each dtype, so that the scale is one operation."""
        key = magnitude.dtype
        if key not in self._zero_d:
            self._zero_d[key] = torch.as_tensor(self.atol, dtype=key, device=magnitude.device)
        return self._zero_d[key]
