"""Tables and sentences from the JSON of kernels.py and solve.py, and of a stage of gpu.sh."""

from __future__ import annotations

from tables import Result, Rows, evaluations, markdown, provenance, spread, target

SHORT = 16  # letters
INCOMPLETE = "The program was stopped before its end: rows are missing."

# ---- kernels


def kernels_rows(result: Result) -> Rows:
    """A row a primitive and size: its time, bytes and bandwidth, and the time of plain PyTorch and torch.compile."""
    head = [
        "primitive", "state", "moves", "kernel\nus (IQR)", "GB/s", "of a\ncopy", "target", "PyTorch\nus (IQR)",
        "torch.compile\nus (IQR)",
    ]  # fmt: skip
    rows = [head]
    for row in result["rows"]:
        state = size(row["state_bytes"])
        if "failed" in row:
            rows.append([row["primitive"], state, "", outcome(row["failed"]), "", "", target(row), "", ""])
            continue
        rows.append(
            [
                row["primitive"],
                state,
                size(row["bytes"]),
                spread(row["microseconds"]),
                f"{row['bytes_per_second'] / 1e9:.0f}",
                f"{row['of_copy']:.0%}",
                target(row),
                spread(row["plain"]["microseconds"]),
                outcome(row["compiled"]["failed"])
                if "failed" in row["compiled"]
                else spread(row["compiled"]["microseconds"]),
            ]
        )
    return rows


def size(count: float) -> str:
    """Bytes in MiB or KiB."""
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def kernels_sentences(result: Result) -> str:
    """The copies, what a whole step takes, how many rows keep the promise, and why any failed."""
    lines = [] if result["complete"] else [INCOMPLETE]
    for copy in result["copies"]:
        rate = copy["bytes"] / copy["microseconds"][0] / 1e3
        lines.append(f"A copy of {size(copy['state_bytes'])} moves {rate:.0f} GB/s.")
    for step in result["steps"]:
        lines.append(
            f"The {step['launches']} launches of a step of dopri5 on {size(step['state_bytes'])} move "
            f"{step['sizes']:g} times the state and take {step['kernel']:.3g} us; PyTorch {step['plain']:.3g} us"
            + ("." if step["compiled"] is None else f", torch.compile {step['compiled']:.3g} us.")
        )
    judged = [row for row in result["rows"] if row["target"] is not None]
    met = sum(row["met"] is True for row in judged)
    lines.append(f"{met} of {len(judged)} primitives reach the target.")
    failed = [(row["primitive"], row["failed"]) for row in result["rows"] if "failed" in row]
    failed += [
        ("torch.compile", row["compiled"]["failed"]) for row in result["rows"] if "failed" in row.get("compiled", {})
    ]
    return " ".join([*lines, *reasons(failed)])


def kernels_block(result: Result) -> str:
    dtype = f"A state of {result['settings']['dtype']}."
    return "\n\n".join([provenance(result), f"{dtype} {kernels_sentences(result)}", markdown(kernels_rows(result))])


# ---- solve


def solve_rows(result: Result) -> Rows:
    """A row a case and contestant."""
    head = ["case", "by", "ms (IQR)", "torchdiffeq's\ntime / its (IQR)", "target", "nfe f+b", "steps", "error"]
    rows = [head]
    for row in result["rows"]:
        for place, (name, record) in enumerate(row["by"].items()):
            case = "" if place else row["case"]
            promised = target({"target": None, "met": None} | record)
            if "failed" in record:
                rows.append([case, name, outcome(record["failed"]), "", promised, "", "", ""])
                continue
            rows.append(
                [
                    case,
                    name,
                    spread(record["milliseconds"]),
                    spread(record["ratio"]) if "ratio" in record else "",
                    promised,
                    "" if record["nfe"] is None else evaluations(record),
                    str(record["accepted"]),
                    f"{record['error']:.0e}",
                ]
            )
    return rows


def solve_sentences(result: Result) -> str:
    """How many rows keep the promise, and why any failed."""
    judged = [record for row in result["rows"] for record in row["by"].values() if record.get("target") is not None]
    met = sum(record["met"] is True for record in judged)
    lines = [] if result["complete"] else [INCOMPLETE]
    if judged:
        lines.append(f"{met} of {len(judged)} promised ratios reached.")
    failed = [
        (name, record["failed"]) for row in result["rows"] for name, record in row["by"].items() if "failed" in record
    ]
    return " ".join([*lines, *reasons(failed)])


def solve_block(result: Result) -> str:
    return "\n\n".join(filter(None, [provenance(result), solve_sentences(result), markdown(solve_rows(result))]))


# ---- gpu.sh


def gpu_rows(result: Result) -> Rows:
    """A row a check or item, with the tests that failed."""
    rows = [["check", "came out", "seconds", "said"]]
    for line in result["lines"]:
        said = "; ".join([line["detail"], *line["more"]]).replace("|", "/")
        rows.append([line["name"], line["outcome"], f"{line['seconds']:.0f}", said])
    return rows


def gpu_block(result: Result) -> str:
    return "\n\n".join([provenance(result), markdown(gpu_rows(result))])


# ---- both


def outcome(why: str) -> str:
    """A cell without a time: why, if that is short enough for a table."""
    return why if len(why) <= SHORT else "failed"


def reasons(failed: list[tuple[str, str]]) -> list[str]:
    """What the table has no room for, once for each who and why."""
    return [f"{who}: {why.rstrip('.')}." for who, why in dict.fromkeys(failed) if len(why) > SHORT]
