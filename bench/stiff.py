"""Stiff problems by the implicit methods, and by SciPy's Radau and LSODA driven by the same PyTorch field.

1. Work against precision: steps, evaluations, time and error, for four problems of the test set of Hairer and Wanner.
   The error is the largest at the end in units of atol + rtol |y|; the time is the best of some runs, in turn.
2. A batch: Robertson's problem with other rates in each sample, solved at once with batch_dims=1, against a loop of
   Radau over some of them; and Van der Pol oscillators out of phase, where one shared step helps little.
3. Gradients: Robertson to t = 40 with the gradient of its rates, by every mode, and what the forward solve takes.

float64. Rows that lose stay in.

    python bench/stiff.py [--quick] [--threads N] [--out DIRECTORY]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from node_cuda import solve
from node_cuda._typing import MethodName
from parts import program
from parts.common.tables import write_result
from parts.stiff.problems import PROBLEMS, Problem, Robertson, van_der_pol

METHODS: tuple[MethodName, ...] = ("rodas5p", "kvaerno5", "kvaerno3")
RIVALS = ("Radau", "LSODA")
F64 = torch.float64
Row = dict[str, Any]


def main() -> None:
    arguments = program.parser(__doc__, quick="one problem, one tolerance, few samples").parse_args()
    device = program.begin(arguments)
    quick = arguments.quick
    result = {**program.new_result("stiff", device), "work": [], "batch": [], "gradients": []}
    tolerances = (1e-4,) if quick else (1e-4, 1e-6, 1e-8)
    for problem in PROBLEMS[:1] if quick else PROBLEMS:
        for rtol in tolerances:
            methods = METHODS if not quick and (rtol > 1e-7 or problem.cheap) else METHODS[:2]
            result["work"] += work(problem, rtol, methods, rounds=1 if quick or rtol < 1e-7 else 3)
    for samples in (3,) if quick else (10, 1000):
        result["batch"] += batches(samples, alone=2 if quick else 5, cases=1 if quick else 2)
    result["gradients"] = gradients(1e-4 if quick else 1e-6)
    path = write_result(result, arguments.out)
    try:
        from parts.stiff.plot import draw_stiff
    except ImportError:  # without matplotlib there is no figure
        print(program.written(path, arguments.out))
        return
    figure = arguments.out / f"stiff-{device.type}.png"
    draw_stiff(result, figure)
    print(program.written(f"{path}, {figure.name}", arguments.out))


def say(row: Row) -> Row:
    print({k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items()}, file=sys.stderr, flush=True)
    return row


def work(problem: Problem, rtol: float, methods: tuple[MethodName, ...], rounds: int) -> list[Row]:
    """All methods in turn, so often; the shortest time of each."""
    best: dict[str, Row] = {}
    for _ in range(rounds):
        rows = [*(by_us(problem, rtol, method) for method in methods), *(by_scipy(problem, rtol, x) for x in RIVALS)]
        for name, row in zip((*methods, *RIVALS), rows, strict=True):
            if name not in best or row["ms"] < best[name]["ms"]:
                best[name] = row
    return [say(row) for row in best.values()]


def by_us(problem: Problem, rtol: float, method: MethodName) -> Row:
    start, t = torch.tensor(problem.start, dtype=F64), torch.tensor([0.0, problem.t], dtype=F64)
    begun = time.perf_counter()
    with torch.no_grad():
        found = solve(problem.field, start, t, method=method, rtol=rtol, atol=problem.atol * rtol)
    ms = 1e3 * (time.perf_counter() - begun)
    stats = found.stats
    return {
        "problem": problem.name, "method": method, "rtol": rtol, "steps": stats.accepted, "rejected": stats.rejected,
        "by_newton": stats.rejected_by_newton, "nfe": stats.nfe, "jacobians": stats.jacobians,
        "factorisations": stats.factorisations, "ms": ms, "error": problem.error(found.ys[-1].numpy(), rtol),
    }  # fmt: skip


def by_scipy(problem: Problem, rtol: float, solver: str) -> Row:
    begun = time.perf_counter()
    found = scipys(problem.field, problem.start, problem.t, solver, rtol, problem.atol * rtol)
    ms = 1e3 * (time.perf_counter() - begun)
    return {
        "problem": problem.name, "method": f"SciPy {solver}", "rtol": rtol, "steps": len(found.t) - 1,
        "nfe": found.nfev, "ms": ms, "error": problem.error(found.y[:, -1], rtol),
    }  # fmt: skip


def scipys(field: Callable[..., Tensor], start: Any, end: float, solver: str, rtol: float, atol: float) -> Any:
    """By SciPy, whose Jacobian is of finite differences; the field is torch's, without a graph."""
    none = torch.zeros((), dtype=F64)

    def func(t: float, y: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return field(none, torch.from_numpy(y)).numpy()

    return solve_ivp(func, (0.0, end), np.asarray(start, dtype=float), method=solver, rtol=rtol, atol=atol)


def batches(samples: int, alone: int, cases: int) -> list[Row]:
    """Robertson's problem with rates over two decades, and Van der Pol oscillators from random starts. alone: so many
    of the samples are also solved one by one, by Radau; the others would take as long. cases: how many of the two."""
    torch.manual_seed(0)
    rates = torch.tensor([0.04, 1e4, 3e7], dtype=F64) * 10 ** (2 * torch.rand(samples, 3, dtype=F64) - 1)
    starts = torch.stack([4 * torch.rand(samples, dtype=F64) - 2, torch.zeros(samples, dtype=F64)], -1)
    ones = torch.tensor([1.0, 0.0, 0.0], dtype=F64).expand(samples, 3)
    both = (
        ("robertson", Robertson(rates), [Robertson(r) for r in rates], ones, 1e5, 1e-10),
        ("van der pol", van_der_pol, [van_der_pol] * samples, starts, 2.0, 1e-4),
    )
    rows = []
    for name, field, each, y0, end, atol in both[:cases]:
        begun = time.perf_counter()
        for i in range(min(alone, samples)):
            scipys(each[i], y0[i], end, "Radau", 1e-4, atol)
        loop = (time.perf_counter() - begun) * samples / min(alone, samples)
        for method in METHODS[:2]:
            begun = time.perf_counter()
            with torch.no_grad():
                t = torch.tensor([0.0, end], dtype=F64)
                found = solve(
                    field, y0, t, method=method, rtol=1e-4, atol=atol, options=dict(batch_dims=1, throw=False,
                                                                                     max_num_steps=3000)
                )  # fmt: skip
            seconds = time.perf_counter() - begun
            rows.append(say({
                "problem": name, "method": method, "samples": samples, "steps": found.stats.accepted,
                "status": found.status.name, "seconds": seconds, "loop_of_radau": loop, "ratio": loop / seconds,
            }))  # fmt: skip
    return rows


def gradients(rtol: float) -> list[Row]:
    """Forward and backward, by every mode; the forward solve alone, without a graph, is what they are compared with."""
    rows = []
    for method in METHODS:
        for mode in ("none", "backprop", "discrete", "adjoint"):
            func = Robertson()
            y0, t = torch.tensor([1.0, 0.0, 0.0], dtype=F64), torch.tensor([0.0, 40.0], dtype=F64)
            begun = time.perf_counter()
            with torch.set_grad_enabled(mode != "none"):
                arguments: dict[str, Any] = dict(method=method, rtol=rtol, atol=1e-6 * rtol)
                found = solve(func, y0, t, gradient="backprop" if mode == "none" else mode, **arguments)
            middle = time.perf_counter()
            if mode != "none":
                found.ys[-1][0].backward()
            rows.append(say({
                "method": method, "gradient": mode, "steps": found.stats.accepted, "nfe": found.stats.nfe,
                "nfe_backward": found.stats.nfe_backward, "forward_ms": 1e3 * (middle - begun),
                "backward_ms": 1e3 * (time.perf_counter() - middle),
            }))  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
