"""Checks of func for the adjoint and the discrete adjoint, in the first evaluation of a solve.

Autograd sees every tensor that func uses. The adjoint methods know only the tensors that they were given. They also
evaluate func again at points where it was evaluated before, and need the same values.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from node_cuda._torch_modes import set_recording
from node_cuda._typing import Func, State
from node_cuda.gradients.members import Members
from node_cuda.gradients.parameters import Parameters, is_wrapped
from node_cuda.problem.field import VectorField
from node_cuda.problem.problem import Problem
from node_cuda.status import InvalidField, MissingGradientWarning, Unsupported, users_level

functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


class AnswersByChance(InvalidField):
    """func is non-deterministic: a second call differs. It was evaluated twice, and the random generators are as they
    were before."""


_States = tuple[list[Tensor], list[int]]
"""The states of random generators and, if steps are computed again, the versions of func's buffers."""


class Inspection:
    """Replaces func in one evaluation of a field. It records the evaluation on a tape, and checks it.

    parameters: those of the user's function. given: the tensors in their place. what: the gradient mode as the user
    writes it. replays: the mode computes steps again, and refuses a non-deterministic func; the other mode only warns.
    members: noted after the evaluation of func. by_chance: func is non-deterministic.
    """

    def __init__(
        self,
        field: VectorField,
        parameters: Parameters,
        given: Sequence[Tensor],
        what: str,
        replays: bool,
        members: Members,
    ) -> None:
        self.field = field
        self.called = field.func
        self.func = parameters.func
        self.named = (*parameters.every, *given)
        self.buffers = parameters.buffers if replays else ()
        self.what = what
        self.replays = replays
        self.members = members
        self.by_chance = False
        self._reached: set[int] = set()

    def leave(self) -> None:
        """Put func back into the field. It is called after each solve: a captured one may not evaluate the field."""
        if self.field.func is self:
            self.field.func = self.called

    def __call__(self, t: Tensor, y: State) -> Any:
        self.field.func = self.called
        self.field.probes += 1  # func may treat memory differently when autograd records
        before = y.clone() if isinstance(y, Tensor) else tuple([x.clone() for x in y])
        states, recorded = self._states(t.device), torch.is_grad_enabled()
        set_recording(True)
        try:
            out = self.called(t, y)
        finally:
            set_recording(recorded)
        self.members.look()
        self._refuse_chance(t, before, out, states)
        self._warn_of_unnamed(out, (t, *_parts(y)))
        if isinstance(out, Tensor):
            return out.detach()
        return tuple(x.detach() if isinstance(x, Tensor) else x for x in out) if isinstance(out, (tuple, list)) else out

    def used(self, tensors: Sequence[Tensor]) -> list[int]:
        """Return the indices of those tensors that func used."""
        return [i for i, x in enumerate(tensors) if id(x) in self._reached]

    def _refuse_chance(self, t: Tensor, y: State, out: Any, before: _States) -> None:
        """Raise or warn if func is non-deterministic.

        func is evaluated a second time only if its first evaluation changed one of `_states`.
        """
        (random, versions), (random_after, versions_after) = before, self._states(t.device)
        if versions == versions_after and all(map(torch.equal, random, random_after)):
            return
        self.field.nfe += 1
        with torch.no_grad():
            again = self.called(t, y)
        _restore_random(random_after, t.device)  # so that this check changes no random state
        if all(map(_equal, _parts(out), _parts(again))):
            return
        words = "func is non-deterministic: a second call at the same t and y differs (dropout, spectral norm, noise?)"
        if self.replays:
            _restore_random(random, t.device)
            raise AnswersByChance(
                f"{words}, and {self.what} takes every step again to differentiate it. Put func in evaluation mode, "
                'draw the noise once before the solve, or use gradient="backprop".'
            )
        self.by_chance = True
        warnings.warn(
            f"{words}. The backward pass of {self.what} uses other random numbers than the solve, so its gradient is "
            'wrong. Put func in evaluation mode, draw the noise once before the solve, or use gradient="backprop".',
            stacklevel=users_level(),
        )

    def _states(self, device: torch.device) -> _States:
        """Return the states that an evaluation changes if it is random, or if it depends on earlier evaluations."""
        random = [torch.default_generator.get_state()]
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            random.append(torch.cuda.get_rng_state(device))
        return random, [x._version for x in self.buffers if not x.is_inference()]

    def _warn_of_unnamed(self, out: Any, arguments: tuple[Tensor, ...]) -> None:
        named = (*self.named, *arguments)
        self._reached, *missing = sources(out, named, {})
        if not any(missing):
            return
        del missing  # it holds references to the leaves
        # Search again, and stop at each tensor that has a name: a product with a name is reported by that name.
        known = {id(x): (name, x) for name, x in _names(self.func)}
        _, held, _ = sources(out, named, known)
        if not held:
            return
        words = ", ".join(
            f"{known[id(x)][0] if id(x) in known else 'a tensor'} of shape {tuple(x.shape)}" for x in held
        )
        warnings.warn(
            f"func uses a tensor that requires a gradient and is not among the parameters of {self.what}: {words}. It "
            "will get no gradient. Add it to `adjoint_params=(...)`, make it a parameter of func, or use `.detach()`.",
            MissingGradientWarning,
            stacklevel=users_level(),
        )


def refuse_hidden(problem: Problem, given: Sequence[Tensor], what: str) -> None:
    """Raise Unsupported if func depends on an active torch.func transform, or on forward mode, by a tensor not given.

    A solve is one operation, and a transform sees only the tensors that the operation is given. Evaluates func once.
    """
    t, y0 = problem.t[0].to(problem.y0.device, problem.time_dtype), problem.y0
    try:
        out = problem.func(t, problem.layout.unflatten(y0.clone()))
    except RuntimeError:  # func has an operation for plain tensors only, such as y.requires_grad_()
        ids = {id(n) for n in given}
        if any(is_wrapped(x) and id(x) not in ids for _, x in _names(problem.func)):
            raise
        return
    for x in _parts(out):
        if isinstance(x, Tensor) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise Unsupported(
                f'{what} has no forward mode (jvp, jacfwd, dual tensors). Use gradient="backprop", as odeint does.'
            )
        named = [t, y0, *given]
        while is_wrapped(x):
            level = functorch.maybe_get_level(x)
            here = [n for n in named if functorch.maybe_get_level(n) == level]
            batched = functorch.is_batchedtensor(x)
            if not here if batched else any(sources(x, named, {})[1:]):
                raise Unsupported(
                    f"func uses a tensor of a torch.func transform that is not among the parameters of {what}: its "
                    "gradient would be lost. Make it part of y0, or make func an nn.Module and it a parameter."
                )
            named = [functorch.get_unwrapped(n) if functorch.maybe_get_level(n) == level else n for n in named]
            x = functorch.get_unwrapped(x)


def sources(
    out: Any, named: Sequence[Tensor], known: dict[int, tuple[str, Tensor]]
) -> tuple[set[int], list[Tensor], list[Tensor]]:
    """Return the tensors with a gradient that `out` was computed from, in three groups.

    They are the ids of the named tensors; other leaves with a reference outside of the graph, and tensors in `known`;
    and leaves that only the graph holds.
    """
    stop = set(map(id, named))
    # The nodes are kept alive here, or another could get the same id.
    ends: dict[Any, Tensor] = {}
    for x in (*[x for _, x in known.values()], *named) if known else named:
        if x.grad_fn is not None:
            ends[x.grad_fn] = x
    reached, others, loose = set[int](), dict[int, Tensor](), dict[int, Tensor]()
    waiting: list[Any] = []
    for x in _parts(out):
        if not isinstance(x, Tensor) or not x.requires_grad:
            continue
        if x.grad_fn is not None:
            waiting.append(x.grad_fn)
        elif id(x) in stop:
            reached.add(id(x))
        else:
            others[id(x)] = x  # func returned a leaf
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        end, below = ends.get(node), node.next_functions
        if end is None and not below and node.name() == "torch::autograd::AccumulateGrad":
            leaf: Any = getattr(node, "variable", None)
            held = sys.getrefcount(leaf) > _ALONE
            end = leaf
            if id(end) not in stop and not held:
                loose[id(end)] = leaf
                continue
        if end is not None:
            if id(end) in stop:
                reached.add(id(end))
            else:
                others[id(end)] = end
            continue
        for node, _ in below:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return reached, list(others.values()), list(loose.values())


def _restore_random(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.set_rng_state(states[1], device)


def _names(func: Func) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that func can see, with their names: its parameters, attributes, and those of its closure."""
    seen: dict[str, Any] = {}
    while isinstance(func, functools.partial):
        seen |= func.keywords
        seen |= {f"argument {i}": x for i, x in enumerate(func.args)}
        func = func.func
    if isinstance(func, nn.Module):
        seen |= dict(func.named_parameters())
        func = func.forward
    elif not (inspect.isfunction(func) or inspect.ismethod(func)):
        func = getattr(func, "__call__", func)  # noqa: B004
    owner = getattr(func, "__self__", None)
    if isinstance(owner, nn.Module):
        seen |= dict(owner.named_parameters())
    seen |= getattr(owner, "__dict__", {})
    func = getattr(func, "__func__", func)
    if inspect.isfunction(func):
        with contextlib.suppress(ValueError):  # raised for a closure that is not filled yet
            inside = inspect.getclosurevars(func)
            seen |= {**inside.globals, **inside.nonlocals}
    for name, value in seen.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, nn.Module):
            yield from ((f"{name}.{below}", x) for below, x in value.named_parameters())
        elif isinstance(value, (tuple, list)):
            yield from ((f"{name}[{i}]", x) for i, x in enumerate(value) if isinstance(x, Tensor))


def _equal(a: Any, b: Any) -> bool:
    """Return whether a and b are equal, where NaN equals NaN. Values that are not tensors are checked elsewhere."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return True
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a.detach()), torch.nan_to_num(b))


def _parts(state: Any) -> tuple[Any, ...]:
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)


def _references_of_a_leaf() -> int:
    """Return the reference count that `sources` finds for a tensor that only a graph holds."""
    with torch.enable_grad():
        made: Any = torch.ones((), requires_grad=True, device="cpu") * 1
    leaf = made.grad_fn.next_functions[0][0].variable
    return sys.getrefcount(leaf)


_ALONE = _references_of_a_leaf()
