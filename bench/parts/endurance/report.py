"""The table and the sentence from the JSON of endurance.py."""

from __future__ import annotations

from parts.common.tables import INCOMPLETE, Result, Rows, markdown, provenance

NAMES = {"resident": "resident memory", "tensors": "live tensors", "allocated": "torch's memory on CUDA"}


def endurance_rows(result: Result) -> Rows:
    """A row for each loop: the memory after its warm-up and at its end."""
    on_cuda = result["device"] == "cuda"
    head = ["gradient by", "solves", "ms a solve", "resident\nMiB", "bytes\na solve", "live\ntensors"]
    rows = [head + ["allocated\nKiB"] * on_cuda]
    for row in result["rows"]:
        first, last = row["samples"][row["watched_from"]], row["samples"][-1]
        line = [
            row["gradient"],
            str(last["solves"]),
            f"{1e3 * row['seconds'] / last['solves']:.1f}",
            f"{first['resident'] / 2**20:.1f} to {last['resident'] / 2**20:.1f}",
            f"{row['bytes_a_solve']:+.1f}",
            f"{first['tensors']} to {last['tensors']}",
        ]
        if on_cuda:
            line.append(f"{first['allocated'] / 2**10:.1f} to {last['allocated'] / 2**10:.1f}")
        rows.append(line)
    return rows


def endurance_sentence(result: Result) -> str:
    """Whether and where memory grew, and what would count as growth."""
    rows = result["rows"]
    lines = [] if result["complete"] else [INCOMPLETE]
    if not rows:
        return " ".join(lines)
    solves = sum(row["samples"][-1]["solves"] for row in rows)
    grew = [f"{row['gradient']} ({', '.join(NAMES[each] for each in row['grew'])})" for row in rows if row["grew"]]
    verdict = f"memory grew: {'; '.join(grew)}" if grew else "memory did not grow"
    steepest = max(row["bytes_a_solve"] for row in rows)
    allowed = min(row["allowed_bytes_a_solve"] for row in rows)
    lines.append(
        f"In {solves} solves and gradients {verdict}. After the warm-up of {result['settings']['warm_up']:.0%} of each "
        f"loop, the resident memory of the steepest rises by {steepest:+.1f} bytes a solve; {allowed:.0f} would count "
        "as growth, and so would a tensor more."
    )
    return " ".join(lines)


def endurance_block(result: Result) -> str:
    """The block `endurance` of the pages."""
    return "\n\n".join([provenance(result), endurance_sentence(result), markdown(endurance_rows(result))])
