"""What a gradient by hand must know of func before it can be trusted, found in the first evaluation of a solve.

autograd sees every tensor that func uses; a backward pass by hand only those that it was told of. And it asks func
again at points where it was asked before: the answers must be the same.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from node_cuda._typing import Func, State
from node_cuda.field import VectorField
from node_cuda.gradients.parameters import is_wrapped
from node_cuda.status import InvalidField, MissingGradientWarning, Unsupported, users_level


class Inspection:
    """Stands in for func in one evaluation of a field: on the tape, and watching.

    func: as the user gave it. named: the tensors that the gradient mode was told of. what: that mode, as the user calls
    it. replays: it takes steps again, and refuses a func that answers differently; else such a func is a warning.
    """

    def __init__(self, field: VectorField, func: Func, named: Sequence[Tensor], what: str, replays: bool) -> None:
        self.field = field
        self.called = field.func
        self.func = func
        self.named = named
        self.what = what
        self.replays = replays

    def __call__(self, t: Tensor, y: State) -> Any:
        self.field.func = self.called
        self.field.probes += 1  # with a tape, what func does with memory may be another thing
        before = _copied(y)
        states = self._states(t.device)
        with torch.enable_grad():
            out = self.called(t, y)
        if any(is_wrapped(x) for x in _parts(out)) and not any(is_wrapped(x) for x in _parts(y)):
            raise Unsupported(
                f"func uses a tensor of a torch.func transform that {self.what} was not told of. Make func an "
                "nn.Module and the tensor one of its parameters, or part of the state y0."
            )
        self._refuse_chance(t, before, out, states)
        self._warn_of_unnamed(out)
        detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in _parts(out))
        return detached if isinstance(out, (tuple, list)) else detached[0]

    def _refuse_chance(self, t: Tensor, y: State, out: Any, states: list[Any]) -> None:
        """Raise, or warn, if func answers by chance: something changed as it was evaluated, and a second time its
        answer is another one."""
        if all(map(_same, states, self._states(t.device))):
            return
        self.field.nfe += 1
        with torch.no_grad():
            again = self.called(t, y)
        if all(map(_equal, _parts(out), _parts(again))):
            return
        words = "func answers differently when it is asked again at the same t and y (dropout, spectral norm, noise?)"
        if self.replays:
            raise InvalidField(
                f"{words}, and {self.what} takes every step again to differentiate it. Put func in evaluation mode, "
                'draw the noise once before the solve, or use gradient="backprop".'
            )
        warnings.warn(
            f"{words}: the backward pass of {self.what} solves with other random numbers, and its gradient is that of "
            'no solve. Put func in evaluation mode, draw the noise once before the solve, or use gradient="backprop".',
            stacklevel=users_level(),
        )

    def _states(self, device: torch.device) -> list[Any]:
        """What an evaluation changes if it depends on chance, or on earlier ones: random generators, and func's buffers
        where steps are taken again."""
        states: list[Any] = [torch.get_rng_state()]
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            states.append(torch.cuda.get_rng_state(device))
        if self.replays and isinstance(self.func, nn.Module):
            states += [x._version for x in self.func.buffers() if not x.is_inference()]
        return states

    def _warn_of_unnamed(self, out: Any) -> None:
        missing = _unnamed(out, self.named, {})
        if not missing:
            return
        # Again, and no further than to what has a name: a product of a named tensor is known by it.
        known = {id(x): (name, x) for name, x in _names(self.func)}
        missing = _unnamed(out, self.named, known)
        words = ", ".join(
            f"{known[id(x)][0] if id(x) in known else 'a tensor'} of shape {tuple(x.shape)}" for x in missing
        )
        warnings.warn(
            f"func uses what requires a gradient and {self.what} was not told of: {words}. No gradient will reach it. "
            "Add it to `adjoint_params=(...)`, make it a parameter of func, or use its `.detach()`.",
            MissingGradientWarning,
            stacklevel=users_level(),
        )


def _unnamed(out: Any, named: Sequence[Tensor], known: dict[int, tuple[str, Tensor]]) -> list[Tensor]:
    """The tensors with a gradient that `out` was computed from, each once, as far as to those that were named: leaves,
    and those among `known`."""
    stop = {id(x) for x in named}
    # The nodes are kept alive here, or another could get the same id.
    ends = {x.grad_fn: None for x in named if x.grad_fn is not None}
    ends |= {x.grad_fn: x for _, x in known.values() if x.grad_fn is not None and id(x) not in stop}
    found: dict[int, Tensor] = {}
    waiting = [x.grad_fn for x in _parts(out) if isinstance(x, Tensor) and x.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None) if node.name() == "torch::autograd::AccumulateGrad" else None
        end = ends.get(node, leaf)
        if end is not None and id(end) not in stop:
            found[id(end)] = end
        if end is not None or node in ends:
            continue
        fresh = [below for below, _ in node.next_functions if below is not None and below not in seen]
        seen.update(fresh)
        waiting += fresh
    return list(found.values())


def _names(func: Func) -> Iterator[tuple[str, Tensor]]:
    """The tensors that func can see by name: its own, its attributes', and those of its closure."""
    seen: dict[str, Any] = {}
    if isinstance(func, nn.Module):
        seen |= dict(func.named_parameters()) | vars(func)
        func = func.forward
    while isinstance(func, functools.partial):
        func = func.func
    func = getattr(func, "__func__", func)
    if inspect.isfunction(func):
        with contextlib.suppress(ValueError):  # of a closure that is not filled yet
            inside = inspect.getclosurevars(func)
            seen |= {**inside.globals, **inside.nonlocals}
    for name, value in seen.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, nn.Module):
            yield from ((f"{name}.{below}", x) for below, x in value.named_parameters())
        elif isinstance(value, (tuple, list)):
            yield from ((f"{name}[{i}]", x) for i, x in enumerate(value) if isinstance(x, Tensor))


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _equal(a: Any, b: Any) -> bool:
    """Alike, NaN for NaN; what is no tensor is left to others to complain of."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return True
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a.detach()), torch.nan_to_num(b))


def _parts(state: Any) -> tuple[Any, ...]:
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)


def _copied(state: State) -> State:
    return state.clone() if isinstance(state, Tensor) else tuple(x.clone() for x in state)
