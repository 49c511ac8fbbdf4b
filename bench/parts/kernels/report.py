"""Tables and sentences from the JSON of kernels.py."""

from __future__ import annotations

from parts.common.tables import INCOMPLETE, Result, Rows, markdown, outcome, provenance, reasons, spread, target


def kernels_rows(result: Result) -> Rows:
    """A row for each primitive and size: time, bytes and bandwidth, and the times of PyTorch and torch.compile."""
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
    """A number of bytes in MiB or KiB, as text."""
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def kernels_sentences(result: Result) -> str:
    """The rate of a copy, the time of a whole step, how many rows reach the target, and why rows failed."""
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
    """The block `kernels` of the pages."""
    dtype = f"A state of {result['settings']['dtype']}."
    return "\n\n".join([provenance(result), f"{dtype} {kernels_sentences(result)}", markdown(kernels_rows(result))])
