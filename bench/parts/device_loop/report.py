"""Tables and sentences from the JSON of device_loop.py."""

from __future__ import annotations

from parts.common.tables import INCOMPLETE, Result, Rows, evaluations, markdown, outcome, provenance, reasons, spread

CALLS = ("graphs", "kernels", "copies", "fills", "waits", "others")


def solve_rows(result: Result, section: str) -> Rows:
    """A row for each case and contestant of `solves` or `training`; a promise stands after its ratio."""
    against = result[section][0]["against"] if result[section] else []
    ratios = [f"{name}'s\ntime / its (IQR)" for name in against]
    rows = [["case", "by", "loops", "ms (IQR)", *ratios, "nfe f+b", "steps", "error"]]
    for row in result[section]:
        for place, (name, record) in enumerate(row["by"].items()):
            begin = ["" if place else row["case"], name]
            if "failed" in record:
                rows.append([*begin, "", outcome(record["failed"]), *[""] * (len(against) + 3)])
                continue
            rows.append(
                [
                    *begin,
                    record["loops"],
                    spread(record["milliseconds"]),
                    *(ratio(record, other) for other in against),
                    "" if record["nfe"] is None else evaluations(record),
                    "" if record["accepted"] is None else str(record["accepted"]),
                    f"{record['error']:.0e}",
                ]
            )
    return rows


def ratio(record: Result, other: str) -> str:
    """The ratio of the other's time to this one's, and the promise."""
    cell = spread(record["ratios"][other]) if other in record["ratios"] else ""
    promise = record.get("promises", {}).get(other)
    if promise is None or not cell:
        return cell
    return f"{cell}\n[{promise['target']:g}{', missed' if promise['met'] is False else ''}]"


def steps_rows(result: Result) -> Rows:
    """A row for each kind of step and loop."""
    counts = result["steps"][0]["steps"] if result["steps"] else []
    rows = [["step", "loop", "us a step (IQR)", *(f"ms of {n} steps" for n in counts), "first call, ms"]]
    for row in result["steps"]:
        for place, (name, record) in enumerate(row["by"].items()):
            begin = ["" if place else row["case"], name]
            if "failed" in record:
                rows.append([*begin, outcome(record["failed"]), *[""] * (len(counts) + 1)])
                continue
            first = spread(record["first_milliseconds"]) if "first_milliseconds" in record else ""
            times = [f"{median:.3g}" for median, *_ in record["milliseconds"]]
            rows.append([*begin, spread(record["microseconds_a_step"]), *times, first])
    return rows


def calls_rows(result: Result) -> Rows:
    """A row for each run."""
    rows = [["run", "loop", *CALLS]]
    for row in result["calls"]:
        begin = [row["gradient"], row["loop"]]
        if "failed" in row:
            rows.append([*begin, outcome(row["failed"]), *[""] * (len(CALLS) - 1)])
            continue
        counts = {kind: str(row["calls"][kind]) for kind in CALLS}
        if row["allowed"] is not None:
            counts["waits"] += f" [{row['allowed']}{', missed' if row['met'] is False else ''}]"
        rows.append([*begin, *counts.values()])
    return rows


def memory_rows(result: Result) -> Rows:
    """A row for each run and number of steps."""
    rows = [
        [
            "run",
            "loop",
            "steps",
            "state,\nMiB",
            "captured, MiB\nallocated / reserved",
            "owner gone, MiB\nallocated / reserved",
        ]
    ]
    for row in result["memory"]:
        begin = [row["gradient"], row["loop"]]
        if "failed" in row:
            rows.append([*begin, str(row["steps"]), "", outcome(row["failed"]), ""])
            continue
        pairs = [" / ".join(f"{mib:.2f}" for mib in row[name]) for name in ("owned_mib", "left_mib")]
        rows.append([*begin, str(row["accepted"]), f"{row['state_mib']:.2f}", *pairs])
    return rows


def device_loop_sentences(result: Result) -> str:
    """How many promises are kept, what the WHILE node adds to a step, and why rows failed."""
    lines = [] if result["complete"] else [INCOMPLETE]
    timed = [
        (f"{name}, {row['case']}", record)
        for section in ("solves", "training")
        for row in result[section]
        for name, record in row["by"].items()
    ]
    promises = [promise["met"] for _, record in timed for promise in record.get("promises", {}).values()]
    promises += [row["met"] for row in result["calls"] if row["allowed"] is not None]
    if promises:
        untold = promises.count(None)
        told = f", {untold} could not be told" if untold else ""
        lines.append(f"{promises.count(True)} of {len(promises)} promises kept{told}.")
    for row in result["steps"]:
        if "while_over_batches_microseconds" in row:
            median, q1, q3 = row["while_over_batches_microseconds"]
            lines.append(
                f"A step ({row['case']}) takes {median:+.3g} us ({q1:+.3g} to {q3:+.3g}) in the WHILE node beyond what "
                "it takes as one of a batch of launches."
            )
    failed = [(who, record["failed"]) for who, record in timed if "failed" in record]
    failed += [
        (f"{name}, {row['case']}", record["failed"])
        for row in result["steps"]
        for name, record in row["by"].items()
        if "failed" in record
    ]
    failed += [
        (f"{section} of {row['gradient']}, {row['loop']}", row["failed"])
        for section in ("calls", "memory")
        for row in result[section]
        if "failed" in row
    ]
    return " ".join([*lines, *reasons(failed)])


def device_loop_block(result: Result) -> str:
    """The block `device-loop` of the pages."""
    tables = [solve_rows(result, section) for section in ("solves", "training")]
    tables += [rows(result) for rows in (steps_rows, calls_rows, memory_rows)]
    shown = [markdown(rows) for rows in tables if len(rows) > 1]
    return "\n\n".join(filter(None, [provenance(result), device_loop_sentences(result), *shown]))
