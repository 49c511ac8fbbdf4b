"""csrc/ as Python calls it in tests: the launchers over ctypes, on the CPU behind the shim or on a GPU.

`Kernels` has a method for each launcher, under its name, that takes tensors and returns fresh ones where the launcher
writes. The structures mirror csrc/control.h and csrc/launchers.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from ctypes import Structure, byref, c_char_p, c_double, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from node_cuda.kernels.tape import Tape

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
BUILDS = HERE.parent.parent / "build" / "tests"

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
HALF = (torch.float16, torch.bfloat16)
MODULE = "shim_C"
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off")


def sources() -> list[Path]:
    return sorted(CSRC.glob("*.cu"))


def compile_with_shim(folder: Path, *flags: str, main: Path | None = None) -> Path:
    """csrc/ behind the shim in `folder`: as a library that is also the Python module `MODULE`, or with `main` as a
    program without Python. Two compilers at a time."""
    compiler = shutil.which("g++")
    assert compiler is not None
    common = [compiler, *FLAGS, *flags, "-fPIC", f"-I{HERE}", f"-I{CSRC}", "-DNODE_CUDA_WITH_KERNELS"]
    # Two units of about the same size: one for each file would compile the standard headers fifteen times.
    units = ["rk_", "rest"]
    for unit in units:
        wanted = [s for s in sources() if s.name.startswith("rk_") == (unit == "rk_")]
        (folder / f"{unit}.cpp").write_text("".join(f'#include "{s.name}"\n' for s in wanted))
    paths = [*(folder / f"{unit}.cpp" for unit in units), main or HERE / "exports.cpp", HERE / "cuda_graphs.cpp"]
    with_python: list[str] = []
    if main is not None:
        paths.append(CSRC / "graphs.cpp")
    else:
        paths += sorted(CSRC.glob("*.cpp"))
        headers = (sysconfig.get_paths()["include"], Path(torch.__file__).parent / "include")  # pybind11's are torch's
        with_python += [f"-isystem{path}" for path in headers]
        with_python += [f"-DTORCH_EXTENSION_NAME={MODULE}", '-DNODE_CUDA_ARCHS="shim"']
        with_python.append(f'-DNODE_CUDA_TORCH="{torch.__version__}"')
    compilers = []
    for i in range(0, len(paths), 2):
        pair = [
            subprocess.Popen(
                [*common, *with_python, "-c", str(p), "-o", str(folder / f"{p.stem}.o")],
                stderr=subprocess.PIPE,
                text=True,
            )
            for p in paths[i : i + 2]
        ]
        compilers += [(process.communicate()[1], process.returncode) for process in pair]
    assert not any(code for _, code in compilers), "".join(message for message, _ in compilers)
    result = folder / ("program" if main else f"{MODULE}.so")
    objects = [str(folder / f"{p.stem}.o") for p in paths]
    subprocess.run([*common, *([] if main else ["-shared"]), *objects, "-o", str(result), "-lpthread"], check=True)
    return result


def behind_shim(folder: Path) -> Path:
    """csrc/ as the tests of a session share it: with few blocks, so that small tensors go round the loops as well."""
    return compile_with_shim(folder, "-O0", "-DNODE_CUDA_MAX_BLOCKS=5")


def import_module(library: Path) -> ModuleType:
    """The library of `compile_with_shim` as what node_cuda._C is: the plan and the launchers."""
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_for_gpu(folder: Path) -> Path:
    """csrc/ as a library for the GPU of this machine."""
    compiler = shutil.which("nvcc")
    assert compiler is not None
    result = folder / "kernels.so"
    flags = ["-std=c++17", "-O3", "-fmad=false", "-arch=native", "-Xcompiler", "-fPIC", "--shared", "--threads", "4"]
    subprocess.run([compiler, *flags, *map(str, sources()), "-o", str(result)], check=True)
    return result


def built(name: str, make: Callable[[Path], Path]) -> Path:
    """What `make` builds of csrc/ and the shim, in a folder that is kept as long as neither changes.

    Several test processes may ask at once: one builds, the others wait.
    """
    digest = hashlib.sha256(f"{sys.version} {torch.__version__} {platform.platform()}".encode())
    for path in sorted([*CSRC.iterdir(), *HERE.iterdir()]):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    folder = BUILDS / f"{name}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if not done.exists():
            done.write_text(make(folder).name)
        return folder / done.read_text()


class Interval(Structure):
    _fields_ = [(name, c_double) for name in ("t0", "t1", "h", "dt")]


class LawStruct(Structure):
    _fields_ = [
        ("exponents", c_double * 3),
        *((name, c_double) for name in ("safety", "ifactor", "dfactor", "min_step", "max_step", "order")),
        ("max_num_steps", c_int64),
        *((name, c_void_p) for name in ("landings", "is_jump", "stops", "outputs")),
        *((name, c_int64) for name in ("landing_count", "stop_count", "output_count")),
        ("keep", c_int32),
        ("pauses", c_int32),
        ("tape", c_void_p),
    ]


class Ctl(Structure):
    _fields_ = [
        ("next", Interval),
        ("last", Interval),
        *((name, c_double) for name in ("h", "carried", "ratio")),
        ("history", c_double * 2),
        ("direction", c_double),
        ("norms", c_double * 2),
        *((name, c_int64) for name in ("attempts", "accepted", "rejected", "next_landing", "next_stop")),
        *((name, c_int64) for name in ("first_output", "next_output")),
        *((name, c_int32) for name in ("accept", "jump", "status", "active", "finite", "paused")),
    ]


class Recorded(Structure):
    _fields_ = [
        ("at", Interval),
        *((name, c_int64) for name in ("first_output", "next_output")),
        *((name, c_int32) for name in ("begins", "unused")),
    ]


class TapeStruct(Structure):
    _fields_ = [
        ("steps", c_void_p),
        ("capacity", c_int64),
        *((name, c_int32) for name in ("first", "carries")),
        *((name, c_int64) for name in ("count", "slot", "row")),
        *((name, c_int32) for name in ("jumped", "unused")),
    ]


class On(Structure):
    _fields_ = [("stream", c_void_p), ("device", c_int32), ("unused", c_int32)]


class Where(Structure):
    _fields_ = [("ctl", c_void_p), ("at", Interval), ("direction", c_double)]


class Slot(Structure):
    _fields_ = [("time", c_void_p), ("c", c_double), ("side", c_int64)]


class Tolerance(Structure):
    _fields_ = [("rtol", c_double), ("atol", c_double), ("rtol_each", c_void_p), ("atol_each", c_void_p)]


class Segments(Structure):
    _fields_ = [("count", c_int64), ("ends", c_void_p), ("host_ends", c_void_p)]


class Finish(Structure):
    _fields_ = [
        ("result", c_void_p),
        ("ctl", c_void_p),
        ("also", c_void_p),
        ("also_count", c_int64),
        ("law", LawStruct),
    ]


class Part(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("sum", "error", "total")),
        *((name, c_int64) for name in ("size", "first_chunk", "dtype")),
    ]


_P, _I, _L, _D = c_void_p, c_int, c_int64, c_double
_LAUNCHERS = {
    "rk_stage": (_I, _L, _P, _P, _I, _P, _P, _P, _P),
    "rk_finish": (_I, _L, _P, _P, _P, _I, _P, _P, _P, _P, _P),
    "stage_time": (_I, _I, _P, _P),
    "error_ratio": (_I, _L, _P, _P, _D, _P, _P, _P, _P, _P, _P, _P),
    "scaled_error": (_I, _L, _P, _P, _P, _D, _P, _P, _P, _P),
    "step_control": (_P, _P, _P, _L),
    "start_control": (_P, _P, _D, _P, _D, _D),
    "grid_control": (_P, _P, _P, _L),
    "resume": (_P, _P, _P, _L),
    "set_walk": (_P, _P),
    "take_back": (_I, _P, _P, _P),
    "taken": (_P, _P),
    "initial_norms": (_I, _L, _P, _P, _P, _P, _P, _P, _P),
    "initial_change": (_I, _L, _P, _P, _P, _P, _P, _P, _P, _P, _P),
    "dense_eval": (_I, _L, _P, _P, _L, _L, _P, _P, _I, _I, _P, _P, _P, _P),
    "dense_adjoint": (_I, _L, _P, _P, _P, _P, _P, _P, _L, _L, _I, _I, _P, _P, _P),
    "commit": (_L, _I, _P, _P, _P),
    "adjoint_stage": (_I, _L, _P, _I, _P, _P, _P),
    "adjoint_finish": (_I, _L, _P, _P, _I, _P),
    "pack_adjoint": (_I, _L, _P, _P, _P),
    "accumulate": (_P, _L, _L, _P, _P, _P, _D, _D, _I, _I, _P),
    "commit_sums": (_P, _L, _L, _P),
    "sums_ratio": (_P, _L, _L, _D, _D, _P, _P, _P),
    "jump": (_I, _L, _P, _P, _P, _P, _P),
}


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


def step(h: float, t0: float = 0.0, direction: float = 1.0, t1: float | None = None) -> Where:
    """A step by value."""
    return Where(None, Interval(t0, t0 + h if t1 is None else t1, h, direction * h), direction)


class Law:
    """A LawStruct and the arrays that it points to."""

    def __init__(
        self, law, order=5, max_num_steps=2**31 - 1, landings=(), jumps=(), stops=(), outputs=(), device="cpu",
        tape: Tape | None = None,
    ):  # fmt: skip
        def array(values, dtype=torch.float64):
            return torch.tensor(list(values), dtype=dtype, device=device)

        self.arrays = array(landings), array([x in jumps for x in landings], torch.uint8), array(stops), array(outputs)
        self.struct = LawStruct(
            (c_double * 3)(*law.exponents),
            law.safety,
            law.ifactor,
            law.dfactor,
            law.min_step,
            law.max_step,
            order,
            max_num_steps,
            *(x.data_ptr() or None for x in self.arrays),
            len(landings),
            len(stops),
            len(outputs),
            law.keep,
            False,
            None if tape is None else tape.address,
        )


class Kernels:
    """The launchers of a compiled csrc/, on tensors of one device."""

    def __init__(self, library: Path, device: str = "cpu") -> None:
        self.lib = ctypes.CDLL(str(library))
        self.device = torch.device(device)
        self.lib.failed_op.restype = c_char_p
        for name, argtypes in _LAUNCHERS.items():
            getattr(self.lib, f"launch_{name}").argtypes = [*argtypes, On]
        self.lib.reduce_workspace.argtypes = [c_int64, c_void_p]
        self.lib.sums_workspace.argtypes = self.lib.chunks_of.argtypes = [c_int64]
        for name in ("reduce_workspace", "sums_workspace", "chunks_of"):
            getattr(self.lib, name).restype = c_int64
        if device == "cpu":
            self.lib.shim_configure.argtypes = [c_uint64, c_int]
            self.lib.shim_launch_stream.restype = c_void_p
        self.configure()

    def configure(self, seed: int = 0, workers: int = 1) -> None:
        """The order of blocks, where it can be chosen."""
        if self.device.type == "cpu":
            self.lib.shim_configure(seed, workers)

    def on(self) -> On:
        if self.device.type == "cpu":
            return On(None, 0, 0)
        return On(torch.cuda.current_stream(self.device).cuda_stream, self.device.index or 0, 0)

    def call(self, name: str, *arguments, on: On | None = None) -> None:
        error = getattr(self.lib, f"launch_{name}")(*arguments, on or self.on())
        if error:
            raise RuntimeError(f"{self.lib.failed_op().decode()} failed with error {error}")

    # Tensors and structures as arguments.

    def workspace(self, n: int, segments: Segments | None = None) -> Tensor:
        size = self.lib.reduce_workspace(n, None if segments is None else byref(segments))
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def segments(self, sizes: Sequence[int]) -> tuple[Segments, tuple[Tensor, Tensor]]:
        ends = torch.tensor(sizes).cumsum(0)
        there = ends.to(self.device)
        return Segments(len(sizes), there.data_ptr(), ends.data_ptr()), (ends, there)

    def new_ctl(self) -> Tensor:
        return torch.zeros(ctypes.sizeof(Ctl), dtype=torch.uint8, device=self.device)

    def read(self, ctl: Tensor) -> Ctl:
        return Ctl.from_buffer_copy(ctl.cpu().numpy().tobytes())

    def where(self, ctl: Tensor) -> Where:
        return Where(ctl.data_ptr(), Interval(), 0.0)

    def read_tape(self, tape: Tape) -> tuple[TapeStruct, list[Recorded]]:
        """The struct, and the steps that it recorded."""
        now = TapeStruct.from_buffer_copy(tape._struct.cpu().numpy().tobytes())
        steps = (Recorded * tape.capacity).from_buffer_copy(tape._steps.cpu().numpy().tobytes())
        return now, list(steps[: now.count])

    # The primitives.

    def rk_stage(self, y0, k, row, where: Where, slot: Slot | None = None, out: Tensor | None = None) -> Tensor:
        z = torch.empty_like(y0) if out is None else out
        self.call("rk_stage", code(y0), y0.numel(), ptr(z), ptr(y0), *terms(k, row), byref(where), ref(slot))
        return z

    def rk_finish(self, y0, k, b, e, where: Where, slot: Slot | None = None):
        y1, known = torch.empty_like(y0), [(j, x) for j, x in e or () if j < len(k)]
        error = None if e is None else torch.empty_like(y0, dtype=acc(y0.dtype))
        both = sorted({j for j, _ in b} | {j for j, _ in known})
        rows = [doubles([dict(row).get(j, 0.0) for j in both]) for row in (b, known)]
        pointers = array_of_pointers([k[j] for j in both])
        self.call(
            "rk_finish", code(y0), y0.numel(), ptr(y1), ptr(error), ptr(y0), len(both), pointers, *rows, byref(where),
            ref(slot),
        )  # fmt: skip
        return y1, error

    def stage_time(self, dtype: torch.dtype, slots: Sequence[Slot], where: Where) -> None:
        self.call("stage_time", DTYPES.index(dtype), len(slots), (Slot * len(slots))(*slots), byref(where))

    def error_ratio(
        self, error, last, e_last, y0, y1, rtol, atol, sizes=None, where=None, ctl=None, law=None, also=None,
        workspace=None,
    ) -> Tensor:  # fmt: skip
        segments, keep = (None, None) if sizes is None else self.segments(sizes)
        if workspace is None:
            workspace = self.workspace(y0.numel(), segments)
        result = torch.full((1,), -1.0, dtype=torch.float64, device=self.device)
        finish = Finish(
            ptr(result), ptr(ctl), ptr(also), 0 if also is None else also.numel(), law.struct if law else LawStruct()
        )
        self.call(
            "error_ratio", code(y0), y0.numel(), ptr(error), ptr(last), e_last, ptr(y0), ptr(y1),
            byref(tolerance(rtol, atol)), ref(segments), ptr(workspace), byref(where or step(1.0)), byref(finish),
        )  # fmt: skip
        del keep
        return result

    def scaled_error(self, error, last, e_last, y0, y1, rtol, atol, where=None) -> Tensor:
        out = torch.empty_like(error)
        self.call(
            "scaled_error", code(y0), y0.numel(), ptr(out), ptr(error), ptr(last), e_last, ptr(y0), ptr(y1),
            byref(tolerance(rtol, atol)), byref(where or step(1.0)),
        )  # fmt: skip
        return out

    def step_control(self, ctl: Tensor, law: Law, ratios: Tensor) -> None:
        self.call("step_control", ptr(ctl), byref(law.struct), ptr(ratios), ratios.numel())

    def start_control(self, ctl: Tensor, law: Law, direction: float, t0: float, h: float) -> None:
        self.call("start_control", ptr(ctl), byref(law.struct), direction, None, t0, h)

    def resume(self, ctl: Tensor, law: Law, points: Tensor | None = None) -> None:
        self.call("resume", ptr(ctl), byref(law.struct), ptr(points), 0 if points is None else points.numel())

    def grid_control(self, ctl: Tensor, law: Law, points: Tensor) -> None:
        self.call("grid_control", ptr(ctl), byref(law.struct), ptr(points), points.numel())

    def set_walk(self, ctl: Tensor, tape: Tape) -> None:
        self.call("set_walk", ptr(ctl), tape.address)

    def take_back(self, ctl: Tensor, tape: Tape, time: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        of = torch.float32 if time is None else time.dtype
        self.call("take_back", DTYPES.index(dtype or of), ptr(ctl), tape.address, ptr(time))

    def taken(self, ctl: Tensor, tape: Tape) -> None:
        self.call("taken", ptr(ctl), tape.address)

    def initial_norms(self, y0, f0, rtol, atol, sizes=None, ctl=None) -> Tensor:
        segments, keep = (None, None) if sizes is None else self.segments(sizes)
        workspace = self.workspace(y0.numel(), segments)
        norms = torch.full((2,), -1.0, dtype=torch.float64, device=self.device)
        self.call(
            "initial_norms", code(y0), y0.numel(), ptr(y0), ptr(f0), byref(tolerance(rtol, atol)), ref(segments),
            ptr(workspace), ptr(norms), ptr(ctl),
        )  # fmt: skip
        del keep
        return norms

    def initial_change(self, y0, f0, f1, rtol, atol, sizes=None, ctl=None, law=None) -> Tensor:
        segments, keep = (None, None) if sizes is None else self.segments(sizes)
        workspace = self.workspace(y0.numel(), segments)
        norm = torch.full((1,), -1.0, dtype=torch.float64, device=self.device)
        self.call(
            "initial_change", code(y0), y0.numel(), ptr(y0), ptr(f0), ptr(f1), byref(tolerance(rtol, atol)),
            ref(segments), ptr(workspace), ptr(norm), ptr(ctl), byref(law.struct) if law else None,
        )  # fmt: skip
        del keep
        return norm

    def dense_eval(self, out, times, y0, y1, k, weight_rows, where, first=0, stop=None, end=None) -> None:
        degree = len(weight_rows[0][1]) if weight_rows else len(end or ())
        weights = doubles([x for _, row in weight_rows for x in row])
        pointers = array_of_pointers([k[j] for j, _ in weight_rows])
        self.call(
            "dense_eval", code(y0), y0.numel(), ptr(out), ptr(times), first, len(times) if stop is None else stop,
            ptr(y0), ptr(y1), len(weight_rows), degree, pointers, weights, None if end is None else doubles(end),
            byref(where),
        )  # fmt: skip

    def dense_adjoint(self, out, lam, g, times, weight_rows, where, first=0, stop=None, end=None) -> None:
        degree = len(weight_rows[0][1]) if weight_rows else len(end or ())
        weights = doubles([x for _, row in weight_rows for x in row])
        self.call(
            "dense_adjoint", code(lam), lam.numel(), ptr(out[0]), ptr(out[1]), array_of_pointers(out[2:]), ptr(lam),
            ptr(g), ptr(times), first, len(times) if stop is None else stop, len(weight_rows), degree, weights,
            None if end is None else doubles(end), byref(where),
        )  # fmt: skip

    def commit(self, to: Sequence[Tensor], source: Sequence[Tensor], ctl: Tensor | None) -> None:
        size = to[0].numel() * to[0].element_size()
        self.call("commit", size, len(to), array_of_pointers(to), array_of_pointers(source), ptr(ctl))

    def adjoint_stage(self, x, row, where: Where) -> Tensor:
        kappa = torch.empty_like(x[0])
        self.call("adjoint_stage", code(kappa), kappa.numel(), ptr(kappa), *terms(x, row), byref(where))
        return kappa

    def adjoint_finish(self, lam: Tensor, mu: Sequence[Tensor]) -> None:
        self.call("adjoint_finish", code(lam), lam.numel(), ptr(lam), ptr(lam), len(mu), array_of_pointers(mu))

    def pack_adjoint(self, f: Tensor, vjp: Tensor | None) -> Tensor:
        row = f.new_empty(2 * f.numel())
        self.call("pack_adjoint", code(f), f.numel(), ptr(row), ptr(f), ptr(vjp))
        return row

    def jump(self, a, g, f) -> Tensor | None:
        n = g.numel()
        dot = None if f is None else torch.full((1,), -1.0, dtype=torch.float64, device=self.device)
        workspace = self.workspace(n)
        self.call("jump", code(g), n, ptr(a), ptr(g), ptr(f), ptr(dot), ptr(workspace))
        return dot


class Sums:
    """A list of sums, errors and totals for accumulate, like `params`."""

    def __init__(self, kernels: Kernels, params: Sequence[Tensor]) -> None:
        self.kernels = kernels

        def like(value):
            return [torch.full_like(p, value, dtype=acc(p.dtype)) for p in params]

        self.sums, self.errors, self.totals = like(9.0), like(9.0), like(0.0)
        self.first, chunks, parts = [], 0, []
        for p, s, e, t in zip(params, self.sums, self.errors, self.totals, strict=True):
            self.first.append(chunks)
            parts.append(Part(ptr(s), ptr(e), ptr(t), p.numel(), chunks, DTYPES.index(p.dtype)))
            chunks += kernels.lib.chunks_of(p.numel())
        self.count, self.chunks = len(parts), chunks
        table = bytearray(bytes((Part * len(parts))(*parts)))
        self.parts = torch.frombuffer(table, dtype=torch.uint8).to(kernels.device) if parts else None
        self.workspace = torch.zeros(kernels.lib.sums_workspace(chunks), dtype=torch.uint8, device=kernels.device)

    def accumulate(self, x, weight, error_weight, add, where, when_accepted=False, table=False) -> None:
        pointers = array_of_pointers(x)
        there = None
        if table:
            there = torch.tensor([ptr(t) or 0 for t in x], dtype=torch.int64, device=self.kernels.device)
        first = (c_int64 * self.count)(*self.first)
        self.kernels.call(
            "accumulate", ptr(self.parts), self.count, self.chunks, first, pointers, ptr(there), weight, error_weight,
            add, when_accepted, byref(where),
        )  # fmt: skip

    def commit(self, ctl: Tensor | None = None) -> None:
        self.kernels.call("commit_sums", ptr(self.parts), self.count, self.chunks, ptr(ctl))

    def ratio(self, rtol, atol, ctl=None, law=None, also=None) -> Tensor:
        result = torch.full((1,), -1.0, dtype=torch.float64, device=self.kernels.device)
        finish = Finish(
            ptr(result), ptr(ctl), ptr(also), 0 if also is None else also.numel(), law.struct if law else LawStruct()
        )
        self.kernels.call(
            "sums_ratio", ptr(self.parts), self.count, self.chunks, rtol, atol, ptr(self.workspace), ptr(ctl),
            byref(finish),
        )  # fmt: skip
        return result


def code(x: Tensor) -> int:
    return DTYPES.index(x.dtype)


def ptr(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def ref(struct: Structure | None):
    return None if struct is None else byref(struct)


def doubles(values: Sequence[float]):
    return (c_double * max(len(values), 1))(*values)


def array_of_pointers(tensors: Sequence[Tensor | None]):
    return (c_void_p * max(len(tensors), 1))(*(ptr(x) for x in tensors))


def terms(k: Sequence[Tensor], row) -> tuple:
    return len(row), array_of_pointers([k[j] for j, _ in row]), doubles([a for _, a in row])


def tolerance(rtol, atol) -> Tolerance:
    each = [x.data_ptr() if isinstance(x, Tensor) else None for x in (rtol, atol)]
    numbers = [0.0 if isinstance(x, Tensor) else x for x in (rtol, atol)]
    return Tolerance(*numbers, *each)
