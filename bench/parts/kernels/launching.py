"""Direct launches of node_cuda._C: tensors become addresses, structs have the layout of csrc/launchers.h.

node_cuda launches through an object that it makes once per solve. Here a launch is timed without it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The order of enum Dtype.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
LAW = "9dq4Q3q2iQ"
LAYOUTS = {"StepRef": "Q5d", "Tolerance": "2d2Q", "ControllerParams": LAW, "Finish": f"3Qq{LAW}", "Part": "3Q3q"}


class Workplace(NamedTuple):
    """Where a primitive runs, and its size: n elements, a multiple of 8.

    launchers: node_cuda._C. on: the address of the stream and the index of the device.
    """

    launchers: Any
    on: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    n: int

    @property
    def acc(self) -> torch.dtype:
        """The dtype of errors and sums."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def sized(self) -> tuple[int, int]:
        """The first two arguments of most launchers."""
        return DTYPES.index(self.dtype), self.n

    def state(self) -> Tensor:
        """Random numbers of size 1."""
        return torch.randn(self.n, dtype=self.dtype, device=self.device)

    def states(self, count: int) -> list[Tensor]:
        """Several states."""
        return [self.state() for _ in range(count)]

    def error(self) -> Tensor:
        """Random numbers in the dtype of errors and sums."""
        return torch.randn(self.n, dtype=self.acc, device=self.device)

    def doubles(self, count: int = 1) -> Tensor:
        """Zeros in float64, for norms."""
        return torch.zeros(count, dtype=torch.float64, device=self.device)

    def workspace(self, size: int | None = None) -> Tensor:
        """Zeroed bytes; by default as many as a reduction over the state needs."""
        wanted: int = self.launchers.reduce_workspace(self.n, 0) if size is None else size
        return torch.zeros(wanted, dtype=torch.uint8, device=self.device)

    def bind(self, name: str, *arguments: Any) -> Callable[[], None]:
        """A launch as a function without arguments. It keeps these tensors alive, but not what they point to."""
        launch, on = getattr(self.launchers, name), self.on
        raw = [address(argument) for argument in arguments]

        def call(_alive: object = arguments) -> None:
            launch(*raw, on)

        return call


class Launch(NamedTuple):
    """A primitive with the tensors that it runs on."""

    kernel: Callable[[], None]
    arguments: tuple[Any, ...]  # of plain PyTorch, which may write to them
    moved: tuple[Tensor, ...]  # read or written by the kernel; a tensor that is both is listed twice
    results: tuple[Tensor, ...]  # of the kernel, in the order in which plain PyTorch returns them
    alive: object = None  # other tensors that the kernel's arguments point to

    @property
    def bytes(self) -> int:
        """The bytes that must be read and written."""
        return sum(x.numel() * x.itemsize for x in self.moved)


def packed(name: str, *values: Any) -> Tensor:
    """A struct as bytes in host memory. Tensors become addresses; missing values are zeros."""
    fields = len(struct.unpack(LAYOUTS[name], bytes(struct.calcsize(LAYOUTS[name]))))
    given = [address(value) for value in values]
    content = struct.pack(LAYOUTS[name], *given, *[0] * (fields - len(given)))
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def address(value: Any) -> Any:
    """The address of a tensor, 0 for None, numbers as they are."""
    return value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value


def pointers(tensors: Sequence[Tensor]) -> Tensor:
    """The addresses of tensors, as a host array."""
    return torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64)


def numbers(values: Sequence[float]) -> Tensor:
    """Numbers as a host array of doubles."""
    return torch.tensor(values, dtype=torch.float64)
