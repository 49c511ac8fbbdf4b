"""Tables and sentences from the JSON of gradients.py."""

from __future__ import annotations

from collections.abc import Callable

from parts.common.tables import (
    INCOMPLETE,
    Result,
    Rows,
    digits,
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


def gradient_costs(result: Result) -> str:
    """The block `gradient-costs` of the pages: a row for each mode, with its cost in every case and problem."""
    return "\n\n".join([provenance(result), *(markdown(rows(result)) for rows in (cost_rows, memory_and_error_rows))])


def cost_rows(result: Result) -> Rows:
    """The time of a solve with its gradient, in ms: a row for each mode, a column for each case."""
    return by_mode(result["times"], "case", lambda record: digits(record["milliseconds"][0]))


def memory_and_error_rows(result: Result) -> Rows:
    """Peak memory and error against the exact gradient: a row for each mode, a column for each problem."""
    return by_mode(result["problems"], "problem", lambda record: f"{record['peak_mib']:.1f} MiB, {record['error']:.0e}")


def by_mode(rows: list[Result], name: str, shown: Callable[[Result], str]) -> Rows:
    """A row for each mode, a column for each of these rows of the result."""
    table = [["gradient by", *(row[name] for row in rows)]]
    for mode in dict.fromkeys(mode for row in rows for mode in row["by"]):
        records = [row["by"].get(mode) for row in rows]
        cells = ["" if r is None else "failed" if "failed" in r else shown(r) for r in records]
        table.append([mode, *cells])
    return table
