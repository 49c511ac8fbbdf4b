"""Whether a function would still compute what it computed: `structure` says with what, `storage` where that lies.

Work that was recorded reads tensors at their addresses, and holds numbers as they were. It may be repeated as long as
both are the same; what was compiled, and is given its tensors, as long as the structure is. `parts` says what is
looked at. Neither keeps an object alive, except code and classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from node_cuda.cuda_graphs.parts import LARGEST, Unseen, parts

Fingerprint = dict[str, Any]
"""What was found, by where it was found: "net.0.weight", say."""


def structure(func: Callable[..., Any]) -> Fingerprint:
    """What func computes, whatever the numbers in its tensors are: code, attributes, closures, globals, and the shapes
    and dtypes of its tensors. There is no address in it. Raises Unseen."""
    values, tensors = parts(func)
    return {**values, **{name: _form(x) for name, x in tensors.items()}}


def storage(func: Callable[..., Any], device: torch.device) -> Fingerprint:
    """Where func's tensors lie; and the numbers in those on the host, which func's kernels on this device get as
    constants. Raises Unseen."""
    _, tensors = parts(func)
    return {name: _place(name, x, device) for name, x in tensors.items()}


def fingerprint(func: Callable[..., Any], device: torch.device) -> Fingerprint:
    """The structure and the storage of func, for the time of one."""
    values, tensors = parts(func)
    return {**values, **{name: (_form(x), _place(name, x, device)) for name, x in tensors.items()}}


def difference(a: Fingerprint, b: Fingerprint) -> str | None:
    """Where two of them differ first; None if they are the same."""
    if a == b:
        return None
    return next((name for name in (*a, *b) if name not in a or name not in b or a[name] != b[name]), None)


def written(before: Fingerprint, after: Fingerprint) -> frozenset[str]:
    """What is another thing in the second: what func itself writes, if only func ran between them."""
    return frozenset(name for name, _ in before.items() ^ after.items())


def without(found: Fingerprint, written: frozenset[str]) -> Fingerprint:
    """A fingerprint without what func itself writes, and without the items of a list or dict that it fills."""
    if not written:
        return found
    filled = tuple(f"{name.removesuffix('.length()')}[" for name in written if name.endswith(".length()"))
    return {name: x for name, x in found.items() if name not in written and not name.startswith(filled)}


def _form(x: Tensor) -> Any:
    return x.dtype, x.device, x.shape, x.requires_grad, x.is_conj(), x.is_neg()


def _place(name: str, x: Tensor, device: torch.device) -> Any:
    if not x.is_cpu or (device.type == "cpu" and x.numel() > 1):
        return x.stride(), x.data_ptr()
    if x.numel() > LARGEST:
        raise Unseen(f"func's {name!r} is a tensor of {x.numel()} numbers on the CPU: move it to {device}")
    return x.stride(), x.data_ptr(), repr(x.tolist())  # func may read it, and pass a kernel its numbers


def surroundings(kind: str) -> tuple[Any, ...]:
    """What the launches of a field on a device of this kind depend on, that is torch's own."""
    kinds = (kind,) if kind == "cpu" else (kind, "cpu")
    return (
        torch.get_default_dtype(),
        # A default device is a mode, and to ask for it costs more than all the others.
        torch.get_default_device() if torch._C._len_torch_function_stack() else None,
        tuple(torch.is_autocast_enabled(name) and torch.get_autocast_dtype(name) for name in kinds),
        torch.are_deterministic_algorithms_enabled(),
        tuple(flag() for flag in _FLAGS),
        _PRECISION is not None and tuple(_PRECISION(*of) for of in _PRECISIONS),
    )


# Read as torch.backends reads them, which takes ten times as long. Where torch has precisions of float32 by name, it
# refuses to be asked in the old way for what was set in the new one.
_PRECISION: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
_PRECISIONS = (("generic", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"), ("mkldnn", "matmul"))
_FLAGS: tuple[Callable[[], Any], ...] = tuple(
    getattr(torch._C, f"_get_{name}")
    for name in (
        "cudnn_enabled cudnn_benchmark cudnn_deterministic mkldnn_enabled flash_sdp_enabled mem_efficient_sdp_enabled "
        "math_sdp_enabled cudnn_sdp_enabled cublas_allow_fp16_reduced_precision_reduction "
        "cublas_allow_bf16_reduced_precision_reduction"
        + (" cublas_allow_tf32 cudnn_allow_tf32 float32_matmul_precision" if _PRECISION is None else "")
    ).split()
    if hasattr(torch._C, f"_get_{name}")
)
