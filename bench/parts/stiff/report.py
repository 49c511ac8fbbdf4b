"""Tables from the JSON of stiff.py."""

from __future__ import annotations

from parts.common.tables import Result, Rows, markdown, provenance


def work_rows(result: Result) -> Rows:
    """A row a problem, tolerance and method."""
    rows = [["problem", "rtol", "method", "steps\n(rejected)", "nfe", "Jacobians", "ms", "error"]]
    before = None
    for row in result["work"]:
        case = (row["problem"], f"{row['rtol']:.0e}")
        rejected = f" ({row['rejected']})" if "rejected" in row else ""
        rows.append(
            [
                *(case if case != before else ("", "")),
                row["method"],
                f"{row['steps']}{rejected}",
                str(row["nfe"]),
                str(row.get("jacobians", "")),
                f"{row['ms']:.0f}",
                f"{row['error']:.2g}",
            ]
        )
        before = case
    return rows


def batch_rows(result: Result) -> Rows:
    """A row a batch and method."""
    rows = [["batch of", "samples", "method", "steps", "ended", "s", "loop of Radau,\ns", "ratio"]]
    for row in result["batch"]:
        seconds = (f"{row['seconds']:.2g}", f"{row['loop_of_radau']:.2g}")
        ratio = f"{row['ratio']:.3g}" if row["status"] == "SUCCESS" else ""
        rows.append(
            [row["problem"], str(row["samples"]), row["method"], str(row["steps"]), row["status"], *seconds, ratio]
        )
    return rows


def gradient_rows(result: Result) -> Rows:
    """A row a method and mode."""
    rows = [["method", "gradient", "steps", "nfe f+b", "forward,\nms", "backward,\nms"]]
    for row in result["gradients"]:
        both = str(row["nfe"]) + (f"+{row['nfe_backward']}" if row["nfe_backward"] else "")
        backward = "" if row["gradient"] == "none" else f"{row['backward_ms']:.0f}"
        rows.append([row["method"], row["gradient"], str(row["steps"]), both, f"{row['forward_ms']:.0f}", backward])
    return rows


def stiff_block(result: Result) -> str:
    tables = [markdown(rows(result)) for rows in (work_rows, batch_rows, gradient_rows)]
    return "\n\n".join([provenance(result), *tables])
