"""The training step of memory_vs_steps.py: the ODE-Net on random images, with N equal solver steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from parts.common import libraries
from parts.common.modes import Mode
from parts.memory.digits import CLASSES, PIXELS, ODENet


class Setting(NamedTuple):
    """The settings that all cells share."""

    method: str
    channels: int
    batch: int
    device: str


def training_step(mode: Mode, setting: Setting) -> Callable[[int], tuple[int, int]]:
    """A function of N that runs one training step and returns the evaluations forward and backward.

    The images are random, as memory and time do not depend on them.
    """
    torch.manual_seed(0)
    device = torch.device(setting.device)
    net = ODENet(setting.channels, mode.solver, method=setting.method).to(device)
    images = torch.rand(setting.batch, 1, PIXELS, PIXELS, device=device)
    labels = torch.randint(CLASSES, (setting.batch,), device=device)

    def step(steps: int) -> tuple[int, int]:
        net.solver_options["options"] = {"step_size": 1.0 / steps}
        net.zero_grad(set_to_none=False)
        net.field.reset()
        with libraries.path(mode.library):
            loss = cross_entropy(net(images), labels)
            nfe = net.field.reset()
            loss.backward()
        return nfe, net.field.reset()

    return step
