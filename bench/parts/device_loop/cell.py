"""One cell of device_loop.py: prints one line of JSON. device_loop.py starts it as a fresh process.

calls: the CUDA calls of a run between its start and its return, by torch.profiler. Early releases of CUPTI with loops
on the GPU crashed sometimes (pytorch issue 134308); in a separate process a crash ends one cell and not the benchmark.
The calls are those of the host: of the kernels in a WHILE node the profiler shows the first iteration only.
memory: what torch's allocator holds beyond what it held before, with a captured solve and after its owner is deleted.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from parts.common import libraries
from parts.common.fields import MLPField, SineField
from parts.common.libraries import FUSED
from parts.common.modes import ADJOINT, DISCRETE
from parts.common.timing import synchronize
from parts.device_loop.captured import LOOPS, Loop, Run

FORWARD = "forward"
MARK = "device_loop_cell"
WARM_UPS = 3
CALLS = {"cuda_runtime", "cuda_driver"}
KINDS = {  # kind of a call -> part of its name; the first match counts
    "graphs": "GraphLaunch",
    "kernels": "LaunchKernel",
    "copies": "Memcpy",
    "fills": "Memset",
    "waits": "Synchronize",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("calls", "memory"), required=True)
    parser.add_argument("--loop", choices=LOOPS, required=True)
    parser.add_argument("--gradient", choices=(FORWARD, ADJOINT, DISCRETE), required=True)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows", type=int, required=True, help="rows of a state with 64 columns")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    gradient = None if arguments.gradient == FORWARD else arguments.gradient
    measure = calls if arguments.what == "calls" else memory
    print(json.dumps(measure(LOOPS[arguments.loop], gradient, arguments.rows, arguments.steps, device)))


def calls(loop: Loop, gradient: str | None, rows: int, steps: int, device: torch.device) -> dict[str, Any]:
    """The CUDA calls of a solve with an MLP field that was captured before; with its gradient, if one is named."""
    torch.manual_seed(0)
    run = stepping_run(loop, gradient, MLPField(64, 64).to(device), rows, steps, device)
    for _ in range(WARM_UPS):
        run.checked()
    with tempfile.TemporaryDirectory() as folder, libraries.path(FUSED):
        synchronize(device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            with record_function(MARK):
                run()
            synchronize(device)
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(errors="replace"), strict=False)["traceEvents"]
    return {"calls": calls_of(events)}


def calls_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The calls inside the mark, counted by kind and by name. Raises SystemExit if there are none."""
    (mark,) = [e for e in events if e.get("name") == MARK and e.get("cat") == "user_annotation"]
    begin, end = float(mark["ts"]), float(mark["ts"]) + float(mark["dur"])
    # Versions are parts of names: cudaGraphLaunch_v10000.
    found = [
        re.sub(r"(_v\d+|_ptsz)+$", "", e["name"])
        for e in events
        if e.get("cat") in CALLS and begin <= float(e["ts"]) <= end
    ]
    if not found:
        raise SystemExit("torch.profiler saw no call of CUDA: CUPTI may be missing or not permitted.")
    kinds = Counter(next((kind for kind, part in KINDS.items() if part in name), "others") for name in found)
    return {**{kind: kinds[kind] for kind in (*KINDS, "others")}, "names": dict(Counter(found))}


def memory(loop: Loop, gradient: str | None, rows: int, steps: int, device: torch.device) -> dict[str, Any]:
    """The memory of a captured solve. The field has no matrix product: cuBLAS keeps a workspace for each stream."""
    field = SineField().to(device)
    stepping_run(LOOPS["host"], gradient, field, rows, steps, device).checked()  # what is allocated once per process
    before = held(device)
    run = stepping_run(loop, gradient, field, rows, steps, device)
    taken = [run.checked().solution.stats.accepted for _ in range(WARM_UPS)]
    owned = held(device)
    del run
    after = held(device)
    state = rows * 64 * torch.float32.itemsize
    return {
        "accepted": taken[-1],
        "state_mib": state / 2**20,
        "owned_mib": [(now - then) / 2**20 for now, then in zip(owned, before, strict=True)],
        "left_mib": [(now - then) / 2**20 for now, then in zip(after, before, strict=True)],
    }


def held(device: torch.device) -> tuple[int, int]:
    """Bytes allocated and reserved by torch, after its cache is emptied."""
    gc.collect()
    synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


def stepping_run(
    loop: Loop, gradient: str | None, field: torch.nn.Module, rows: int, steps: int, device: torch.device
) -> Run:
    """A run from t = 0 to 1 by dopri5 in steps of one size, none rejected; the times are on the CPU."""
    generator = torch.Generator().manual_seed(0)
    y0 = torch.randn(rows, 64, generator=generator).to(device)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    options = {"first_step": 1 / steps, "max_step": 1 / steps}
    return Run(loop, field, y0, t, gradient=gradient, method="dopri5", rtol=1e3, atol=1e3, options=options)


if __name__ == "__main__":
    main()
