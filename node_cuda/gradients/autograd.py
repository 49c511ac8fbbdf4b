"""A solve as one operation for autograd, for the transforms of torch.func, and for vmap.

A `DifferentiableSolve` is a solve with its backward pass; each gradient mode has a subclass. vmap solves for one sample
after another. Each sample has its own steps, so the result is that of a loop over the samples. Samples that must share
their steps are one state.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from node_cuda._eager import eager
from node_cuda._torch_modes import recordable, refuse_second_derivative, transformed
from node_cuda.cuda_graphs.cache import refuse_in_capture
from node_cuda.gradients.context import autocast_contexts, autocast_state
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
    """The tensors that the forward pass saves for the backward pass.

    grid: the grid of the steps, if it is on the tape. ys: y at the outputs.
    """

    t: Tensor
    grid: Tensor | None
    ys: Tensor
    params: tuple[Tensor, ...]


class Gradients(NamedTuple):
    """The gradients of t and of the grid (None if they are not wanted), of y0 and of the parameters."""

    t: Tensor | None
    grid: Tensor | None
    y0: Tensor
    params: Sequence[Tensor]


class DifferentiableSolve(ABC):
    """A solve that can be differentiated once. It computes with plain tensors, without the wrappers of torch.func.

    what: the gradient mode as the user writes it. replays: the backward pass computes the steps again. samples: under
    vmap, the solves of the samples. status: how the solve ended. by_chance: func is known to be non-deterministic.
    shown: the attributes that the user finds in `ys.grad_fn`. at: the user's time of the event, if the solve looked for
    one.
    """

    what: ClassVar[str]
    replays: ClassVar[bool]
    at: float | None = None

    def __init__(self, request: SolveSpec, parameters: Parameters) -> None:
        self.stats = request.stats
        self.parameters = parameters
        self.status = Status.SUCCESS
        self.by_chance = False
        self.shown: dict[str, Any] = {}
        self.samples: list[DifferentiableSolve] = []
        self._request = request
        self._inspects = torch.is_grad_enabled()
        self._inspection: Inspection | None = None

    @abstractmethod
    def solve(self, request: SolveSpec) -> Tensor:
        """Return y at the outputs, and set `at`."""

    @abstractmethod
    def gradients(self, problem: Problem, saved: Saved, grad_ys: Tensor, wants_t: bool, wants_grid: bool) -> Gradients:
        """Return the gradients: the backward pass. problem.y0 has a shape and a dtype, but no values."""

    def __call__(self, grid: Tensor | None = None) -> Tensor:
        """Return y at the outputs, on the tape."""
        problem = self._request.problem
        given = (*self.parameters.wanted, *self.parameters.carried)
        if transformed():
            refuse_hidden(problem, given, self.what)
            return _TransformedSolve.apply(self, problem.t, grid, problem.y0, *given)
        return _Solve.apply(self, problem.t, grid, problem.y0, *given)

    def event(self) -> tuple[Tensor, Tensor]:
        """Return the time of the event, without a gradient, and [y0, y at the event], on the tape."""
        t, ys = self._request.problem.t, self()
        assert self.at is not None
        return torch.tensor(self.at, dtype=t.dtype, device=t.device), ys

    def forward(self, t: Tensor, y0: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Solve from these tensors. Without transforms they are those of the request."""
        request = self._request
        problem, func = request.problem, self.parameters.bound(params, unchanged=True)
        if func is not problem.func or y0 is not problem.y0 or t is not problem.t:
            field = problem.field if func is problem.func else problem.field_of(func)
            problem = problem._replace(func=func, field=field, y0=y0, t=t)
            request = request._replace(problem=problem)
        self.autocast = autocast_state(y0.device)
        self.members = Members(self.parameters)
        if self._inspects:
            assert isinstance(problem.field, VectorField)
            self._inspection = Inspection(problem.field, self.parameters, params, self.what, self.replays, self.members)
            problem.field.func = self._inspection
        ys = self.solve(request)
        if self._inspection is not None:
            self._inspection.leave()
            self.by_chance = self._inspection.by_chance
            self.members.settle()
        self._let_go(problem)
        return ys

    def backward(self, saved: Saved, grad_ys: Tensor, wants_t: bool, wants_grid: bool) -> Gradients:
        """Return the gradients of the inputs from those of the outputs. autograd calls this without recording."""
        refuse_in_capture(grad_ys)
        if torch.is_inference_mode_enabled():  # where autograd records nothing, and a backward pass needs graphs
            with torch.inference_mode(False), torch.no_grad():
                ys, grad_ys = recordable(saved.ys, grad_ys)
                return self.backward(saved._replace(ys=ys), grad_ys, wants_t, wants_grid)
        contexts = self.members.put_back()
        if self.autocast != autocast_state(grad_ys.device):
            contexts = [*autocast_contexts(self.autocast, grad_ys.device), *contexts]
        if not contexts:
            return self._backward(saved, grad_ys, wants_t, wants_grid)
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return self._backward(saved, grad_ys, wants_t, wants_grid)

    def _backward(self, saved: Saved, grad_ys: Tensor, wants_t: bool, wants_grid: bool) -> Gradients:
        # func is bound to new leaves in the place of some parameters: a transform may pass those that require no
        # gradient, and a hook of a parameter is for its whole gradient, not for the part of each evaluation.
        count = len(self.parameters.wanted)
        params = list(saved.params[:count])
        for i, p in enumerate(params):
            if not p.requires_grad or (p._backward_hooks and self._binds(p)):
                params[i] = p.detach().requires_grad_()
        problem, func = self._request.problem, self.parameters.bound((*params, *saved.params[count:]))
        if func is not problem.func:
            problem = problem._replace(func=func, field=problem.field_of(func))
        saved = Saved(saved.t, saved.grid, saved.ys, tuple(params))
        return self.gradients(problem, saved, grad_ys, wants_t, wants_grid)

    def _binds(self, p: Tensor) -> bool:
        """Return whether func can compute with another tensor in the place of p. Native code and graphs cannot."""
        return self.stats.loop == "host" and self.parameters.replaceable(p)

    def replaced(self, problem: Problem) -> str | None:
        """Return the reason to solve on the host if func computes with other tensors than its own, else None."""
        if problem.func is self.parameters.func:
            return None
        return "func computes with tensors in the place of its own (functional_call, a transform, or hooks)"

    def reached(self, problem: Problem) -> UsedParameters:
        """Return the parameters that func used in the forward pass, as far as known. Each must get a gradient."""
        used = self._inspection.used(self.parameters.wanted) if self._inspection is not None else ()
        return UsedParameters(used if problem is self._request.problem else ())

    def per_sample(self, count: int) -> list[DifferentiableSolve]:
        """Return `count` solves like this one, not yet run. The first one inspects func for all of them."""
        if count == 0:
            raise InvalidInput("torch.func.vmap needs at least one sample; got a batch of size 0. Skip the solve.")
        problem = self._request.problem
        for i in range(count):
            sample = copy.copy(self)
            sample.stats = Stats(host_reads=1)
            sample.samples = []
            sample._inspects = self._inspects and i == 0
            own = problem._replace(field=problem.field_of(problem.func))
            sample._request = self._request._replace(stats=sample.stats, problem=own)
            self.samples.append(sample)
        return self.samples

    def gather(self) -> None:
        """Add up the statistics of the samples, and take the status of the first one that failed."""
        if self.samples:
            for name in ("nfe", "nfe_backward", "accepted", "rejected", "host_reads", "recomputed_steps"):
                setattr(self.stats, name, sum(getattr(sample.stats, name) for sample in self.samples))
            self.stats.peak_checkpoints = max(sample.stats.peak_checkpoints for sample in self.samples)
            failed = [sample.status for sample in self.samples if sample.status is not Status.SUCCESS]
            self.status = failed[0] if failed else Status.SUCCESS
            self._request = self.samples[0]._request._replace(stats=self.stats)

    def _let_go(self, problem: Problem) -> None:
        """Keep the problem without its tensors, which would keep the user's graph and the memory of y0 alive."""
        y0, t = problem.y0, problem.t
        blank = y0.new_empty_strided(y0.shape, (0,) * y0.ndim)  # the memory of one element
        problem = problem._replace(y0=blank, t=t.detach() if t.requires_grad else t)
        self._request = self._request._replace(problem=problem)


def refuse_transforms(what: str) -> None:
    """Raise Unsupported inside a transform of torch.func."""
    if transformed():
        raise Unsupported(f"{what} cannot be transformed by torch.func. Solve outside the transform.")


class _Solve(torch.autograd.Function):
    """The operation from (t, grid, y0, parameters) to y at the outputs."""

    @staticmethod
    def forward(ctx, task, t, grid, y0, *params):
        ys = task.forward(t, y0, params)
        _remember(ctx, (task, t, grid, y0, *params), ys)
        return ys

    @staticmethod
    @eager
    def backward(ctx, grad_ys):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch._C._functorch.is_legacy_batchedtensor(grad_ys):  # pyright: ignore[reportAttributeAccessIssue]
            raise NotImplementedError(
                f"{ctx.task.what} takes one gradient of the outputs at a time; got a batch of them (is_grads_batched, "
                "or jacobian(vectorize=True)). Use `torch.func.jacrev`, or a loop."
            )
        _, wants_t, wants_grid, *_ = ctx.needs_input_grad
        given = ctx.task, wants_t, wants_grid, grad_ys, *ctx.saved_tensors
        # `_Gradient` raises an error if the gradient is differentiated. Without a graph that cannot happen.
        recorded = torch.is_grad_enabled() or transformed()
        found = iter(_Gradient.apply(*given) if recorded else _Gradient.forward(*given))
        adj_t = next(found) if wants_t else None
        adj_grid = next(found) if wants_grid else None
        return None, adj_t, adj_grid, *found, *[None] * len(ctx.task.parameters.carried)


def _remember(ctx: Any, inputs: Any, output: Tensor) -> None:
    """Save what the backward pass needs."""
    task, t, grid, _, *params = inputs
    ctx.save_for_backward(t, grid, output, *params)
    ctx.task = task
    for name, value in task.shown.items():
        setattr(ctx, name, value)


class _TransformedSolve(torch.autograd.Function):
    """`_Solve` for the transforms of torch.func, which need `setup_context`. Its calls take longer."""

    @staticmethod
    def forward(task, t, grid, y0, *params):
        return task.forward(t, y0, params)

    setup_context = staticmethod(_remember)
    backward = staticmethod(_Solve.backward)  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def vmap(info, in_dims, task, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        samples = task.per_sample(info.batch_size)
        each = _samples(info, in_dims[1:], tensors)
        done = [_TransformedSolve.apply(*one) for one in zip(samples, *each, strict=True)]
        task.gather()
        return torch.stack(done), 0


class _Gradient(torch.autograd.Function):
    """The backward pass of a solve as an operation. To differentiate it raises an error."""

    @staticmethod
    def forward(task, wants_t, wants_grid, grad_ys, t, grid, ys, *params):
        found = task.backward(Saved(t, grid, ys, params), grad_ys, wants_t, wants_grid)
        of_times = () if found.t is None else (found.t,)
        of_grid = () if found.grid is None else (found.grid,)
        return *of_times, *of_grid, found.y0, *found.params

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.what = inputs[0].what

    @staticmethod
    def backward(ctx, *_):
        refuse_second_derivative(ctx.what)

    @staticmethod
    def vmap(info, in_dims, task, wants_t, wants_grid, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        # If ys is batched, each sample has its own task. Else only grad_ys is batched, and the task is the same.
        many = in_dims[6] is not None
        tasks = task.samples if many else [task] * info.batch_size
        each = _samples(info, in_dims[3:], tensors)
        done = [_Gradient.apply(one, wants_t, wants_grid, *its) for one, *its in zip(tasks, *each, strict=True)]
        if many:
            task.gather()
        return _stacked(done)


def _samples(info: Any, in_dims: Sequence[int | None], tensors: Sequence[Any]) -> list[Iterator[Any]]:
    """Return an iterator over the samples for each tensor. A tensor that is not batched is repeated."""
    return [
        iter([x] * info.batch_size if dim is None else x.unbind(dim)) for x, dim in zip(tensors, in_dims, strict=True)
    ]


def _stacked(done: list[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Return what a vmap rule must return: each result, stacked in dimension 0, and the batch dimensions."""
    results = tuple(torch.stack(each) for each in zip(*done, strict=True))
    return results, (0,) * len(results)
