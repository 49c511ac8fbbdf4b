"""The build of the compiled module `node_cuda._C`: its sources, the tools, and the choice among its three settings.

Both setup.py (at installation) and `extension.loading` (on the first CUDA solve) use this module. setup.py runs this
file by its path, where torch may be missing. So only the standard library is imported at the top.

To add a source, put it into a folder of csrc/: every .cpp is always compiled, every .cu if the kernels are built.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

MODULE = "node_cuda._C"
COMMAND = "NODE_CUDA_BUILD=cuda pip install -v --no-build-isolation --force-reinstall --no-deps ."
SETTINGS = ("auto", "python", "cpu", "cuda")
NOTE = "_build.json"  # a file in the package's folder: what the last build did, and why

# Architectures for a build without a visible GPU: those of them that the toolkit knows, and PTX of the last one for
# newer GPUs.
ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# No -std: torch's build chooses the standard that its headers need. -g0: Python's own flags ask for debug information.
CXX_FLAGS = ("-O2", "-g0", "-fvisibility=hidden")
# -fmad=false: only sums that use fma explicitly are fused, so that the CPU can compute the same result. For a profiler
# set NVCC_APPEND_FLAGS=-lineinfo, which makes the module three times as large.
NVCC_FLAGS = ("-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden")


class BuildError(Exception):
    """The chosen build is not possible. The message says why and what to do."""


class Toolkit(NamedTuple):
    """A CUDA toolkit: bin/nvcc in `home`, the headers and libraries of the runtime."""

    home: Path
    include: Path
    lib: Path
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"CUDA {self.version[0]}.{self.version[1]} in {self.home}"


class Recipe(NamedTuple):
    """One of the three settings, with everything that determines its result."""

    setting: str  # python, cpu or cuda
    why: str  # half a sentence
    torch: str = ""  # the version of torch to build with
    cuda_torch: bool = False
    toolkit: Toolkit | None = None
    archs: str = ""  # as in TORCH_CUDA_ARCH_LIST

    @property
    def kernels(self) -> bool:
        return self.setting == "cuda"


def find_csrc() -> Path:
    """Return the folder of the sources: in the package if it was installed, next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "bind" / "bind.cpp").is_file():
            return folder
    raise BuildError(f"the sources of {MODULE} are missing: there is no csrc/bind/bind.cpp in {package} or beside it")


def sources(csrc: Path, kernels: bool) -> list[str]:
    """Return the files to compile, from all folders of csrc/."""
    paths = _files(csrc, (".cpp", ".cu") if kernels else (".cpp",))
    stems = [path.stem for path in paths]
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        # torch's build names an object file after its source: without the folder on first use, without the suffix in
        # pip.
        same = ", ".join(path.relative_to(csrc).as_posix() for path in paths if path.stem in twice)
        raise BuildError(f"sources in csrc/ share a name (without folder and suffix): {same}. Rename one of them")
    return [str(path) for path in paths]


def digest(csrc: Path, suffixes: Sequence[str] = (".cpp", ".cu", ".h", ".cuh")) -> str:
    """Return a short hash of the sources and of their folders, which shows whether they have changed."""
    total = hashlib.sha256()
    for path in _files(csrc, suffixes):
        total.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def _files(csrc: Path, suffixes: Sequence[str]) -> list[Path]:
    return sorted(path for path in csrc.rglob("*") if path.suffix in suffixes)


# --- tools -----------------------------------------------------------------------------------------------------------


def toolkit_at(home: Path) -> Toolkit | None:
    """Return the toolkit in a folder. nvcc and the headers must both be there; a wrapper in /usr/local/bin has no
    headers."""
    if not (home / "bin" / "nvcc").is_file():
        return None
    for base in (home, *sorted((home / "targets").glob("*-linux"))):  # conda has its headers in targets/
        header = base / "include" / "cuda_runtime_api.h"
        if header.is_file() and (base / "include" / "cuda_runtime.h").is_file():
            found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
            if found is not None:
                number = int(found[1])
                lib = base / "lib64" if (base / "lib64").is_dir() else base / "lib"
                return Toolkit(home, base / "include", lib, (number // 1000, number % 1000 // 10))
    return None


def find_toolkit(environ: Mapping[str, str] = os.environ) -> Toolkit | None:
    """Return the CUDA toolkit: only CUDA_HOME or CUDA_PATH if set, else that of nvcc, else one in a usual place."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            return toolkit_at(Path(environ[variable]))
    homes = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True), Path("/opt/cuda")]
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc is not None:
        folders = [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent]
        # nvcc on the PATH may be a script. The nvcc that it runs prints its own folder.
        told = re.search(r"^#\$ TOP=(.+)$", _output([nvcc, "--dryrun", "-c", "x.cu"]), re.MULTILINE)
        homes = [*folders, *([Path(told[1]).resolve()] if told else []), *homes]
    return next((toolkit for home in homes if (toolkit := toolkit_at(home)) is not None), None)


def missing_compiler(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return what this machine lacks for C++, as half a sentence, or None if it lacks nothing."""
    command = shlex.split(environ.get("CXX", "c++"))
    if not command or shutil.which(command[0], path=environ.get("PATH")) is None:
        return f"there is no C++ compiler ({environ.get('CXX', 'c++')} is not on the PATH)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.is_file() else f"Python's headers are missing ({header})"


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


# --- architectures ---------------------------------------------------------------------------------------------------


def _known_archs(toolkit: Toolkit) -> set[str]:
    """Return the architectures that nvcc supports, as "8.0"; empty if nvcc does not print them."""
    listed = re.findall(r"compute_(\d+)(\d)\b", _output([str(toolkit.home / "bin" / "nvcc"), "--list-gpu-arch"]))
    return {f"{major}.{minor}" for major, minor in listed}


def _number(arch: str) -> tuple[int, int]:
    major, minor = arch.split(".")
    return int(major), int(minor)


def choose_archs(toolkit: Toolkit, visible: Sequence[tuple[int, int]], environ: Mapping[str, str] = os.environ) -> str:
    """Return TORCH_CUDA_ARCH_LIST, else the visible GPUs, else `ARCHS`, with PTX of the newest for later GPUs."""
    given = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if given and given != "native":
        return given
    known = _known_archs(toolkit)
    wanted = {f"{major}.{minor}" for major, minor in visible} or set(ARCHS)
    archs = sorted(wanted & known if known else wanted, key=_number)
    if not archs:  # this nvcc is too old (or too new) for the GPUs
        archs = sorted((arch for arch in ARCHS if arch in known), key=_number)
    return ";".join(archs) + "+PTX"


def gencode(archs: str) -> list[str]:
    """Return nvcc's flags for a list of architectures; none if only torch can read the list (it has names like
    Ampere)."""
    flags = []
    for arch in re.split(r"[;\s]+", archs):
        if not (found := re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)):
            return []
        number = "".join(found.groups("")[:3])
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def fits(archs: str, capability: tuple[int, int]) -> bool:
    """Return whether code for these architectures runs on a GPU: same major and no higher minor version, or older
    PTX."""
    for arch in re.split(r"[;\s]+", archs):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if found is None:
            return True  # a name that only torch can read; if it is wrong, the launch fails
        number = (int(found[1]), int(found[2]))
        same = number == capability if found[3] else number[0] == capability[0] and number <= capability
        if same or (found[4] and not found[3] and number <= capability):
            return True
    return False


# --- the decision ----------------------------------------------------------------------------------------------------


def asked(environ: Mapping[str, str] = os.environ) -> str:
    """Return the setting that requires a compiled module, so that a build without it fails; "" if none does."""
    setting = environ.get("NODE_CUDA_BUILD", "") or "auto"
    if setting in ("cpu", "cuda"):
        return f"NODE_CUDA_BUILD={setting}"
    return "FORCE_CUDA=1" if setting == "auto" and forced(environ) else ""


def forced(environ: Mapping[str, str] = os.environ) -> bool:
    return environ.get("FORCE_CUDA", "") not in ("", "0")


def choose(environ: Mapping[str, str] = os.environ) -> Recipe:
    """Choose the setting: by NODE_CUDA_BUILD, or by what is installed. Raises BuildError if a required one is not
    possible.

    auto: kernels if torch is a CUDA build and nvcc exists; else the C++ part if torch and a compiler exist; else Python
    alone. FORCE_CUDA=1 also builds kernels with a CPU torch, to check that they compile.
    """
    setting = environ.get("NODE_CUDA_BUILD", "") or "auto"
    if setting not in SETTINGS:
        raise BuildError(f"NODE_CUDA_BUILD must be one of {', '.join(SETTINGS)}; got {setting}")
    if setting == "python":
        return Recipe("python", "NODE_CUDA_BUILD=python is set")
    insists = asked(environ)

    def python(why: str) -> Recipe:
        if insists:
            raise BuildError(f"{insists} asks for a compiled module, but {why}")
        return Recipe("python", why)

    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of torch is missing
        return python(f"the build cannot import torch ({error}): pip hides it without --no-build-isolation")
    if (lacking := missing_compiler(environ)) is not None:
        return python(lacking)

    version = str(torch.__version__)
    lacking, toolkit = missing_kernels(torch.version.cuda, environ)
    if toolkit is not None and setting != "cpu":
        visible = _visible_gpus() if torch.version.cuda else []
        archs = choose_archs(toolkit, visible, environ)
        why = f"torch {version} and nvcc ({toolkit}) are there"
        return Recipe("cuda", why, version, torch.version.cuda is not None, toolkit, archs)
    if insists and setting != "cpu":
        check = "" if torch.version.cuda else " (FORCE_CUDA=1 compiles them against a CPU torch too, as a check)"
        raise BuildError(f"{insists} asks for kernels, but {lacking}{check}")
    return Recipe("cpu", "NODE_CUDA_BUILD=cpu is set" if setting == "cpu" else lacking, version)


def missing_kernels(torch_cuda: str | None, environ: Mapping[str, str] = os.environ) -> tuple[str, Toolkit | None]:
    """Return ("", the toolkit), or (what the kernels need and is missing, None). torch_cuda is torch.version.cuda."""
    if torch_cuda is None and not forced(environ):
        return "this torch is built without CUDA", None
    toolkit = find_toolkit(environ)
    if toolkit is None:
        where = next((f"{name}={environ[name]}" for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)), None)
        looked = f"{where} has not" if where else "neither the PATH nor /usr/local/cuda has"
        return f"{looked} a CUDA toolkit: bin/nvcc and include/cuda_runtime.h (CUDA_HOME names its folder)", None
    if torch_cuda is not None and int(torch_cuda.split(".")[0]) != toolkit.version[0]:
        return f"torch is built for CUDA {torch_cuda} and the toolkit is {toolkit}: their major versions differ", None
    return "", toolkit


def _visible_gpus() -> list[tuple[int, int]]:
    import torch

    if not torch.cuda.is_available():
        return []
    return sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})


# --- flags -----------------------------------------------------------------------------------------------------------


def macros(recipe: Recipe, csrc: Path) -> list[tuple[str, str | None]]:
    """Return the macros for bind.cpp. Strings are quoted.

    No code reads NODE_CUDA_HEADERS. It makes ninja compile again, because the command changes: with a CPU torch ninja
    does not know that a .cu depends on its headers and on nvcc's own variables.
    """
    nvcc = "".join(os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"))
    headers = digest(csrc, (".h", ".cuh")) + hashlib.sha256(nvcc.encode()).hexdigest()[:8]
    told: list[tuple[str, str | None]] = [
        ("NODE_CUDA_TORCH", f'"{recipe.torch}"'),
        ("NODE_CUDA_HEADERS", f'"{headers}"'),
    ]
    if recipe.kernels:
        told += [("NODE_CUDA_WITH_KERNELS", None), ("NODE_CUDA_ARCHS", f'"{recipe.archs}"')]
    return told


def nvcc_flags(recipe: Recipe) -> list[str]:
    return [*NVCC_FLAGS, *gencode(recipe.archs)]


def include_folders(recipe: Recipe, csrc: Path) -> list[str]:
    """Return csrc, and the headers of the runtime if the compiler does not find them by itself.

    /usr/include is never named, because that would break the compiler's search order.
    """
    if recipe.toolkit is None or recipe.toolkit.include == Path("/usr/include"):
        return [str(csrc)]
    return [str(csrc), str(recipe.toolkit.include)]


def library_folders(recipe: Recipe) -> list[str]:
    return [str(recipe.toolkit.lib)] if recipe.toolkit is not None else []


def libraries(recipe: Recipe) -> list[str]:
    """Return the CUDA runtime: the shared library that a CUDA torch has loaded, else a static copy."""
    if not recipe.kernels:
        return []
    return ["cudart"] if recipe.cuda_torch else ["cudart_static", "rt", "dl", "pthread"]


# --- the note that a build leaves for `python -m node_cuda` ----------------------------------------------------------


class Note(NamedTuple):
    setting: str
    why: str
    sources: str = ""  # the digest of the sources that were compiled


def write_note(package: Path, note: Note) -> None:
    (package / NOTE).write_text(json.dumps(note._asdict()) + "\n")


def read_note() -> Note | None:
    """Return the note of the build that made this install, or None if there is none."""
    try:
        return Note(**json.loads((Path(__file__).resolve().parent.parent / NOTE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def say(text: str) -> None:
    """Print one line that stands out. pip shows it with -v."""
    print(f"\n*** node_cuda: {text}\n", file=sys.stderr, flush=True)
