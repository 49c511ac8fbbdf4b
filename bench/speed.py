"""Times node_cuda against torchdiffeq in one process, in turn, after checking both against an exact solution.

Every row gives medians and quartiles of both, the quartiles of the ratio of each pair, the evaluations of the
field forward and backward, and the achieved error. Rows that we lose stay in. The cases are in cases.py.

    python bench/speed.py [--quick] [--device cuda] [--threads N] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import libraries
import machine
import torch
from cases import CASES, QUICK_CASES, Case
from fields import Counted, MLPField
from report import console_table, speed_rows, write_result
from rich.console import Console
from rich.progress import track
from timing import Spread, interleaved, seconds
from torch import Tensor

HERE = Path(__file__).resolve().parent
PAIRS = 41  # at most, of each row
BUDGET = 8.0  # seconds of timing, of each row; at least three pairs, however long they take
REFERENCE_ROWS = 4096  # of a batch at a time: its tape is kept in memory
# How far a solve may miss the exact solution: so many times rtol, which bounds the error of one step only, plus so
# many roundings, which is all that float32 leaves of rtol = 1e-7.
ERROR_PER_RTOL = 100.0
ERROR_PER_EPS = 200.0


class Quantities(NamedTuple):
    """What a case computes: ys (outputs, batch, dim) and, but for a forward case, the gradients of the loss."""

    ys: Tensor
    grad_y0: Tensor | None = None
    grad_parameters: Tensor | None = None


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    console = Console()
    cases = QUICK_CASES if arguments.quick else CASES
    pairs = 3 if arguments.quick else PAIRS
    rows = [measure(case, device, pairs) for case in track(cases, "measuring", console=console)]
    result = {
        "benchmark": "speed",
        "device": device.type,
        "machine": machine.describe(device),
        "settings": {"method": "dopri5", "loss": "sum of y(t_end)^2 / batch"},
        "rows": rows,
    }
    path = write_result(result, arguments.out)
    console.print(console_table(speed_rows(result)))
    promised = [row for row in rows if row["target"] is not None]
    console.print(
        f"{sum(row['met'] for row in promised)} of {len(promised)} promised ratios reached; "
        f"faster than {libraries.RIVAL} in {sum(row['ratio'][0] > 1 for row in rows)} of {len(rows)} rows."
    )
    console.print(f"Written: {path}", soft_wrap=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON")
    parser.add_argument("--quick", action="store_true", help="two tiny cases: shows that the program runs")
    return parser.parse_args()


def measure(case: Case, device: torch.device, pairs: int) -> dict[str, Any]:
    """One row: both checked, then both timed."""
    torch.manual_seed(0)
    field = Counted(MLPField(case.dim, case.hidden)).to(device, case.dtype)
    y0 = torch.randn(case.batch, case.dim, device=device).to(case.dtype)
    exact = reference(case, field, y0)
    record: dict[str, dict[str, Any]] = {}
    for library in (libraries.OURS, libraries.RIVAL):
        quantities, nfe, nfe_backward = solved(case, library, field, y0)
        record[library] = {
            "nfe": nfe,
            "nfe_backward": nfe_backward,
            "error": largest_error(quantities, exact),
        }
    require_right(case, record)

    ours = timed_run(case, libraries.OURS, field, y0)
    theirs = timed_run(case, libraries.RIVAL, field, y0)
    sample = interleaved(ours, theirs, pairs=pairs, budget=BUDGET)
    record[libraries.OURS]["milliseconds"] = Spread.of([1e3 * pair[0] for pair in sample])
    record[libraries.RIVAL]["milliseconds"] = Spread.of([1e3 * pair[1] for pair in sample])
    ratio = Spread.of([pair[1] / pair[0] for pair in sample])
    return {
        "case": case.name,
        "pairs": len(sample),
        "ratio": ratio,
        "target": case.target,
        "met": None if case.target is None else ratio.median >= case.target,
        "libraries": record,
    }


def loss_of(ys: Tensor, batch: int) -> Tensor:
    """A sum over the rows of the batch, so that the reference can take them a part at a time."""
    return ys[-1].square().sum() / batch


def forward(case: Case, library: str, field: Counted, y0: Tensor) -> Tensor:
    """ys (outputs, batch, dim) at evenly spaced times from 0 to t_end."""
    t = torch.linspace(0.0, case.t_end, case.outputs, device=y0.device, dtype=y0.dtype)
    solver = libraries.function(library, case.function)
    return solver(field, y0, t, rtol=case.rtol, atol=case.atol, method="dopri5")


def solved(case: Case, library: str, field: Counted, y0: Tensor) -> tuple[Quantities, int, int]:
    """What the case computes, with the evaluations of the field forward and backward."""
    field.zero_grad()
    field.reset()
    start = y0.clone().requires_grad_(case.timed != "forward")
    with torch.set_grad_enabled(case.timed != "forward"):
        ys = forward(case, library, field, start)
    nfe = field.reset()
    if case.timed == "forward":
        return Quantities(ys), nfe, 0
    loss_of(ys, case.batch).backward()
    return Quantities(ys.detach(), start.grad, flat_gradient(field)), nfe, field.reset()


def timed_run(case: Case, library: str, field: Counted, y0: Tensor) -> Callable[[], float]:
    """A function that runs the case once and returns the seconds of the part that is timed."""

    def step() -> None:
        start = y0.clone().requires_grad_()
        loss_of(forward(case, library, field, start), case.batch).backward()

    def run() -> float:
        field.zero_grad()
        if case.timed == "forward":
            with torch.no_grad():
                return seconds(lambda: forward(case, library, field, y0), y0.device)
        if case.timed == "step":
            return seconds(step, y0.device)
        start = y0.clone().requires_grad_()
        loss = loss_of(forward(case, library, field, start), case.batch)
        return seconds(loss.backward, y0.device)

    return run


def reference(case: Case, field: Counted, y0: Tensor) -> Quantities:
    """The exact quantities: torchdiffeq's dopri8 in float64 with rtol 1e-12, differentiated by backpropagation.

    The rows of the batch do not depend on each other, so a wide batch is taken a part at a time.
    """
    exact_field = Counted(MLPField(case.dim, case.hidden)).to(y0.device, torch.float64)
    exact_field.load_state_dict({name: value.double() for name, value in field.state_dict().items()})
    t = torch.linspace(0.0, case.t_end, case.outputs, device=y0.device, dtype=torch.float64)
    odeint = libraries.function(libraries.RIVAL, "odeint")
    needs_gradient = case.timed != "forward"
    parts, gradients = [], []
    with torch.set_grad_enabled(needs_gradient):
        for rows in y0.double().split(REFERENCE_ROWS):
            start = rows.clone().requires_grad_(needs_gradient)
            ys = odeint(exact_field, start, t, rtol=1e-12, atol=1e-14, method="dopri8")
            parts.append(ys.detach())
            if needs_gradient:
                loss_of(ys, case.batch).backward()
                gradients.append(start.grad)
    ys = torch.cat(parts, dim=1)
    if not needs_gradient:
        return Quantities(ys)
    return Quantities(ys, torch.cat(gradients), flat_gradient(exact_field))


def flat_gradient(field: Counted) -> Tensor:
    return torch.cat([p.grad.flatten() for p in field.parameters() if p.grad is not None])


def largest_error(found: Quantities, exact: Quantities) -> float:
    """Largest relative error of the quantities, each in the Euclidean norm."""
    errors = [
        torch.linalg.vector_norm(a.double() - b).item() / torch.linalg.vector_norm(b).item()
        for a, b in zip(found, exact, strict=True)
        if a is not None and b is not None
    ]
    return max(errors)


def require_right(case: Case, record: dict[str, dict[str, Any]]) -> None:
    """Ends the program where a library misses the exact solution: a wrong result's time is of no interest."""
    allowed = ERROR_PER_RTOL * case.rtol + ERROR_PER_EPS * torch.finfo(case.dtype).eps
    for library, row in record.items():
        if not row["error"] <= allowed:  # NaN is caught as well
            raise SystemExit(
                f"{library} misses the exact solution of `{case.name}` by {row['error']:.1e} (relative), more "
                f"than the {allowed:.1e} that its tolerances allow: nothing is timed. See `make test`."
            )


if __name__ == "__main__":
    main()
