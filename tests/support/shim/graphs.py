"""The streams and graphs of the shim for tests: captures, nodes added by hand, calls that fail, complaints."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL, c_char_p, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

from shim.library import Launch
from torch import Tensor

from node_cuda.kernels.fused import DTYPES


def numbers_of(state: Any) -> dict[str, Any]:
    """The fields of a struct ControllerState by name, to be compared."""
    return {name: getattr(state, name) for name in dir(state) if name.islower() and name[0] != "_" and name != "copy"}


NODE_TYPES = {
    "kernel": 0x00,
    "memcpy": 0x01,
    "memset": 0x02,
    "host": 0x03,
    "empty": 0x05,
    "wait": 0x06,
    "record": 0x07,
    "signal": 0x08,
    "semaphore": 0x09,
    "alloc": 0x0A,
    "free": 0x0B,
    "conditional": 0x0D,
    "unheard of": 0x77,
}


class Call(NamedTuple):
    """A call of the runtime, the current device, and whether the caller held the GIL."""

    name: str
    device: int
    gil: int


class GraphCache:
    """The functions that control the shim. A graph, a node and an executable graph are addresses."""

    def __init__(self, library: Path) -> None:
        self.lib = lib = CDLL(str(library))
        signatures = {
            "configure": (None, c_uint64, c_int),
            "lazy": (None, c_int),
            "progress": (c_int, c_void_p),
            "driver_version": (None, c_int),
            "fail_call": (None, c_char_p, c_int, c_int),
            "write_calls": (None, c_void_p),
            "calls": (c_char_p,),
            "complaints": (c_char_p,),
            "forget_complaints": (None,),
            "last_error": (c_int,),
            "device": (c_int,),
            "leaks": (c_int,),
            "begin_capture": (c_int, c_void_p),
            "end_capture": (c_void_p, c_void_p),
            "new_graph": (c_void_p,),
            "destroy_graph": (c_int, c_void_p),
            "add_node": (c_void_p, c_void_p, c_int, c_void_p),
            "add_child": (c_int, c_void_p, c_void_p),
            "instantiate": (c_void_p, c_void_p),
            "launch": (c_int, c_void_p, c_void_p),
            "destroy_exec": (c_int, c_void_p),
            "copy": (c_int, c_void_p, c_void_p, c_int64, c_void_p),
            "fill": (c_int, c_void_p, c_int, c_int64, c_void_p),
            "field": (c_int, c_int, c_int64, c_void_p, c_void_p, c_void_p, Launch),
        }
        for name, (result, *arguments) in signatures.items():
            function = getattr(lib, f"shim_{name}")
            function.restype, function.argtypes = result, arguments

    def field(self, f: Tensor, t: Tensor, y: Tensor, on: Launch) -> None:
        """Return f = 3 cos(4 t) y - y^2, computed by a kernel."""
        assert self.lib.shim_field(DTYPES[y.dtype], y.numel(), f.data_ptr(), t.data_ptr(), y.data_ptr(), on) == 0

    @contextmanager
    def capturing(self, stream: int) -> Iterator[list[int]]:
        """Capture the launches in this stream as a graph, which the list holds at the end."""
        found: list[int] = []
        assert self.lib.shim_begin_capture(stream) == 0
        yield found
        found.append(self.lib.shim_end_capture(stream))

    def graph(self, *types: str, child: int | None = None) -> int:
        """Return a graph with a chain of empty nodes, and with a child graph."""
        graph, last = self.lib.shim_new_graph(), None
        for name in types:
            last = self.lib.shim_add_node(graph, NODE_TYPES[name], last)
        if child is not None:
            assert self.lib.shim_add_child(graph, child) == 0
        return graph

    @contextmanager
    def written(self) -> Iterator[list[Call]]:
        """Yield a list that holds the calls of the runtime in this context at its end."""
        calls: list[Call] = []
        self.lib.shim_write_calls(ctypes.cast(ctypes.pythonapi.PyGILState_Check, c_void_p))
        yield calls
        for line in self.lib.shim_calls().decode().splitlines():
            name, device, gil = line.split()
            calls.append(Call(name, int(device), int(gil)))
        self.lib.shim_write_calls(None)

    def reset(self) -> None:
        """Restore the state at the start of a test."""
        self.lib.shim_configure(0, 1)
        self.lib.shim_lazy(0)
        self.lib.shim_driver_version(13000)
        self.lib.shim_fail_call(b"", 0, 0)
        self.lib.shim_write_calls(None)
        self.lib.shim_forget_complaints()
        self.lib.shim_last_error()
