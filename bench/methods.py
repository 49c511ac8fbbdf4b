"""What each explicit method needs for an error: evaluations of the field against the error that was reached.

1. Adaptive methods at four tolerances, atol = rtol / 100, on three problems: a neural field, an orbit, and a field with
   a kink (ReLU). Those of order 2 take part at loose tolerances only: below, they need too many steps.
2. Fixed grids with a budget of evaluations, as samplers of flows have it, on the neural field.

float64, so that rounding does not hide an error. The error is the largest one at the end, relative to the largest
element; the exact solution is dopri8's at rtol 1e-13. Times are not measured here: speed.py does that.

    python bench/methods.py [--quick] [--out DIRECTORY]
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from node_cuda import TABLEAUS, solve
from parts import program
from parts.common.tables import write_result
from parts.methods.problems import PROBLEMS, Problem

ADAPTIVE = tuple(name for name, tableau in TABLEAUS.items() if tableau.adaptive)
GRIDS = ("euler", "midpoint", "heun3", "rk4")
TOLERANCES = (1e-3, 1e-5, 1e-7, 1e-9)
BUDGETS = (12, 24, 48, 96)
EXACT: dict[str, Any] = dict(method="dopri8", rtol=1e-13, atol=1e-15)
Row = dict[str, Any]


def main() -> None:
    arguments = program.parser(__doc__, quick="one problem, two methods, two tolerances, two budgets").parse_args()
    device = program.begin(arguments)
    least = 2 if arguments.quick else None
    adaptive = ("dopri5", "dopri8") if arguments.quick else ADAPTIVE
    result = program.new_result("methods", device)
    result["adaptive"] = [
        row(problem, name, rtol=rtol, atol=rtol / 100)
        for problem in PROBLEMS[: 1 if arguments.quick else None]
        for name in adaptive
        for rtol in TOLERANCES[:least]
        if TABLEAUS[name].order > 2 or rtol >= 1e-5
    ]
    result["grids"] = [on_a_grid(PROBLEMS[0], name, budget) for name in GRIDS[:least] for budget in BUDGETS[:least]]
    path = write_result(result, arguments.out)
    print(program.written(path, arguments.out))


def row(problem: Problem, method: Any, **settings: Any) -> Row:
    """One solve: its evaluations and its error."""
    found = solved(problem, method=method, **settings)
    exact = end_of(problem)
    error = float((found.ys[-1] - exact).abs().max() / exact.abs().max())
    shown = {name: value for name, value in settings.items() if name == "rtol"}
    return {"problem": problem.name, "method": method, **shown, "nfe": found.stats.nfe, "error": error}


def on_a_grid(problem: Problem, method: str, budget: int) -> Row:
    """A grid of equal steps, as many as this number of evaluations allows."""
    steps = budget // TABLEAUS[method].stages
    found = row(problem, method, options=dict(step_size=problem.end / steps))
    return {**found, "budget": budget, "steps": steps}


@cache
def end_of(problem: Problem) -> Tensor:
    """The exact solution at the end."""
    return solved(problem, **EXACT).ys[-1]


def solved(problem: Problem, **settings: Any) -> Any:
    t: Tensor = torch.tensor([0.0, problem.end], dtype=torch.float64)
    with torch.no_grad():
        return solve(problem.field, problem.start, t, **settings)


if __name__ == "__main__":
    main()
