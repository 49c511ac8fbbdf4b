"""Tables and sentences from the JSON of solve.py."""

from __future__ import annotations

from parts.common.tables import (
    INCOMPLETE,
    Result,
    Rows,
    evaluations,
    markdown,
    outcome,
    provenance,
    reasons,
    spread,
    target,
)


def solve_rows(result: Result) -> Rows:
    """A row for each case and contestant."""
    head = ["case", "by", "ms (IQR)", "torchdiffeq's\ntime / its (IQR)", "target", "nfe f+b", "steps", "error"]
    rows = [head]
    for row in result["rows"]:
        for place, (name, record) in enumerate(row["by"].items()):
            case = "" if place else row["case"]
            promised = target({"target": None, "met": None} | record)
            if "failed" in record:
                rows.append([case, name, outcome(record["failed"]), "", promised, "", "", ""])
                continue
            rows.append(
                [
                    case,
                    name,
                    spread(record["milliseconds"]),
                    spread(record["ratio"]) if "ratio" in record else "",
                    promised,
                    "" if record["nfe"] is None else evaluations(record),
                    str(record["accepted"]),
                    f"{record['error']:.0e}",
                ]
            )
    return rows


def solve_sentences(result: Result) -> str:
    """How many targets are reached, and why rows failed."""
    judged = [record for row in result["rows"] for record in row["by"].values() if record.get("target") is not None]
    met = sum(record["met"] is True for record in judged)
    lines = [] if result["complete"] else [INCOMPLETE]
    if judged:
        lines.append(f"{met} of {len(judged)} promised ratios reached.")
    failed = [
        (name, record["failed"]) for row in result["rows"] for name, record in row["by"].items() if "failed" in record
    ]
    return " ".join([*lines, *reasons(failed)])


def solve_block(result: Result) -> str:
    """The block `solve` of the pages."""
    return "\n\n".join(filter(None, [provenance(result), solve_sentences(result), markdown(solve_rows(result))]))
