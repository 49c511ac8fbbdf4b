"""The golden record: a fixed set of problems has the same results as when they were recorded.

`RECORD_GOLDEN=1 python -m pytest tests/kernels/test_golden.py` records again, after a change on purpose. Bits are
compared on the kind of machine that recorded them, counts and rounded numbers everywhere.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
from golden.problems import PROBLEMS
from golden.record import machine, record

pytestmark = pytest.mark.slow
PATH = Path(__file__).parents[1] / "support" / "golden" / "golden.json"
ANEW = "RECORD_GOLDEN" in os.environ
SLOW = ("adaptive_heun", "no event", "explodes", "limits", "explicit_", "fixed_", "fehlberg2", "bosh3 adjoint")
BY_KERNELS = [  # the others test the same on this path, or take long, because each thread of a GPU is a fiber
    name
    for name in PROBLEMS
    if not name.endswith(("True", "False", "backwards", "backprop")) and not name.startswith(SLOW)
]
CAPTURED = [  # a part of them: captured solves take the same steps as the kernels
    "step_t, adjoint", "jump_t, discrete", "PID, adjoint", "dopri5 adjoint", "dopri5 discrete", "rk4 adjoint",
    "rk4 discrete", "norm, adjoint", "dopri5 backprop", "too many steps", "explodes, not raised",
]  # fmt: skip


def solved(names, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: record(PROBLEMS[name], **options) for name in names}


def numbers(value):
    """Return a record without the hashes of its bits."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
        return pytest.approx(value[1], rel=2e-4, abs=1e-6)
    if isinstance(value, list):
        return [numbers(x) for x in value]
    return {name: numbers(x) for name, x in value.items()} if isinstance(value, dict) else value


def rounded(value):
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
        return value[1]
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return {name: rounded(x) for name, x in value.items()} if isinstance(value, dict) else value


def ended(value):
    """Return the record; for a solve that failed only its status."""
    failed = value.get("status", "SUCCESS") != "SUCCESS"
    return {key: value[key] for key in ("raised", "status") if key in value} if failed else value


def agrees(path, found):
    """Compare with the record, or write it."""
    book = json.loads(PATH.read_text()) if PATH.is_file() else {}
    if ANEW:
        PATH.write_text(json.dumps({**book, "machine": machine(), path: found}, indent=1, sort_keys=True) + "\n")
        return
    expected = book[path]
    assert set(found) == set(expected)
    same_bits = book["machine"] == machine()
    if not same_bits:  # when a solve breaks down, rounding chooses its last steps: only the status is compared
        found, expected = ({name: ended(x) for name, x in book.items()} for book in (found, expected))
    differ = [
        f"{name}: {key} was {before.get(key)} and is {now.get(key)}"
        for name, now in found.items()
        for before in [expected[name]]
        for key in sorted({*now, *before})
        if now.get(key) != before.get(key) and (same_bits or rounded(now.get(key)) != numbers(before.get(key)))
    ]
    assert not differ, "\n".join(differ)


def test_solves_in_plain_pytorch_agree_with_the_record():
    agrees("plain", solved(PROBLEMS))


def test_solves_by_the_kernels_agree_with_the_record(shim):
    agrees("kernels", solved(BY_KERNELS))


def test_captured_solves_agree_with_the_record(eager):
    agrees("captured", solved(CAPTURED, cuda_graph=True))
