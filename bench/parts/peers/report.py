"""The table and the sentences from the JSON of peers.py."""

from __future__ import annotations

from typing import Any

from parts.common.libraries import OURS
from parts.common.tables import INCOMPLETE, Result, Rows, evaluations, markdown, outcome, provenance, reasons, spread
from parts.peers.diffrax_contestant import EVALUATIONS


def peers_rows(result: Result) -> Rows:
    """A row for each problem, tolerance and contestant."""
    rows = [["problem", "rtol", "by", "CPU ms (IQR)", "its time /\nnode_cuda's (IQR)", "nfe f+b", "error"]]
    before = None
    for row in result["rows"]:
        case = (row["problem"], f"{row['rtol']:.0e}")
        head = [*(case if case != before else ("", "")), row["by"]]
        before = case
        if "failed" in row:
            rows.append([*head, outcome(row["failed"]), "", "", ""])
            continue
        ratio = spread(row["ratio"]) if "ratio" in row else ""
        rows.append([*head, spread(row["milliseconds"]), ratio, counted(row), f"{row['error']:.0e}"])
    return rows


def counted(row: dict[str, Any]) -> str:
    """The evaluations forward + backward; of a library that counts steps alone, those of its steps."""
    return evaluations(row) if row["nfe"] is not None else f"~{EVALUATIONS * row['steps'] + 2}"


def peers_sentences(result: Result) -> str:
    """What takes part, what does not, and in how many cases a peer is the faster one."""
    lines = [] if result["complete"] else [INCOMPLETE]
    lines.append(f"The peers: {', '.join(f'{name} {number}' for name, number in result['peers'].items()) or 'none'}.")
    lines += result["left_out"]
    timed = [row for row in result["rows"] if "milliseconds" in row]
    for peer in result["peers"]:
        cases, faster = 0, 0
        for case in dict.fromkeys((row["problem"], row["rtol"]) for row in timed):
            took = {row["by"]: row["milliseconds"][0] for row in timed if (row["problem"], row["rtol"]) == case}
            its, ours = ([ms for by, ms in took.items() if by.partition(" ")[0] == name] for name in (peer, OURS))
            cases, faster = cases + bool(its and ours), faster + bool(its and ours and min(its) < min(ours))
        if cases:
            lines.append(f"{peer} is faster than the fastest way of node_cuda in {faster} of {cases} cases.")
    failed = [(f"{row['by']}, {row['problem']}", row["failed"]) for row in result["rows"] if "failed" in row]
    return " ".join([*lines, *reasons(failed)])


def peers_block(result: Result) -> str:
    """The block `peers` of the pages."""
    return "\n\n".join([provenance(result), peers_sentences(result), markdown(peers_rows(result))])
