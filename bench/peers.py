"""Work against precision beside the peers: node_cuda, torchdiffeq, torchode and diffrax on six problems people have.

The problems are in parts/peers/problems.py: the training step of a spiral, of a normalizing flow with exact trace and
of a latent ODE; a flow-matching sampler, Van der Pol's oscillator and a large cheap field without a gradient. All take
dopri5 with rtol = atol at three tolerances. Times are CPU times of the process on one thread, and the contestants take
turns. The error is the largest relative one among outputs and gradients, against dopri8 at rtol 1e-13 in float64.
diffrax is compiled by jax.jit before it is timed. A peer that is not installed is left out, and the result says so.

    python bench/peers.py [--quick] [--threads N] [--budget SECONDS] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from parts import program
from parts.common.libraries import DIFFRAX, OURS, RIVAL, TORCHODE, installed, version
from parts.common.tables import gist, show, write_result
from parts.common.timing import Spread, cpu_seconds, interleaved
from parts.peers.diffrax_contestant import diffraxes
from parts.peers.problems import PROBLEMS, QUICK_PROBLEMS, Problem, exact
from parts.peers.report import peers_rows, peers_sentences
from parts.peers.torch_contestants import Contestant, ours, torchdiffeqs, torchodes
from parts.solve.solving import Quantities, largest_error

ROUNDS = 31  # at most, of each row
WRONG = 0.5  # a relative error above it is a wrong result and not an inaccurate one
PEERS = {RIVAL: torchdiffeqs, TORCHODE: torchodes, DIFFRAX: diffraxes}


def main() -> None:
    arguments = parse()
    device = program.begin(arguments)
    if device.type != "cpu":
        raise SystemExit("peers.py measures on a CPU; leave out --device.")
    peers = {name: make for name, make in PEERS.items() if installed(name)}
    rows: list[dict[str, Any]] = []
    result = {
        **program.new_result("peers", device),
        "peers": {name: version(name) for name in (*peers, *(["jax"] if DIFFRAX in peers else []))},
        "left_out": [f"{name} is not installed (`pip install {name}`)." for name in PEERS if name not in peers],
        "complete": False,
        "rows": rows,
    }
    rounds = 3 if arguments.quick else ROUNDS
    for problem in QUICK_PROBLEMS if arguments.quick else PROBLEMS:
        expected = exact(problem)
        for rtol in problem.rtols:
            print(f"{problem.name}, rtol {rtol:g}", file=sys.stderr, flush=True)
            makers = ours(problem, rtol, quick=arguments.quick)
            for make in peers.values():
                makers |= make(problem, rtol)
            rows += measure(problem, rtol, makers, expected, device, rounds, arguments.budget)
            write_result(result, arguments.out)  # the program may be stopped before its end
    result["complete"] = True
    path = write_result(result, arguments.out)
    show(peers_rows(result))
    print(peers_sentences(result))
    try:
        from parts.peers.plot import draw_peers
    except ImportError:  # without matplotlib there is no figure
        print(program.written(path, arguments.out))
        return
    figure = arguments.out / f"peers-{device.type}.png"
    draw_peers(result, figure)
    print(program.written(f"{path}, {figure.name}", arguments.out))


def parse() -> argparse.Namespace:
    parser = program.parser(__doc__, quick="two small problems, one tolerance")
    parser.add_argument(
        "--budget", type=float, default=5.0, help="seconds of timing per tolerance; three rounds at least"
    )
    return parser.parse_args()


def measure(
    problem: Problem,
    rtol: float,
    makers: dict[str, Any],
    expected: Quantities,
    device: torch.device,
    rounds: int,
    budget: float,
) -> list[dict[str, Any]]:
    """The rows of one problem at one tolerance. A contestant that fails or is wrong has a row that says so."""
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, Contestant] = {}
    for name, make in makers.items():
        rows[name] = {"problem": problem.name, "rtol": rtol, "by": name}
        try:
            contestant = make()
            solved = contestant.solved()
            error = largest_error(solved.quantities, expected)
            if not error < WRONG:
                raise ValueError(f"the relative error is {error:.1e}")
            contestant.run()  # warm-up
        except Exception as error:  # the row says so
            rows[name]["failed"] = gist(error)
            continue
        rows[name] |= {
            "nfe": solved.nfe, "nfe_backward": solved.nfe_backward, "steps": solved.steps, "error": error,
        }  # fmt: skip
        running[name] = contestant
    sample = interleaved(
        [lambda run=contestant.run: cpu_seconds(run, device) for contestant in running.values()],
        rounds=rounds,
        budget=budget,
    )
    first = next((place for place, name in enumerate(running) if name.startswith(OURS)), None)
    for place, name in enumerate(running):
        rows[name]["milliseconds"] = Spread.of([1e3 * took[place] for took in sample])
        if first is not None:
            rows[name]["ratio"] = Spread.of([took[place] / took[first] for took in sample])
    return list(rows.values())


if __name__ == "__main__":
    main()
