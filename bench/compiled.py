"""Compiled solves on the CPU (options compile=True) against the eager path, torchdiffeq, torchode and jitted diffrax.

Each row is a field, and a pass: a solve without gradients, a training step by the discrete adjoint, or one by the
continuous adjoint. The others take part with the gradient that corresponds: backprop or RecursiveCheckpointAdjoint for
the discrete one, their adjoints for the other. CPU time of the process, in turn; float32, dopri5, rtol = atol = 1e-6.
Beside every time: the evaluations, the error (of the outputs and of all gradients, against float64), and the seconds of
the compiler. Rows that lose stay in. What is not installed is left out, with a sentence.

    python bench/compiled.py [--quick] [--threads N] [--only TEXT] [--before CHECKOUT] [--out DIRECTORY]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from parts import program
from parts.common.libraries import DIFFRAX, OURS, RIVAL, installed
from parts.common.tables import show, write_result
from parts.compiled.beside import Before
from parts.compiled.cases import CASES, FORWARD, PASSES, QUICK
from parts.compiled.measure import ROUNDS, measure
from parts.compiled.peers import MAKERS, TORCHODE
from parts.compiled.report import compiled_rows, short_rows

NEEDS = {RIVAL: (RIVAL,), TORCHODE: (TORCHODE,), DIFFRAX: (DIFFRAX, "jax")}


def main() -> None:
    parser = program.parser(__doc__, quick="one small case forwards, without the compiler")
    parser.add_argument("--only", default="", help="only the cases with this text in their name")
    parser.add_argument("--before", type=Path, help="the root of an older checkout, whose eager path is timed, too")
    arguments = parser.parse_args()
    if arguments.threads == 1:  # read when jax is imported
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    device = program.begin(arguments)
    result = {**program.new_result("compiled", device), "missing": [], "rows": []}
    names = []
    for name in MAKERS:
        lacking = [library for library in NEEDS.get(name, (OURS,)) if not installed(library)]
        if lacking:
            result["missing"].append(f"{name} is left out, because this Python has no {' and no '.join(lacking)}.")
        else:
            names.append(name)
    before = None if arguments.before is None else Before(arguments.before.resolve(), arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NODE_CUDA_CACHE"] = folder  # so that every row says what its compilation takes
        if arguments.quick:
            without_compiler()
        for case in QUICK if arguments.quick else CASES:
            for timed in (FORWARD,) if arguments.quick else PASSES:
                if arguments.only in case.name:
                    print(f"{case.name}, {timed}", file=sys.stderr, flush=True)
                    result["rows"].append(measure(case, timed, names, 3 if arguments.quick else ROUNDS, before))
    if before is not None:
        before.close()
    show(compiled_rows(result))
    show(short_rows(result))
    print("\n".join(result["missing"]))
    path = write_result(result, arguments.out)
    print(program.written(path, arguments.out))


def without_compiler() -> None:
    """Lets the traced graphs run without the compiler."""
    from node_cuda.native import build

    build.interpreted = True


if __name__ == "__main__":
    main()
