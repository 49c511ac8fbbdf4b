"""The parameters that a solve is differentiated by, and func with other tensors in their place."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from node_cuda._typing import Func
from node_cuda.status import Unsupported


class Parameters:
    """The tensors to differentiate func by, each once.

    every: the tensors that the caller named, or else the module's parameters. wanted: those of them that require a
    gradient. buffers: those of the module. carried: the buffers that belong to a torch.func transform. owner: the
    module, or the object that func is a method of.

    Raises ValueError if the caller named no tensors and func is not a module. method: for the message.
    """

    def __init__(self, func: Func, named: Iterable[Tensor] | None, method: str) -> None:
        if named is None and not isinstance(func, nn.Module):
            raise ValueError(
                f"func must be an nn.Module to find its parameters by the {method}; got a {type(func).__name__}. Pass "
                "the tensors to differentiate by, `adjoint_params=tuple(net.parameters())`, or `adjoint_params=()` if "
                "there are none."
            )
        self.func = func
        self.owner: Any = func if isinstance(func, nn.Module) else getattr(func, "__self__", None)
        self._links: list[Link] = []
        params, buffers = tensors_of(self.owner, self._links)
        self._members = {**params, **buffers}
        self.buffers = tuple(buffers.values())
        if named is None:
            assert isinstance(func, nn.Module)
            plain, replica = type(func).parameters is nn.Module.parameters, func.__dict__.get("_is_replica")
            named = _of_replica(func) if replica else params.values() if plain else func.parameters()
        named = list(named)
        self.every = tuple(dict(zip(map(id, named), named, strict=True)).values())
        self.wanted = tuple([x for x in self.every if x.requires_grad or is_wrapped(x)])
        if not set(map(type, self.wanted)) <= _NO_SHARDS and torch.is_grad_enabled():
            _refuse_shards_inside(self.owner, method)
        self.carried: tuple[Tensor, ...] = ()
        if buffers:
            known = {id(x) for x in self.wanted}
            self.carried = tuple([x for x in buffers.values() if is_wrapped(x) and id(x) not in known])

    def bound(self, given: Sequence[Tensor], *, unchanged: bool = False) -> Func:
        """Return func as it was when this object was made, with `given` in place of `wanted` and `carried`.

        This is func itself unless tensors were replaced since then: by a transform of torch.func, by saved-tensor
        hooks, or by `torch.func.functional_call`, which takes its parameters away before the backward pass runs.
        unchanged: func has the same tensors as when this object was made. Raises Unsupported if a tensor was replaced
        that is not a parameter of func.
        """
        members: dict[str, Tensor] = {}
        if not (unchanged or self._all_in_place()):
            params, buffers = tensors_of(self.owner)
            now = {**params, **buffers}
            members = {name: x for name, x in self._members.items() if now.get(name) is not x}
        for own, new in zip((*self.wanted, *self.carried), given, strict=True):
            if new is own:
                continue
            names = [name for name, x in self._members.items() if x is own]
            if not names:
                raise Unsupported(
                    f"A tensor of shape {tuple(own.shape)} in adjoint_params was replaced, by a torch.func transform "
                    "or by saved-tensor hooks, and func would compute with the old one. Make func an nn.Module and the "
                    "tensor one of its parameters."
                )
            members.update(dict.fromkeys(names, new))
        if not members:
            return self.func
        if self.owner is self.func:
            return lambda t, y: functional_call(self.owner, members, (t, y), tie_weights=False)
        method = _Method(self.owner, self.func)
        members = {f"owner.{name}": x for name, x in members.items()}
        return lambda t, y: functional_call(method, members, (t, y), tie_weights=False)

    def replaceable(self, p: Tensor) -> bool:
        """Return whether `bound` can put another tensor in the place of p."""
        return not isinstance(self.owner, torch.jit.ScriptModule) and any(x is p for x in self._members.values())

    def _all_in_place(self) -> bool:
        """Return whether every member was found by `_collect` and is still where it was. False: this is not known."""
        for place, name, x in self._links:
            if place.get(name) is not x:
                return False
        return bool(self._links)


class _Method(nn.Module):
    """A bound method of a module, as a module."""

    def __init__(self, owner: nn.Module, method: Func) -> None:
        super().__init__()
        self.owner = owner
        self.method = method

    def forward(self, t: Tensor, y: Any) -> Any:
        return self.method(t, y)


def is_wrapped(x: Any) -> bool:
    """Return whether x belongs to an active torch.func transform."""
    known: Any = torch._C
    return isinstance(x, Tensor) and known._functorch.is_functorch_wrapped_tensor(x)


_NO_SHARDS = {nn.Parameter, Tensor}
"""The types of plain parameters. The shards of a parameter are a DTensor."""


def _refuse_shards_inside(owner: Any, method: str) -> None:
    """Raise Unsupported if fully_shard holds parts of func: their parameters are others during each evaluation."""
    if not isinstance(owner, nn.Module):
        return
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", ())
    for name, module in owner.named_modules():
        if isinstance(module, kind):
            raise Unsupported(
                f"FSDP shards {f'{name!r} inside of func' if name else 'func itself'}, so that its parameters are "
                f"replaced during each evaluation of func, and the {method} needs them during the whole solve. Shard "
                "the layer that solves as one unit, `fully_shard(NeuralODE(func))`, or a module that contains it, or "
                'use gradient="backprop".'
            )


def _of_replica(func: nn.Module) -> Iterable[Tensor]:
    """Return the parameters of a DataParallel replica: plain tensor attributes, which parameters() does not find."""
    members = (vars(module).values() for module in func.modules())
    return (x for values in members for x in values if isinstance(x, Tensor) and x.requires_grad)


Link = tuple[dict[str, Any], str, Any]
"""A member of a module: the dict that holds it, its name there, and the member."""


def tensors_of(owner: Any, links: list[Link] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters and the buffers under all their names in the module, in its order.

    links: receives where they and the submodules were found, if `_collect` finds them.
    """
    params: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    if not isinstance(owner, nn.Module):
        return params, buffers
    kind, plain = type(owner), nn.Module
    if (
        kind.named_parameters is plain.named_parameters
        and kind.named_buffers is plain.named_buffers
        and kind.named_modules is plain.named_modules
        and kind.parameters is plain.parameters
    ):
        # This takes a fifth of the time of the two methods.
        _collect(owner, params, buffers, [] if links is None else links)
    else:
        params.update(owner.named_parameters(remove_duplicate=False))
        buffers.update(owner.named_buffers(remove_duplicate=False))
    return ({} if owner.__dict__.get("_is_replica") else params), buffers


def _collect(owner: nn.Module, params: dict[str, Tensor], buffers: dict[str, Tensor], links: list[Link]) -> None:
    waiting = [("", owner)]
    while waiting:
        prefix, module = waiting.pop()
        for own, found in ((module._parameters, params), (module._buffers, buffers)):
            for name, x in own.items():
                if x is not None:
                    found[prefix + name] = x
                    links.append((own, name, x))
        below = module._modules
        if not isinstance(below, dict):  # that of a scripted module has no `get`
            links.append(({}, "unknown", module))
        elif not below:
            continue
        first = len(waiting)
        for name, child in below.items():
            links.append((below, name, child))
            if child is not None:
                waiting.insert(first, (f"{prefix}{name}.", child))


def _is_replica(func: nn.Module) -> bool:
    return bool(vars(func).get("_is_replica"))
