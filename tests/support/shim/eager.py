"""A stand-in for the recorder of CUDA graphs: nothing is recorded, the Python of a step runs again for every step."""

from __future__ import annotations

import contextlib

import torch

from node_cuda.cuda_graphs import capture


class Eager:
    """Stands in for a GraphCapture: work is not recorded, its Python runs again."""

    def __init__(self, device, module, tier=None):
        self.tier = tier or "eager"

    def aside(self):
        return contextlib.nullcontext()

    def in_its_stream(self):
        return contextlib.nullcontext()

    def warm_up(self, work):
        work()
        with capture.Watch(torch.device("cpu")):  # nothing of ours waits for a number in a step that is to be recorded
            work()

    def record(self, work):
        class Recording:
            @staticmethod
            @torch.no_grad()
            def replay(times=1):
                for _ in range(times):
                    work()

        return Recording()

    def repeat(self, step, control):
        class Repeat:
            tier = self.tier

            @staticmethod
            def run():
                while control.read().active:
                    step.replay()
                for _ in range(2):
                    step.replay()

        return Repeat(), None

    def look(self, control):
        class StatusReader:
            ask = staticmethod(lambda: None)
            answer = staticmethod(control.read)

        return StatusReader()
