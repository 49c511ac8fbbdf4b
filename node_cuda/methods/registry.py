"""The methods by name, with their options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from node_cuda import _parse_options
from node_cuda import options as opt
from node_cuda.methods.implicit.tableau import Implicit
from node_cuda.methods.implicit.tableaus import IMPLICIT_TABLEAUS
from node_cuda.methods.interpolation import dense_of
from node_cuda.methods.tableau import Tableau
from node_cuda.methods.tableaus import TABLEAUS
from node_cuda.status import InvalidType, did_you_mean

DEFAULT = "dopri5"
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
SCIPY = "scipy_solver"
METHODS = (*TABLEAUS, *ADAMS, *IMPLICIT_TABLEAUS, SCIPY)
"""The methods that come with the package. `register_method` adds to `TABLEAUS`."""

_STIFF = 'method="rodas5p" or "kvaerno5" for stiff problems, or method="scipy_solver" with options=dict(solver="{}")'
_RADAU = ("radau5", "ode15s", "ode23s", "ode23t", "ode23tb", "rosenbrock23", "rodas4", "rodas5", "kencarp3")
_RADAU += ("kencarp4", "kencarp5", "kvaerno4", "stiff", "radau")
_BDF = ("bdf", "vode", "zvode", "cvode", "cvode_bdf", "qndf", "fbdf")
ELSEWHERE = {
    **dict.fromkeys(_RADAU, _STIFF.format("Radau")),
    **dict.fromkeys(_BDF, _STIFF.format("BDF")),
    "lsoda": _STIFF.format("LSODA"),
    **dict.fromkeys(("rk45", "ode45", "dp5", "dopri", "dopri45", "dormand_prince"), 'method="dopri5"'),
    **dict.fromkeys(("rk23", "ode23", "bs3"), 'method="bosh3"'),
    **dict.fromkeys(("dop853", "dp8"), 'method="dopri8"'),
}
"""Methods of scipy, Matlab, Julia and diffrax, in lower case, each with what there is here in its place."""


@dataclass(frozen=True)
class Method:
    """The method of a solve: its name, its parsed options, and its tableau if it has one.

    tableau: of an explicit method. implicit: that of an implicit one.
    """

    name: str
    options: opt.Common
    tableau: Tableau | None = None
    implicit: Implicit | None = None

    @cached_property
    def adaptive(self) -> bool:
        """The error estimate chooses the steps."""
        return isinstance(self.options, opt.AdaptiveOptions)

    @cached_property
    def steps_are_outputs(self) -> bool:
        """The method is an explicit one on the fixed grid t, and no option needs the single steps."""
        options, tableau = self.options, self.tableau
        return (
            isinstance(options, opt.FixedOptions)
            and tableau is not None
            and not tableau.fsal
            and options.step_size is None
            and options.grid_constructor is None
            and not (options.perturb or options.record_steps or options.progress)
            and not (options.compensated or options.cuda_graph)
        )

    @cached_property
    def reads_tolerances(self) -> bool:
        """The method uses rtol and atol, for its steps or for the end of an iteration."""
        return self.adaptive or self.implicit is not None or self.name in (SCIPY, "implicit_adams", "fixed_adams")

    @cached_property
    def clips(self) -> bool:
        """func may be evaluated between the ends of t only, and the method would not keep to that by itself."""
        return self.options.clip and not isinstance(self.options, opt.FixedOptions)


def lookup(name: str | None, options: Mapping[str, Any] | None, *, quiet: bool = False) -> Method:
    """Return the method of this name with these options.

    Raises ValueError for an unknown name and InvalidInput for wrong options. Warns of unknown options unless quiet.
    """
    name = DEFAULT if name is None else name
    if not isinstance(name, str):
        raise InvalidType(f'method must be a string; got {name!r:.60}. Use method="dopri5", for example.')
    tableau = TABLEAUS.get(name)
    known, key = _known(name, options) if options else (_PLAIN, name)
    if key is not None and (found := known.get(key)) is not None and found.tableau is tableau:
        return found
    others: dict[str, type[opt.Common]] = {
        **dict.fromkeys(ADAMS, opt.AdamsOptions),
        **{
            name: opt.ImplicitOptions if implicit.adaptive else opt.FixedImplicitOptions
            for name, implicit in IMPLICIT_TABLEAUS.items()
        },
        SCIPY: opt.ScipyOptions,
    }
    if tableau is not None:
        family: type[opt.Common] = opt.AdaptiveOptions if tableau.adaptive else opt.FixedOptions
    elif name in others:
        family = others[name]
    else:
        names = (*TABLEAUS, *others)
        known = ", ".join(f'"{known}"' for known in names)
        instead = ELSEWHERE.get(name.lower())
        hint = f" Use {instead}." if instead else did_you_mean(name, names)
        raise ValueError(f'Invalid method "{name}".{hint} Must be one of {{{known}}}.')
    implicit = IMPLICIT_TABLEAUS.get(name)
    _parse_options.check_mapping(options)
    defaults = {} if implicit is None else implicit.defaults
    parsed = _parse_options.parse(family, name, {**defaults, **(options or {})}, quiet=quiet)
    method = Method(name, parsed, tableau, implicit)
    if key is not None and all(x in parsed.__dataclass_fields__ for x in options or ()):  # the others warn each time
        if len(known) >= MOST:
            known.clear()
        known[key] = method
    return method


MOST = 256
"""The number of methods with options that are kept."""

_PLAIN: dict[Any, Method] = {}
"""The methods as `lookup` made them, by the content of their options. One that was registered anew has another
tableau."""

_WORDS = frozenset((bool, int, float, str, type(None)))


def _known(name: str, options: Any) -> tuple[dict[Any, Method], Any]:
    """Return where the method with these options is kept, and its key there; None if an option has no plain value.

    Options with a cache of compiled solves are kept in that cache, so that they do not keep it alive.
    """
    if type(options) is not dict or options.get("progress"):  # tqdm is looked for each time
        return _PLAIN, None
    known: dict[Any, Method] = _PLAIN
    key: list[Any] = [name]
    for option, value in options.items():
        if (kind := type(value)) in _WORDS:
            key += option, kind, value
        elif option == "compile" and (kept := getattr(value, "methods", None)) is not None:
            known = kept
        else:
            return known, None
    return known, tuple(key)


def supported_callbacks(method: Method) -> frozenset[str]:
    """Return the names of the callbacks that this method calls."""
    if method.adaptive:
        return frozenset(("callback_step", "callback_accept_step", "callback_reject_step"))
    return frozenset(("callback_step",) if method.name != SCIPY else ())


def for_one_output(method: Method) -> Method:
    """Return the method for a solve with one output inside a step.

    By default it then uses the accurate interpolant if that of torchdiffeq is two orders below the method (dopri8).
    """
    options, tableau = method.options, method.tableau
    if not isinstance(options, opt.AdaptiveOptions) or tableau is None or options.dense != "default":
        return method
    if dense_of(tableau, options.dense).order + 1 >= tableau.order:
        return method
    return replace(method, options=replace(options, dense="accurate"))
