"""Measures the peak memory of one training step with N solver steps; prints one line of JSON.

memory_vs_steps.py starts it as a fresh process, with malloc set as parts/common/peak_memory.py says.
"""

from __future__ import annotations

import argparse
import json

import torch

from parts.common import modes
from parts.common.peak_memory import PeakMemory
from parts.memory.training_step import Setting, training_step

WARM_UP_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", required=True)
    parser.add_argument("--gradient", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--channels", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    setting = Setting(arguments.method, arguments.channels, arguments.batch, arguments.device)
    mode = modes.mode(arguments.library, arguments.gradient)
    step = training_step(mode, setting)
    step(WARM_UP_STEPS)
    with PeakMemory(torch.device(arguments.device)) as peak:
        nfe, nfe_backward = step(arguments.steps)
    cell = {
        "peak_mib": peak.bytes / 2**20,
        "memory_method": peak.method,
        "nfe": nfe,
        "nfe_backward": nfe_backward,
    }
    if mode.replays:  # on a fixed grid all steps cost the same, and each is replayed once
        cell["recompute"] = nfe_backward / nfe - 1
    print(json.dumps(cell))


if __name__ == "__main__":
    main()
