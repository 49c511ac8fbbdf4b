"""How a solve can end, and the exceptions that say so.

Knows nothing of tensors or methods. A new way to fail is one member of `Status` with its sentence.
"""

from __future__ import annotations

import sys
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class Status(Enum):
    """How a solve ended. The value is the code that kernels write, the sentence what a person reads."""

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
        "solution, start nearer to the event, or take larger steps.",
    )
    PENDING = 5, "Nobody has looked yet how the solve ended: `Solution.check()` does."
    RECORD_FULL = (
        6,
        "The solve took more steps than there was room to record, so that the backward pass of a deferred solve cannot "
        "take them back. Solve once with `options=dict(throw=True)`: the next solves then have room.",
    )

    NOT_SOLVED = (
        7,
        "The equations of an implicit step could not be solved at any step size: Newton's iterations do not converge. "
        "Check that func is smooth there and, if it was given, that options['jac'] is its derivative; pass "
        '`options=dict(jump_t=...)` if func is discontinuous; or use method="rodas5p", which does not iterate.',
    )

    def __new__(cls, code: int, sentence: str) -> Self:
        member = object.__new__(cls)
        member._value_ = code
        member.sentence = sentence
        return member

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}"


class InvalidInput(ValueError, AssertionError):
    """A caller's mistake in a value. Also an AssertionError, which is what torchdiffeq raises."""


class InvalidType(TypeError, AssertionError):
    """A caller's mistake in a type. Also an AssertionError, which is what torchdiffeq raises."""


class InvalidState(TypeError, NotImplementedError):
    """A state of a dtype that no method can integrate. Also a NotImplementedError, as in torchdiffeq."""


class InvalidField(ValueError, TypeError, RuntimeError):
    """The field returned something that is not dy/dt. Also a RuntimeError, as in torchdiffeq."""


class Unsupported(ValueError, AttributeError):
    """A combination of arguments that no method offers. Also an AttributeError, as in torchdiffeq."""


class UnsupportedTransform(Unsupported, RuntimeError):
    """A transform of torch.func that cannot go through this solve. Also a RuntimeError, which is what torch raises."""


class MissingGradientWarning(UserWarning):
    """func uses a tensor that requires a gradient and that its gradient mode was not told of."""


class ReconstructionWarning(UserWarning):
    """The adjoint method went backwards along another trajectory than forwards."""


class StiffnessWarning(UserWarning):
    """An explicit method is limited by stability, and not by accuracy: the field is stiff."""


class SolveError(RuntimeError, AssertionError):
    """A solve that failed: `status` says how, `t` how far it came, `stats` what it cost until there.

    Also an AssertionError, which is what torchdiffeq raises, so that code which catches that goes on working.
    """

    def __init__(self, status: Status, t: float, stats: Any, detail: str = "") -> None:
        self.status = status
        self.t = t
        self.stats = stats
        self.detail = detail
        super().__init__(f"{status.name} at t = {t:.6g}. {detail}{' ' if detail else ''}{status.sentence} ({stats})")

    def __reduce__(self) -> tuple[Any, ...]:
        # By default the message alone would be given to __init__, and a pool of workers would wait for ever.
        return type(self), (self.status, self.t, self.stats, self.detail), vars(self)


def users_level() -> int:
    """The stack level, for `warnings.warn`, of the first caller that is neither this package nor torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("node_cuda", "torch"):
        level, frame = level + 1, frame.f_back
    return level
