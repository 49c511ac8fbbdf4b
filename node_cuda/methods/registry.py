"""The methods by name, with their options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from node_cuda import options as opt
from node_cuda.methods.implicit.tableau import Implicit
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS
from node_cuda.methods.interpolation import dense_of
from node_cuda.methods.tableau import Tableau
from node_cuda.methods.tableaus import TABLEAUS

DEFAULT = "dopri5"
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
SCIPY = "scipy_solver"
METHODS = (*TABLEAUS, *ADAMS, *IMPLICIT_TABLEAUS, SCIPY)
"""Those that come with the package; `register_method` adds to `TABLEAUS`."""

# torchdiffeq's repository has these, its release 0.2.5 has not; each with the method to take instead.
MISSING = dict.fromkeys(
    ("implicit_euler", "implicit_midpoint", "trapezoid", "radauIIA3", "gl4", "radauIIA5", "gl6", "sdirk2", "trbdf2"),
    '"rodas5p" or "kvaerno5" for stiff problems, which choose their steps, or "implicit_adams" on a fixed grid',
)


@dataclass(frozen=True)
class Method:
    """A method as asked for: its name, its parsed options, and its tableau if it has one: of an explicit method, or of
    an implicit one."""

    name: str
    options: opt.Common
    tableau: Tableau | None = None
    implicit: Implicit | None = None

    @property
    def adaptive(self) -> bool:
        """Steps are chosen by an error estimate."""
        return isinstance(self.options, opt.AdaptiveOptions)


def lookup(name: str | None, options: Mapping[str, Any] | None, *, quiet: bool = False) -> Method:
    """The method of this name with these options. Raises ValueError for an unknown name, InvalidInput for options;
    warns of options that it does not know unless quiet."""
    name = DEFAULT if name is None else name
    if name in MISSING:
        raise ValueError(
            f'Invalid method "{name}": implicit Runge-Kutta methods on fixed grids are not here yet. Use '
            f"{MISSING[name]}."
        )
    rest = (*ADAMS, *IMPLICIT_TABLEAUS, SCIPY)
    if name not in TABLEAUS and name not in rest:
        known = ", ".join(f'"{known}"' for known in (*TABLEAUS, *rest))
        raise ValueError(f'Invalid method "{name}". Must be one of {{{known}}}.')
    if name == SCIPY:
        return Method(name, opt.parse(opt.ScipyOptions, name, options, quiet=quiet))
    if name in ADAMS:
        return Method(name, opt.parse(opt.AdamsOptions, name, options, quiet=quiet))
    if name in IMPLICIT_TABLEAUS:
        return Method(
            name, opt.parse(opt.ImplicitOptions, name, options, quiet=quiet), implicit=IMPLICIT_TABLEAUS[name]
        )
    tableau = TABLEAUS[name]
    family = opt.AdaptiveOptions if tableau.adaptive else opt.FixedOptions
    return Method(name, opt.parse(family, name, options, quiet=quiet), tableau)


def reads_tolerances(method: Method) -> bool:
    """rtol and atol decide something: steps, or when an iteration ends."""
    return method.adaptive or method.name in (SCIPY, "implicit_adams", "fixed_adams")


def supported_callbacks(method: Method) -> frozenset[str]:
    """The callbacks that this method calls."""
    if method.adaptive:
        return frozenset(("callback_step", "callback_accept_step", "callback_reject_step"))
    return frozenset(("callback_step",) if method.name != SCIPY else ())


def for_one_output(method: Method) -> Method:
    """The method for a solve whose only output lies between two steps: by default the interpolant is then the accurate
    one where torchdiffeq's is two orders below the method's (dopri8)."""
    options, tableau = method.options, method.tableau
    if not isinstance(options, opt.AdaptiveOptions) or tableau is None or options.dense != "default":
        return method
    if dense_of(tableau, options.dense).order + 1 >= tableau.order:
        return method
    return replace(method, options=replace(options, dense="accurate"))
