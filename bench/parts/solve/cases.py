"""The cases that speed.py and solve.py time: one row for each case, and no code."""

from __future__ import annotations

from typing import NamedTuple

import torch

from parts.common.modes import ADJOINT, BACKPROP


class Case(NamedTuple):
    """A field on a random state (batch, dim), solved from t = 0 to t_end with dopri5.

    `hidden` is the width of an MLP field dim -> hidden -> dim; None: the cheap field dz/dt = sin z. `timed` is
    "forward" (under no_grad), "backward" (the gradient of a loss alone), or "step" (both). `gradient` is the name of a
    mode in parts/common/modes.py. `target` is the promised ratio torchdiffeq's time / our time, or None; in SOLVE_CASES
    it is the target of the kernels.
    """

    timed: str
    gradient: str
    batch: int
    dim: int
    hidden: int | None
    t_end: float
    outputs: int = 2
    rtol: float = 1e-7  # torchdiffeq's defaults
    atol: float = 1e-9
    dtype: torch.dtype = torch.float32
    target: float | None = None

    @property
    def name(self) -> str:
        """The name of the case in tables: what differs from the defaults."""
        field = "sin z" if self.hidden is None else f"hidden {self.hidden}"
        words = [self.timed, f"{self.batch}x{self.dim} {field}"]
        if self.timed != "forward":
            words.append(self.gradient)
        if self.outputs != 2:
            words.append(f"{self.outputs} outputs")
        if self.rtol != 1e-7:
            words.append(f"rtol {self.rtol:g}")
        if self.dtype is not torch.float32:
            words.append(str(self.dtype).removeprefix("torch."))
        return ", ".join(words)


CASES = (
    Case("forward", BACKPROP, 16, 2, 50, t_end=5.0, target=2.5),
    Case("forward", BACKPROP, 128, 64, 64, t_end=5.0, target=2.5),
    Case("forward", BACKPROP, 1024, 64, 64, t_end=5.0, target=2.5),
    Case("forward", BACKPROP, 16, 2, 50, t_end=5.0, dtype=torch.float64),
    Case("forward", BACKPROP, 16, 2, 50, t_end=5.0, outputs=50),
    # A wide batch: a solver step costs more than the field. With this tolerance a run takes seconds.
    Case("backward", ADJOINT, 65536, 32, 16, t_end=1.0, rtol=1e-6, atol=1e-8, target=4.0),
    Case("step", ADJOINT, 16, 2, 50, t_end=5.0),
    Case("step", ADJOINT, 128, 64, 64, t_end=5.0),
    Case("step", ADJOINT, 1024, 64, 64, t_end=5.0),
    Case("step", BACKPROP, 16, 2, 50, t_end=5.0),
    Case("step", BACKPROP, 128, 64, 64, t_end=5.0),
)
QUICK_CASES = (
    Case("forward", BACKPROP, 4, 2, 8, t_end=1.0, rtol=1e-4, atol=1e-4),
    Case("backward", ADJOINT, 4, 2, 8, t_end=1.0, rtol=1e-4, atol=1e-4),
)


def whole(batch: int, dim: int, hidden: int | None, t_end: float, target: float) -> tuple[Case, Case]:
    """A solve and a training step at rtol 1e-6. The target is for the solve; the training step must not be slower."""
    forward = Case("forward", BACKPROP, batch, dim, hidden, t_end, rtol=1e-6, atol=1e-6, target=target)
    return forward, forward._replace(timed="step", gradient=ADJOINT, target=1.0)


SOLVE_CASES = (
    *whole(128, 64, 64, t_end=5.0, target=4.0),
    *whole(16, 2, 50, t_end=5.0, target=1.0),
    *whole(1024, 32, 64, t_end=5.0, target=1.0),
    *whole(4096, 4096, None, t_end=1.0, target=3.0),
)
QUICK_SOLVE_CASES = (
    *whole(4, 2, 8, t_end=1.0, target=4.0),
    *whole(16, 8, None, t_end=1.0, target=3.0),
)
