"""The compiled backward solve of the adjoint method: a native loop for each interval between outputs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from node_cuda.cuda_graphs.parts import Unseen
from node_cuda.gradients.adjoint.backward_solve import Backward, Found
from node_cuda.kernels.norms import ErrorNorm
from node_cuda.kernels.reference import real_dot
from node_cuda.kernels.stage_times import Clock
from node_cuda.loop.grids import grid_of
from node_cuda.loop.step_control import look_at_length, next_look
from node_cuda.methods.registry import Method
from node_cuda.native.adjoint import BackwardLoop, Shape
from node_cuda.native.build import traced
from node_cuda.native.cache import NativeCache, Seen, Then, key_of, refused, why_eager
from node_cuda.native.forward import SECONDS, account, begin, failure_of, name_of, order_of, padded, room_of
from node_cuda.native.loop import scheme_of
from node_cuda.native.numbers import CAP, Form, point_of
from node_cuda.native.tracing import TracedField
from node_cuda.options import AdaptiveOptions, FixedOptions
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import Status


class CompiledAdjoint:
    """The compiled backward loop of one kind of solve."""

    def __init__(self, problem: Problem, method: Method, seen: Seen, shape: Shape) -> None:
        start = time.perf_counter()
        self.scheme = scheme_of(method)
        field = TracedField(problem, seen.tensors)
        field.probe()
        begun = time.perf_counter()
        field.probe()
        self.attempt_seconds = 2 * (time.perf_counter() - begun) * self.scheme.tableau.stages
        run = BackwardLoop(self.scheme, order_of(method), shape, field)
        y = torch.zeros(problem.y0.shape, dtype=problem.y0.dtype)
        tensors = [torch.zeros_like(x) for x in seen.bare()]
        sums = [tensors[i].clone() for i in shape.wanted]
        tolerances = [y.real.clone() for given in shape.per_element if given]
        numbers = torch.zeros(shape.form.length, dtype=torch.float64)
        state = [y, *(y.clone() for _ in range(3)), *sums, *(x.clone() for x in sums)]
        examples = [numbers, *state, *tolerances, *tensors]
        what = f'gradient="adjoint" by {method.name} of {name_of(problem.func)}'
        self.call = traced(run, examples, len(tensors), what)
        self.seconds = time.perf_counter() - start
        self.told = False


def try_native(
    given: Backward, then: Then | None, stats: Stats, why: str | None, wanted: Sequence[Tensor], *, wants_t: bool
) -> Found | None:
    """Return the gradients by a compiled backward solve, or None if the host must do it: see `stats.why_backward`.

    then: what func reached in the forward pass. wanted: the parameters as func knows them.
    """
    method = given.method
    if len(given.times) < 2:  # the solve failed before its first output
        return None
    found = _seen(given, why)
    if isinstance(found, Seen):
        solve = _NativeSolve(given, found, wanted)
        found = solve.compiled(found)
        if not isinstance(found, str):
            made, seen = found
            if then is not None:
                then.refuse_changes(seen, 'gradient="adjoint"')
            account(made, stats)
            return solve.run(made, seen, stats, wants_t)
    stats.why_backward = refused(method, found)
    return None


def _seen(given: Backward, why: str | None) -> Seen | str:
    """Return what func reaches now, or the reason why the backward solve is not compiled. why: one that is known."""
    if why is None and given.settings.checks:
        why = "check_reconstruction compares y at each output on the host"
    if why is None and given.forward.adjoint_callbacks:
        why = "func has callbacks for the backward solve, and a compiled loop calls no Python"
    why = why or why_eager(given.problem._replace(callbacks={}), given.method)
    if why is not None:
        return why
    try:
        return Seen(given.problem.func)
    except Unseen as unseen:
        return str(unseen)


class _NativeSolve:
    """A backward solve as the compiled loop takes it: y and a apart, each like y0, from output to output.

    wanted: the parameters as func knows them. known: their places among the tensors that func reaches; None for one
    that it does not reach.
    """

    def __init__(self, given: Backward, seen: Seen, wanted: Sequence[Tensor]) -> None:
        settings, forward = given.settings, given.forward
        self.given, self.method = given, given.method
        self.problem = given.problem._replace(
            y0=given.ys[0].contiguous(),
            layout=forward.layout,
            norm=ErrorNorm(settings.rtol, settings.atol, forward.norm.sizes),
        )
        self.begun = begin(self.problem, self.method)
        self.points = None if isinstance(self.method.options, AdaptiveOptions) else _grids(self.problem, self.method)
        self.room = 0 if self.points is None else room_of(max(self.points, key=len))
        places = {id(x): i for i, x in enumerate(seen.tensors)}
        self.known = [places.get(id(x)) for x in wanted]
        self.shape = Shape(
            Form(1, self.begun.form.tstops, self.begun.form.jumps, self.room),
            tuple(sorted({i for i in self.known if i is not None})),
            (isinstance(settings.rtol, Tensor), isinstance(settings.atol, Tensor)),
            self.problem.norm.sizes,
            given.params_in_norm,
        )

    def compiled(self, seen: Seen) -> tuple[CompiledAdjoint, Seen] | str:
        """Return the compiled loop and what func reaches in it, or the reason why there is none."""
        problem, method, shape = self.problem, self.method, self.shape
        cache = method.options.compile
        assert isinstance(cache, NativeCache)
        key = key_of(problem, method, "adjoint", shape)
        return cache.get(key, problem.func, lambda now: CompiledAdjoint(problem, method, now, shape), seen)

    def run(self, made: CompiledAdjoint, seen: Seen, stats: Stats, wants_t: bool) -> Found:
        """Return the gradients. Raises SolveError."""
        given, times, begun, form = self.given, self.problem.times, self.begun, self.shape.form
        tensors = seen.bare()
        for i, x in zip(self.known, given.params, strict=True):
            if i is not None:
                tensors[i] = x.detach()
        norm = given.params_norm
        settings = begun.settings._replace(rtol_sums=float(norm.rtol), atol_sums=float(norm.atol))
        stops = begun.times[len(times) : len(times) + form.tstops + form.jumps]
        y, a = given.ys[-1].contiguous(), given.grad_ys[-1].contiguous()
        own = [tensors[i] for i in self.shape.wanted]
        changing = [y, y, *own, *map(torch.zeros_like, own)]
        p, last = begun.point._replace(output=0), len(times) - 1
        after = Clock(1.0, self.problem.time_dtype, y.device).after
        adj_t = torch.zeros_like(given.t) if wants_t else None
        cap = float(max(int(SECONDS / max(made.attempt_seconds, 1e-7)), 1))
        for i in range(last):
            m = last - i
            if i:
                p = p._replace(output=0, place=0, t_k1=after(p.t), fresh=int(made.scheme.adaptive))
            grid = [] if self.points is None else padded(self.points[i], self.room)
            while p.output < 1:
                tried = p.accepted + p.rejected
                looked_at = next_look(tried)
                numbers = [*p, *settings, times[i + 1], *stops, *grid]
                numbers[CAP] = min(cap, looked_at - tried)
                vector = torch.tensor(numbers, dtype=torch.float64, device="cpu")
                point, y, a, *changing = made.call([vector, y, a, *changing, *begun.tolerances, *tensors])
                p = point_of(point.tolist())
                stats.host_reads += 1
                tried = p.accepted + p.rejected
                if tried == looked_at and p.output < 1 and made.scheme.adaptive:
                    chance = look_at_length(self.problem, p.t, y, p.proposal, tried, p.rejected, False)
                    p = p if chance is None else p._replace(status=Status.BY_CHANCE.value)
                if p.status:
                    stats.nfe_backward += p.nfe
                    raise failure_of(self.problem, self.method, stats, p, y, changing[0])
            if adj_t is not None:
                adj_t[m] = real_dot(given.grad_ys[m], _f(given, m, stats))
                if m == 1:
                    adj_t[0] = -real_dot(a, _f(given, 0, stats))
            y, a = given.ys[m - 1].contiguous(), a + given.grad_ys[m - 1]
        stats.nfe_backward += p.nfe
        stats.loop_backward = "native"
        sums = dict(zip(self.shape.wanted, changing[2 + len(own) :], strict=True))
        of_params = [
            torch.zeros_like(x) if i is None else sums[i] for i, x in zip(self.known, given.params, strict=True)
        ]
        return adj_t, a, of_params


def refuse_changes(then: Then, problem: Problem) -> None:
    """Raise InvalidField if func has changed since a compiled forward pass. For a backward pass by the host."""
    with contextlib.suppress(Unseen):
        then.refuse_changes(Seen(problem.func), 'gradient="adjoint"')


def _grids(problem: Problem, method: Method) -> list[list[float]]:
    """Return the points of the grid of each interval. Each interval has a grid of its own, as in torchdiffeq."""
    assert isinstance(method.options, FixedOptions)
    pairs = [
        problem._replace(t=problem.t[i : i + 2], times=problem.times[i : i + 2]) for i in range(len(problem.times) - 1)
    ]
    return [grid_of(pair, method.options)[0] for pair in pairs]


def _f(given: Backward, m: int, stats: Stats) -> Tensor:
    """Return f at the m-th output."""
    forward = given.forward
    stats.nfe_backward += 1
    return forward.field(given.t[m].to(given.ys.device, forward.time_dtype), given.ys[m])
