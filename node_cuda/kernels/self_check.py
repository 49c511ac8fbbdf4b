"""The self-check: on its first use on a device, every kernel is compared with plain PyTorch on small tensors.

The check runs once in a process for each dtype, unless the same build already passed on the same kind of device. If one
kernel disagrees, solves on this device use plain PyTorch in all dtypes. The reason: all dtypes come from one source and
one compilation, so a fault that shows in one dtype may exist in others, where small tensors do not show it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch

from node_cuda._torch_modes import capturing
from node_cuda._version import __version__
from node_cuda.kernels.check_record import Lost, Record
from node_cuda.kernels.check_rows import ROWS, Primitive, Side, difference, sides
from node_cuda.kernels.fused import DTYPES, Launch

T = TypeVar("T")

PASSED, DISAGREES, NOT_RUN = "passed", "disagrees", "not run"

_known: dict[tuple[torch.device, torch.dtype], str | None] = {}
"""The reason why the kernels must not be used, as half a sentence; None: they passed."""
_lock = threading.Lock()  # one thread checks, the others wait for it


class Outcome(NamedTuple):
    """The result of a row. state: passed, disagrees or not run. why: half a sentence."""

    name: str
    state: str
    why: str = ""


def fallback_reason(module: ModuleType, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why a solve must not use the kernels, as half a sentence, or None.

    The first call for a dtype checks the kernels. Later calls only read a dict.
    """
    key = device, dtype
    if key not in _known:
        if not_now := _not_now(device):
            return f"the kernels were not yet checked on {device} in {_name(dtype)}, and cannot be {not_now}"
        with _lock:
            try:
                warning = None if key in _known else _first_use(module, device, dtype)
            except Exception as error:
                if not _is_full(error):
                    raise
                return f"{device} had no memory left to check the kernels, which is done before they are used"
        if warning is not None:
            warnings.warn(warning, RuntimeWarning, stacklevel=3)
    return _known[key]


def trust(device: torch.device) -> None:
    """Treat the kernels as checked on this device, in every dtype. For tests of code that uses them."""
    _known.update({(device, dtype): None for dtype in DTYPES})


def _not_now(device: torch.device) -> str | None:
    if capturing(device):
        return "while a CUDA graph is captured: solve once before that"
    if torch._C._len_torch_dispatch_stack():
        return "inside a TorchDispatchMode: solve once before that"
    return None


def _first_use(module: ModuleType, device: torch.device, dtype: torch.dtype) -> str | None:
    """Check the kernels in this dtype. Return a warning if they are wrong, else None."""
    record = Record(facts(module, device))
    if record.passed(_name(dtype)):
        _known[device, dtype] = None
        return None
    died = record.unfinished()
    if not died:
        wrong = [outcome for outcome in outcomes(module, device, dtype, record) if outcome.state != PASSED]
        if not wrong:
            _known[device, dtype] = None
            return None
        names = ", ".join(outcome.name for outcome in wrong)
        why = f"the self-check found kernels that disagree with plain PyTorch on {device} in {_name(dtype)}: {names}"
        more = f"The first of them: {wrong[0].why}. For all of them: python -m node_cuda"
    else:
        why = _death(died[0][0])
        more = f"To check it again: rm {' '.join(str(path) for _, path in died)}"
    _known.update({(device, of): why for of in DTYPES})
    return f"Solves on {device} take plain PyTorch instead of the kernels, because {why}. {more}"


def _death(what: str) -> str:
    return f"a process died while it checked {what}"


def outcomes(
    module: ModuleType, device: torch.device, dtype: torch.dtype, record: Record, died: Sequence[tuple[str, Path]] = ()
) -> list[Outcome]:
    """Run all rows in this dtype, except those that killed a process; record it if all passed.

    Raises Lost if an error makes the device unusable for this process. The next process then reports the cause.
    """

    def run(on: Launch) -> list[Outcome]:
        pair = sides(module, on, device, dtype)
        return [_outcome(row, *pair, note, died) for row in ROWS]

    with record.checking() as note:
        found = _apart(device, run)
    if all(outcome.state == PASSED for outcome in found):
        record.remember(_name(dtype))
    return found


def survey(module: ModuleType, device: torch.device) -> list[tuple[str, str]]:
    """Return the lines of a report: the recorded results, and the result of each primitive in all dtypes, checked
    again."""
    record = Record(facts(module, device))
    known = [_name(dtype) for dtype in DTYPES if record.passed(_name(dtype))]
    found: dict[str, dict[str, list[str]]] = {row.name: {} for row in ROWS}
    for dtype in DTYPES:
        try:
            of_dtype = outcomes(module, device, dtype, record, record.unfinished())
        except Exception as error:  # report the error in a line
            of_dtype = [Outcome(row.name, NOT_RUN, _gist(error)) for row in ROWS]
        for name, state, why in of_dtype:
            found[name].setdefault(f"{state}: {why}" if why else state, []).append(_name(dtype))
    lines = [("remembered", f"passed in {', '.join(known) or 'no dtype'}, by {record.folder}")]
    for name, results in found.items():
        lines.append((name, "; ".join(f"in {', '.join(dtypes)} {result}" for result, dtypes in results.items())))
        if list(results) == [PASSED]:
            lines[-1] = (name, PASSED)
    return lines


def _outcome(
    row: Primitive, device: Side, host: Side, note: Callable[[str], None], died: Sequence[tuple[str, Path]]
) -> Outcome:
    """Run one row."""
    for what, path in died:
        if what.split()[0] == row.name:
            return Outcome(row.name, NOT_RUN, f"{_death(what)}; to check it again: rm {path}")
    note(f"{row.name} in {_name(device.dtype)}")
    try:
        wrong = difference(row, device, host)
    except Exception as error:
        if _is_full(error):
            raise
        if not _usable(device.device):
            raise Lost(
                f"The self-check of {row.name} in {_name(device.dtype)} ended in an error after which this process "
                f"cannot use {device.device}: {_gist(error)}. To solve in plain PyTorch, start it again with "
                "NODE_CUDA_BACKEND=reference."
            ) from error
        wrong = f"it fails: {_gist(error)}"
    return Outcome(row.name, PASSED) if wrong is None else Outcome(row.name, DISAGREES, wrong)


def _gist(error: Exception) -> str:
    """Return an error in one line, without the advice that torch adds."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _is_full(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in str(error)


def _usable(device: torch.device) -> bool:
    """Return whether the device still works. After an illegal memory access it does not."""
    try:
        return torch.ones(1, device=device).item() == 1.0
    except RuntimeError as error:
        return _is_full(error)


def _apart(device: torch.device, work: Callable[[Launch], T]) -> T:
    """Run the work in a separate thread and stream, and return its result.

    The modes of this thread (autocast, inference mode, torch.func, default device, hooks) do not apply there. The work
    does not wait for the user's work, and does not delay it.
    """

    def alone() -> T:
        if device.type != "cuda":
            with torch.no_grad():
                return work((0, 0))
        watched = torch.cuda.get_sync_debug_mode()
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            torch.cuda.set_sync_debug_mode(0)
            try:
                torch.cuda.synchronize(device)  # so that an error of an earlier launch is not attributed to the kernels
                return work((torch.cuda.current_stream(device).cuda_stream, torch.cuda.current_device()))
            finally:
                torch.cuda.set_sync_debug_mode(watched)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(alone).result()


def facts(module: ModuleType, device: torch.device) -> str:
    """Return everything that the result of a check depends on: the build, the device, its driver and torch."""
    name, driver = device.type, "none"
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), str(torch._C._cuda_getDriverVersion())  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(OSError):
            driver += f", {Path('/proc/driver/nvidia/version').read_text().splitlines()[0]}"
    return (
        f"node_cuda {__version__}, of the digest {_digest(module.__file__)}\n"
        f"device {name}, driver {driver}\ntorch {torch.__version__}, CUDA {torch.version.cuda}"
    )


@functools.cache
def _digest(library: str | None) -> str:
    """Return a hash of the compiled module and of the Python code that calls it."""
    digest = hashlib.blake2b(digest_size=16)
    for path in (*sorted(Path(__file__).parent.glob("*.py")), *(() if library is None else (Path(library),))):
        with contextlib.suppress(OSError):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
