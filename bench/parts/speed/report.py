"""The tables from the JSON of speed.py."""

from __future__ import annotations

from parts.common.libraries import OURS, RIVAL
from parts.common.tables import Result, Rows, evaluations, markdown, provenance, spread, target


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
    """The block `speed-short`: the rows with a target, the row with the smallest ratio, and all lost rows."""
    least = min(row["ratio"][0] for row in result["rows"])
    kept = [row for row in result["rows"] if row["target"] is not None or row["ratio"][0] <= max(least, 1.0)]
    return speed_block({**result, "rows": kept})
