"""Raw launches of node_cuda._C: tensors become addresses, structs are packed as csrc/launchers.h lays them out.

node_cuda itself launches through a plan that it makes once a solve. Here nothing stands between the clock and a kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The order of enum Dtype.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
CTL_BYTES = 208
LAW = "9dq4Q3q2iQ"
LAYOUTS = {"StepRef": "Q5d", "Tolerance": "2d2Q", "ControllerParams": LAW, "Finish": f"3Qq{LAW}", "Part": "3Q3q"}


class Workplace(NamedTuple):
    """Where a primitive runs, and on how much: n elements, a multiple of 8.

    launchers: node_cuda._C. on: the stream's address and the device's index.
    """

    launchers: Any
    on: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    n: int

    @property
    def acc(self) -> torch.dtype:
        """What errors and sums are kept in."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def sized(self) -> tuple[int, int]:
        """The first two arguments of most launchers."""
        return DTYPES.index(self.dtype), self.n

    def state(self) -> Tensor:
        """Random numbers of size 1."""
        return torch.randn(self.n, dtype=self.dtype, device=self.device)

    def states(self, count: int) -> list[Tensor]:
        """Several of these."""
        return [self.state() for _ in range(count)]

    def error(self) -> Tensor:
        """Random numbers in the precision of errors and sums."""
        return torch.randn(self.n, dtype=self.acc, device=self.device)

    def doubles(self, count: int = 1) -> Tensor:
        """Room for norms and the like."""
        return torch.zeros(count, dtype=torch.float64, device=self.device)

    def workspace(self, size: int | None = None) -> Tensor:
        """Of so many bytes, by default those that a reduction over the state wants."""
        wanted: int = self.launchers.reduce_workspace(self.n, 0) if size is None else size
        return torch.zeros(wanted, dtype=torch.uint8, device=self.device)

    def bind(self, name: str, *arguments: Any) -> Callable[[], None]:
        """A launch as a function of nothing. It keeps its arguments alive, and not what they in turn point to."""
        launch, on = getattr(self.launchers, name), self.on
        raw = [address(argument) for argument in arguments]

        def call(_alive: object = arguments) -> None:
            launch(*raw, on)

        return call


class Launch(NamedTuple):
    """A primitive on tensors of its own."""

    kernel: Callable[[], None]
    arguments: tuple[Any, ...]  # of the plain PyTorch, which may write to them
    moved: tuple[Tensor, ...]  # read or written by the kernel; what is both stands twice
    results: tuple[Tensor, ...]  # of the kernel, in the order in which plain PyTorch returns them
    alive: object = None  # what else the kernel's arguments point to

    @property
    def bytes(self) -> int:
        """What must go through memory at the least."""
        return sum(x.numel() * x.itemsize for x in self.moved)


def packed(name: str, *values: Any) -> Tensor:
    """A struct as bytes in host memory; tensors among the values become addresses, values left out zeros."""
    fields = len(struct.unpack(LAYOUTS[name], bytes(struct.calcsize(LAYOUTS[name]))))
    given = [address(value) for value in values]
    content = struct.pack(LAYOUTS[name], *given, *[0] * (fields - len(given)))
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def address(value: Any) -> Any:
    """The address of a tensor, 0 for None, numbers as they are."""
    return value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value


def pointers(tensors: Sequence[Tensor]) -> Tensor:
    """A host array of their addresses."""
    return torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64)


def numbers(values: Sequence[float]) -> Tensor:
    """A host array of doubles."""
    return torch.tensor(values, dtype=torch.float64)
