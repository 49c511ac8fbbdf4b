"""Measures the peak memory of one gradient; prints one line of JSON. gradients.py starts it as a fresh process."""

from __future__ import annotations

import argparse
import json

import torch

from parts.common.modes import MODES
from parts.common.peak_memory import PeakMemory
from parts.gradients.problems import PROBLEMS
from parts.gradients.steps import Step

WARM_UP_PART = 0.01  # of the time interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problem", choices=PROBLEMS, required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    step = Step(PROBLEMS[arguments.problem], arguments.mode, device)
    step(WARM_UP_PART)
    with PeakMemory(device) as peak:
        step()
    print(json.dumps({"peak_mib": peak.bytes / 2**20, "memory_method": peak.method}))


if __name__ == "__main__":
    main()
