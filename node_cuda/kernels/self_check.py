"""The self-check: on its first use on a device, every kernel is compared with plain PyTorch on small tensors.

Once a process for each dtype, and not where the same build passed on the same kind of device before. Where a kernel
disagrees, solves on this device take plain PyTorch in all dtypes, since all of them come from one source and one
compilation: a fault that small tensors show in one of them may lie in the others where small tensors do not show it.
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
"""Why the kernels are not to be used, as half a sentence; None: they passed."""
_lock = threading.Lock()  # one thread checks, the others wait for it


class Outcome(NamedTuple):
    """What came of a row. state: passed, disagrees or not run; why: half a sentence."""

    name: str
    state: str
    why: str = ""


def fallback_reason(module: ModuleType, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a solve is not to use the kernels, as half a sentence. The first call for a dtype checks them; later ones
    look into a dict."""
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
    """Take the kernels as checked on this device, in every dtype. For tests of what uses them."""
    _known.update({(device, dtype): None for dtype in DTYPES})


def _not_now(device: torch.device) -> str | None:
    if capturing(device):
        return "while a CUDA graph is captured: solve once before that"
    if torch._C._len_torch_dispatch_stack():
        return "inside a TorchDispatchMode: solve once before that"
    return None


def _first_use(module: ModuleType, device: torch.device, dtype: torch.dtype) -> str | None:
    """Find out whether the kernels are right in this dtype. What to warn of, if they are not."""
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
    return f"a process that checked {what} did not survive it"


def outcomes(
    module: ModuleType, device: torch.device, dtype: torch.dtype, record: Record, died: Sequence[tuple[str, Path]] = ()
) -> list[Outcome]:
    """Run all rows in this dtype, but for those that a process did not survive; remember it if all passed. Raises Lost
    where an error ruins the device for this process: the next process finds what it was."""

    def run(on: Launch) -> list[Outcome]:
        pair = sides(module, on, device, dtype)
        return [_outcome(row, *pair, note, died) for row in ROWS]

    with record.checking() as note:
        found = _apart(device, run)
    if all(outcome.state == PASSED for outcome in found):
        record.remember(_name(dtype))
    return found


def survey(module: ModuleType, device: torch.device) -> list[tuple[str, str]]:
    """For a report: what is remembered, and what comes of each primitive in all dtypes, checked anew."""
    record = Record(facts(module, device))
    known = [_name(dtype) for dtype in DTYPES if record.passed(_name(dtype))]
    found: dict[str, dict[str, list[str]]] = {row.name: {} for row in ROWS}
    for dtype in DTYPES:
        try:
            of_dtype = outcomes(module, device, dtype, record, record.unfinished())
        except Exception as error:  # a line of the report, and no failure
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
    """An error in one line: torch adds paragraphs of advice."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _is_full(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in str(error)


def _usable(device: torch.device) -> bool:
    """Does the device still do what it is told? Behind an illegal access it never does."""
    try:
        return torch.ones(1, device=device).item() == 1.0
    except RuntimeError as error:
        return _is_full(error)


def _apart(device: torch.device, work: Callable[[Launch], T]) -> T:
    """What the work gives in a thread and a stream for itself: the modes of this thread (autocast, inference mode,
    torch.func, default device, hooks) are not there, and no work of the user's is waited for or held up."""

    def alone() -> T:
        if device.type != "cuda":
            with torch.no_grad():
                return work((0, 0))
        watched = torch.cuda.get_sync_debug_mode()
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            torch.cuda.set_sync_debug_mode(0)
            try:
                torch.cuda.synchronize(device)  # an error of an earlier launch is not one of the kernels
                return work((torch.cuda.current_stream(device).cuda_stream, torch.cuda.current_device()))
            finally:
                torch.cuda.set_sync_debug_mode(watched)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(alone).result()


def facts(module: ModuleType, device: torch.device) -> str:
    """All that the result of a check depends on: the build, the device, its driver and torch."""
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
    """Of the compiled module and of the Python that calls it."""
    digest = hashlib.blake2b(digest_size=16)
    for path in (*sorted(Path(__file__).parent.glob("*.py")), *(() if library is None else (Path(library),))):
        with contextlib.suppress(OSError):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
