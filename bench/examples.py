"""Runs the examples in full, with both libraries where torchdiffeq can do the example, and keeps their pictures.

The JSON has what each found: the loss at the end, the evaluations of the field in a training step, and the CPU time of
the part that is compared, for most of them the training. The pictures go beside the JSON, with --publish into
docs/images/examples/. Each run is a fresh process on one thread; several_processes.py is started by torchrun in two.

    python bench/examples.py [--only NAMES] [--quick] [--threads N] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from parts import program
from parts.common.libraries import OURS, RIVAL, installed
from parts.common.paths import PICTURES, PUBLISHED
from parts.common.tables import show, write_result
from parts.examples.report import examples_rows, examples_sentences
from parts.examples.running import has_both, names, run


def main() -> None:
    arguments = parse()
    device = program.begin(arguments)
    if device.type != "cpu":
        raise SystemExit("examples.py measures on a CPU; leave out --device.")
    pictures = PICTURES if arguments.out == PUBLISHED else arguments.out / "examples"
    pictures.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    result = {**program.new_result("examples", device), "complete": False, "examples": found}
    for name in arguments.only:
        libraries = [OURS, *([RIVAL] if has_both(name) and installed(RIVAL) else [])]
        found[name] = {}
        for library in libraries:
            picture = pictures / f"{name}.png" if library == OURS else arguments.out / f"{name}-{library}.png"
            print(f"{name}, {library}", file=sys.stderr, flush=True)
            found[name][library] = run(name, library, picture, short=arguments.quick, threads=arguments.threads)
            if library != OURS:
                picture.unlink(missing_ok=True)  # only the picture of node_cuda is kept
        write_result(result, arguments.out)  # the program may be stopped before its end
    result["complete"] = True
    path = write_result(result, arguments.out)
    show(examples_rows(result))
    print(examples_sentences(result))
    print(program.written(path, arguments.out))
    failed = [name for name, by in found.items() if "failed" in by[OURS]]
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}.")


def parse() -> argparse.Namespace:
    parser = program.parser(__doc__, quick="the short form of each example")
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), help="these examples (default: all)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
