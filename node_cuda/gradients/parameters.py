"""What a solve is differentiated by, besides y0 and t: the tensors, and func computing with others in their place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from node_cuda._typing import Func
from node_cuda.status import Unsupported


class Parameters:
    """The tensors to differentiate func by, each once. every: those that the caller named, or the module's parameters;
    wanted: those of them that have a gradient.

    Raises ValueError if there is neither, for this method of differentiation.
    """

    def __init__(self, func: Func, named: Iterable[Tensor] | None, method: str) -> None:
        if named is None and not isinstance(func, nn.Module):
            raise ValueError(
                f"func must be an nn.Module to find its parameters by the {method}; got a {type(func).__name__}. Pass "
                "the tensors to differentiate by as `adjoint_params=(...)`, or `adjoint_params=()` if there are none."
            )
        self.func = func
        self.every = tuple({id(x): x for x in (_of_module(func) if named is None else named)}.values())
        self.wanted = tuple(x for x in self.every if x.requires_grad or is_wrapped(x))
        self._members = _members(func)

    def bound(self, given: Sequence[Tensor]) -> Func:
        """func as it was when this was made, with the tensors `given` in the place of `wanted`.

        It is func itself unless someone replaced tensors since: `torch.func.functional_call`, whose parameters are gone
        when the backward pass runs, a transform of torch.func, or saved-tensor hooks. Raises Unsupported where a tensor
        was replaced that is no parameter of func.
        """
        now = _members(self.func)
        members = {name: x for name, x in self._members.items() if now.get(name) is not x}
        names = {id(x): name for name, x in self._members.items()}
        for own, new in zip(self.wanted, given, strict=True):
            if new is own:
                continue
            if id(own) not in names:
                raise Unsupported(
                    f"A tensor of shape {tuple(own.shape)} in adjoint_params was replaced, by a torch.func transform "
                    "or by saved-tensor hooks, and func would compute with the old one. Make func an nn.Module and the "
                    "tensor one of its parameters."
                )
            members[names[id(own)]] = new
        if not members:
            return self.func
        func = self.func
        assert isinstance(func, nn.Module)
        return lambda t, y: functional_call(func, members, (t, y))


def is_wrapped(x: Any) -> bool:
    """x belongs to a torch.func transform that is at work."""
    known: Any = torch._C
    return isinstance(x, Tensor) and known._functorch.is_functorch_wrapped_tensor(x)


def _of_module(func: Func) -> Iterable[Tensor]:
    assert isinstance(func, nn.Module)
    if not _is_replica(func):
        return func.parameters()
    # In a replica of DataParallel the parameters are plain tensor attributes, which parameters() does not find.
    members = (vars(module).values() for module in func.modules())
    return (x for values in members for x in values if isinstance(x, Tensor) and x.requires_grad)


def _members(func: Func) -> dict[str, Tensor]:
    """Parameters and buffers by their names in the module."""
    if not isinstance(func, nn.Module) or _is_replica(func):
        return {}
    return {**dict(func.named_parameters()), **dict(func.named_buffers())}


def _is_replica(func: nn.Module) -> bool:
    return bool(getattr(func, "_is_replica", False))
