"""The tables from the JSON of methods.py."""

from __future__ import annotations

from parts.common.tables import Result, Rows, markdown, provenance


def adaptive_rows(result: Result) -> Rows:
    """A row for each problem and method: evaluations and error at each tolerance."""
    rows = result["adaptive"]
    tolerances = sorted({row["rtol"] for row in rows}, reverse=True)
    table = [["problem", "method", *(f"rtol {rtol:.0e}" for rtol in tolerances)]]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        of_problem = [row for row in rows if row["problem"] == problem]
        for place, method in enumerate(dict.fromkeys(row["method"] for row in of_problem)):
            cells = {row["rtol"]: cell(row) for row in of_problem if row["method"] == method}
            table.append(["" if place else problem, method, *(cells.get(rtol, "") for rtol in tolerances)])
    return table


def grid_rows(result: Result) -> Rows:
    """A row for each method: the error for each budget of evaluations."""
    rows = result["grids"]
    table = [["method", *(f"{budget} evaluations" for budget in sorted({row["budget"] for row in rows}))]]
    for method in dict.fromkeys(row["method"] for row in rows):
        table.append([method, *(f"{row['error']:.0e}" for row in rows if row["method"] == method)])
    return table


def cell(row: Result) -> str:
    """The evaluations and the error of a solve."""
    return f"{row['nfe']}, {row['error']:.0e}"


def methods_block(result: Result) -> str:
    """The block `methods` of the pages: adaptive methods."""
    return "\n\n".join([provenance(result), markdown(adaptive_rows(result))])


def grids_block(result: Result) -> str:
    """The block `grids` of the pages: fixed grids."""
    return "\n\n".join([provenance(result), markdown(grid_rows(result))])
