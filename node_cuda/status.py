"""The ways a solve can end, and the exceptions for them.

This module uses no tensors and no methods. A new way to fail is one member of `Status` with its sentence.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from enum import Enum, unique
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


@unique
class Status(Enum):
    """How a solve ended. The value is the code that kernels write; the sentence is for the user."""

    sentence: str

    SUCCESS = 0, "The solve reached its end."
    STEP_UNDERFLOW = (
        1,
        "The step size shrank until t + h == t: the field is too stiff for an explicit method here, or its solution "
        "blows up. Loosen rtol and atol, end the interval earlier, set `options=dict(min_step=...)`, or use "
        'method="rodas5p" for a stiff field.',
    )
    NON_FINITE = (
        2,
        "The field or the state became NaN or infinite. Check the field at this time and state, bound its output "
        "(tanh, weight decay), or pass `options=dict(jump_t=...)` if it is discontinuous there.",
    )
    MAX_STEPS = (
        3,
        "max_num_steps was used up before the next output time. Raise `options=dict(max_num_steps=...)`, loosen rtol "
        'and atol, or use method="rodas5p" if the field is stiff.',
    )
    NO_EVENT = (
        4,
        "The event function did not change its sign within the allowed number of steps. Check that it does along the "
        "solution, or start nearer to the event. Where two changes may lie in one step, use "
        "`options=dict(event_checks=8)` or `options=dict(max_step=...)`.",
    )
    PENDING = 5, "The status has not been read from the device yet: `Solution.check()` reads it."
    RECORD_FULL = (
        6,
        "The solve took more steps than there was room to record, so the backward pass of a deferred solve cannot "
        "reverse them. Solve once with `options=dict(throw=True)`: the next solves then have room.",
    )
    BY_CHANCE = (
        7,
        "The field answers differently when it is asked again at the same t and y (dropout, noise?), so that no step "
        "is small enough. Put func in evaluation mode, `func.eval()`, or draw the noise once before the solve.",
    )
    NON_FINITE_GRADIENT = (
        8,
        "dL/dy, with which the backward pass begins, holds NaN or infinity. Look at the loss, not at func: it may "
        "divide by 0, or take the sqrt or the log of 0.",
    )

    NOT_SOLVED = (
        9,
        "The equations of an implicit step could not be solved: Newton's iterations do not converge (on a fixed grid "
        "at its step_size, else at any). Check that func is smooth there and, if it was given, that options['jac'] is "
        'its derivative; pass `options=dict(jump_t=...)` if func is discontinuous; or use method="rodas5p", which does '
        "not iterate.",
    )

    def __new__(cls, code: int, sentence: str) -> Self:
        member = object.__new__(cls)
        member._value_ = code
        member.sentence = sentence
        return member

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}"


class InvalidInput(ValueError, AssertionError):
    """The caller passed a wrong value. Also an AssertionError, which is what torchdiffeq raises."""


class InvalidType(TypeError, AssertionError):
    """The caller passed a wrong type. Also an AssertionError, which is what torchdiffeq raises."""


class InvalidState(TypeError, NotImplementedError):
    """The state has a dtype that no method can integrate. Also a NotImplementedError, as in torchdiffeq."""


class InvalidField(ValueError, TypeError, RuntimeError):
    """The field returned something that is not dy/dt. Also a RuntimeError, as in torchdiffeq."""


class Unsupported(ValueError, AttributeError):
    """No method supports this combination of arguments. Also an AttributeError, as in torchdiffeq."""


class UnsupportedTransform(Unsupported, RuntimeError):
    """This solve does not support this transform of torch.func. Also a RuntimeError, which is what torch raises."""


class MissingGradientWarning(UserWarning):
    """func uses a tensor that requires a gradient, but the gradient mode does not know this tensor."""


class ReconstructionWarning(UserWarning):
    """The backward solve of the adjoint followed another trajectory than the forward solve."""


class PerformanceWarning(UserWarning):
    """A gradient will cost far more than it needs to."""


class StiffnessWarning(UserWarning):
    """An explicit method is limited by stability, and not by accuracy: the field is stiff."""


class SolveError(RuntimeError, AssertionError):
    """The solve failed. `status` says how, `t` is the time that it reached, `stats` are the statistics up to there.

    Also an AssertionError, which is what torchdiffeq raises, so that code which catches that still works.
    """

    def __init__(self, status: Status, t: float, stats: Any, detail: str = "") -> None:
        self.status = status
        self.t = t
        self.stats = stats
        self.detail = detail
        super().__init__(f"{status.name} at t = {t:.6g}. {detail}{' ' if detail else ''}{status.sentence} ({stats})")

    def __reduce__(self) -> tuple[Any, ...]:
        # By default only the message would be passed to __init__, and a pool of workers would wait for ever.
        return type(self), (self.status, self.t, self.stats, self.detail), vars(self)


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """A question that names what was meant, with a space before it; "" if nothing known is like it."""
    names = {x.lower(): x for x in known}
    near = difflib.get_close_matches(str(name).lower(), names, 1)
    return f" Did you mean {names[near[0]]!r}?" if near else ""


def users_level() -> int:
    """Return the stack level, for `warnings.warn`, of the first caller outside of this package and of torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("node_cuda", "torch"):
        level, frame = level + 1, frame.f_back
    return level
