"""The exact adjoint of one explicit Runge-Kutta step and its outputs, for a constant step size.

kappa_i is the cotangent of the stage k_i, mu_i that of its argument z_i, lam that of y1:

    kappa_i = h b_i lam + h sum_{j>i} a_ji mu_j + G_i,   mu_i = (df/dz)^T kappa_i,   lam_n = lam + sum_i mu_i + G_0

G comes from the outputs in the step. If the last stage is also the first stage of the next step, the kappa_1 of that
step is added to it, and one vjp is enough for both (for FSAL methods, at the same point). Hager 2000; Matsubara et al.
2021, arXiv:2102.09750, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from node_cuda._torch_modes import vjp
from node_cuda.gradients.discrete.memory import fits, graph_size
from node_cuda.gradients.discrete.trajectory import State, StepRecord
from node_cuda.gradients.reached import UsedParameters
from node_cuda.kernels import reference
from node_cuda.kernels.arithmetic import Arithmetic
from node_cuda.kernels.stage_times import HERE, JUST_BEFORE, Interval
from node_cuda.kernels.sums import GradientAccumulator
from node_cuda.methods.interpolation import HERMITE, HERMITE_END
from node_cuda.methods.tableau import DenseOutput, SparseRow, Tableau
from node_cuda.problem.problem import Problem


class StageTable(NamedTuple):
    """A method and its interpolant as one list of stages.

    rows, nodes, sides: one entry for each stage; first the stages of the method, then those that only outputs need.
    b: the weights of y1. own: the number of the method's stages. fsal: the last of them is the field at y1, which is
    the first stage of the next step. dense: (stage, weights of x, x^2, ...) of the interpolant. end: its weights of
    y1 - y0.
    """

    rows: tuple[SparseRow, ...]
    nodes: tuple[float, ...]
    sides: tuple[int, ...]
    b: tuple[float, ...]
    own: int
    fsal: bool
    dense: tuple[tuple[int, tuple[float, ...]], ...]
    end: tuple[float, ...] = ()

    @property
    def stages(self) -> int:
        """The number of stages of the method and of its interpolant."""
        return len(self.rows)

    def columns(self) -> list[list[tuple[int, float]]]:
        """Return, for each stage i, the (j, a_ji) of the later stages j that read it."""
        columns: list[list[tuple[int, float]]] = [[] for _ in self.rows]
        for j, row in enumerate(self.rows):
            for i, a in row:
                columns[i].append((j, a))
        return columns


def adaptive_form(tableau: Tableau, dense: DenseOutput) -> StageTable:
    """Return the stage table of an adaptive method and its interpolant."""
    count, extra = tableau.stages, dense.extra
    return StageTable(
        rows=(*tableau.rows, *dense.rows),
        nodes=(*tableau.nodes, *dense.nodes),
        sides=(JUST_BEFORE,) * (count + extra),
        b=(*tableau.weights, *(0.0,) * extra),
        own=count,
        fsal=tableau.fsal,
        dense=dense.weight_rows,
    )


def grid_form(tableau: Tableau, *, inside: bool, cubic: bool) -> StageTable:
    """Return the stage table of a method on a fixed grid.

    The interpolant is linear, or a cubic polynomial; the cubic has the field at y1 as a further stage.
    """
    count = tableau.stages
    slopes = ((0, HERMITE[0][1]), (count, HERMITE[1][1])) if cubic else ()
    return StageTable(
        rows=(*tableau.rows, *((tableau.b_row,) if cubic else ())),
        nodes=(*tableau.nodes, *((1.0,) if cubic else ())),
        sides=((JUST_BEFORE if inside else HERE),) * count + ((HERE,) if cubic else ()),
        b=(*tableau.weights, *((0.0,) if cubic else ())),
        own=count,
        fsal=False,
        dense=slopes,
        end=HERMITE_END if cubic else (1.0,),
    )


class Evaluation(NamedTuple):
    """The field at (t, z): f with its autograd graph, if that is kept, and k without it, if a later stage reads k."""

    t: Tensor
    z: Tensor
    f: Tensor | None
    k: Tensor | None


class Outputs(NamedTuple):
    """The outputs in a step.

    first: the index of the first output. gradients: the gradients of the outputs, as rows of one tensor. places: the x
    of each output, 0 < x <= 1; None if only the device knows which of the rows lie in the step.
    """

    first: int
    gradients: Tensor
    places: Sequence[float] | None


@dataclass
class Cotangent:
    """The cotangents that a step gets from the later steps.

    lam: the cotangent of y1. kappa: the cotangent of the last stage, if it is also the first stage of the next step.
    stage: that stage, if the next step evaluated it.
    """

    lam: Tensor
    kappa: Tensor | None = None
    stage: Evaluation | None = None


@dataclass
class TimeCotangent:
    """Cotangents for exact gradients of a fixed grid.

    size: of the step size. start: of the step's start, at a constant size. places: of the x of each output.
    """

    size: Tensor
    start: Tensor
    places: list[Tensor] = field(default_factory=list)


class Back(NamedTuple):
    """The result of the reversal of a step: the cotangents before it, and those of the grid if they are needed."""

    cotangent: Cotangent
    timed: TimeCotangent | None


class StepAdjoint:
    """Propagates cotangents back over single steps, and adds those of the parameters to `sums`.

    timed: compute the cotangents of the grid too. arithmetic: for states. cotangents: the arithmetic for lam, kappa and
    mu, which are float32 if the states are half precision. at_once: the graphs of all stages of a step are held at
    once. If it is False, one graph is held at a time, and stages that others read are evaluated twice. It is None until
    the first graph has been measured. first: a function that is called with the first evaluation.
    """

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        cotangents: Arithmetic,
        form: StageTable,
        params: Sequence[Tensor],
        sums: GradientAccumulator,
        reached: UsedParameters,
        *,
        timed: bool,
    ) -> None:
        self.field = problem.field
        self.reached = reached
        self.arithmetic = arithmetic
        self.cotangents = cotangents
        self.at_once: bool | None = True if len(form.rows) == 1 else None  # one stage has one graph
        self.form = form
        self.params = tuple(params)
        self.sums = sums
        self.timed = timed
        self.nfe = 0
        self.first: Callable[[Evaluation], None] | None = None
        self._columns = form.columns()
        self.prepared = [
            arithmetic.stage(row, c, side) for row, c, side in zip(form.rows, form.nodes, form.sides, strict=True)
        ]
        b_row = tuple((i, b) for i, b in enumerate(form.b) if b)
        self._finish = arithmetic.last_stage(b_row, None, 1.0, HERE)
        self._polynomials = cotangents.polynomials(form.dense, form.end)

    def advance(self, taken: StepRecord, state: State, then: StepRecord) -> State:
        """Return the state after a step, with which the step `then` begins."""
        k = [self.plain(*self.first_stage(taken, state)) if state.k1 is None else state.k1]
        for i, t in self.slots(taken.at, self.form.own - self.form.fsal):
            k.append(self.plain(t, self.arithmetic.rk_stage(self.prepared[i], taken.at, state.y0, k, t)))
        y1, lost = self.end(taken.at, state, k)
        return State(y1, k[-1] if then.carried and not self.form.fsal else None, lost)

    def back(
        self, taken: StepRecord, state: State, outgoing: Cotangent, outputs: Outputs | None, shared: bool = True
    ) -> Back:
        """Return the cotangents before a step, from those after it and from those of its outputs.

        shared: the step before has outputs inside, which need this step's first stage. `WholeStepAdjoint` reads it.
        """
        at = taken.at
        self.sums.begin()
        dense = outputs is not None and (outputs.places is None or self.timed or any(x < 1.0 for x in outputs.places))
        stages, k = self._replay(taken, state, outgoing, dense=dense)
        if self.first is not None:
            first, self.first = self.first, None
            first(next(stage for stage in stages if stage is not None))
        lam, at_start, extra = self.into_stages(at, outgoing, outputs)
        mu: dict[int, Tensor] = {}
        kappas: dict[int, Tensor] = {}
        taus: dict[int, Tensor] = {}
        for i in range(len(k) - 1, -1, -1):
            kappa, stage = self._kappa(i, at, lam, mu, extra.get(i)), stages[i]
            if kappa is None:
                continue
            kappas[i] = kappa
            if stage is None or (i == 0 and taken.carried):
                continue  # the step before computes its vjp
            mu_i, tau = self.vjp(stage, kappa)
            if mu_i is not None:
                mu[i] = mu_i
            if tau is not None:
                taus[i] = tau
        self.commit_sums()
        timed = self._of_time(at, k, kappas, taus, state, outputs) if self.timed else None
        starts = [*mu.values(), *at_start]
        lam = self.cotangents.adjoint_stage(lam, starts, (1.0,) * len(starts), None) if starts else lam
        return Back(Cotangent(lam, kappas.get(0), stages[0]) if taken.carried else Cotangent(lam), timed)

    def _replay(
        self, taken: StepRecord, state: State, outgoing: Cotangent, *, dense: bool
    ) -> tuple[list[Evaluation | None], list[Tensor]]:
        """Recompute the step's stages, each with its graph. Stages at the end that are not needed are left out."""
        form, arithmetic, at = self.form, self.arithmetic, taken.at
        known = form.own - form.fsal
        wanted = form.stages if dense else form.own if outgoing.kappa is not None else known
        given = known if form.fsal and outgoing.stage is not None else None
        rows = (form.rows[i] for i in range(1, wanted) if i != given)
        read = set(range(wanted)) if self.timed else {j for row in rows for j, _ in row}
        stages: list[Evaluation | None] = []
        k: list[Tensor] = []

        def add(stage: Evaluation) -> None:
            stages.append(stage)
            k.append(stage.z if stage.k is None else stage.k)  # z is a placeholder: no stage reads it

        if state.k1 is None:
            add(self._evaluate(*self.first_stage(taken, state), 0 in read or taken.carried))
        else:
            stages.append(None)
            k.append(state.k1)
        for i, t in self.slots(at, wanted):
            if i == known and form.fsal:  # the field at y1, which is the first stage of the next step
                stage = outgoing.stage
                if stage is None:
                    (t,) = arithmetic.times(at, (1.0,), form.sides[i])
                    stage = self._evaluate(t, self.end(at, state, k)[0], i in read)
                add(stage)
            else:
                add(self._evaluate(t, arithmetic.rk_stage(self.prepared[i], at, state.y0, k, t), i in read))
        return stages, k

    def first_stage(self, taken: StepRecord, state: State) -> tuple[Tensor, Tensor]:
        """Return (t, z) of the first stage."""
        return self.arithmetic.times(taken.start, (taken.node,), taken.side)[0], state.y0

    def slots(self, at: Interval, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (i, t) for the stages from the second one up to `stop`. The computation of the stage fills t."""
        for side, stages in groupby(range(1, stop), key=self.form.sides.__getitem__):
            indices = list(stages)
            yield from zip(indices, self.arithmetic.slots(at, [self.form.nodes[i] for i in indices], side), strict=True)

    def end(self, at: Interval, state: State, k: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return y1, with the bits of the forward solve, and what it lost by rounding."""
        if state.lost is not None:
            return reference.compensated(state.y0, k, self._finish.row, at.dt, state.lost)
        return self.arithmetic.rk_finish(self._finish, at, state.y0, k, None)[0], None

    def into_stages(
        self, at: Interval, outgoing: Cotangent, outputs: Outputs | None
    ) -> tuple[Tensor, list[Tensor], dict[int, Tensor]]:
        """Return lam with the outputs' part, and the cotangents of y0 and of each stage that do not come from y1."""
        lam, kappa, at_start, extra = outgoing.lam, outgoing.kappa, list[Tensor](), dict[int, Tensor]()
        if outputs is not None and outputs.places is not None and all(x == 1.0 for x in outputs.places):
            given = outputs.gradients
            lam = lam + (given[0] if len(outputs.places) == 1 else given.sum(0))
        elif outputs is not None:
            found = self.cotangents.dense_adjoint(self._polynomials, at, lam, outputs.first, outputs.gradients)
            lam, at_start = found.lam, [found.start]
            extra = {j: x for (j, _), x in zip(self.form.dense, found.extra, strict=True)}
        if kappa is not None:
            last = self.form.own - 1
            extra[last] = kappa if last not in extra else kappa + extra[last]
        return lam, at_start, extra

    def _kappa(self, i: int, at: Interval, lam: Tensor, mu: dict[int, Tensor], extra: Tensor | None) -> Tensor | None:
        """Return the cotangent of stage i, or None if nothing depends on that stage."""
        terms = [(lam, self.form.b[i])] if self.form.b[i] else []
        terms += [(mu[j], a) for j, a in self._columns[i] if j in mu]
        if not terms:
            return extra
        return self.cotangents.adjoint_stage(extra, [x for x, _ in terms], [a for _, a in terms], at)

    def plain(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the field at (t, z). Autograd records it only if it is on."""
        self.nfe += 1
        return self.arithmetic.as_contiguous(self.field(t, z))

    def _evaluate(self, t: Tensor, z: Tensor, read: bool) -> Evaluation:
        """Evaluate the field at (t, z) for its vjp, and for later stages if they read it."""
        if self.at_once is False:
            return Evaluation(t, z, None, self.plain(t, z) if read else None)
        stage = self._measured(t, z) if self.at_once is None else self.taped(t, z)
        if self.field.copies_output:
            self.at_once = False  # func overwrites its output, which its graph may have saved
        return stage if self.at_once else stage._replace(f=None)

    def _measured(self, t: Tensor, z: Tensor) -> Evaluation:
        """Evaluate the field with a graph for the first time.

        The size of the graph decides whether all graphs of a step are held at once.
        """
        try:
            with graph_size(z.device, self.params) as size:
                stage = self.taped(t, z)
        except RuntimeError:  # func calls torch.func, which does not work while its graph is measured
            self.at_once = True
            return self.taped(t, z)
        self.at_once = fits(size() * self.form.stages, z.device)
        return stage

    def taped(self, t: Tensor, z: Tensor) -> Evaluation:
        self.nfe += 1
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            if self.timed:
                t = t.detach().requires_grad_(True)
            f = self.field(t, z)
        return Evaluation(t, z, f, self.arithmetic.as_contiguous(f.detach()))

    def vjp(self, stage: Evaluation, kappa: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (mu, tau), the vjp of kappa for the argument and the time. Add that for the parameters to `sums`."""
        if stage.f is None or not self.at_once:
            stage = self.taped(stage.t, stage.z)
        f = stage.f
        if f is None or not f.requires_grad:
            return None, None
        inputs = (stage.z, stage.t, *self.params) if self.timed else (stage.z, *self.params)
        wide = kappa.dtype
        mu, *rest = vjp(f, inputs, kappa if f.dtype is wide else kappa.to(f.dtype))
        tau = rest.pop(0) if self.timed else None
        if self.params:
            self.reached.see(rest)
            self.sums.add(rest, 1.0, 0.0)
        if mu is not None:
            mu = self.cotangents.as_contiguous(mu if mu.dtype is wide else mu.to(wide))
        return mu, tau

    def commit_sums(self) -> None:
        """Add the step's gradients of the parameters to those of the later steps."""
        self.sums.commit()

    def _of_time(
        self,
        at: Interval,
        k: Sequence[Tensor],
        kappas: dict[int, Tensor],
        taus: dict[int, Tensor],
        state: State,
        outputs: Outputs | None,
    ) -> TimeCotangent:
        """Return the cotangents of the grid.

        They follow from two facts: kappa_i is h times the factor of k_i, and the time of a stage is t0 + c_i h.
        """
        dot, form, y0 = self.cotangents.real_dot, self.form, state.y0
        zero = torch.zeros((), dtype=of_times(y0.dtype), device=y0.device)
        size = sum((dot(kappa, k[i]).to(zero) / at.signed for i, kappa in kappas.items()), zero)
        size = sum((tau.to(zero) * form.nodes[i] for i, tau in taus.items()), size)
        result = TimeCotangent(size, sum((tau.to(zero) for tau in taus.values()), zero))
        if outputs is None or outputs.places is None:
            return result
        y1, _ = self.end(at, state, k)
        for x, g in zip(outputs.places, outputs.gradients, strict=True):
            slope = (y1 - y0) * _derivative(form.end, x)
            for j, weights in form.dense:
                slope = slope + k[j] * (at.signed * _derivative(weights, x))
            result.places.append(dot(g, slope).to(zero))
        return result


def of_times(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which dL/dt is summed: that of the state, and at least float32.

    It is not always float64, because some devices have no doubles.
    """
    return torch.promote_types(dtype.to_real(), torch.float32)


def _derivative(weights: Sequence[float], x: float) -> float:
    """Return the derivative of sum_d weights[d] x^(d + 1) at x."""
    return sum((d + 1) * weight * x**d for d, weight in enumerate(weights))
