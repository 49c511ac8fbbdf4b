"""The self-check of the kernels through the shim: it passes on them as they are, and finds each fault in each of them.

A fault lies in one method of the compiled module, between Python and the kernel: nothing is compiled for it.
"""

from __future__ import annotations

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
from node_cuda.kernels import backend as dispatch
from node_cuda.kernels import check_record, check_rows, self_check
from node_cuda.kernels.check_record import Lost, Record
from node_cuda.kernels.check_rows import MANY, ROWS, difference
from node_cuda.kernels.fused import DTYPES

CPU = torch.device("cpu")
ON = (0, 0)

# A dtype that memory is mistaken for: not a wider one, so that nothing is read beyond its end.
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
"""An address, the size of an element, and how many there are."""


# ------------------------------------------------------------------ what the calls write, and what they add up
def written(plan: Any, name: str, args: tuple[Any, ...]) -> list[Memory]:
    """What a call of this method writes of the state's or the parameters' size."""
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
    """What a call of this method adds up over the elements of a state: where it is zero, it is left out."""
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
    """The same for a list of parameters."""
    if name == "commit":
        return [(total, _SUMS[code], size) for _, _, total, size, _, code in parts]
    if name in ("accumulate", "keep"):
        error = name == "accumulate" and args[3]
        return [(of, _SUMS[code], size) for s, e, _, size, _, code in parts for of in (s, e if error else 0) if of]
    return []


# ------------------------------------------------------------------ faults
Call = Callable[..., Any]
Fault = Callable[["Broken", Any, str, Call, tuple[Any, ...]], Any]
"""What happens instead of a call of a method with these arguments."""


def no_write(broken, plan, name, call, args):
    """The kernel does nothing."""


def _keeping(start: Callable[[int], slice]) -> Fault:
    """These elements are not written, and those that are added up are left out."""

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
    """The kernel of another dtype."""
    return plan.mistaken(name, args)


def argument(place: int, change: Callable[[Any], Any]) -> Fault:
    """One argument of the call is another one."""

    def fault(broken, plan, name, call, args):
        return call(*(change(x) if i == place else x for i, x in enumerate(args)))

    return fault


def scaled(x):
    """A coefficient that is wrong by two percent, the last one of several."""
    if isinstance(x, (list, tuple)):
        return [*x[:-1], scaled(x[-1])] if x and not isinstance(x[-1], int) else x
    return 1.02 * x


def of_row(entries):
    """The same in a row of stages and their coefficients."""
    return [*entries[:-1], (entries[-1][0], 1.02 * entries[-1][1])] if entries else entries


def shorter(array):
    return array[0], max(array[1] - 1, 0)


class Broken:
    """The compiled module with a fault in one method: of a plan (`Plan.name`, `SumsPlan.name`) or of the module."""

    def __init__(self, module: ModuleType, where: str, fault: Fault) -> None:
        self._module, self.where, self.fault = module, where, fault
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return self.method(self, "", name, value) if name in ("pack_adjoint", "jump") else value

    def Plan(self, *args: Any) -> OfState:
        return OfState(self, *args)

    def SumsPlan(self, *args: Any) -> OfSums:
        return OfSums(self, *args)

    def method(self, plan: Any, owner: str, name: str, call: Call) -> Call:
        full = f"{owner}.{name}" if owner else name
        self.called.add(full)
        return (lambda *args: self.fault(self, plan, name, call, args)) if full == self.where else call

    # Of the module's own functions:
    n = size = error_size = 0

    def written(self, name, args):
        return written(self, name, args)

    def summed(self, name, args):
        return summed(self, name, args)

    def mistaken(self, name, args):
        return getattr(self._module, name)(WRONG_CODE[args[0]], *args[1:])


class OfState:
    """A plan, and one beside it that takes the state for another dtype."""

    def __init__(self, broken: Broken, code: int, n: int, size: int, error_size: int, on: Any, direction: float) -> None:
        if broken.where == "Plan":
            direction = -direction
        self.broken, self.n, self.size, self.error_size = broken, n, size, error_size
        self.real_size = size // 2 if list(DTYPES)[code].is_complex else size
        self._real = broken._module.Plan(code, n, size, error_size, on, direction)
        self._other = broken._module.Plan(WRONG_CODE[code], n, size, error_size, on, direction)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if name.startswith("set_") and name != "set_walk" or name in ("row", "polynomials"):

            def both(*args: Any) -> Any:
                getattr(self._other, name)(*args)
                return value(*args)

            return self.broken.method(self, "Plan", name, both)
        return self.broken.method(self, "Plan", name, value) if callable(value) else value

    def written(self, name, args):
        return written(self, name, args)

    def summed(self, name, args):
        return summed(self, name, args)

    def mistaken(self, name, args):
        return getattr(self._other, name)(*args)


class OfSums:
    """A plan of sums, and one beside it that takes the tensors for others."""

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

    def mistaken(self, name, args):
        return getattr(self._other, name)(*args)


def found_by(module: Any, dtype: torch.dtype, rows: Sequence[check_rows.Primitive]) -> str | None:
    """The first row that disagrees."""
    pair = check_rows.sides(module, ON, CPU, dtype)
    with torch.no_grad():
        for row in rows:
            try:
                wrong = difference(row, *pair)
            except RuntimeError as error:  # as the self-check takes it
                wrong = str(error)
            if wrong is not None:
                return row.name
    return None


@pytest.fixture(scope="session")
def called(shim_module) -> dict[str, list[check_rows.Primitive]]:
    """The rows that call each method of the module, the fastest ones first."""
    rows: dict[str, list[check_rows.Primitive]] = {}
    seconds = {}
    for row in ROWS:
        watched = Broken(shim_module, "", no_write)
        start = time.perf_counter()
        assert found_by(watched, torch.float32, [row]) is None, row.name
        seconds[row.name] = time.perf_counter() - start
        for name in {"Plan", *watched.called}:
            rows.setdefault(name, []).append(row)
    return {name: sorted(found, key=lambda row: seconds[row.name]) for name, found in rows.items()}


def launches(module: ModuleType) -> Iterator[str]:
    """Every method of the plans and every function that Fused calls, but those that launch nothing."""
    quiet = {"launches", "bytes", "workspace_size", "set_workspace"}
    for owner in ("Plan", "SumsPlan"):
        yield from (f"{owner}.{x}" for x in dir(getattr(module, owner)) if not x.startswith("_") and x not in quiet)
    yield from ("pack_adjoint", "jump")


def test_every_method_of_the_compiled_module_that_solves_call_is_called_by_a_row(shim_module, called):
    assert set(launches(shim_module)) <= set(called)


OF_STATE = ["rk_stage", "rk_finish", "combine", "sum", "commit", "scaled_error", "dense_eval", "dense_adjoint"]
NORMS = ["judge", "initial_norms", "initial_change"]
CONTROL = ["start_control", "start_control_at", "judge_ratio", "next_of_grid", "resume", "read_control"]
WALK = ["set_walk", "take_back", "taken"]
SUMS = [f"SumsPlan.{name}" for name in ("accumulate", "keep", "commit", "ratio")]
LARGE = [*(f"Plan.{name}" for name in (*OF_STATE, *NORMS)), *SUMS, "pack_adjoint", "jump"]
TYPED = [x for x in LARGE if x != "Plan.commit"] + ["Plan.stage_times"]  # a commit copies bytes

NONE = ctypes.create_string_buffer(8)  # of the landings a jump
COEFFICIENTS = [
    ("Plan", no_write),  # the direction, see OfState
    *(("Plan.interval", argument(i, scaled)) for i in range(3)),
    ("Plan.row", argument(0, of_row)),
    ("Plan.row", argument(1, of_row)),
    ("Plan.row", argument(2, scaled)),
    ("Plan.row", argument(3, lambda side: 1)),
    ("Plan.combine", argument(0, scaled)),
    ("Plan.combine", argument(4, scaled)),
    ("Plan.sum", argument(4, scaled)),
    ("Plan.stage_times", argument(1, scaled)),
    ("Plan.stage_times", argument(2, lambda side: -side)),
    ("Plan.polynomials", argument(1, scaled)),
    ("Plan.polynomials", argument(2, scaled)),
    *(("Plan.set_norm", argument(i, scaled)) for i in (0, 1)),
    ("Plan.set_norm", argument(4, lambda ends: [])),  # one segment
    *(("Plan.set_law", argument(i, scaled)) for i in (0, 1, 2, 3, 6, 7, 8)),
    ("Plan.set_law", argument(0, lambda e: [e[0], e[1] + 0.02, e[2]])),
    *(("Plan.set_law", argument(i, lambda flag: not flag)) for i in (4, 5)),
    ("Plan.set_law", argument(9, lambda most: most + 1)),
    *(("Plan.set_law", argument(i, shorter)) for i in (10, 12, 13)),
    ("Plan.set_law", argument(11, lambda is_jump: ctypes.addressof(NONE))),
    ("Plan.judge", argument(3, scaled)),
    ("Plan.judge", argument(6, shorter)),
    ("Plan.judge_ratio", argument(0, shorter)),
    ("Plan.scaled_error", argument(4, scaled)),
    *(("Plan.start_control", argument(i, scaled)) for i in (0, 1)),
    ("Plan.start_control_at", argument(1, scaled)),
    *((f"Plan.{name}", argument(0, shorter)) for name in ("next_of_grid", "resume")),
    ("Plan.dense_eval", argument(3, lambda times: times - 8)),
    ("Plan.dense_adjoint", argument(4, lambda times: times - 8)),
    *(("SumsPlan.accumulate", argument(i, scaled)) for i in (2, 3)),
    ("SumsPlan.accumulate", argument(4, lambda add: not add)),
    ("SumsPlan.keep", argument(2, lambda add: not add)),
    *(("SumsPlan.ratio", argument(i, scaled)) for i in (0, 1)),
    ("Plan.commit", argument(1, lambda sources: sources[::-1])),
    ("pack_adjoint", argument(4, lambda vjp: 0)),
    ("jump", argument(5, lambda f: f and f + 4)),
    ("Plan.set_walk", argument(1, lambda last: 1)),
    ("Plan.taken", argument(1, lambda least: 1)),
]  # fmt: skip
FAULTS = [
    *(pytest.param(where, no_write, id=f"no write {where}") for where in
      (*(f"Plan.{name}" for name in (*CONTROL, *WALK, "stage_times")), *LARGE)),
    *(pytest.param(where, dropped_tail, id=f"dropped tail {where}") for where in (*LARGE, "Plan.stage_times")),
    *(pytest.param(where, missing_block, id=f"missing block {where}") for where in LARGE),
    *(pytest.param(where, wrong_dtype, id=f"wrong dtype {where}") for where in (*TYPED, "Plan.take_back")),
    *(pytest.param(where, fault, id=f"coefficient {i} {where}") for i, (where, fault) in enumerate(COEFFICIENTS)),
]  # fmt: skip


@pytest.mark.parametrize("where, fault", FAULTS)
def test_a_kernel_with_a_fault_is_found(shim_module, called, where, fault):
    assert found_by(Broken(shim_module, where, fault), torch.float32, called[where]) is not None
