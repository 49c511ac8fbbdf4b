"""Prints the record of the machine for gpu.json, as a line of JSON. gpu_stages.py starts it as a process."""

from __future__ import annotations

import json
import sys

import torch

from parts.common import machine


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit(f"bench/gpu.sh needs an NVIDIA GPU and a CUDA build of torch; torch {torch.__version__} finds none.")
    print(json.dumps(machine.describe(torch.device("cuda"))))


if __name__ == "__main__":
    main()
