"""Tables and sentences from the JSON of memory_vs_steps.py."""

from __future__ import annotations

import math

from parts.common.modes import ADJOINT, BACKPROP, CHECKPOINTED, DISCRETE
from parts.common.tables import Result, Rows, markdown, provenance

NOT_TRAINED = "Not trained: scikit-learn, which has the digits, is not installed."
BY = {
    BACKPROP: "backpropagation through the solver",
    DISCRETE: "the discrete adjoint",
    CHECKPOINTED: "the discrete adjoint with 8 checkpoints",
    ADJOINT: "the adjoint",
}


def series(result: Result, quantity: str) -> dict[tuple[str, str], dict[int, float]]:
    """(library, gradient) -> {N: value}, of the cells that have this quantity."""
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for cell in result["cells"]:
        line = lines.setdefault((cell["library"], cell["gradient"]), {})
        if quantity in cell:
            line[cell["steps"]] = cell[quantity]
    return lines


def slope(points: dict[int, float]) -> float:
    """Least-squares slope of log(value) over log(N): 1 for linear growth, 0 for no growth."""
    xs = [math.log(n) for n in points]
    ys = [math.log(value) for value in points.values()]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def memory_sentence(result: Result) -> str:
    """How the memory of each mode grows with N, and its memory and time at the last N against backpropagation."""
    ours = result["cells"][0]["library"]  # on CUDA the kernels, which come first
    memory, times, again = (
        {gradient: points for (library, gradient), points in series(result, quantity).items() if library == ours}
        for quantity in ("peak_mib", "seconds", "recompute")
    )
    shown = [gradient for gradient in BY if gradient in memory]
    common = sorted(set.intersection(*(set(memory[gradient]) for gradient in shown)))
    if len(common) < 2:
        return "Too few cells could be measured to say how memory grows with the number of solver steps."
    first, last = common[0], common[-1]
    growths = [
        f"as N^{slope(memory[by]):.2f} with {BY[by]} ({memory[by][first]:.0f} to {memory[by][last]:.0f} MiB)"
        for by in shown
    ]
    savings = []
    for by in shown[1:]:
        less = f"{BY[by]} takes {memory[BACKPROP][last] / memory[by][last]:.3g} times less memory and "
        savings.append(less + pace(times[by][last] / times[BACKPROP][last]) + repeats(again[by].get(last)))
    return (
        f"From N = {first} to {last} solver steps, the peak memory of a training step grows {listed(growths)}. "
        f"At N = {last}, compared with backpropagation, {listed(savings, '; ')}."
    )


def listed(parts: list[str], separator: str = ", ") -> str:
    """The parts as a list in a sentence: "a, b, and c"."""
    return separator.join(parts[:-1]) + f"{separator.strip() * (len(parts) > 2)} and " * (len(parts) > 1) + parts[-1]


def pace(slower: float) -> str:
    """A ratio of times in words."""
    return f"{slower:.1f} times the time" if slower >= 1 else f"{1 / slower:.1f} times less time"


def repeats(recompute: float | None) -> str:
    """The recomputed steps in words; empty if there are none."""
    return f", {recompute:.1f} times the N steps taken again" if recompute else ""


def training_sentence(result: Result) -> str:
    """The accuracy of the training, or that there was no training."""
    training = result["training"]
    if training is None:
        return NOT_TRAINED
    return (
        f"Trained with `odeint_adjoint` to a test accuracy of {training['test_accuracy']:.3f} "
        f"in {training['seconds']:.0f} s."
    )


def memory_rows(result: Result) -> Rows:
    """A row for each N: peak memory, time and, for modes that replay steps, the recomputed steps."""
    lines = [series(result, quantity) for quantity in ("peak_mib", "seconds", "recompute")]
    steps = sorted({cell["steps"] for cell in result["cells"]})
    head = ["N"]
    for (library, gradient), recompute in lines[2].items():
        head.append(f"{library}\n{gradient}\nMiB / s" + " / again" * bool(recompute))
    rows = [head]
    for n in steps:
        row = [str(n)]
        for name in lines[0]:
            mib, took, recompute = (line[name].get(n) for line in lines)
            measured = "failed" if mib is None else f"{mib:.1f} / {'not timed' if took is None else f'{took:.3f}'}"
            row.append(measured if recompute is None else f"{measured} / {recompute:.2f}")
        rows.append(row)
    return rows


def memory_block(result: Result) -> str:
    """The block `memory` of the pages."""
    settings = result["settings"]
    about = f"One training step, batch {settings['batch']}, method {settings['method']}, step 1/N"
    if any(series(result, "recompute").values()):
        about += "; `again`: the steps taken again, besides the replay of each, in units of N"
    return "\n\n".join(
        [
            provenance(result),
            f"{training_sentence(result)} {result['sentence']}",
            f"{about}:",
            markdown(memory_rows(result)),
        ]
    )


def memory_short(result: Result) -> str:
    """The block `memory-short` of the pages: memory and time of each mode of ours at the last N."""
    ours = result["cells"][0]["library"]
    memory, times = (
        {gradient: points for (library, gradient), points in series(result, quantity).items() if library == ours}
        for quantity in ("peak_mib", "seconds")
    )
    last = max(cell["steps"] for cell in result["cells"])
    each = [
        f"{BY[by]} {memory[by][last]:.0f} MiB and {times[by][last]:.1f} s"
        for by in BY
        if last in memory.get(by, {}) and last in times[by]
    ]
    return f"A training step of {last} solver steps takes with {listed(each)}. {provenance(result)}"
