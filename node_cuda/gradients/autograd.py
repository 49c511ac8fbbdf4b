"""A solve as one operation of the user's graph: what autograd, the transforms of torch.func and vmap see of it.

A `DifferentiableSolve`, a class for each mode, is the solve and its backward pass. vmap solves for one sample after
another, each with other steps, and so gives what a loop over the samples gives. Samples that share their steps are one
state.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from node_cuda._eager import eager
from node_cuda._second_derivatives import refuse_second_derivative
from node_cuda._torch_modes import transformed
from node_cuda.cuda_graphs.cache import refuse_in_capture
from node_cuda.gradients.context import autocast_state
from node_cuda.gradients.inspection import Inspection, refuse_hidden
from node_cuda.gradients.members import Members
from node_cuda.gradients.parameters import Parameters
from node_cuda.gradients.reached import UsedParameters
from node_cuda.loop.request import SolveSpec
from node_cuda.problem.field import VectorField
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import InvalidInput, Status, Unsupported


class Saved(NamedTuple):
    """What the backward pass gets of the forward pass: t and the grid that the steps lie on, if that is on the tape, y
    at the outputs, the time of the event or of the last output, and the parameters."""

    t: Tensor
    grid: Tensor | None
    ys: Tensor
    at: Tensor
    params: tuple[Tensor, ...]


class Gradients(NamedTuple):
    """Of t and of the grid, where they were asked for, of y0 and of the parameters."""

    t: Tensor | None
    grid: Tensor | None
    y0: Tensor
    params: Sequence[Tensor]


class DifferentiableSolve(ABC):
    """A solve that can be differentiated once. Its tensors are plain: wrappers of torch.func stay outside.

    samples: under vmap, the tasks that did the work. status: how the solve ended.
    """

    what: ClassVar[str]
    replays: ClassVar[bool]

    def __init__(self, request: SolveSpec, parameters: Parameters) -> None:
        self.stats = request.stats
        self.parameters = parameters
        self.status = Status.SUCCESS
        self.samples: list[DifferentiableSolve] = []
        self._request = request
        self._inspects = torch.is_grad_enabled()
        self._inspection: Inspection | None = None

    @abstractmethod
    def solve(self, request: SolveSpec) -> tuple[Tensor, float]:
        """(y at the outputs, the user's time of the last one)."""

    @abstractmethod
    def gradients(self, problem: Problem, saved: Saved, grad_ys: Tensor, wants_t: bool, wants_grid: bool) -> Gradients:
        """The backward pass; problem.y0 has a shape and a dtype, and no values."""

    @property
    def shown(self) -> dict[str, Any]:
        """What the user may see of it in `ys.grad_fn`."""
        return {}

    def __call__(self, grid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y at the outputs, the time of the last one, which has no gradient), on the tape."""
        problem = self._request.problem
        given = (*self.parameters.wanted, *self.parameters.carried)
        if transformed():
            refuse_hidden(problem, given, self.what)
        return _Solve.apply(self, problem.t, grid, problem.y0, *given)

    def forward(self, t: Tensor, y0: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The solve from these tensors, which are the request's own but for transforms."""
        problem = _computing_with(self.parameters.bound(params), self._request.problem)
        problem = replace(problem, y0=y0, t=t)
        self.autocast = autocast_state(y0.device.type)
        self.members = Members(self.parameters)
        if self._inspects:
            assert isinstance(problem.field, VectorField)
            named = (*self.parameters.every, *params)
            self._inspection = Inspection(
                problem.field, self.parameters.func, named, self.what, self.replays, self.members
            )
            problem.field.func = self._inspection
        ys, at = self.solve(replace(self._request, problem=problem))
        if self._inspection is not None:
            self._inspection.leave()
            self.members.settle()
        self._let_go(problem)
        return ys, torch.tensor(at, dtype=torch.float64, device="cpu")

    def backward(self, saved: Saved, grad_ys: Tensor, wants_t: bool, wants_grid: bool) -> Gradients:
        """The gradients from those of the outputs."""
        refuse_in_capture(grad_ys)
        # What a transform hands down need not want a gradient; func is then bound to leaves of our own.
        count = len(self.parameters.wanted)
        params = tuple(p if p.requires_grad else p.detach().requires_grad_() for p in saved.params[:count])
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for context in (*self.autocast(), self.members.put_back()):
                stack.enter_context(context)
            func = self.parameters.bound((*params, *saved.params[count:]))
            problem = _computing_with(func, self._request.problem)
            return self.gradients(problem, saved._replace(params=params), grad_ys, wants_t, wants_grid)

    @property
    def by_chance(self) -> bool:
        """func is known to answer differently when it is asked again."""
        return self._inspection is not None and self._inspection.by_chance

    def replaced(self, problem: Problem) -> str | None:
        """Why this problem is the host's, if its func is one that computes with other tensors than its own."""
        if problem.func is self.parameters.func:
            return None
        return "func computes with tensors in the place of its own (functional_call, a transform, or hooks)"

    def reached(self, problem: Problem) -> UsedParameters:
        """What the backward pass is to find a gradient of, as far as the forward pass knows."""
        used = self._inspection.used(self.parameters.wanted) if self._inspection is not None else ()
        return UsedParameters(used if problem is self._request.problem else ())

    def per_sample(self, count: int) -> list[DifferentiableSolve]:
        """As many tasks like this one, not yet run. The first of them looks at func for all."""
        if count == 0:
            raise InvalidInput("torch.func.vmap over no samples: got a batch of size 0. Skip the solve.")
        problem = self._request.problem
        for i in range(count):
            sample = copy.copy(self)
            sample.stats = Stats(host_reads=1)
            sample.samples = []
            sample._inspects = self._inspects and i == 0
            own = replace(problem, field=problem.field_of(problem.func))
            sample._request = replace(self._request, stats=sample.stats, problem=own)
            self.samples.append(sample)
        return self.samples

    def gather(self) -> None:
        """What the samples cost, and how the first one that failed ended."""
        if self.samples:
            for name in ("nfe", "nfe_backward", "accepted", "rejected", "host_reads", "recomputed_steps"):
                setattr(self.stats, name, sum(getattr(sample.stats, name) for sample in self.samples))
            self.stats.peak_checkpoints = max(sample.stats.peak_checkpoints for sample in self.samples)
            failed = [sample.status for sample in self.samples if sample.status is not Status.SUCCESS]
            self.status = failed[0] if failed else Status.SUCCESS
            self._request = replace(self.samples[0]._request, stats=self.stats)

    def _let_go(self, problem: Problem) -> None:
        """Keep the problem without its tensors: they hold the user's graph, and the user may want to be rid of y0."""
        blank = problem.y0.new_empty(()).expand(problem.y0.shape)
        self._request = replace(self._request, problem=replace(problem, y0=blank, t=problem.t.detach()))


def refuse_transforms(what: str) -> None:
    """Raises Unsupported inside a transform of torch.func."""
    if transformed():
        raise Unsupported(f"{what} cannot be transformed by torch.func. Solve outside the transform.")


def _computing_with(func: Any, problem: Problem) -> Problem:
    """The problem with this func."""
    return problem if func is problem.func else replace(problem, func=func, field=problem.field_of(func))


class _Solve(torch.autograd.Function):
    """(t, grid, y0, parameters) -> (y at the outputs, the time of the last one)."""

    @staticmethod
    def forward(task, t, grid, y0, *params):
        return task.forward(t, y0, params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        task, t, grid, _, *params = inputs
        ys, at = output
        ctx.mark_non_differentiable(at)
        ctx.save_for_backward(t, grid, ys, at, *params)
        ctx.task = task
        for name, value in task.shown.items():
            setattr(ctx, name, value)

    @staticmethod
    @eager
    def backward(ctx, grad_ys, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch._C._functorch.is_legacy_batchedtensor(grad_ys):  # pyright: ignore[reportAttributeAccessIssue]
            raise NotImplementedError(
                f"{ctx.task.what} takes one gradient of the outputs at a time; got a batch of them (is_grads_batched, "
                "or jacobian(vectorize=True)). Use `torch.func.jacrev`, or a loop."
            )
        _, wants_t, wants_grid, *_ = ctx.needs_input_grad
        found = iter(_Gradient.apply(ctx.task, wants_t, wants_grid, grad_ys, *ctx.saved_tensors))
        adj_t = next(found) if wants_t else None
        adj_grid = next(found) if wants_grid else None
        return None, adj_t, adj_grid, *found, *[None] * len(ctx.task.parameters.carried)

    @staticmethod
    def vmap(info, in_dims, task, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        samples = task.per_sample(info.batch_size)
        each = _samples(info, in_dims[1:], tensors)
        done = [_Solve.apply(*one) for one in zip(samples, *each, strict=True)]
        task.gather()
        return _stacked(done)


class _Gradient(torch.autograd.Function):
    """The backward pass of a solve as an operation: it is not differentiable, and says so."""

    @staticmethod
    def forward(task, wants_t, wants_grid, grad_ys, t, grid, ys, at, *params):
        found = task.backward(Saved(t, grid, ys, at, params), grad_ys, wants_t, wants_grid)
        return *(g for g in (found.t, found.grid) if g is not None), found.y0, *found.params

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.what = inputs[0].what

    @staticmethod
    def backward(ctx, *_):
        refuse_second_derivative(ctx.what)

    @staticmethod
    def vmap(info, in_dims, task, wants_t, wants_grid, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        # Where ys is one sample after another, each was solved by a task of its own; else only grad_ys is many.
        many = in_dims[6] is not None
        tasks = task.samples if many else [task] * info.batch_size
        each = _samples(info, in_dims[3:], tensors)
        done = [_Gradient.apply(one, wants_t, wants_grid, *its) for one, *its in zip(tasks, *each, strict=True)]
        if many:
            task.gather()
        return _stacked(done)


def _samples(info: Any, in_dims: Sequence[int | None], tensors: Sequence[Any]) -> list[Iterator[Any]]:
    """One sequence of samples a tensor; what is not batched is the same for all."""
    return [
        iter([x] * info.batch_size if dim is None else x.unbind(dim)) for x, dim in zip(tensors, in_dims, strict=True)
    ]


def _stacked(done: list[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """What vmap wants of its rule: each result with the samples in front, and where they are."""
    results = tuple(torch.stack(each) for each in zip(*done, strict=True))
    return results, (0,) * len(results)
