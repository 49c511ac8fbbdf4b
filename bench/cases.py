"""The problems that speed.py times: data only, one row a case."""

from __future__ import annotations

from typing import NamedTuple

import torch
from libraries import FUNCTIONS


class Case(NamedTuple):
    """An MLP field dim -> hidden -> dim on a batch of random states, from t = 0 to t_end, with dopri5.

    `timed` is "forward" (under no_grad), "backward" (the gradient of a loss alone), or "step" (both).
    `target` is the ratio torchdiffeq's time / our time that the project has promised, if it has.
    """

    timed: str
    function: str
    batch: int
    dim: int
    hidden: int
    t_end: float
    outputs: int = 2
    rtol: float = 1e-7  # torchdiffeq's defaults
    atol: float = 1e-9
    dtype: torch.dtype = torch.float32
    target: float | None = None

    @property
    def name(self) -> str:
        words = [self.timed, f"{self.batch}x{self.dim} hidden {self.hidden}"]
        if self.timed != "forward":
            words.append(FUNCTIONS[self.function])
        if self.outputs != 2:
            words.append(f"{self.outputs} outputs")
        if self.rtol != 1e-7:
            words.append(f"rtol {self.rtol:g}")
        if self.dtype is not torch.float32:
            words.append(str(self.dtype).removeprefix("torch."))
        return ", ".join(words)


CASES = (
    Case("forward", "odeint", 16, 2, 50, t_end=5.0, target=2.5),
    Case("forward", "odeint", 128, 64, 64, t_end=5.0, target=2.5),
    Case("forward", "odeint", 1024, 64, 64, t_end=5.0, target=2.5),
    Case("forward", "odeint", 16, 2, 50, t_end=5.0, dtype=torch.float64),
    Case("forward", "odeint", 16, 2, 50, t_end=5.0, outputs=50),
    # The wide batch: a solver step costs more than the field. The tolerance makes a run a matter of seconds.
    Case("backward", "odeint_adjoint", 65536, 32, 16, t_end=1.0, rtol=1e-6, atol=1e-8, target=4.0),
    Case("step", "odeint_adjoint", 16, 2, 50, t_end=5.0),
    Case("step", "odeint_adjoint", 128, 64, 64, t_end=5.0),
    Case("step", "odeint_adjoint", 1024, 64, 64, t_end=5.0),
    Case("step", "odeint", 16, 2, 50, t_end=5.0),
    Case("step", "odeint", 128, 64, 64, t_end=5.0),
)
QUICK_CASES = (
    Case("forward", "odeint", 4, 2, 8, t_end=1.0, rtol=1e-4, atol=1e-4),
    Case("backward", "odeint_adjoint", 4, 2, 8, t_end=1.0, rtol=1e-4, atol=1e-4),
)
