"""Times every primitive: the kernel alone, beside plain PyTorch and torch.compile of that, against a copy's bandwidth.

For a state of 64 MB, where bytes are what counts, and of 16 KB, where launches do. A kernel is called raw, without
node_cuda around it, and its results are compared with the reference's before anything is timed. Bytes are those that
the formula must read and write; the bandwidth is that of `copy_` of one such state in the same run. Many launches
follow each other between two CUDA events; with the large state their tensors take turns, so many that a pass over them
is several times larger than the L2 cache. The primitives are in primitives/.

    python bench/kernels.py [--dtype float16] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parts import program
from parts.common.tables import gist, show, write_result
from parts.common.timing import Spread, device_seconds
from parts.kernels.primitives import PRIMITIVES, STEP, Launch, Primitive, Workplace
from parts.kernels.report import kernels_rows, kernels_sentences

SIZES = (64 * 2**20, 16 * 2**10)  # bytes of the state
TARGET, TARGET_FROM = 0.85, 64 * 2**20  # share of the copy's bandwidth, from so many bytes of state on
L2_PASSES = 8  # so many times the L2 cache is what launches go through before they meet a tensor again
ULPS = 64  # a result may be off by so many units in the last place of the largest one
DTYPES = ("float32", "float64", "float16", "bfloat16")


class Setting(NamedTuple):
    """What all rows have in common. compile_until: a time of perf_counter; later rows are not compiled."""

    place: Workplace
    state_bytes: int
    copy_rate: float  # bytes a second
    compile_until: float


def main() -> None:
    arguments = parse()
    device = cuda_device(arguments.device)
    launchers = compiled_module(device)
    dtype = getattr(torch, arguments.dtype)
    compile_until = time.perf_counter() + arguments.compile_seconds
    copies: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        **program.new_result("kernels" if dtype is torch.float32 else f"kernels-{arguments.dtype}", device),
        "settings": {"dtype": arguments.dtype, "target_from_bytes": TARGET_FROM},
        "complete": False,
        "copies": copies,
        "steps": [],
        "rows": rows,
    }
    with torch.no_grad():
        for size in arguments.sizes:
            on = torch.cuda.current_stream(device).cuda_stream, device.index
            place = Workplace(launchers, on, device, dtype, size // dtype.itemsize)
            rate, record = copy_rate(place, size)
            copies.append(record)
            setting = Setting(place, size, rate, compile_until)
            for primitive in PRIMITIVES:
                print(f"{primitive.name}, {size} bytes", file=sys.stderr, flush=True)
                rows.append(measure(primitive, setting))
                result["steps"] = [step for done in arguments.sizes if (step := whole_step(rows, done))]
                write_result(result, arguments.out)  # each time: time on a GPU may be over before the last row
    result["complete"] = True
    path = write_result(result, arguments.out)
    show(kernels_rows(result))
    print(kernels_sentences(result))
    print(program.written(path, arguments.out))
    if failed := [row["primitive"] for row in rows if "failed" in row]:
        raise SystemExit(f"Failed, or wrong: {'; '.join(failed)}.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="a CUDA device (default: cuda)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the state (default: float32)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES", help="of the state")
    parser.add_argument(
        "--compile-seconds", type=float, default=120.0, help="no new torch.compile after so many (0: none at all)"
    )
    program.add_out(parser)
    arguments = parser.parse_args()
    if any(size % 64 or size <= 0 for size in arguments.sizes):
        parser.error("--sizes must be multiples of 64 bytes: eight tensors share a state of doubles.")
    return arguments


def cuda_device(name: str) -> torch.device:
    """The device with its index, or the end of the program."""
    device = torch.device(name)
    if device.type != "cuda" or not torch.cuda.is_available():
        lacking = "this is no CUDA device" if device.type != "cuda" else "torch finds none here"
        raise SystemExit(
            f"kernels.py times CUDA kernels, and needs an NVIDIA GPU with a CUDA build of torch (--device {name}: "
            f"{lacking}). Without one, tests/project/test_bench.py checks the same launches on the CPU."
        )
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def compiled_module(device: torch.device) -> Any:
    """node_cuda._C, or the end of the program."""
    from node_cuda.extension.loading import kernels

    module = kernels(device)
    if module is None:
        raise SystemExit("There are no compiled kernels to time; the warning above says why, and how to get them.")
    return module


def copy_rate(place: Workplace, size: int) -> tuple[float, dict[str, Any]]:
    """Bytes a second that torch's copy of a state moves, reads and writes both counted, and its record."""
    pairs = [place.states(2) for _ in range(turns(2 * size, place))]
    took = device_seconds([lambda to=to, source=source: to.copy_(source) for to, source in pairs])
    spread = Spread.of(took)
    record = {"state_bytes": size, "bytes": 2 * size, "microseconds": Spread.of([1e6 * s for s in took])}
    return 2 * size / spread.median, record


def turns(moved: int, place: Workplace) -> int:
    """How many sets of tensors take turns: one for a small state, which may stay in the cache."""
    if place.n * place.dtype.itemsize < TARGET_FROM:
        return 1
    cache = getattr(torch.cuda.get_device_properties(place.device), "L2_cache_size", 64 * 2**20)
    return max(1, math.ceil(L2_PASSES * cache / moved))


def measure(primitive: Primitive, setting: Setting) -> dict[str, Any]:
    """One row; where something fails, it says what."""
    row: dict[str, Any] = {
        "primitive": primitive.name,
        "launcher": primitive.launcher,
        "state_bytes": setting.state_bytes,
        "target": TARGET if setting.state_bytes >= TARGET_FROM else None,
        "met": None,
    }
    try:
        first = primitive.prepare(setting.place)
        require_right(primitive, first, setting.place.dtype)
        launches = [first]
        launches += [primitive.prepare(setting.place) for _ in range(turns(first.bytes, setting.place) - 1)]
        took = Spread.of(device_seconds([launch.kernel for launch in launches]))
        row |= {
            "bytes": first.bytes,
            "microseconds": [1e6 * s for s in took],
            "bytes_per_second": first.bytes / took.median,
            "of_copy": first.bytes / took.median / setting.copy_rate,
            "plain": timed(primitive.plain, launches),
        }
        if row["target"] is not None:
            row["met"] = row["of_copy"] >= row["target"]
        row["compiled"] = compiled(primitive, launches, setting)
    except Exception as error:  # a row that fails is a value, and the others go on
        row["failed"] = gist(error)
    return row


def whole_step(rows: Sequence[dict[str, Any]], size: int) -> dict[str, Any] | None:
    """The sums over the launches of a step of dopri5 in microseconds, None where one is missing."""
    by_name = {row["primitive"]: row for row in rows if row["state_bytes"] == size and "failed" not in row}
    if not by_name.keys() >= set(STEP):
        return None
    launches = [by_name[name] for name in STEP]
    no_compiler = any("failed" in row["compiled"] for row in launches)
    return {
        "state_bytes": size,
        "launches": len(launches),
        "sizes": sum(row["bytes"] for row in launches) / size,
        "kernel": sum(row["microseconds"][0] for row in launches),
        "plain": sum(row["plain"]["microseconds"][0] for row in launches),
        "compiled": None if no_compiler else sum(row["compiled"]["microseconds"][0] for row in launches),
    }


def timed(plain: Callable[..., Any], launches: Sequence[Launch]) -> dict[str, Any]:
    """What the same costs without the kernel."""
    took = device_seconds([lambda launch=launch: plain(*launch.arguments) for launch in launches])
    return {"microseconds": Spread.of([1e6 * s for s in took])}


def compiled(primitive: Primitive, launches: Sequence[Launch], setting: Setting) -> dict[str, Any]:
    """What torch.compile makes of plain PyTorch; fresh for every row, or it would soon stop compiling."""
    if time.perf_counter() >= setting.compile_until:
        return {"failed": "not compiled"}
    try:
        torch.compiler.reset()
        return timed(torch.compile(primitive.plain, dynamic=False), launches)
    except Exception as error:  # the compiler may fail in any way
        return {"failed": gist(error)}


def require_right(primitive: Primitive, launch: Launch, dtype: torch.dtype) -> None:
    """Runs the kernel once, then plain PyTorch on numbers of its own, and raises where they differ."""
    launch.kernel()
    plain = flat(primitive.plain(*launch.arguments))
    if len(plain) != len(launch.results):
        raise ValueError(f"{primitive.name} gives {len(launch.results)} results, plain PyTorch {len(plain)}")
    for ours, expected in zip(launch.results, plain, strict=True):
        size = expected.abs().max().item()
        off = (ours - expected.to(ours.device).view_as(ours)).abs().max().item()
        if not off <= ULPS * torch.finfo(dtype).eps * size:  # NaN is caught as well
            raise ValueError(f"{primitive.name} is off by {off:.2g} from plain PyTorch, where numbers are {size:.2g}")


def flat(results: Any) -> list[Tensor]:
    """Tensors, numbers and sequences of them as a list of tensors."""
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, float):
        return [torch.tensor([results], dtype=torch.float64)]
    return [tensor for result in results for tensor in flat(result)]


if __name__ == "__main__":
    main()
