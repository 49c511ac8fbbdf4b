"""The tables from the JSON of speed.py."""

from __future__ import annotations

from parts.common.libraries import OURS, RIVAL
from parts.common.tables import Result, Rows, digits, evaluations, markdown, provenance, spread, target
from parts.speed.small import HAND


def speed_rows(result: Result) -> Rows:
    """A row for each case: both times, their ratio, evaluations and errors."""
    rows = [
        [
            "case",
            f"{OURS}\nms (IQR)",
            f"{RIVAL}\nms (IQR)",
            "ratio\n(IQR)",
            "target",
            "nfe f+b,\nboth",
            "error,\nboth",
        ]
    ]
    for row in result["rows"]:
        ours, theirs = row["libraries"][OURS], row["libraries"][RIVAL]
        rows.append(
            [
                row["case"],
                spread(ours["milliseconds"]),
                spread(theirs["milliseconds"]),
                spread(row["ratio"]),
                target(row),
                f"{evaluations(ours)},\n{evaluations(theirs)}",
                f"{ours['error']:.0e},\n{theirs['error']:.0e}",
            ]
        )
    return rows


def speed_block(result: Result) -> str:
    """The block `speed` of the pages."""
    return "\n\n".join([provenance(result), markdown(speed_rows(result))])


def speed_short(result: Result) -> str:
    """The block `speed-short`: the rows with a target, the row with the smallest ratio, all lost rows, and a sentence
    on small states if they were measured."""
    least = min(row["ratio"][0] for row in result["rows"])
    kept = [row for row in result["rows"] if row["target"] is not None or row["ratio"][0] <= max(least, 1.0)]
    table = [["what is timed", f"{OURS}, ms", f"{RIVAL}, ms", "times faster", "evaluations of f"]]
    for row in kept:
        ours, theirs = row["libraries"][OURS], row["libraries"][RIVAL]
        counts = dict.fromkeys(evaluations(library).replace("+", " + ") for library in (ours, theirs))
        times = [digits(library["milliseconds"][0]) for library in (ours, theirs)]
        table.append([row["case"], *times, digits(row["ratio"][0]), " and ".join(counts)])
    small = [small_sentence(result)] if "small" in result else []
    return "\n\n".join([markdown(table), provenance(result), *small])


def small_rows(result: Result) -> Rows:
    """A row for each case of small states: all times, the ratios to the time of node_cuda, evaluations and errors."""
    rows = [
        [
            "case",
            *(f"{name}\nms (IQR)" for name in (OURS, RIVAL, HAND)),
            *(f"{name} /\n{OURS} (IQR)" for name in (RIVAL, HAND)),
            "nfe f+b,\nall",
            "error,\nall",
        ]
    ]
    for row in result["small"]:
        ran = row["contestants"]
        times = [spread(ran[name]["milliseconds"]) if name in ran else "" for name in (OURS, RIVAL, HAND)]
        ratios = [spread(ran[name]["ratio"]) if name in ran else "" for name in (RIVAL, HAND)]
        counts = ",\n".join(evaluations(contestant) for contestant in ran.values())
        errors = ",\n".join(f"{contestant['error']:.0e}" for contestant in ran.values())
        rows.append([row["case"], *times, *ratios, counts, errors])
    return rows


def small_sentence(result: Result) -> str:
    """How many rows of small states are faster than torchdiffeq, and the row with the smallest ratio."""
    ratios = {row["case"]: row["contestants"][RIVAL]["ratio"][0] for row in result["small"]}
    least = min(ratios, key=ratios.__getitem__)
    return (
        f"On small states it is faster than {RIVAL} in {sum(ratio > 1 for ratio in ratios.values())} of "
        f"{len(ratios)} rows; the smallest ratio is {ratios[least]:.3g} ({least})."
    )


def small_block(result: Result) -> str:
    """The block `speed-small`; empty if the results have no rows of small states."""
    if "small" not in result:
        return ""
    return "\n\n".join([provenance(result), small_sentence(result), markdown(small_rows(result))])
