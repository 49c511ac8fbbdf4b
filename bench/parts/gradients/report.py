"""Tables and sentences from the JSON of gradients.py."""

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


def gradient_time_rows(result: Result) -> Rows:
    """A row for each case and mode."""
    rows = [
        ["case", "gradient by", "ms (IQR)", "torchdiffeq adjoint's\ntime / its (IQR)", "target", "nfe f+b", "error"]
    ]
    for row in result["times"]:
        for place, (mode, record) in enumerate(row["by"].items()):
            case = "" if place else row["case"]
            promise = target(record) if "target" in record else ""
            if "failed" in record:
                rows.append([case, mode, outcome(record["failed"]), "", promise, "", ""])
                continue
            ratio = spread(record["ratio"]) if "ratio" in record else ""
            cost = [evaluations(record), f"{record['error']:.0e}"]
            rows.append([case, mode, spread(record["milliseconds"]), ratio, promise, *cost])
    return rows


def gradient_error_rows(result: Result) -> Rows:
    """A row for each problem and mode."""
    rows = [["problem", "gradient by", "error", "error,\nsame steps", "peak MiB", "nfe f+b"]]
    for row in result["problems"]:
        for place, (mode, record) in enumerate(row["by"].items()):
            name = "" if place else row["problem"]
            if "failed" in record:
                rows.append([name, mode, outcome(record["failed"]), "", "", ""])
                continue
            errors = [f"{record[kind]:.0e}" for kind in ("error", "error_same_steps")]
            rows.append([name, mode, *errors, f"{record['peak_mib']:.1f}", evaluations(record)])
    return rows


def gradients_sentence(result: Result) -> str:
    """How many targets are reached, and why rows failed."""
    lines = [] if result["complete"] else [INCOMPLETE]
    judged = [record for row in result["times"] for record in row["by"].values() if record.get("target") is not None]
    lines.append(f"{sum(record['met'] is True for record in judged)} of {len(judged)} promised ratios reached.")
    failed = [
        (f"{mode}, {row.get('case') or row.get('problem')}", record["failed"])
        for row in (*result["times"], *result["problems"])
        for mode, record in row["by"].items()
        if "failed" in record
    ]
    return " ".join([*lines, *reasons(failed)])


def gradients_block(result: Result) -> str:
    """The block `gradients` of the pages."""
    tables = [markdown(rows(result)) for rows in (gradient_time_rows, gradient_error_rows)]
    return "\n\n".join([provenance(result), gradients_sentence(result), *tables])
