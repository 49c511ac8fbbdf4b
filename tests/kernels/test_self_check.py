"""The self-check of the kernels through the shim: the kernels pass it, and it finds each fault in each of them.

A fault is put into one method of the compiled module, between Python and the kernel, so nothing is compiled for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import node_cuda
from node_cuda import Unsupported, odeint, solve
from node_cuda import __main__ as environment
from node_cuda.extension import loading as extension
from node_cuda.kernels import backend as dispatch
from node_cuda.kernels import check_record, check_rows, self_check
from node_cuda.kernels.check_record import Lost, Record
from node_cuda.kernels.check_rows import ROWS, difference
from node_cuda.kernels.fused import DTYPES

CPU = torch.device("cpu")
ON = (0, 0)

# A dtype in the place of the right one: never a wider one, so that nothing is read past the end.
MISTAKEN = {
    torch.float32: torch.float16,
    torch.float64: torch.float32,
    torch.float16: torch.bfloat16,
    torch.bfloat16: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
WRONG_CODE = {DTYPES[of]: DTYPES[by] for of, by in MISTAKEN.items()}

_PART = struct.Struct("=6q")
_SIZES = [dtype.itemsize for dtype in DTYPES]
_SUMS = [torch.promote_types(dtype, torch.float32).itemsize for dtype in DTYPES]
Memory = tuple[int, int, int]
"""An address, the size of an element, and the number of elements."""


# ------------------------------------------------------------------ the outputs and the sums of a call
def written(plan: Any, name: str, args: tuple[Any, ...]) -> list[Memory]:
    """Return the memory of the state's or the parameters' size that a call of this method writes."""
    n, size, error_size = plan.n, plan.size, plan.error_size
    match name, args:
        case "rk_stage", (_, _, z, *_):
            return [(z, size, n)]
        case "rk_finish", (_, _, y1, error, *_):
            return [(y1, size, n), *([(error, error_size, n)] if error else [])]
        case "combine" | "sum", (_, out, *_):
            return [(out, size, n)]
        case "stage_times", (_, _, _, times):
            return [(times[-1], plan.real_size, 1)]
        case "commit", (to, _):
            return [(x, size, n) for x in to]
        case "scaled_error", (_, out, *_):
            return [(out, error_size, n)]
        case "dense_eval", (_, _, out, _, first, stop, *_):
            return [(out + i * n * size, size, n) for i in range(stop - first)]
        case "dense_adjoint", (_, _, out, *_):
            return [(x, size, n) for x in out]
        case "pack_adjoint", (code, n, row, *_):
            return [(row, _SIZES[code], 2 * n)]
    return []


def summed(plan: Any, name: str, args: tuple[Any, ...]) -> list[Memory]:
    """Return the memory that a call of this method sums over the elements of a state. Zeros there are left out of the
    sum."""
    n, size = plan.n, plan.size
    match name, args:
        case "judge", (_, error, last, *_):
            return [(error, plan.error_size, n), *([(last, size, n)] if last else [])]
        case "initial_norms", (y0, f0):
            return [(y0, size, n), (f0, size, n)]
        case "initial_change", (_, f0, f1):
            return [(f0, size, n), (f1, size, n)]
        case "jump", (code, n, _, g, *_):
            return [(g, _SIZES[code], n)]
    return []


def written_sums(parts: Sequence[tuple[int, ...]], name: str, args: tuple[Any, ...]) -> list[Memory]:
    """Return the memory that a call writes for a list of parameters."""
    if name == "commit":
        return [(total, _SUMS[code], size) for _, _, total, size, _, code in parts]
    if name in ("accumulate", "keep"):
        error = name == "accumulate" and args[3]
        return [(of, _SUMS[code], size) for s, e, _, size, _, code in parts for of in (s, e if error else 0) if of]
    return []


# ------------------------------------------------------------------ faults
Call = Callable[..., Any]
Fault = Callable[["Broken", Any, str, Call, tuple[Any, ...]], Any]
"""A function that replaces a call of a method with these arguments."""


def no_write(broken, plan, name, call, args):
    """The kernel does nothing. What the host reads is what its memory held before."""
    return broken._module.ControllerState.copy(args[0]) if name == "read_control" else None


def _keeping(start: Callable[[int], slice]) -> Fault:
    """Do not write these elements, and leave them out of the sums."""

    def fault(broken, plan, name, call, args):
        outputs, inputs = plan.written(name, args), plan.summed(name, args)
        places = []
        for address, size, count in (*outputs, *inputs):
            of = start(count)
            first, stop, _ = of.indices(count)
            if stop > first:
                places.append((address + first * size, (stop - first) * size))
        saved = [(address, ctypes.string_at(address, size)) for address, size in places]
        for address, size in places if inputs else ():
            ctypes.memset(address, 0, size)
        call(*args)
        for address, old in saved:
            ctypes.memmove(address, old, len(old))

    return fault


dropped_tail = _keeping(lambda count: slice(count - 3 if count > 3 else max(count - 1, 0), count))
missing_block = _keeping(lambda count: slice(2048, 4096))


def wrong_dtype(broken, plan, name, call, args):
    """The kernel for another dtype runs."""
    return plan.mistaken(name, args)


def no_write_of_current(broken, plan, name, call, args):
    """The kernel does nothing if its step is the one in the control."""
    if not any(x is at for x in args for at in broken.currents):
        call(*args)


def no_write_of_three_terms(broken, plan, name, call, args):
    """The kernel for three terms does nothing."""
    if plan.terms[args[0]] != 3:
        call(*args)


def no_write_of_one(broken, plan, name, call, args):
    """The kernel does nothing for a single element."""
    if (args[1] if plan is broken else plan.n) != 1:
        call(*args)


def no_write_unaligned(broken, plan, name, call, args):
    """The kernel does nothing if it cannot read vectors."""
    given = [x for group in args for x in (group if isinstance(group, list) else [group])]
    if not any(isinstance(x, int) and x > 2**20 and x % 16 for x in given):
        call(*args)


def no_second_launch(broken, plan, name, call, args):
    """If a list needs several launches, only the first one runs."""
    late = [(part[0], _SUMS[part[5]] * part[3]) for part in plan.parts[448:]]
    saved = [(address, ctypes.string_at(address, size)) for address, size in late]
    call(*args)
    for address, old in saved:
        ctypes.memmove(address, old, len(old))


def argument(place: int, change: Callable[[Any], Any]) -> Fault:
    """Replace one argument of the call."""

    def fault(broken, plan, name, call, args):
        return call(*(change(x) if i == place else x for i, x in enumerate(args)))

    return fault


def scaled(x):
    """Make a coefficient wrong by two percent, the last one of several."""
    if isinstance(x, (list, tuple)):
        return [*x[:-1], scaled(x[-1])] if x and not isinstance(x[-1], int) else x
    return 1.02 * x


def of_row(entries):
    """Do the same in a row of stages and their coefficients."""
    return [*entries[:-1], (entries[-1][0], 1.02 * entries[-1][1])] if entries else entries


def shorter(array):
    return array[0], max(array[1] - 1, 0)


class Faulty:
    """The data of a plan, or of the module, that the faults need. _other: the same, with another dtype."""

    n = size = error_size = 0
    written, summed = written, summed
    _other: Any

    def mistaken(self, name, args):
        return getattr(self._other, name)(*args)


class Broken(Faulty):
    """The compiled module with a fault in one method: `SolveContext.name`, `SumsPlan.name`, or one of the module."""

    def __init__(self, module: ModuleType, where: str, fault: Fault) -> None:
        self._module, self.where, self.fault = module, where, fault
        self.called: set[str] = set()
        self.currents: list[Any] = []  # tells a kernel that its step is in the control

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return self.method(self, "", name, value) if name in ("pack_adjoint", "jump") else value

    def SolveContext(self, *args: Any) -> OfState:
        return OfState(self, *args)

    def SumsPlan(self, *args: Any) -> OfSums:
        return OfSums(self, *args)

    def method(self, plan: Any, owner: str, name: str, call: Call) -> Call:
        full = f"{owner}.{name}" if owner else name
        self.called.add(full)
        return (lambda *args: self.fault(self, plan, name, call, args)) if full == self.where else call

    def mistaken(self, name, args):
        return getattr(self._module, name)(WRONG_CODE[args[0]], *args[1:])


class OfState(Faulty):
    """A plan, and a second plan with another dtype of the state."""

    def __init__(
        self, broken: Broken, code: int, n: int, size: int, error_size: int, on: Any, direction: float
    ) -> None:
        if broken.where == "SolveContext":
            direction = -direction
        self.broken, self.n, self.size, self.error_size = broken, n, size, error_size
        self.real_size = size // 2 if list(DTYPES)[code].is_complex else size
        self.terms: list[int] = []  # for each row
        self._real = broken._module.SolveContext(code, n, size, error_size, on, direction)
        self._other = broken._module.SolveContext(WRONG_CODE[code], n, size, error_size, on, direction)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if name == "current":
            return lambda: self.broken.currents.append(value()) or self.broken.currents[-1]
        if name in ("set_norm", "set_law", "set_workspace", "row", "polynomials"):

            def both(*args: Any) -> Any:
                if name == "row":
                    self.terms.append(len(args[0]))
                getattr(self._other, name)(*args)
                return value(*args)

            return self.broken.method(self, "SolveContext", name, both)
        return self.broken.method(self, "SolveContext", name, value) if callable(value) else value


class OfSums(Faulty):
    """A plan of sums, and a second plan with other dtypes of the tensors."""

    def __init__(self, broken: Broken, parts: int, sizes: Sequence[int], on: Any) -> None:
        table = ctypes.string_at(parts, _PART.size * len(sizes))
        self.broken, self.parts = broken, list(_PART.iter_unpack(table))
        self._real = broken._module.SumsPlan(parts, sizes, on)
        self._wrong = ctypes.create_string_buffer(b"".join(_PART.pack(*p[:5], WRONG_CODE[p[5]]) for p in self.parts))
        self._other = broken._module.SumsPlan(ctypes.addressof(self._wrong), sizes, on)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        return self.broken.method(self, "SumsPlan", name, value) if callable(value) else value

    def written(self, name, args):
        return written_sums(self.parts, name, args)

    def summed(self, name, args):
        return [(e, _SUMS[code], size) for _, e, _, size, _, code in self.parts if e] if name == "ratio" else []


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """Fill new memory with NaN: memory that no kernel writes then never holds the right result of an old tensor."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def found_by(module: Any, dtype: torch.dtype, rows: Sequence[check_rows.Primitive]) -> str | None:
    """Return the first row that disagrees."""
    pair = check_rows.sides(module, ON, CPU, dtype)
    with torch.no_grad(), filled_memory():
        for row in rows:
            try:
                wrong = difference(row, *pair)
            except RuntimeError as error:  # as in the self-check
                wrong = str(error)
            if wrong is not None:
                return row.name
    return None


@pytest.fixture(scope="session")
def called(shim_module) -> dict[str, list[check_rows.Primitive]]:
    """Return the rows that call each method of the module, the fastest ones first."""
    rows: dict[str, list[check_rows.Primitive]] = {}
    seconds = {}
    for row in ROWS:
        watched = Broken(shim_module, "", no_write)
        start = time.perf_counter()
        assert found_by(watched, torch.float32, [row]) is None, row.name
        seconds[row.name] = time.perf_counter() - start
        for name in {"SolveContext", *watched.called}:
            rows.setdefault(name, []).append(row)
    return {name: sorted(found, key=lambda row: seconds[row.name]) for name, found in rows.items()}


def launches(module: ModuleType) -> Iterator[str]:
    """Return every method of the plans and every function that Fused calls, without those that launch nothing."""
    quiet = {"launches", "bytes", "workspace_size", "current"}
    for owner in ("SolveContext", "SumsPlan"):
        yield from (f"{owner}.{x}" for x in dir(getattr(module, owner)) if not x.startswith("_") and x not in quiet)
    yield from ("pack_adjoint", "jump")


def test_the_rows_call_every_method_of_the_compiled_module(shim_module, called):
    assert set(launches(shim_module)) <= set(called)


OF_STATE = ["rk_stage", "rk_finish", "combine", "sum", "commit", "scaled_error", "dense_eval", "dense_adjoint"]
NORMS = ["judge", "initial_norms", "initial_change"]
ON_CURRENT = ["rk_stage", "rk_finish", "sum", "stage_times", "judge", "dense_eval", "dense_adjoint"]
CONTROL = ["start_control", "start_control_at", "judge_ratio", "next_of_grid", "resume", "read_control"]
WALK = ["begin_reverse", "load_step", "advance_reverse"]
SUMS = [f"SumsPlan.{name}" for name in ("accumulate", "keep", "commit", "ratio")]
LARGE = [*(f"SolveContext.{name}" for name in (*OF_STATE, *NORMS)), *SUMS, "pack_adjoint", "jump"]
NOT_SUMS = [x for x in LARGE if x not in SUMS]
TYPED = [x for x in LARGE if x != "SolveContext.commit"] + ["SolveContext.stage_times"]  # a commit copies bytes

NONE = ctypes.create_string_buffer(8)  # which of the tstops are discontinuities
COEFFICIENTS = [
    ("SolveContext", no_write),  # the direction, see OfState
    *(("SolveContext.interval", argument(i, scaled)) for i in range(3)),
    ("SolveContext.row", argument(0, of_row)),
    ("SolveContext.row", argument(1, of_row)),
    ("SolveContext.row", argument(2, scaled)),
    ("SolveContext.row", argument(3, lambda side: 1)),
    ("SolveContext.combine", argument(0, scaled)),
    ("SolveContext.combine", argument(4, scaled)),
    ("SolveContext.sum", argument(4, scaled)),
    ("SolveContext.stage_times", argument(1, scaled)),
    ("SolveContext.stage_times", argument(2, lambda side: -side)),
    ("SolveContext.polynomials", argument(1, scaled)),
    ("SolveContext.polynomials", argument(2, scaled)),
    *(("SolveContext.set_norm", argument(i, scaled)) for i in (0, 1)),
    ("SolveContext.set_norm", argument(4, lambda ends: [])),  # one segment
    *(("SolveContext.set_law", argument(i, scaled)) for i in (0, 1, 2, 3, 6, 7, 8)),
    ("SolveContext.set_law", argument(0, lambda e: [e[0], e[1] + 0.02, e[2]])),
    *(("SolveContext.set_law", argument(i, lambda flag: not flag)) for i in (4, 5)),
    ("SolveContext.set_law", argument(9, lambda most: min(most + 1, 2**63 - 1))),
    *(("SolveContext.set_law", argument(i, shorter)) for i in (10, 12, 13)),
    ("SolveContext.set_law", argument(11, lambda is_jump: ctypes.addressof(NONE))),
    ("SolveContext.judge", argument(3, scaled)),
    ("SolveContext.judge", argument(6, shorter)),
    ("SolveContext.judge_ratio", argument(0, shorter)),
    ("SolveContext.scaled_error", argument(4, scaled)),
    *(("SolveContext.start_control", argument(i, scaled)) for i in (0, 1)),
    ("SolveContext.start_control_at", argument(1, scaled)),
    *((f"SolveContext.{name}", argument(0, shorter)) for name in ("next_of_grid", "resume")),
    ("SolveContext.dense_eval", argument(3, lambda times: times - 8)),
    ("SolveContext.dense_adjoint", argument(4, lambda times: times - 8)),
    *(("SumsPlan.accumulate", argument(i, scaled)) for i in (2, 3)),
    ("SumsPlan.accumulate", argument(4, lambda add: not add)),
    ("SumsPlan.keep", argument(2, lambda add: not add)),
    *(("SumsPlan.ratio", argument(i, scaled)) for i in (0, 1)),
    ("SolveContext.commit", argument(1, lambda sources: sources[::-1])),
    ("pack_adjoint", argument(4, lambda vjp: 0)),
    ("jump", argument(5, lambda f: f and f + 4)),
]  # fmt: skip
FAULTS = [
    *(pytest.param(where, no_write, id=f"no write {where}") for where in
      (*(f"SolveContext.{name}" for name in (*CONTROL, *WALK, "stage_times")), *LARGE)),
    *(pytest.param(where, dropped_tail, id=f"dropped tail {where}") for where in (*LARGE, "SolveContext.stage_times")),
    *(pytest.param(where, missing_block, id=f"missing block {where}") for where in LARGE),
    *(pytest.param(where, wrong_dtype, id=f"wrong dtype {where}") for where in (*TYPED, "SolveContext.load_step")),
    *(pytest.param(where, no_write_of_current, id=f"no write of the current step {where}") for where in
      (*(f"SolveContext.{name}" for name in ON_CURRENT), "SumsPlan.accumulate", "SumsPlan.keep", "SumsPlan.commit")),
    *(pytest.param(where, no_write_of_one, id=f"no write of one element {where}") for where in NOT_SUMS),
    *(pytest.param(where, no_write_unaligned, id=f"no write unaligned {where}") for where in NOT_SUMS),
    pytest.param("SolveContext.rk_stage", no_write_of_three_terms, id="no write of three terms SolveContext.rk_stage"),
    pytest.param("SumsPlan.accumulate", no_second_launch, id="no second launch SumsPlan.accumulate"),
    *(pytest.param(where, fault, id=f"coefficient {i} {where}") for i, (where, fault) in enumerate(COEFFICIENTS)),
]  # fmt: skip


@pytest.mark.parametrize("where, fault", FAULTS)
def test_a_kernel_with_a_fault_is_found(shim_module, called, where, fault):
    assert found_by(Broken(shim_module, where, fault), torch.float32, called[where]) is not None


OTHERS = [dtype for dtype in DTYPES if dtype != torch.float32]
# The others use lists of all dtypes, independent of the state.
OF_DTYPE = [row for row in ROWS if row.name not in ("accumulate", "long_list", "sums_on_device")]
QUICK = ("rk_stage", "rk_finish", "combine", "sum", "scaled_error")


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_the_kernels_pass_in_every_dtype_and_kernels_of_another_dtype_do_not(shim_module, called, dtype):
    assert found_by(shim_module, dtype, OF_DTYPE) is None
    faults = [(f"SolveContext.{name}", wrong_dtype) for name in QUICK]
    if not dtype.is_complex:  # for complex states the times have the same dtype
        faults.append(("SolveContext.stage_times", wrong_dtype))
    faults += [
        ("SolveContext.row", argument(0, of_row)),
        ("SolveContext.commit", missing_block),
        ("jump", missing_block),
    ]
    for where, fault in faults:
        assert found_by(Broken(shim_module, where, fault), dtype, called[where]) is not None, where


by_kernels: list[Any] = []  # the arithmetic of solves, without that of the checks


# ------------------------------------------------------------------ when the check runs, and how solves use its result
@pytest.fixture
def unchecked(shim, monkeypatch, tmp_path) -> Callable[[Any], None]:
    """A process in which nothing was checked and nothing is recorded, with two quick rows.

    Calling it replaces the module. Without an argument it only resets the results of the process.
    """
    monkeypatch.setenv(check_record.VARIABLE, str(tmp_path))
    monkeypatch.setattr(self_check, "ROWS", tuple(row for row in ROWS if row.name in ("stage_times", "combine")))

    def process(module: Any = None) -> None:
        monkeypatch.setattr(self_check, "_known", {})
        if module is not None:
            monkeypatch.setattr(dispatch, "_kernels", lambda device: (module, ON))

    class Counted(dispatch.Fused):
        def __init__(self, *args: Any) -> None:
            by_kernels.append(self)
            super().__init__(*args)

    monkeypatch.setattr(dispatch, "Fused", Counted)
    process()
    return process


@pytest.fixture
def wrong(shim_module) -> Broken:
    return Broken(shim_module, "SolveContext.combine", argument(0, scaled))


def decay(t, y):
    return -y


def run(dtype=torch.float64):
    return odeint(decay, torch.ones(3, dtype=dtype), torch.linspace(0.0, 1.0, 3), method="dopri5")


def takes_kernels(dtype=torch.float64) -> bool:
    """Return whether the kernels compute the steps of a solve."""
    by_kernels.clear()
    run(dtype)
    return bool(by_kernels)


@pytest.fixture
def checks(monkeypatch) -> list[torch.dtype]:
    """Collect the dtypes of the checks that ran."""
    ran = []
    outcomes = self_check.outcomes

    def spy(module, device, dtype, *rest):
        ran.append(dtype)
        return outcomes(module, device, dtype, *rest)

    monkeypatch.setattr(self_check, "outcomes", spy)
    return ran


def test_a_kernel_that_disagrees_is_named_in_one_warning_and_solves_use_plain_pytorch(unchecked, wrong):
    with node_cuda.backend("reference"):
        expected = run()
    unchecked(wrong)
    with pytest.warns(RuntimeWarning) as caught:
        assert torch.equal(run(), expected)
    (warning,) = caught
    message = str(warning.message)
    assert "Solves on cpu take plain PyTorch instead of the kernels" in message
    assert "disagree with plain PyTorch on cpu in float64: combine." in message
    assert "is right, and rounding allows" in message and "python -m node_cuda" in message
    assert not takes_kernels()  # and does not warn again
    assert not takes_kernels(torch.float32)  # other dtypes do not trust the same build either
    with node_cuda.backend("fused"), pytest.raises(Unsupported, match="the self-check found kernels that disagree"):
        run()
    with torch.no_grad():
        found = solve(decay, torch.ones(3), torch.linspace(0.0, 1.0, 3), options={"cuda_graph": True})
    assert found.stats.why is not None and "the self-check found kernels" in found.stats.why


def test_kernels_that_cannot_be_called_are_named_with_the_error(unchecked, shim_module):
    def too_old(broken, plan, name, call, args):
        raise RuntimeError("node_cuda: stage_time failed: cudaErrorInsufficientDriver\nadvice")

    unchecked(Broken(shim_module, "SolveContext.stage_times", too_old))
    message = r"in float64: stage_times\. .* it fails: node_cuda: stage_time failed: cudaErrorInsufficientDriver\. For"
    with pytest.warns(RuntimeWarning, match=message):
        run()


def test_only_the_first_solve_of_a_dtype_checks_it(unchecked, checks, monkeypatch):
    assert takes_kernels()
    run(torch.float32)
    assert checks == [torch.float64, torch.float32]
    for name in ("Record", "_not_now", "facts", "_lock"):
        monkeypatch.delattr(self_check, name)
    assert takes_kernels() and takes_kernels(torch.float32)
    assert checks == [torch.float64, torch.float32]


def test_one_thread_checks_and_the_others_wait(unchecked, checks):
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert checks == [torch.float64]


def test_nothing_is_checked_during_a_capture_but_in_the_next_solve(unchecked, checks, monkeypatch):
    with monkeypatch.context() as capture:
        capture.setattr(self_check, "capturing", lambda device: True)
        assert not takes_kernels()
        with node_cuda.backend("fused"), pytest.raises(Unsupported, match="were not yet checked on cpu in float64"):
            run()
    assert not checks
    assert takes_kernels()


def test_nothing_is_checked_inside_a_dispatch_mode_or_a_torch_func_transform(unchecked, checks):
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Watching():
        assert not takes_kernels()
    torch.func.grad(lambda y: odeint(decay, y, torch.linspace(0.0, 1.0, 2), method="rk4").sum())(torch.ones(3))
    assert not checks
    assert takes_kernels()


def test_the_check_is_independent_of_the_modes_and_random_states_of_the_caller(unchecked, checks, shim_module):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float16)
    try:
        with (
            torch.inference_mode(),
            torch.device("meta"),
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(lambda x: 1 / 0, lambda x: x),
        ):
            assert self_check.fallback_reason(shim_module, CPU, torch.float32) is None
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.enable_grad():
        assert self_check.fallback_reason(shim_module, CPU, torch.complex64) is None
    assert checks == [torch.float32, torch.complex64]


def test_out_of_memory_is_not_a_fault_of_a_kernel_and_the_next_solve_checks_again(unchecked, shim_module, tmp_path):
    def full(broken, plan, name, call, args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    unchecked(Broken(shim_module, "SolveContext.combine", full))
    assert not takes_kernels()
    with node_cuda.backend("fused"), pytest.raises(Unsupported, match="had no memory left to check the kernels"):
        run()
    assert not list(tmp_path.iterdir())
    unchecked(shim_module)
    assert takes_kernels()


# ------------------------------------------------------------------ the record on disk
def test_the_next_process_knows_of_a_pass_but_not_of_a_failure(unchecked, checks, wrong, tmp_path):
    run()
    unchecked()
    assert takes_kernels() and checks == [torch.float64]
    run(torch.float32)
    assert checks == [torch.float64, torch.float32]
    for file in tmp_path.iterdir():
        file.unlink()
    for _ in range(2):
        unchecked(wrong)
        with pytest.warns(RuntimeWarning):
            run()
        assert not list(tmp_path.iterdir())
    assert len(checks) == 4


@pytest.mark.parametrize("changed", ["device", "driver", "torch"])
def test_another_device_driver_or_torch_is_checked_again(unchecked, checks, monkeypatch, changed):
    run()
    facts = self_check.facts
    monkeypatch.setattr(self_check, "facts", lambda *args: facts(*args).replace(f"{changed} ", f"{changed} other "))
    unchecked()
    run()
    assert checks == [torch.float64] * 2


def test_another_build_is_checked_again(unchecked, checks, monkeypatch, shim_module, tmp_path):
    run()
    library = tmp_path / "other.so"
    library.write_bytes(Path(shim_module.__file__).read_bytes() + b"0")
    monkeypatch.setattr(shim_module, "__file__", str(library))
    unchecked()
    run()
    assert checks == [torch.float64] * 2


def test_a_damaged_file_is_replaced_without_an_error(unchecked, checks, tmp_path):
    run()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:20], b"\xff" * 99):
        file.write_bytes(damaged)
        unchecked()
        run()
        assert file.read_bytes() == whole
    assert len(checks) == 4


def test_a_folder_that_cannot_be_written_raises_no_error(unchecked, checks, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(check_record.VARIABLE, str(tmp_path / "file" / "folder"))
    assert takes_kernels()
    unchecked()
    run()
    assert checks == [torch.float64] * 2


def test_checks_are_recorded_in_the_folder_of_the_environment_or_in_the_users_cache(monkeypatch):
    monkeypatch.delenv(check_record.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert check_record.folder() == Path("/some/cache/node_cuda")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert check_record.folder() == Path.home() / ".cache" / "node_cuda"
    monkeypatch.setenv(check_record.VARIABLE, "/some/folder")
    assert check_record.folder() == Path("/some/folder")


OTHER_PROCESS = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("check_record", sys.argv[1])
record = importlib.util.module_from_spec(spec)
sys.modules["check_record"] = record
spec.loader.exec_module(record)
with record.Record(sys.argv[2]).checking() as note:
    note("combine in float32")
    print("checking", flush=True)
    sys.stdin.readline()
    os._exit(1)
"""


def test_the_entry_of_a_dead_process_is_found_but_not_that_of_a_running_one(unchecked, checks, shim_module, tmp_path):
    facts = self_check.facts(shim_module, CPU)
    command = [sys.executable, "-c", OTHER_PROCESS, check_record.__file__, facts]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "checking\n"
        assert not Record(facts).unfinished()
        run()
        assert checks == [torch.float64]
        other.stdin.write("die\n")
    (entry,) = tmp_path.glob("*.checking")
    unchecked()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert takes_kernels()  # float64 passed
        with pytest.raises(RuntimeWarning, match=f"died while it checked combine in float32. .*rm {entry}"):
            run(torch.float32)
        assert not takes_kernels(torch.float32)
    assert checks == [torch.float64]  # no check ran
    entry.unlink()
    unchecked()
    assert takes_kernels(torch.float32)
    assert checks == [torch.float64, torch.float32]


def test_an_error_that_ruins_the_device_is_raised_and_reported_by_the_next_process(
    unchecked, checks, shim_module, monkeypatch, tmp_path
):
    def illegal(broken, plan, name, call, args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nadvice")

    unchecked(Broken(shim_module, "SolveContext.combine", illegal))
    with monkeypatch.context() as ruined:
        ruined.setattr(self_check, "_usable", lambda device: False)
        with pytest.raises(Lost, match=r"self-check of combine in float64 .* illegal memory access was encountered\. "):
            run()
    (entry,) = tmp_path.iterdir()
    unchecked(shim_module)
    with pytest.warns(RuntimeWarning, match=f"died while it checked combine in float64. .*rm {entry}"):
        run()
    assert checks == [torch.float64]


def test_without_file_locks_an_old_entry_counts_as_a_death(monkeypatch, tmp_path):
    monkeypatch.setenv(check_record.VARIABLE, str(tmp_path))
    monkeypatch.setattr(check_record, "fcntl", None)
    record = Record("facts")
    with record.checking() as note:
        note("tape in float16")
        assert not record.unfinished()
        monkeypatch.setattr(check_record, "LONGEST_CHECK", -1.0)
        assert [what for what, _ in record.unfinished()] == ["tape in float16"]
        note("")
        assert not record.unfinished()  # no check ran yet
    assert not record.unfinished()


# ------------------------------------------------------------------ the report
def test_the_report_has_a_row_for_each_primitive(unchecked, shim_module, wrong, tmp_path):
    assert self_check.survey(shim_module, CPU) == [
        ("remembered", f"passed in no dtype, by {tmp_path}"),
        ("stage_times", "passed"),
        ("combine", "passed"),
    ]
    dtypes = "float32, float64, float16, bfloat16, complex64, complex128"
    assert self_check.survey(shim_module, CPU)[0] == ("remembered", f"passed in {dtypes}, by {tmp_path}")
    (_, (_, passed), (_, disagrees)) = self_check.survey(wrong, CPU)
    assert passed == "passed"
    assert disagrees.startswith("in float32 disagrees: element ") and "; in float64 disagrees: element " in disagrees


def test_the_report_checks_the_other_rows_and_says_how_to_check_the_rest(unchecked, shim_module, tmp_path):
    with pytest.raises(Lost), Record(self_check.facts(shim_module, CPU)).checking() as note:
        note("combine in float16")
        raise Lost
    (entry,) = tmp_path.iterdir()
    (_, (_, passed), (_, not_run)) = self_check.survey(shim_module, CPU)
    assert passed == "passed"
    assert not_run.endswith(f"not run: a process died while it checked combine in float16; to check it "
                            f"again: rm {entry}")  # fmt: skip


def test_python_m_node_cuda_prints_the_rows_or_the_reason_for_none(shim_module, monkeypatch):
    live = environment.LivePath(environment.FUSED, "", None)
    assert environment.checks(environment.LivePath(environment.REFERENCE, "", None)) == [
        "not run: the kernels are not live"
    ]
    (broken,) = environment.checks(live)  # there is no GPU here
    assert broken.startswith("not run: ")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(extension, "at_hand", lambda capability: extension.Search(shim_module, ""))
    monkeypatch.setattr(self_check, "survey", lambda module, device: [("rk_stage", "passed"), ("tape", "disagrees: x")])
    monkeypatch.setattr(environment, "live_path", lambda: live)
    assert environment.report().splitlines()[-2:] == ["self-check  rk_stage: passed", "self-check  tape: disagrees: x"]
