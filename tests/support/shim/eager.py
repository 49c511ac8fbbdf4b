"""A replacement for the capture of CUDA graphs: nothing is captured, and the Python of a step runs again for every
step."""

from __future__ import annotations

import contextlib

import torch

from node_cuda.cuda_graphs import capture


class Eager:
    """Replaces a GraphCapture: work is not captured, its Python runs again."""

    def __init__(self, device, module, tier=None):
        self.tier = tier or "eager"

    def aside(self):
        return contextlib.nullcontext()

    def in_its_stream(self):
        return contextlib.nullcontext()

    def warm_up(self, work):
        work()
        with capture.Watch(torch.device("cpu")):  # our code must not wait for a number in a step that is to be captured
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
