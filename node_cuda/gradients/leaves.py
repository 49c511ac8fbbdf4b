"""func for a backward pass that is captured: it computes with leaves that share the parameters' memory.

Autograd keeps one node for each leaf, and with it the stream in which the leaf was first used, as long as a graph with
that node lives; the user's graph does. Through such a node a capture would make that stream wait for it, and CUDA
refuses this of the default stream (pytorch pull 180090). Leaves of our own have nodes of our own.

They are the parameters of a replica of the module, which shares all else with it, as those of nn.DataParallel do.
`torch.func.functional_call` would put them into the module itself, where other threads meet them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from node_cuda._typing import Func
from node_cuda.cuda_graphs import capture
from node_cuda.gradients.inspection import sources
from node_cuda.problem.problem import Problem


def with_leaves(problem: Problem, params: Sequence[Tensor], y: Tensor) -> tuple[Problem, Sequence[Tensor]]:
    """The problem and the tensors to differentiate it by, for a capture. y: a state of its kind, at which func is
    evaluated once.

    Raises Uncapturable where func finds its parameters by itself and this torch minds their streams.
    """
    if not params:
        return problem, params
    leaves = [nn.Parameter(p.detach()) for p in params]
    func = _computing_with(leaves, problem, params, y)
    if func is not None:
        return replace(problem, func=func, field=problem.field_of(func)), leaves
    if capture.override_of_streams() is None:
        raise capture.Uncapturable(
            "func computes with a tensor that it does not have as a parameter of an nn.Module, or not only so, and "
            "this torch cannot capture the gradient of one that was used before; torch 2.13 can"
        )
    return problem, params


def _computing_with(
    leaves: Sequence[nn.Parameter], problem: Problem, params: Sequence[Tensor], y: Tensor
) -> Func | None:
    """func with the leaves in the parameters' place; None where it goes on computing with one of these: it is no
    module, or keeps them in another place as well."""
    places = {id(p): leaf for p, leaf in zip(params, leaves, strict=True)}
    func = problem.func
    t = problem.t[0].detach().to(y.device, problem.time_dtype)
    try:
        if isinstance(func, MethodType):
            func = MethodType(func.__func__, _replica(func.__self__, places, {}))
        else:
            func = _replica(func, places, {})
        with torch.enable_grad():
            out = problem.field_of(func)(t, y.detach().clone())
    except Exception:  # no module, or one that has no replicas
        return None
    reached, *_ = sources(out, params, {})
    return None if reached else func


def _replica(module: Any, places: Mapping[int, nn.Parameter], made: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with leaves in the place of its parameters, and its submodules likewise."""
    if module not in made:
        replica = made[module] = module._replicate_for_data_parallel()
        for name, p in module._parameters.items():
            setattr(replica, name, places.get(id(p), p))
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else _replica(child, places, made)
    return made[module]
