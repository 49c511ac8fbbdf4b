"""Installs modules under the names of torchdiffeq in this process, and takes them away again. No file is changed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

from node_cuda._version import __version__
from node_cuda.as_torchdiffeq import names
from node_cuda.event import odeint_event
from node_cuda.odeint import odeint, odeint_adjoint, odeint_dense
from node_cuda.status import Unsupported

OURS = f"0.2.5+node_cuda.{__version__}"
"""`torchdiffeq.__version__`: the version whose behaviour this package has, and its name."""

PARTS = {
    "odeint": ("SOLVERS", "odeint", "odeint_dense", "odeint_event"),
    "adjoint": ("OdeintAdjointMethod", "find_parameters", "odeint_adjoint"),
    "misc": ("Perturb", "_check_inputs", "_flat_to_shape", "_mixed_norm", "_rms_norm"),
    "interp": ("_interp_evaluate", "_interp_fit"),
    "solvers": ("AdaptiveStepsizeEventODESolver", "AdaptiveStepsizeODESolver", "FixedGridODESolver"),
    "fixed_grid": ("Euler", "FixedGridODESolver", "Midpoint", "RK4"),
    "rk_common": ("RKAdaptiveStepsizeODESolver", "_ButcherTableau", "rk4_alt_step_func"),
    "dopri5": ("DPS_C_MID", "Dopri5Solver", "RKAdaptiveStepsizeODESolver", "_DORMAND_PRINCE_SHAMPINE_TABLEAU"),
    "event_handling": ("find_event",),
}
"""The modules of `torchdiffeq._impl`, with the names that they have here."""

SOLVE = {"odeint": odeint, "odeint_adjoint": odeint_adjoint, "odeint_event": odeint_event, "odeint_dense": odeint_dense}


class Ready(Loader):
    """Loads a module that exists already."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing."""


class Stand(ModuleType):
    """A module in the place of one of torchdiffeq's."""

    def __init__(self, name: str, members: dict[str, Any]) -> None:
        super().__init__(name, f"node_cuda {__version__} in the place of {name}.")
        self.__file__ = __file__  # `from torchdiffeq._impl.misc import other` names it in its error
        self.__spec__ = ModuleSpec(name, Ready(self), origin=__file__)
        self.__package__ = name
        vars(self).update(members)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        covered = ", ".join(sorted(x for x in vars(self) if not x.startswith("__")))
        raise AttributeError(
            f"{self.__name__} is node_cuda here, which has no {name!r}. It has {covered}. Run this program without "
            "install_as_torchdiffeq, or report the name that it needs."
        )


class AsTorchdiffeq:
    """The modules that stand for torchdiffeq, as long as they are installed; made by `install_as_torchdiffeq`."""

    def __init__(self) -> None:
        self._solvers = names._Solvers()
        self._modules = _modules(self._solvers)
        sys.modules.update(self._modules)
        sys.meta_path.insert(0, self)

    @property
    def installed(self) -> bool:
        """Whether `import torchdiffeq` gives this package."""
        return self in sys.meta_path

    def uninstall(self) -> None:
        """Take the modules away: the next `import torchdiffeq` gives torchdiffeq. What was imported stays as it is."""
        if self.installed:
            sys.meta_path.remove(self)
            self._solvers.forget()
        for name, module in self._modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]

    def __enter__(self) -> AsTorchdiffeq:
        return self

    def __exit__(self, *_: object) -> None:
        self.uninstall()

    def __repr__(self) -> str:
        return f"AsTorchdiffeq({OURS!r}, installed={self.installed})"

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Tell the import system that there are no further modules of torchdiffeq."""
        if name.startswith("torchdiffeq."):
            raise ModuleNotFoundError(
                f"torchdiffeq is node_cuda here, which has no module {name}. It has "
                f"{', '.join(f'torchdiffeq._impl.{part}' for part in PARTS)}. Run this program without "
                "install_as_torchdiffeq, or report the module that it needs.",
                name=name,
            )


def install_as_torchdiffeq() -> AsTorchdiffeq:
    """Let `import torchdiffeq` give this package, in this process, also inside of other packages.

        node_cuda.install_as_torchdiffeq()  # before the first import of a package that imports torchdiffeq
        import torchcde

    `python -m node_cuda run train.py` does the same for a program as it stands. Returns a handle with `uninstall()`,
    which is also a context manager. A second call returns the handle of the first. Files are not changed, and
    torchdiffeq need not be installed. `torchdiffeq.__version__` is "0.2.5+node_cuda.<version>".

    Raises Unsupported if torchdiffeq was imported before: the modules that did so would keep it.
    """
    for finder in sys.meta_path:
        if isinstance(finder, AsTorchdiffeq):
            return finder
    if "torchdiffeq" in sys.modules:
        by = sorted(name for name, module in list(sys.modules.items()) if _uses(name, module))
        users = f", by {', '.join(by[:5])}" if by else ""
        raise Unsupported(
            f"torchdiffeq was imported before{users}, and what imported it would keep it. Call "
            "`node_cuda.install_as_torchdiffeq()` at the top of the program, before those imports, or start it by "
            "`python -m node_cuda run PROGRAM.py`."
        )
    return AsTorchdiffeq()


def _uses(name: str, module: Any) -> bool:
    """Return whether this module holds torchdiffeq, or a function of it, among its attributes."""
    if name.split(".")[0] in ("torchdiffeq", "node_cuda"):
        return False
    values = list(vars(module).values()) if isinstance(module, ModuleType) else []
    # Not isinstance, which reads `x.__class__`: an object may warn of each attribute that is read.
    known = [x for x in values if issubclass(type(x), _KINDS)]
    origins = [x.__name__ if isinstance(x, ModuleType) else x.__module__ for x in known]
    return any(isinstance(origin, str) and origin.split(".")[0] == "torchdiffeq" for origin in origins)


_KINDS = (ModuleType, FunctionType)


def _modules(solvers: names._Solvers) -> dict[str, ModuleType]:
    """Return new modules by their names. As in torchdiffeq, the attribute _impl.odeint is the function."""
    special = {**SOLVE, "SOLVERS": solvers}
    parts = {
        part: Stand(f"torchdiffeq._impl.{part}", {x: special[x] if x in special else getattr(names, x) for x in known})
        for part, known in PARTS.items()
    }
    impl = Stand("torchdiffeq._impl", {**parts, **SOLVE})
    top = Stand("torchdiffeq", {"_impl": impl, **SOLVE, "__version__": OURS})
    for package in (impl, top):
        package.__path__ = []
    return {module.__name__: module for module in (top, impl, *parts.values())}
