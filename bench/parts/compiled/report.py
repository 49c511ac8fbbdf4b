"""The tables from the JSON of compiled.py."""

from __future__ import annotations

import math

from parts.common.libraries import DIFFRAX
from parts.common.modes import DISCRETE
from parts.common.tables import Result, Rows, digits, markdown, outcome, provenance, reasons, spread
from parts.compiled.cases import FORWARD
from parts.compiled.peers import COMPILED, EAGER

SMALLEST = "MLP 16x2"
WORDS = {FORWARD: "a solve", DISCRETE: "a training step by the discrete adjoint"}


def compiled_rows(result: Result) -> Rows:
    """A row for each case, pass and contestant: time, its ratio to the compiled solve, work, error, compile time."""
    table = [["case", "pass", "by", "ms (IQR)", "/ compiled (IQR)", "nfe f+b, or steps", "error", "compiles s"]]
    for row in result["rows"]:
        for place, (name, found) in enumerate(row["by"].items()):
            head = ["" if place else row["case"], "" if place else row["timed"], name + by_eager(found)]
            if "milliseconds" not in found:
                table.append([*head, outcome(found["failed"]), *[""] * 4])
                continue
            ratio = spread(found["ratio"]) if "ratio" in found and name != COMPILED else ""
            table.append([*head, spread(found["milliseconds"]), ratio, work(found), *extra(found)])
    return table


def by_eager(found: Result) -> str:
    """A remark on a solve of which a part was not compiled."""
    if found.get("why") or found.get("why_backward"):
        return " (eager)" if found.get("why") else " (eager backwards)"
    return ""


def work(found: Result) -> str:
    """The evaluations, or the steps, that a library tells."""
    if "steps" in found:
        return f"{found['steps']} steps"
    if "nfe" not in found:
        return ""
    return f"{found['nfe']}+{found['nfe_backward']}" if found.get("nfe_backward") else f"{found['nfe']}"


def extra(found: Result) -> list[str]:
    """The error, and the seconds of the compiler."""
    if "error" not in found:
        return ["", ""]
    return [f"{found['error']:.0e}", digits(found["compile_seconds"])]


def solves_to_pay(row: Result) -> int | None:
    """After how many solves the compiler has paid off, against the eager path; None if it never does."""
    ours, eager = row["by"].get(COMPILED, {}), row["by"].get(EAGER, {})
    if "milliseconds" not in ours or "milliseconds" not in eager:
        return None
    gain = (eager["milliseconds"][0] - ours["milliseconds"][0]) / 1e3
    return math.ceil(ours["compile_seconds"] / gain) if gain > 0 else None


def short_rows(result: Result) -> Rows:
    """A row for each case and pass: how many times faster than eager, and after how many solves it pays."""
    table = [["case", "pass", "times faster than eager", "compiles s", "pays after"]]
    for row in result["rows"]:
        ours, eager = row["by"].get(COMPILED, {}), row["by"].get(EAGER, {})
        if "milliseconds" in ours and "ratio" in eager and not by_eager(ours):
            solves = solves_to_pay(row)
            pays = f"{solves} solves" if solves is not None else "never"
            faster, seconds = digits(eager["ratio"][0]), digits(ours["compile_seconds"])
            table.append([row["case"], row["timed"], faster, seconds, pays])
    return table


def lost(result: Result) -> list[str]:
    """Rows in which another is faster than the compiled solve, and limits that it misses."""
    found = []
    for row in result["rows"]:
        for name, other in row["by"].items():
            if "ratio" in other and name != COMPILED and other["ratio"][0] < 1:
                ratio = 1 / other["ratio"][0]
                goal = row["goal"] if name == DIFFRAX else None
                missed = f", {goal:g} was the limit" if goal is not None and ratio > goal else ""
                found.append(f"{row['case']}, {row['timed']}: {digits(ratio)} times the time of {name}{missed}")
        if "failed" in row["by"].get(COMPILED, {}):
            found.append(f"{row['case']}, {row['timed']}: failed")
    return found


def compiled_block(result: Result) -> str:
    """The block `compiled` of the pages: all rows."""
    failed = [
        (name, found["failed"]) for row in result["rows"] for name, found in row["by"].items() if "failed" in found
    ]
    notes = [*result["missing"], *reasons(failed), *eager_reasons(result)]
    return "\n\n".join([provenance(result), markdown(compiled_rows(result)), *notes])


def compiled_short(result: Result) -> str:
    """The block `compiled-short` of the pages: when it pays."""
    return "\n\n".join([provenance(result), markdown(short_rows(result))])


def compiled_sentence(result: Result) -> str:
    """The block `compiled-sentence` of the pages: the times of the smallest field by all contestants."""
    said = []
    for row in result["rows"]:
        timed = {name: found for name, found in row["by"].items() if "milliseconds" in found}
        ours = timed.pop(COMPILED, None)
        if row["case"] == SMALLEST and row["timed"] in WORDS and ours is not None and not by_eager(ours):
            others = (f"{name} {digits(found['milliseconds'][0])}" for name, found in timed.items() if "error" in found)
            said.append(f"{WORDS[row['timed']]} takes {digits(ours['milliseconds'][0])} ms ({', '.join(others)})")
    if not said:
        return ""
    return f"Compiled, with the field {SMALLEST.removeprefix('MLP ')}: {'; '.join(said)}. {provenance(result)}"


def eager_reasons(result: Result) -> list[str]:
    """Why a part of a compiled row was eager, each reason once."""
    whys = {
        found.get("why") or found.get("why_backward")
        for row in result["rows"]
        for name, found in row["by"].items()
        if name == COMPILED
    }
    return [f"Eager: {why}." for why in sorted(filter(None, whys))]
