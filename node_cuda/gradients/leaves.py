"""Replicas of func for a captured backward pass. Their leaves share the memory of the parameters.

Autograd keeps one node for each leaf as long as a graph with that node exists, such as the user's graph. The node keeps
the stream in which the leaf was first used. Through such a node a capture would make that stream wait for it, and CUDA
refuses this for the default stream (pytorch pull 180090). New leaves have new nodes.

The leaves are the parameters of a replica of the module. It shares everything else with the module, as a replica of
nn.DataParallel does. `torch.func.functional_call` would put them into the module itself, where other threads see them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from node_cuda._typing import Func
from node_cuda.cuda_graphs import capture
from node_cuda.gradients.inspection import sources
from node_cuda.problem.problem import Problem


def with_leaves(problem: Problem, params: Sequence[Tensor], y: Tensor) -> tuple[Problem, Sequence[Tensor]]:
    """Return the problem and the tensors to differentiate it by, for a capture.

    y: a state of this problem, at which func is evaluated once. Raises Uncapturable if the parameters cannot be
    replaced in func and this torch makes a capture wait for their streams.
    """
    if not params:
        return problem, params
    leaves = [nn.Parameter(p.detach()) for p in params]
    func = _computing_with(leaves, problem, params, y)
    if func is not None:
        return problem._replace(func=func, field=problem.field_of(func)), leaves
    if capture.override_of_streams() is None:
        raise capture.Uncapturable(
            "func computes with a tensor that is not, or not only, a parameter of an nn.Module, and this torch cannot "
            "capture the gradient of a tensor that was used before; torch 2.13 can"
        )
    return problem, params


def _computing_with(
    leaves: Sequence[nn.Parameter], problem: Problem, params: Sequence[Tensor], y: Tensor
) -> Func | None:
    """Return func with the leaves in place of the parameters; None if it still computes with one of the parameters.

    It does if it is not a module, or if it also keeps the parameter in another place.
    """
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
    except Exception:  # func is not a module, or cannot be replicated
        return None
    reached, *_ = sources(out, params, {})
    return None if reached else func


def _replica(module: Any, places: Mapping[int, nn.Parameter], made: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return a replica of the module, and of its submodules, with leaves in place of the parameters."""
    if module not in made:
        replica = made[module] = module._replicate_for_data_parallel()
        for name, p in module._parameters.items():
            setattr(replica, name, places.get(id(p), p))
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else _replica(child, places, made)
    return made[module]
