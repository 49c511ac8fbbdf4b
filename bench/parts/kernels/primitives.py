"""The table of the primitives that kernels.py measures. `steps` and `adjoint` launch them.

Every launcher of csrc/launchers.h that reads or writes arrays as large as the state has a row; a test checks this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from node_cuda.kernels import reference
from parts.kernels import adjoint, steps
from parts.kernels.launching import Launch, Workplace

__all__ = ["PRIMITIVES", "STEP", "WITHOUT_STATE", "Launch", "Primitive", "Workplace"]

WITHOUT_STATE = {  # these read and write a few numbers only
    "stage_time", "step_control", "start_control", "grid_control", "resume", "begin_reverse", "load_step",
    "advance_reverse",
}  # fmt: skip


class Primitive(NamedTuple):
    """A row. sizes: what it moves, in sizes of the state. plain: the same in PyTorch, called with Launch.arguments."""

    name: str
    launcher: str
    sizes: int
    prepare: Callable[[Workplace], Launch]
    plain: Callable[..., Any]


def _stage(terms: int) -> Primitive:
    prepare = partial(steps.rk_stage, terms=terms)
    return Primitive(f"rk_stage, {terms} terms", "rk_stage", terms + 2, prepare, reference.combine)


def _dense_eval(outputs: int) -> Primitive:
    prepare = partial(steps.dense_eval, outputs=outputs)
    return Primitive(f"dense_eval, {outputs} outputs", "dense_eval", 7 + outputs, prepare, steps.plain_dense_eval)


def _dense_adjoint(outputs: int) -> Primitive:
    prepare = partial(adjoint.dense_adjoint, outputs=outputs)
    name = f"dense_adjoint, {outputs} outputs"
    return Primitive(name, "dense_adjoint", 9 + outputs, prepare, adjoint.plain_dense_adjoint)


def _accumulate(name: str, sizes: int, with_error: bool) -> Primitive:
    prepare = partial(adjoint.accumulate, with_error=with_error)
    return Primitive(name, "accumulate", sizes, prepare, adjoint.plain_accumulate)


PRIMITIVES = (
    *map(_stage, range(1, 7)),
    Primitive("rk_finish", "rk_finish", 8, steps.rk_finish, reference.rk_finish),
    Primitive("error_ratio", "error_ratio", 4, steps.error_ratio, reference.error_ratio),
    Primitive("scaled_error", "scaled_error", 5, steps.scaled_error, steps.plain_scaled_error),
    Primitive("initial_norms", "initial_norms", 2, steps.initial_norms, reference.initial_norms),
    Primitive("initial_change", "initial_change", 3, steps.initial_change, reference.initial_change),
    _dense_eval(1),
    _dense_eval(16),
    _dense_adjoint(1),
    _dense_adjoint(16),
    Primitive("commit", "commit", 4, steps.commit, steps.plain_commit),
    Primitive("pack_adjoint", "pack_adjoint", 4, adjoint.pack_adjoint, adjoint.plain_pack_adjoint),
    _accumulate("accumulate", 3, with_error=False),
    _accumulate("accumulate, with error", 5, with_error=True),
    Primitive("commit_sums", "commit_sums", 3, adjoint.commit_sums, adjoint.plain_commit_sums),
    Primitive("sums_ratio", "sums_ratio", 3, adjoint.sums_ratio, adjoint.plain_sums_ratio),
    Primitive("jump", "jump", 4, adjoint.jump, adjoint.plain_jump),
)
# The launches of a step of dopri5: the stages before the last one, rk_finish (the last one) and the error: 37 sizes.
STEP = (*(f"rk_stage, {terms} terms" for terms in range(1, 6)), "rk_finish", "error_ratio")
