"""How the size of a step follows from the errors of the last ones: `Controller`, and those that have a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from node_cuda.kernels import reference as kernels
from node_cuda.options import AdaptiveOptions
from node_cuda.status import InvalidInput


@dataclass(frozen=True)
class Controller:
    """Coefficients of a proportional-integral-derivative step controller, in the signal log(error ratio).

    factor = safety * r_n^-(p + i + d)/q * r_{n-1}^(p + 2 d)/q * r_{n-2}^-d/q for a method of order q. keep: an accepted
    step is never followed by a smaller one (torchdiffeq's rule; a textbook controller does not have it).
    """

    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    keep: bool = False

    def law(self, order: int, options: AdaptiveOptions) -> kernels.ControlLaw:
        """The constants for a method of this order."""
        p, i, d = self.pcoeff / order, self.icoeff / order, self.dcoeff / order
        return kernels.ControlLaw(
            exponents=(p + i + d, -(p + 2 * d), d),
            safety=float(options.safety),
            ifactor=float(options.ifactor),
            dfactor=float(options.dfactor),
            keep=self.keep,
            min_step=float(options.min_step),
            max_step=float(options.max_step),
        )


CONTROLLERS = {
    "torchdiffeq": Controller(keep=True),
    "I": Controller(),
    # Hairer, Norsett and Wanner, Solving ODEs II, IV.2: exponents 0.7 and -0.4.
    "PI": Controller(pcoeff=0.4, icoeff=0.3),
    # ARKODE's default (Kennedy and Carpenter 2003): exponents 0.58, -0.21 and 0.1.
    "PID": Controller(pcoeff=0.01, icoeff=0.47, dcoeff=0.1),
}


def controller(choice: Any) -> Controller:
    """A controller from its name, or itself."""
    if isinstance(choice, Controller):
        return choice
    if not isinstance(choice, str) or choice not in CONTROLLERS:
        raise InvalidInput(
            f'options["controller"] must be one of {", ".join(map(repr, CONTROLLERS))} or a '
            f"node_cuda.controllers.Controller; got {choice!r}."
        )
    return CONTROLLERS[choice]
