"""Fingerprints of a function, which show whether it changed: `structure` is what it computes, `storage` its addresses.

Captured work reads tensors at fixed addresses, and contains numbers as constants. It can be replayed as long as the
structure and the storage are unchanged. Compiled work gets its tensors as arguments: it can be used as long as the
structure is unchanged. `parts` finds the values and the tensors. A fingerprint keeps no object alive, except code and
classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from node_cuda.cuda_graphs.parts import LARGEST, Unseen, parts

Fingerprint = dict[str, Any]
"""What was found, by its name, such as "net.0.weight"."""


def structure(func: Callable[..., Any]) -> Fingerprint:
    """Return what func computes: its code, attributes, closures, globals, and the shapes and dtypes of its tensors.

    It contains no address, and no numbers of tensors. Raises Unseen.
    """
    values, tensors = parts(func)
    return {**values, **{name: _form(x) for name, x in tensors.items()}}


def storage(func: Callable[..., Any], device: torch.device) -> Fingerprint:
    """Return the addresses of func's tensors, and the numbers in its tensors on the host.

    func's kernels on this device get those numbers as constants. Raises Unseen.
    """
    _, tensors = parts(func)
    return {name: _place(name, x, device) for name, x in tensors.items()}


def fingerprint(func: Callable[..., Any], device: torch.device) -> Fingerprint:
    """Return the structure and the storage of func together. This takes one search instead of two."""
    values, tensors = parts(func)
    return {**values, **{name: (_form(x), _place(name, x, device)) for name, x in tensors.items()}}


def difference(a: Fingerprint, b: Fingerprint) -> str | None:
    """Return the name of the first difference between two fingerprints, or None if they are equal."""
    if a == b:
        return None
    return next((name for name in (*a, *b) if name not in a or name not in b or a[name] != b[name]), None)


def written(before: Fingerprint, after: Fingerprint) -> frozenset[str]:
    """Return the names that differ between two fingerprints. If only func ran between them, func writes these."""
    return frozenset(name for name, _ in before.items() ^ after.items())


def without(found: Fingerprint, written: frozenset[str]) -> Fingerprint:
    """Return a fingerprint without what func itself writes, and without the items of a list or dict that it fills."""
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
    """Return torch's global settings that the kernels of a field on this kind of device depend on."""
    kinds = (kind,) if kind == "cpu" else (kind, "cpu")
    return (
        torch.get_default_dtype(),
        # A default device is a mode, and it takes longer to read than all the other settings.
        torch.get_default_device() if torch._C._len_torch_function_stack() else None,
        tuple(torch.is_autocast_enabled(name) and torch.get_autocast_dtype(name) for name in kinds),
        torch.are_deterministic_algorithms_enabled(),
        tuple(flag() for flag in _FLAGS),
        _PRECISION is not None and tuple(_PRECISION(*of) for of in _PRECISIONS),
    )


# These are the getters that torch.backends calls; torch.backends itself takes ten times as long. If torch has the named
# precisions of float32, the old getters raise an error for what was set with the new ones.
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
