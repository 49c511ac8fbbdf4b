"""Times whole solves by the fused kernels, by plain PyTorch and by torchdiffeq, in turn, at rtol 1e-6.

For every case a solve without gradients, and one with the adjoint's backward solve. Each is checked against the exact
solution first. Evaluations, accepted steps and the achieved error stand beside every time, with the ratio of
torchdiffeq's time in the same round. A contestant that is missing, fails or is wrong keeps its line, which says why.
The cases, with what is promised of the kernels, are in cases.py; without a GPU plain PyTorch runs alone for us.

With --diffrax diffrax takes part, compiled for every case.

    python bench/solve.py [--quick] [--device cuda] [--diffrax] [--threads N] [--budget SECONDS] [--out DIRECTORY]
"""

# speed.py stays apart: its promises are those of plain PyTorch on a CPU, at torchdiffeq's default tolerances. What
# both do is in solving.py.
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
        write_result(result, arguments.out)  # each time: time on a GPU may be over before the last row
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
    parser.add_argument("--diffrax", action="store_true", help="with diffrax, which is compiled for every case")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of timing a row; at least three rounds")
    return parser.parse_args()


def contestants(device: torch.device) -> list[str]:
    """Who takes part: the kernels only where they can."""
    return [*([FUSED] if device.type == "cuda" else []), REFERENCE, RIVAL]


def measure(case: Case, names: Sequence[str], device: torch.device, rounds: int, budget: float) -> Record:
    """One row: all checked, then those that are right timed."""
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
        except Exception as error:  # out of memory, say: a value
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
