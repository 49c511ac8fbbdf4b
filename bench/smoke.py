"""Checks node_cuda on this GPU. Each check prints one line: `ok NAME: detail`, or `FAILED NAME: why`.

First, solves and their adjoint gradients by the kernels are compared with plain PyTorch on the CPU. Then captured
solves are compared with the loop on the host: the forward pass in batches of launches and with the WHILE node, the
backward pass on the default stream and on another one. Values are compared in float64, and bit by bit where equal bits
are promised; the fields of these checks have no matrix product. One check prints the cost of a step in each loop.
bench/gpu.sh runs every group of checks in a separate process.

    python bench/smoke.py [CHECK...]      # all checks, or those named; needs a GPU and the kernels
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import node_cuda
from node_cuda import __main__ as about
from node_cuda.cuda_graphs.cache import GraphCache
from parts.common import machine
from parts.common.fields import MLPField
from parts.common.tables import gist
from parts.device_loop.steps import STEPPINGS, measure_steps

AGREE = 1e-10  # relative to the largest number: the roundings of some hundred sums in another order
DISCRETE_AGREE = 1e-12  # the same for the discrete gradient, on the host and captured
ROWS = (1, 1001, 32768)  # rows of 8 numbers: less than a warp, an odd size, many blocks
TIMES = torch.linspace(0.0, 1.0, 4, dtype=torch.float64)
LOOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
TIGHT: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8}
STEP_COUNTS = (32, 256)
solve: Any = node_cuda.solve  # typed as Any: here all states are tensors


class Wrong(Exception):
    """A check failed; the message says why."""


class Wave(nn.Module):
    """y' = w sin(y) cos(3 t), with one weight for each column."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, 8, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.w * torch.sin(y) * torch.cos(3 * t)


def state(rows: int) -> Tensor:
    """Random numbers between -1 and 1, on the CPU."""
    return torch.rand(rows, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(2).sub(1)


def weighted(ys: Tensor) -> Tensor:
    """A loss with a different weight for every number."""
    return (torch.linspace(0.5, 1.5, ys.numel(), dtype=ys.dtype, device=ys.device) * ys.reshape(-1)).sum()


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor."""
    pairs = zip(found, expected, strict=True)
    return max((a.cpu() - b.cpu()).abs().max().item() / b.abs().max().item() for a, b in pairs)


def require_near(found: list[Tensor], expected: list[Tensor], allowed: float, what: str) -> str:
    """Raises Wrong if the difference is larger than allowed; else returns it in words."""
    off = difference(found, expected)
    if not off <= allowed:  # NaN is caught as well
        raise Wrong(f"{what} is off by {off:.1e}, more than {allowed:.0e}")
    return f"off by {off:.0e}"


# ---- by the kernels, against the CPU


def report(device: torch.device) -> str:
    """`python -m node_cuda` says that the kernels are used, and their self-check passes."""
    text = about.report()
    print(text)
    path = about.live_path()
    if path.name != about.FUSED:
        raise Wrong(f"{path.name}: {path.why}")
    checks = [line.removeprefix("self-check").strip() for line in text.splitlines() if line.startswith("self-check")]
    if bad := [line for line in checks if "disagrees" in line or "not run" in line]:
        raise Wrong(f"the self-check of {len(bad)} kernels did not pass: {'; '.join(bad)}")
    return f"{len(checks)} lines of the self-check passed; {path.why}"


def forward(method: str, device: torch.device) -> str:
    """A solve by the kernels agrees with plain PyTorch on the CPU."""
    torch.manual_seed(0)
    func, y0 = MLPField(8, 16).double(), state(100)
    with torch.no_grad():
        with node_cuda.backend("reference"):
            expected = solve(func, y0, TIMES, method=method, **TIGHT)
        actual = solve(func.to(device), y0.to(device), TIMES, method=method, **TIGHT)
    if actual.stats.accepted != expected.stats.accepted:
        raise Wrong(f"{actual.stats.accepted} steps, on the CPU {expected.stats.accepted}")
    return f"{actual.stats.accepted} steps, {require_near([actual.ys], [expected.ys], AGREE, 'the solution')}"


def adjoint(device: torch.device) -> str:
    """Gradients of y0, t and the parameters by the kernels agree with plain PyTorch on the CPU."""
    torch.manual_seed(0)
    func = MLPField(8, 16).double()

    def gradients(on: torch.device) -> list[Tensor]:
        y0, t = state(100).to(on).requires_grad_(), TIMES.to(on).requires_grad_()
        ys = node_cuda.odeint_adjoint(func.to(on), y0, t, **TIGHT)
        return list(torch.autograd.grad(weighted(ys), (y0, t, *func.parameters())))

    with node_cuda.backend("reference"):
        expected = gradients(torch.device("cpu"))
    return require_near(gradients(device), expected, AGREE, "a gradient")


# ---- captured solves, against the loop on the host


def captured(tier: str, device: torch.device) -> str:
    """A captured solve has the bits of the loop on the host, in its first and in its second run."""
    steps = []
    for rows in ROWS:
        func, y0, kept = Wave().to(device), state(rows).to(device), GraphCache(tier)
        with torch.no_grad():
            host = solve(func, y0, TIMES, **TIGHT)
            for turn in ("first", "second"):
                found = solve(func, y0, TIMES, options={"cuda_graph": kept}, **TIGHT)
                if found.stats.loop != tier:
                    raise Wrong(f'the loop was "{found.stats.loop}", not "{tier}": {found.stats.why}')
                if not torch.equal(found.ys, host.ys):
                    off = difference([found.ys], [host.ys])
                    raise Wrong(f"the {turn} solve of {y0.numel()} numbers has other bits, off by {off:.1e}")
        steps.append(found.stats.accepted)
    return f"the bits of the host, of {', '.join(str(8 * rows) for rows in ROWS)} numbers in {steps} steps"


def step_times(device: torch.device) -> str:
    """Microseconds per step, from the slope of the time over the number of steps."""
    row = measure_steps(STEPPINGS[1], ("batches", "while"), STEP_COUNTS, device, rounds=5, budget=4.0)
    failed = [f"{name}: {record['failed']}" for name, record in row["by"].items() if "failed" in record]
    if failed:
        raise Wrong("; ".join(failed))
    each = {name: record["microseconds_a_step"].median for name, record in row["by"].items()}
    return f"{row['case']}: " + ", ".join(f"{took:.3g} us a step by {name}" for name, took in each.items())


def backward(gradient: str, pool: bool, device: torch.device) -> str:
    """A captured backward pass has the gradients of the loop on the host, while an earlier autograd graph is alive."""
    func, y0 = Wave().to(device), state(ROWS[1]).to(device).requires_grad_()
    with another_stream(device) if pool else contextlib.nullcontext():

        def step(**options: Any) -> tuple[Any, list[Tensor]]:
            func.zero_grad()
            y0.grad = None
            solution = solve(func, y0, TIMES, gradient=gradient, options=options, **LOOSE)
            weighted(solution.ys).backward()
            return solution, [x.grad.clone() for x in (y0, func.w) if x.grad is not None]

        alive, expected = (
            step()
        )  # its autograd graph has the nodes that accumulate the parameters' gradients, made in this stream
        kept, why = GraphCache(), "ok"
        for turn in ("first", "second"):
            solution, found = step(cuda_graph=kept)
            stats = solution.stats
            loops = f'loop "{stats.loop}" (why: {stats.why}), loop_backward "{stats.loop_backward}"'
            loops += f" (why_backward: {stats.why_backward})"
            if "host" in (stats.loop_backward, stats.loop):
                raise Wrong(loops)
            if gradient == "adjoint" and not all(map(torch.equal, found, expected)):
                raise Wrong(f"the {turn} gradient has other bits, off by {difference(found, expected):.1e}; {loops}")
            why = require_near(found, expected, DISCRETE_AGREE, f"the {turn} gradient")
        del alive
    return f"{why}; {loops}"


@contextlib.contextmanager
def another_stream(device: torch.device) -> Any:
    """Context in which a stream of torch's pool is the current stream; waits for it at the end."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def refused(device: torch.device) -> str:
    """A solve inside the user's torch.cuda.graph raises Unsupported, and the next solve outside is correct."""
    func, y0 = Wave().to(device), state(100).to(device)
    options = {"cuda_graph": True, "throw": "deferred"}
    sentence = None
    with torch.no_grad():
        expected = solve(func, y0, TIMES, **LOOSE).ys
        with users_graph(device):
            try:
                solve(func, y0, TIMES, options=options, **LOOSE)
            except node_cuda.Unsupported as refusal:
                sentence = str(refusal)
        if sentence is None or "torch.cuda.graph" not in sentence:
            raise Wrong(f"a solve inside torch.cuda.graph was not refused: {sentence}")
        after = solve(func, y0, TIMES, options=options, **LOOSE).check()
    if not torch.equal(after.ys, expected):
        raise Wrong("the solve after a refused one has other bits")
    return sentence


def users_graph(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context that captures a CUDA graph, as a user may do."""
    return torch.cuda.graph(torch.cuda.CUDAGraph())


Check = Callable[[torch.device], str]
CHECKS: dict[str, Check] = {
    "report": report,
    "dopri5": lambda device: forward("dopri5", device),
    "rk4": lambda device: forward("rk4", device),
    "adjoint": adjoint,
    "batches": lambda device: captured("batches", device),
    "while": lambda device: captured("while", device),
    "step-times": step_times,
    "adjoint-default-stream": lambda device: backward("adjoint", False, device),
    "discrete-default-stream": lambda device: backward("discrete", False, device),
    "adjoint-pool-stream": lambda device: backward("adjoint", True, device),
    "discrete-pool-stream": lambda device: backward("discrete", True, device),
    "users-graph": refused,
}


def checked(name: str, device: torch.device) -> str:
    """Runs a check and returns its line."""
    try:
        with node_cuda.backend("fused"):
            return f"ok {name}: {CHECKS[name](device)}"
    except Exception as error:  # after any error, the next check runs
        traceback.print_exc()
        return f"FAILED {name}: {error if isinstance(error, Wrong) else gist(error)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(CHECKS))
    names = parser.parse_args().checks or list(CHECKS)
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"there is no check {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    faulthandler.register(signal.SIGTERM, chain=True)  # prints a traceback when the time limit ends the process
    device = machine.chosen("cuda")
    failed = False
    for name in names:
        line = checked(name, device)
        failed |= not line.startswith("ok ")
        print(line, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
