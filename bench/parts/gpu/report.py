"""The table from the JSON of a stage of gpu.sh."""

from __future__ import annotations

from parts.common.tables import Result, Rows, markdown, provenance


def gpu_rows(result: Result) -> Rows:
    """A row for each check or item, with its failed tests."""
    rows = [["check", "came out", "seconds", "said"]]
    for line in result["lines"]:
        said = "; ".join([line["detail"], *line["more"]]).replace("|", "/")
        rows.append([line["name"], line["outcome"], f"{line['seconds']:.0f}", said])
    return rows


def gpu_block(result: Result) -> str:
    """The block `gpu` of the pages."""
    return "\n\n".join([provenance(result), markdown(gpu_rows(result))])
