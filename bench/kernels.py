"""Times every primitive: the kernel, plain PyTorch and torch.compile of it, against the bandwidth of a copy.

The states are of 64 MB, where bandwidth matters, and of 16 KB, where the cost of a launch matters. A kernel is launched
directly, without the rest of node_cuda, and its results are first compared with those of the reference. Bytes are those
that the formula must read and write; the bandwidth is compared with that of `copy_` of one state in the same run. Many
launches follow each other between two CUDA events. For the large state they take turns on sets of tensors, which
together are several times as large as the L2 cache. The primitives are in parts/kernels/.

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
TARGET, TARGET_FROM = 0.85, 64 * 2**20  # share of the bandwidth of a copy; from this size of the state on
L2_PASSES = 8  # the sets of tensors together, in sizes of the L2 cache
ULPS = 64  # the allowed error of a result, in units in the last place of the largest number
DTYPES = ("float32", "float64", "float16", "bfloat16")


class Setting(NamedTuple):
    """The settings that all rows share. compile_until: time (perf_counter) after which no row is compiled."""

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
                write_result(result, arguments.out)  # after each row: the program may be stopped before the last one
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
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the state (default: float32)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES", help="sizes of the state")
    parser.add_argument(
        "--compile-seconds", type=float, default=120.0, help="start no torch.compile after this time (0: none at all)"
    )
    program.add_out(parser)
    arguments = parser.parse_args()
    if any(size % 64 or size <= 0 for size in arguments.sizes):
        parser.error("--sizes must be multiples of 64 bytes: eight tensors share a state of doubles.")
    return arguments


def cuda_device(name: str) -> torch.device:
    """The CUDA device with its index. Raises SystemExit if there is none."""
    device = torch.device(name)
    if device.type != "cuda" or not torch.cuda.is_available():
        lacking = "this is no CUDA device" if device.type != "cuda" else "torch finds none here"
        raise SystemExit(
            f"kernels.py times CUDA kernels and needs an NVIDIA GPU and a CUDA build of torch (--device {name}: "
            f"{lacking}). Without a GPU, tests/project/test_bench.py checks the same launches on the CPU."
        )
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def compiled_module(device: torch.device) -> Any:
    """node_cuda._C. Raises SystemExit if there are no compiled kernels."""
    from node_cuda.extension.loading import kernels

    module = kernels(device)
    if module is None:
        raise SystemExit("There are no compiled kernels to time. The warning above says why, and how to get them.")
    return module


def copy_rate(place: Workplace, size: int) -> tuple[float, dict[str, Any]]:
    """Bytes per second of torch's copy of a state (reads plus writes), and its record for the JSON."""
    pairs = [place.states(2) for _ in range(turns(2 * size, place))]
    took = device_seconds([lambda to=to, source=source: to.copy_(source) for to, source in pairs])
    spread = Spread.of(took)
    record = {"state_bytes": size, "bytes": 2 * size, "microseconds": Spread.of([1e6 * s for s in took])}
    return 2 * size / spread.median, record


def turns(moved: int, place: Workplace) -> int:
    """The number of sets of tensors that take turns: 1 for a small state, which may stay in the cache."""
    if place.n * place.dtype.itemsize < TARGET_FROM:
        return 1
    cache = getattr(torch.cuda.get_device_properties(place.device), "L2_cache_size", 64 * 2**20)
    return max(1, math.ceil(L2_PASSES * cache / moved))


def measure(primitive: Primitive, setting: Setting) -> dict[str, Any]:
    """One row; if it fails, it has the reason in `failed`."""
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
    except Exception as error:  # the row says so, and the next one is measured
        row["failed"] = gist(error)
    return row


def whole_step(rows: Sequence[dict[str, Any]], size: int) -> dict[str, Any] | None:
    """The sums over the launches of a step of dopri5 in microseconds; None if a launch has no time."""
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
    """The time of the same work in PyTorch."""
    took = device_seconds([lambda launch=launch: plain(*launch.arguments) for launch in launches])
    return {"microseconds": Spread.of([1e6 * s for s in took])}


def compiled(primitive: Primitive, launches: Sequence[Launch], setting: Setting) -> dict[str, Any]:
    """The time of torch.compile of plain PyTorch. Its cache is reset for each row, or it would stop compiling."""
    if time.perf_counter() >= setting.compile_until:
        return {"failed": "not compiled"}
    try:
        torch.compiler.reset()
        return timed(torch.compile(primitive.plain, dynamic=False), launches)
    except Exception as error:  # the compiler may fail in any way
        return {"failed": gist(error)}


def require_right(primitive: Primitive, launch: Launch, dtype: torch.dtype) -> None:
    """Runs the kernel and plain PyTorch once, on equal numbers; raises ValueError if their results differ."""
    launch.kernel()
    plain = flat(primitive.plain(*launch.arguments))
    if len(plain) != len(launch.results):
        raise ValueError(f"{primitive.name} returns {len(launch.results)} results, plain PyTorch {len(plain)}")
    for ours, expected in zip(launch.results, plain, strict=True):
        size = expected.abs().max().item()
        off = (ours - expected.to(ours.device).view_as(ours)).abs().max().item()
        if not off <= ULPS * torch.finfo(dtype).eps * size:  # NaN is caught as well
            raise ValueError(f"{primitive.name} is off by {off:.2g} from plain PyTorch, where numbers are {size:.2g}")


def flat(results: Any) -> list[Tensor]:
    """A tensor, a number, or a sequence of them, as a list of tensors."""
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, float):
        return [torch.tensor([results], dtype=torch.float64)]
    return [tensor for result in results for tensor in flat(result)]


if __name__ == "__main__":
    main()
