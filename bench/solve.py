"""Times whole solves by the fused kernels, by plain PyTorch and by torchdiffeq, in turn, at rtol 1e-6.

Every case has a solve without gradients, and one with the backward solve of the adjoint. Each is first checked against
the exact solution. A row has the time, the ratio of torchdiffeq's time in the same round, the evaluations, the accepted
steps and the error. If a library is missing, fails or is wrong, its row says why. The cases and the targets of the
kernels are in parts/solve/cases.py. Without a GPU, node_cuda runs in plain PyTorch only.

With --diffrax, diffrax is measured too. It is compiled for every case.

    python bench/solve.py [--quick] [--device cuda] [--diffrax] [--threads N] [--budget SECONDS] [--out DIRECTORY]
"""

# speed.py is a separate program: its targets are for plain PyTorch on a CPU, at torchdiffeq's default tolerances.
# What both programs do is in parts/solve/solving.py.
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from parts import program
from parts.common.libraries import DIFFRAX, FUSED, REFERENCE, RIVAL, installed
from parts.common.tables import gist, show, write_result
from parts.common.timing import Spread, interleaved
from parts.solve.cases import QUICK_SOLVE_CASES, SOLVE_CASES, Case
from parts.solve.diffrax_contestant import DiffraxContestant
from parts.solve.report import solve_rows, solve_sentences
from parts.solve.solving import ROUNDS, Contestant, TorchContestant, checked, exact, make_problem

Record = dict[str, Any]


def main() -> None:
    arguments = parse()
    device = program.begin(arguments)
    cases = QUICK_SOLVE_CASES if arguments.quick else SOLVE_CASES
    rounds = 3 if arguments.quick else ROUNDS
    names = [*contestants(device), *([DIFFRAX] if arguments.diffrax else [])]
    rows: list[Record] = []
    result: Record = {
        **program.new_result("solve", device),
        "settings": {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6, "loss": "sum of y(t_end)^2 / batch"},
        "complete": False,
        "rows": rows,
    }
    for case in cases:
        print(case.name, file=sys.stderr, flush=True)
        rows.append(measure(case, names, device, rounds, arguments.budget))
        write_result(result, arguments.out)  # after each row: the program may be stopped before the last one
    result["complete"] = True
    path = write_result(result, arguments.out)
    show(solve_rows(result))
    print(solve_sentences(result))
    print(program.written(path, arguments.out))
    ours = [(row["case"], name) for row in rows for name in (FUSED, REFERENCE) if "failed" in row["by"].get(name, {})]
    if ours:
        raise SystemExit(f"Failed, or wrong: {'; '.join(f'{name} in `{case}`' for case, name in ours)}.")


def parse() -> argparse.Namespace:
    parser = program.parser(__doc__, quick="tiny cases")
    parser.add_argument("--diffrax", action="store_true", help="measure diffrax too; it is compiled for every case")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of timing per row; at least three rounds")
    return parser.parse_args()


def contestants(device: torch.device) -> list[str]:
    """The names of the contestants; the kernels only on CUDA."""
    return [*([FUSED] if device.type == "cuda" else []), REFERENCE, RIVAL]


def measure(case: Case, names: Sequence[str], device: torch.device, rounds: int, budget: float) -> Record:
    """One row: checks all contestants, then times those with correct results."""
    problem = make_problem(case, device)
    expected = exact(problem)
    by: dict[str, Record] = {}
    running: dict[str, Contestant] = {}
    for name in names:
        if not installed(name.partition(" ")[0]):
            by[name] = {"failed": "not installed"}
            continue
        try:
            running[name] = DiffraxContestant(problem) if name == DIFFRAX else TorchContestant(name, problem)
            by[name] = checked(name, running[name], case, expected)
        except Exception as error:  # for example out of memory: the row says so
            by[name] = {"failed": gist(error)}
        if "failed" in by[name]:
            running.pop(name, None)
    sample = interleaved([contestant.timed for contestant in running.values()], rounds=rounds, budget=budget)
    times = dict(zip(running, zip(*sample, strict=True), strict=True))
    for name, took in times.items():
        by[name]["milliseconds"] = Spread.of([1e3 * seconds for seconds in took])
        if name != RIVAL and RIVAL in times:
            by[name]["ratio"] = Spread.of([theirs / its for its, theirs in zip(took, times[RIVAL], strict=True)])
    if FUSED in by:
        ratio = by[FUSED].get("ratio")
        by[FUSED] |= {"target": case.target, "met": None if ratio is None else ratio.median >= case.target}
    return {"case": case.name, "rounds": len(sample), "by": by}


if __name__ == "__main__":
    main()
