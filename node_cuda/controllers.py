"""Step-size controllers: the size of the next step from the last errors, chosen by name, PID coefficients, or your
class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from node_cuda.kernels import reference
from node_cuda.kernels.reference import ControllerParams
from node_cuda.options import AdaptiveOptions
from node_cuda.status import InvalidInput


@runtime_checkable
class StepSizeController(Protocol):
    """The protocol of `options["controller"]`: it accepts or rejects a step by its error ratio, and chooses the next
    size.

    One object may be used in many solves. So `start` makes the state that a solve must remember. ratio: the norm of the
    error in units of the tolerances, finite and not negative. Without calling the controller, the solver keeps min_step
    and max_step, accepts a step of min_step, shortens steps that must end at a certain time, and shrinks a step by
    dfactor if its ratio is not finite. A controller that is not exactly a `Controller` runs on the host: on CUDA the
    solver reads the ratio once in each step, and such a solve is not captured.
    """

    def start(self, order: int, options: AdaptiveOptions) -> Any:
        """Return the state at the start of a solve by a method of this order."""
        ...

    def accept(self, h: float, ratio: float, state: Any) -> bool:
        """Return whether to accept a step of size h with this ratio."""
        ...

    def propose(self, h: float, ratio: float, accepted: bool, state: Any) -> tuple[float, Any]:
        """Return the size of the next step, which is positive, and the new state."""
        ...


class PIDState(NamedTuple):
    """The constants of a solve, and the ratios of its last two accepted steps."""

    law: ControllerParams
    history: tuple[float, float]


@dataclass(frozen=True)
class Controller:
    """Coefficients of a proportional-integral-derivative step controller, for the signal log(error ratio).

    factor = safety * r_n^-(p + i + d)/q * r_{n-1}^(p + 2 d)/q * r_{n-2}^-d/q for a method of order q. keep: the step is
    never made smaller after an accepted step (torchdiffeq's rule, which textbook controllers do not have).
    """

    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    keep: bool = False

    def law(self, order: int, options: AdaptiveOptions) -> ControllerParams:
        """Return the constants for a method of this order."""
        p, i, d = self.pcoeff / order, self.icoeff / order, self.dcoeff / order
        return ControllerParams(
            exponents=(p + i + d, -(p + 2 * d), d),
            safety=float(options.safety),
            ifactor=float(options.ifactor),
            dfactor=float(options.dfactor),
            keep=self.keep,
            min_step=float(options.min_step),
            max_step=float(options.max_step),
        )

    def start(self, order: int, options: AdaptiveOptions) -> PIDState:
        """Return the constants for this order, with error ratios of 1."""
        return PIDState(self.law(order, options), (1.0, 1.0))

    def accept(self, h: float, ratio: float, state: PIDState) -> bool:
        """Return whether the ratio is at most 1."""
        return reference.step_control(state.law, h, ratio, state.history).accept

    def propose(self, h: float, ratio: float, accepted: bool, state: PIDState) -> tuple[float, PIDState]:
        """Return the next step size by the formula of the class, and the state with the new ratio."""
        judged = reference.step_control(state.law, h, ratio, state.history)
        return judged.h_next, state._replace(history=judged.history if accepted else state.history)


CONTROLLERS = {
    "torchdiffeq": Controller(keep=True),
    "I": Controller(),
    # Hairer, Norsett and Wanner, Solving ODEs II, IV.2: exponents 0.7 and -0.4.
    "PI": Controller(pcoeff=0.4, icoeff=0.3),
    # ARKODE's default (Kennedy and Carpenter 2003): exponents 0.58, -0.21 and 0.1.
    "PID": Controller(pcoeff=0.01, icoeff=0.47, dcoeff=0.1),
    # Of the implicit methods: steps may grow fast behind a transient, and few are rejected. Exponents 1 and -0.3.
    "stiff": Controller(pcoeff=0.3, icoeff=0.7),
}


def controller(choice: Any) -> StepSizeController:
    """Return a controller from its name, or the controller itself. Raises InvalidInput if it is neither."""
    if type(choice) is Controller or (not isinstance(choice, str) and isinstance(choice, StepSizeController)):
        return choice
    if not isinstance(choice, str) or choice not in CONTROLLERS:
        raise InvalidInput(
            f'options["controller"] must be one of {", ".join(map(repr, CONTROLLERS))}, a '
            "node_cuda.controllers.Controller, or an object with the methods of "
            f"node_cuda.controllers.StepSizeController (start, accept, propose); got {choice!r}."
        )
    return CONTROLLERS[choice]


def runs_on_host(chosen: StepSizeController) -> bool:
    """Return whether the rule of the controller is Python code, which no kernel can run."""
    return type(chosen) is not Controller


class OnHost:
    """A controller of the user in one solve, in the form that `StepControl` calls."""

    def __init__(self, chosen: StepSizeController, order: int, options: AdaptiveOptions) -> None:
        self._chosen = chosen
        self._order, self._options = order, options
        self._law = Controller().law(order, options)
        self._state: Any = None

    def start(self) -> None:
        """Start a solve."""
        self._state = self._chosen.start(self._order, self._options)

    def __call__(self, h: float, ratio: float) -> tuple[bool, float]:
        """Return whether a step of size h is accepted, and the size of the next. Raises InvalidInput for an invalid
        size."""
        law = self._law
        if not math.isfinite(ratio):
            return h <= law.min_step, self._within(h * law.dfactor)
        good = bool(self._chosen.accept(h, ratio, self._state)) and h <= law.max_step
        accepted = good or h <= law.min_step
        proposed, self._state = self._chosen.propose(h, ratio, accepted, self._state)
        if not 0 < proposed < math.inf:
            raise InvalidInput(
                f"propose of {type(self._chosen).__name__} must return a step size that is positive and finite; got "
                f"{proposed!r} after a step of {h:.6g} with the error ratio {ratio:.6g}."
            )
        return accepted, self._within(float(proposed))

    def _within(self, h: float) -> float:
        return min(max(h, self._law.min_step), self._law.max_step)
