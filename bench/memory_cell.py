"""One cell of memory_vs_steps.py, in a process of its own: one training step of the ODE-Net with N solver steps.

Prints one line of JSON: peak memory over the baseline, seconds, evaluations of the field forward and backward.
The images are random: memory and time do not depend on what they show, and scikit-learn takes a second to import.
"""

from __future__ import annotations

import argparse
import json

import libraries
import torch
from digits import CLASSES, PIXELS, ODENet
from memory import PeakMemory
from timing import seconds
from torch.nn.functional import cross_entropy

WARM_UP_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", required=True)
    parser.add_argument("--function", choices=libraries.FUNCTIONS, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--solver-method", required=True)
    parser.add_argument("--channels", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    solver = libraries.function(arguments.library, arguments.function)
    net = ODENet(arguments.channels, solver, method=arguments.solver_method).to(device)
    images = torch.rand(arguments.batch, 1, PIXELS, PIXELS, device=device)
    labels = torch.randint(CLASSES, (arguments.batch,), device=device)

    def training_step(steps: int) -> tuple[int, int]:
        net.solver_options["options"] = {"step_size": 1.0 / steps}
        net.zero_grad(set_to_none=False)
        net.field.reset()
        loss = cross_entropy(net(images), labels)
        nfe = net.field.reset()
        loss.backward()
        return nfe, net.field.reset()

    training_step(WARM_UP_STEPS)
    # Timed before PeakMemory changes malloc. The fastest: what slows a repeat down is some other process.
    times = [seconds(lambda: training_step(arguments.steps), device) for _ in range(arguments.repeats)]
    with PeakMemory(device) as peak:
        nfe, nfe_backward = training_step(arguments.steps)
    print(
        json.dumps(
            {
                "peak_mib": peak.bytes / 2**20,
                "memory_method": peak.method,
                "seconds": min(times),
                "repeats": arguments.repeats,
                "nfe": nfe,
                "nfe_backward": nfe_backward,
            }
        )
    )


if __name__ == "__main__":
    main()
