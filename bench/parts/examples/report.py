"""The table from the JSON of examples.py."""

from __future__ import annotations

from typing import Any

from parts.common.libraries import OURS, RIVAL
from parts.common.tables import INCOMPLETE, Result, Rows, markdown, outcome, provenance, reasons


def examples_rows(result: Result) -> Rows:
    """A row for each example."""
    rows = [["example", "loss", f"with\n{RIVAL}", "apart", "CPU s", f"with\n{RIVAL}", "ratio", "nfe,\nboth"]]
    for name, by in result["examples"].items():
        ours, theirs = by[OURS], by.get(RIVAL, {"failed": "cannot"})
        if "failed" in ours:
            rows.append([name, outcome(ours["failed"]), "", "", "", "", "", ""])
        elif "failed" in theirs:
            cells = [name, f"{ours['loss']:.4g}", outcome(theirs["failed"]), "", f"{ours['seconds']:.1f}", "", ""]
            rows.append([*cells, f"{ours['nfe']:.0f}"])
        else:
            rows.append([name, *compared(ours, theirs)])
    return rows


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The cells of an example that ran with both libraries."""
    losses, seconds, nfe = ([side[what] for side in (ours, theirs)] for what in ("loss", "seconds", "nfe"))
    apart = abs(losses[0] - losses[1]) / abs(losses[1])
    return [
        *(f"{loss:.4g}" for loss in losses),
        f"{apart:.0e}" if apart else "0",
        *(f"{second:.1f}" for second in seconds),
        f"{seconds[1] / seconds[0]:.2f}",
        ", ".join(f"{evaluations:.0f}" for evaluations in nfe),
    ]


def examples_sentences(result: Result) -> str:
    """In how many examples node_cuda takes less time, and why examples failed."""
    both = [by for by in result["examples"].values() if all("seconds" in by.get(x, {}) for x in (OURS, RIVAL))]
    faster = sum(by[OURS]["seconds"] < by[RIVAL]["seconds"] for by in both)
    lines = [] if result["complete"] else [INCOMPLETE]
    lines.append(f"{OURS} takes less time in {faster} of {len(both)} examples that run with both libraries.")
    failed = [
        (f"{name} ({library})", found["failed"])
        for name, by in result["examples"].items()
        for library, found in by.items()
        if "failed" in found
    ]
    return " ".join([*lines, *reasons(failed)])


def examples_block(result: Result) -> str:
    """The block `examples` of the pages."""
    return "\n\n".join([provenance(result), examples_sentences(result), markdown(examples_rows(result))])
