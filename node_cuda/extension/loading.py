"""Finds the compiled module: `node_cuda._C` as installed, or compiled once on the first CUDA solve, or the reason why
not.

Importing node_cuda runs nothing of this, and tensors on the CPU do not use it. So the installation cannot change their
results.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from node_cuda.extension import build

Capability = tuple[int, int]


class Search(NamedTuple):
    """The result of a search for the module: the module, or None and the reason as half a sentence."""

    module: ModuleType | None
    why: str


_lock = threading.Lock()  # one thread compiles, the others wait for it
_found: dict[Capability | None, Search] = {}
_compiled: Search | None = None  # at most one attempt in a process


def kernels(device: torch.device | int | None = None) -> ModuleType | None:
    """Return the compiled module with kernels for a CUDA device (the current one), or None: then plain PyTorch is used.

    The first call may compile for a minute, and says so. If that fails, it warns once and never tries again.
    """
    capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None
    found = _found.get(capability)
    if found is None:
        with _lock:
            found = _found.get(capability)
            if found is None:
                found = _found[capability] = _search(capability)
                if found.module is None and not declined():
                    warnings.warn(
                        f"CUDA tensors take the pure PyTorch path, because {found.why}. "
                        f"For the kernels, in a checkout of node_cuda: {build.COMMAND}",
                        RuntimeWarning,
                        stacklevel=3,
                    )
    return found.module


def declined() -> bool:
    """Return whether the environment variables exclude the kernels."""
    return os.environ.get("NODE_CUDA_BUILD") in ("python", "cpu")


def _search(capability: Capability | None) -> Search:
    global _compiled
    at_hand = installed(capability)
    if at_hand.module is not None:
        return at_hand
    if _compiled is None:
        _compiled = _compile(at_hand.why)
    if _compiled.module is not None and (unfit := _unfit(_compiled.module, capability)):
        return Search(None, unfit)
    return _compiled


def installed(capability: Capability | None = None) -> Search:
    """Return the installed `node_cuda._C` if it has kernels that run here. Compiles nothing."""
    try:
        module = importlib.import_module(build.MODULE)
    except ModuleNotFoundError as error:
        if error.name == build.MODULE:
            return Search(None, f"the compiled module {build.MODULE} is not installed{_noted('python')}")
        return Search(None, f"{build.MODULE} is installed but does not load: {error}")
    except ImportError as error:  # built with another torch, or a shared library is missing
        return Search(None, f"{build.MODULE} is installed but does not load: {error}")
    info = module.build_info() if hasattr(module, "build_info") else {"torch": "an unknown version"}
    if info["torch"] != str(torch.__version__):
        why = f"{build.MODULE} was built with torch {info['torch']}, and this is torch {torch.__version__}"
        return Search(None, why)
    if not info["kernels"]:
        return Search(None, f"{build.MODULE} is installed without kernels{_noted('cpu')}")
    if _outdated():
        return Search(None, f"{build.MODULE} was compiled from other sources than those that are in csrc/ now")
    if unfit := _unfit(module, capability):
        return Search(None, unfit)
    return Search(module, f"{build.MODULE} was compiled at installation (CUDA {info['cuda']}, for {info['archs']})")


def at_hand(capability: Capability | None) -> Search:
    """Return the installed module, or the one that an earlier first use compiled. Compiles nothing."""
    found = installed(capability)
    with contextlib.suppress(build.BuildError):
        if found.module is None and compilation().finished.is_file():
            return _search(capability)
    return found


def _noted(setting: str) -> str:
    """Return the reason that the installation wrote down, in brackets, if it was built in this setting."""
    note = build.read_note()
    return f" ({note.why})" if note is not None and note.setting == setting else ""


def _outdated() -> bool:
    """Return whether the sources of an editable install have changed since it was compiled: its structs may differ."""
    note = build.read_note()
    try:
        return note is not None and note.sources not in ("", build.digest(build.find_csrc()))
    except (build.BuildError, OSError):
        return False


def _unfit(module: ModuleType, capability: Capability | None) -> str:
    archs = module.build_info()["archs"]
    if capability is None or build.fits(archs, capability):
        return ""
    major, minor = capability
    return f"the kernels are compiled for {archs}, and this GPU has compute capability {major}.{minor}"


# --- compiling on first use ------------------------------------------------------------------------------------------


class Compilation(NamedTuple):
    """A compilation on first use: its sources and settings, and the folder of the result."""

    recipe: build.Recipe
    csrc: Path
    folder: Path
    name: str

    @property
    def library(self) -> Path:
        return self.folder / f"{self.name}{'.pyd' if os.name == 'nt' else '.so'}"

    @property
    def finished(self) -> Path:
        """A file that is written after the first import of the library, so that an unfinished library is never used."""
        return self.folder / "finished"


def compilation() -> Compilation:
    """Return the compilation that the first CUDA solve would run. Raises BuildError with the reason if it is not
    possible."""
    if declined():
        raise build.BuildError(f"NODE_CUDA_BUILD={os.environ['NODE_CUDA_BUILD']} is set")
    lacking, toolkit = build.missing_kernels(torch.version.cuda)
    if toolkit is None:
        raise build.BuildError(lacking)
    if (no_compiler := build.missing_compiler()) is not None:
        raise build.BuildError(no_compiler)
    recipe = build.choose({**os.environ, "NODE_CUDA_BUILD": "auto"})
    csrc = build.find_csrc()
    # The name depends on everything that the result depends on: another torch, GPU or version of node_cuda compiles
    # again.
    ingredients = (
        sys.version,
        recipe,
        build.CXX_FLAGS,
        build.NVCC_FLAGS,
        build.macros(recipe, csrc),
        build.digest(csrc),
    )
    name = f"node_cuda_C_{hashlib.sha256(repr(ingredients).encode()).hexdigest()[:16]}"
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Compilation(recipe, csrc, Path(root) / name, name)


def _compile(not_installed: str) -> Search:
    """Compile the module, or load it from the cache."""
    try:
        wanted = compilation()
    except build.BuildError as error:
        return Search(None, f"{not_installed}, and it cannot be compiled here: {error}")
    log = wanted.folder / "log.txt"
    try:
        wanted.folder.mkdir(parents=True, exist_ok=True)
        with _only_process(wanted.folder / "process.lock"):
            module = _load(wanted)
    except Exception as error:  # a compiler can fail in any way; the solve then continues without kernels
        with contextlib.suppress(OSError):
            log.write_text(str(error))
        return Search(None, f"{not_installed}, and compiling it failed: {_gist(error)} (all of it in {log})")
    return Search(module, f"the kernels were compiled on first use, in {wanted.folder}")


def _load(wanted: Compilation) -> ModuleType:
    if wanted.finished.is_file():
        return _import(wanted)
    from torch.utils import cpp_extension

    recipe, toolkit = wanted.recipe, wanted.recipe.toolkit
    assert toolkit is not None
    tools = f"{toolkit}, for {recipe.archs}"
    _say(f"compiling the CUDA kernels, once, which takes a minute or more ({tools}; kept in {wanted.folder})")
    start = time.perf_counter()
    # The lock of torch stays after its process is killed, and torch would then wait for ever. Our lock does not stay.
    (wanted.folder / "lock").unlink(missing_ok=True)
    macros = build.macros(recipe, wanted.csrc)
    defined = [f"-D{key}" if value is None else shlex.quote(f"-D{key}={value}") for key, value in macros]
    home = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = str(toolkit.home)  # torch's own search would accept a wrapper as a toolkit
    try:
        module = cpp_extension.load(
            wanted.name,
            build.sources(wanted.csrc, kernels=True),
            extra_cflags=[*build.CXX_FLAGS, *defined],
            extra_cuda_cflags=[*build.nvcc_flags(recipe), *defined],
            extra_ldflags=[f"-L{folder}" for folder in build.library_folders(recipe)],
            extra_include_paths=build.include_folders(recipe, wanted.csrc),
            build_directory=str(wanted.folder),
        )
    finally:
        cpp_extension.CUDA_HOME = home
    assert isinstance(module, ModuleType)
    wanted.finished.touch()
    _say(f"the CUDA kernels are compiled ({time.perf_counter() - start:.0f} s)")
    return module


def _say(text: str) -> None:
    print(f"node_cuda: {text}", file=sys.stderr, flush=True)


def _import(wanted: Compilation) -> ModuleType:
    spec = importlib.util.spec_from_file_location(wanted.name, wanted.library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{wanted.library} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """Hold a lock, one process at a time (the ranks of a job start together). The system frees it if the process
    dies."""
    with path.open("w") as file:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _gist(error: Exception) -> str:
    """Return the line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\b(error|fatal|undefined reference|cannot find)\b", line)]
    wrong = [line for line in telling if not line.startswith("Error building extension")] or lines
    return wrong[0][:300] if wrong else type(error).__name__


class Forecast(NamedTuple):
    """What the first CUDA solve will do if no module is installed."""

    possible: bool
    why: str


def forecast() -> Forecast:
    """Return whether the module can be compiled on first use, or already was. Compiles nothing."""
    try:
        wanted = compilation()
    except build.BuildError as error:
        return Forecast(False, f"it cannot be compiled on first use: {error}")
    if wanted.finished.is_file():
        return Forecast(True, f"it was compiled on an earlier first use, in {wanted.folder}")
    tools = f"{wanted.recipe.toolkit}, for {wanted.recipe.archs}"
    return Forecast(True, f"the first CUDA solve compiles it, once ({tools})")
