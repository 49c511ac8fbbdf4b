"""Times node_cuda against torchdiffeq in one process, in turn, after a check of both against an exact solution.

Every row has the medians and quartiles of both times and of the ratio of each pair, the evaluations of the field
forward and backward, and the error. Rows in which node_cuda loses are kept. The cases are in parts/solve/cases.py.
Those of small states, in parts/speed/small_cases.py, also have the loop that a person would write.

    python bench/speed.py [--quick] [--device cuda] [--threads N] [--out DIRECTORY]
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from parts import program
from parts.common import libraries
from parts.common.tables import show, write_result
from parts.common.timing import Spread, interleaved
from parts.solve.cases import CASES, QUICK_CASES, Case
from parts.solve.solving import TorchContestant, exact, largest_error, make_problem, mistake
from parts.speed.report import small_rows, small_sentence, speed_rows
from parts.speed.small import ROUNDS, measure_small
from parts.speed.small_cases import QUICK_SMALL_CASES, SMALL_CASES

PAIRS = 41  # at most, of each row
BUDGET = 8.0  # seconds of timing for each row; there are always at least three pairs


def main() -> None:
    arguments = program.parser(__doc__, quick="a few tiny cases").parse_args()
    device = program.begin(arguments)
    console = Console()
    cases = QUICK_CASES if arguments.quick else CASES
    pairs = 3 if arguments.quick else PAIRS
    rows = [measure(case, device, pairs) for case in track(cases, "measuring", console=console)]
    small_cases = QUICK_SMALL_CASES if arguments.quick else SMALL_CASES
    rounds = 3 if arguments.quick else ROUNDS
    small = [
        measure_small(case, device, rounds) for case in track(small_cases, "measuring small states", console=console)
    ]
    result = {
        **program.new_result("speed", device),
        "settings": {"method": "dopri5", "loss": "sum of y(t_end)^2 / batch"},
        "rows": rows,
        "small": small,
    }
    path = write_result(result, arguments.out)
    show(speed_rows(result))
    show(small_rows(result))
    promised = [row for row in rows if row["target"] is not None]
    console.print(
        f"{sum(row['met'] for row in promised)} of {len(promised)} promised ratios reached; "
        f"faster than {libraries.RIVAL} in {sum(row['ratio'][0] > 1 for row in rows)} of {len(rows)} rows."
    )
    console.print(small_sentence(result))
    console.print(program.written(path, arguments.out), soft_wrap=True)


def measure(case: Case, device: torch.device, pairs: int) -> dict[str, Any]:
    """One row: checks both libraries, then times both. Raises SystemExit if a result is wrong."""
    problem = make_problem(case, device)
    expected = exact(problem)
    contestants = {name: TorchContestant(name, problem) for name in (libraries.OURS, libraries.RIVAL)}
    record: dict[str, dict[str, Any]] = {}
    for name, contestant in contestants.items():
        solved = contestant.solved()
        error = largest_error(solved.quantities, expected)
        if wrong := mistake(name, case, error):
            raise SystemExit(wrong)
        record[name] = {"nfe": solved.nfe, "nfe_backward": solved.nfe_backward, "error": error}

    sample = interleaved([contestant.timed for contestant in contestants.values()], rounds=pairs, budget=BUDGET)
    for name, times in zip(contestants, zip(*sample, strict=True), strict=True):
        record[name]["milliseconds"] = Spread.of([1e3 * took for took in times])
    ratio = Spread.of([theirs / ours for ours, theirs in sample])
    return {
        "case": case.name,
        "pairs": len(sample),
        "ratio": ratio,
        "target": case.target,
        "met": None if case.target is None else ratio.median >= case.target,
        "libraries": record,
    }


if __name__ == "__main__":
    main()
