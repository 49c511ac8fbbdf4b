"""A continuous normalizing flow: a density that a field carries from data to a base distribution.

    dx/dt = f(t, x),    d/dt log|det dx(t)/dx(t0)| = tr(df/dx)

Chen et al. 2018, arXiv:1806.07366, theorem 1. The trace is computed exactly, or estimated as eps^T (df/dx) eps with
E[eps eps^T] = 1: Grathwohl et al. 2019 (FFJORD), arXiv:1810.01367.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from node_cuda._eager import eager
from node_cuda._torch_modes import recordable
from node_cuda._typing import AdjointArguments, Func
from node_cuda.integrals.regularized import NOISES, Regularized, draw_noise
from node_cuda.nn.neural_ode import NeuralODE, refuse_others
from node_cuda.problem.problem import check_func
from node_cuda.solution import Stats
from node_cuda.status import InvalidField, InvalidInput, InvalidType, did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Unpack

TRACES = ("hutchinson", "exact")


class Base(Protocol):
    """What the base distribution must have, as every torch.distributions.Distribution."""

    def sample(self, sample_shape: Any, /) -> Tensor:
        """Return samples of this shape."""
        ...

    def log_prob(self, z: Tensor, /) -> Tensor:
        """Return the logarithm of the density, one number for each sample or for each element."""
        ...


class ContinuousFlow(nn.Module):
    """The density of data x that func carries to z of a base distribution, a continuous normalizing flow (CNF).

        log p(x) = log p_base(z) + int tr(df/dx) dt,    dx/dt = func(t, x) from x at t[0] to z at t[1]

        flow = ContinuousFlow(func, shape=2)
        loss = -flow.log_prob(x).mean()
        new = flow.sample(100)

    func: an nn.Module of (t, x) with x of shape (n, *shape), which treats samples independently; or
    `regularized(func, kinetic=, jacobian=)`: then each result has the penalty, of shape (n,), as its last part. shape:
    that of one sample, or its number of elements. t: the time of the data and that of the base. base: a distribution
    of z with `sample` and `log_prob`, such as torch.distributions have, by default the standard normal. A base that is
    an nn.Module is trained with func.

    trace: "hutchinson" estimates the trace from one noise vector for each sample, which costs one vjp of func;
    it is drawn once for a solve, so that the gradient is that of one function (repeatable with torch.manual_seed).
    "exact" costs one vjp for each element of a sample, and may be set later: `flow.trace = "exact"`. noise: the
    distribution of the vector, "rademacher" or "gaussian". The other arguments are those of NeuralODE. func must be
    differentiable twice for training. stats: the statistics of the last solve.

    Under DistributedDataParallel, call the wrapped module: `z, log_det = ddp(x)`, `loss = -(flow.base_log_prob(z) +
    log_det).mean()`.
    """

    trace: str
    noise: str

    def __init__(
        self,
        func: nn.Module,
        shape: int | Sequence[int],
        t: tuple[float, float] | Tensor = (0.0, 1.0),
        *,
        base: Base | None = None,
        trace: Literal["hutchinson", "exact"] = "hutchinson",
        noise: Literal["rademacher", "gaussian"] = "rademacher",
        **solver: Unpack[AdjointArguments],
    ) -> None:
        super().__init__()
        refuse_others("ContinuousFlow", solver)
        check_func(func, "ContinuousFlow(func, shape)")
        times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
        if times.shape != (2,):
            raise InvalidInput(f"t must be two times, of the data and of the base; got {t!r:.60}. Use `t=(0.0, 1.0)`.")
        self.ode = NeuralODE(func, times, last_only=True, **solver)
        self.shape = torch.Size((shape,) if isinstance(shape, int) else shape)
        for name, value, known in (("trace", trace, TRACES), ("noise", noise, NOISES)):
            _check_one_of(name, value, known)
        if base is not None and not (hasattr(base, "sample") and hasattr(base, "log_prob")):
            raise InvalidType(
                f"base must have `sample` and `log_prob`; got a {type(base).__name__}. Use for example "
                "`torch.distributions.MultivariateNormal(mean, covariance)`."
            )
        self.base = base
        self.trace = trace
        self.noise = noise

    @eager
    def forward(self, x: Tensor, *, reverse: bool = False, with_log_det: bool = True) -> Any:
        """Return (z, log|det dz/dx|) for x of shape (n, *shape); with a regularized func also the penalty.

        reverse: from z to x. with_log_det: if False, return the state alone.
        """
        self._check(x)
        func, t = self.ode.func, self.ode.t
        assert t is not None
        t = t.flip(0) if reverse else t
        if not with_log_det:
            plain = func.func if isinstance(func, Regularized) else func
            return self.ode.solution(plain, x, t).ys[-1]
        field: nn.Module = self._with_trace(func.func if isinstance(func, Regularized) else func, x)
        if isinstance(func, Regularized):
            field = Regularized(field, func.kinetic, func.jacobian, 0, func.noise)
        solution = self.ode.solution(field, (x, x.new_zeros(len(x))), t)
        moved, log_det = (part[-1] for part in solution.ys)
        return (moved, log_det) if solution.integral is None else (moved, log_det, solution.integral[-1])

    def inverse(self, z: Tensor) -> Any:
        """Return (x, log|det dx/dz|) for z of shape (n, *shape); with a regularized func also the penalty."""
        return self(z, reverse=True)

    def log_prob(self, x: Tensor) -> Any:
        """Return log p(x) for x of shape (n, *shape), of shape (n,); with a regularized func (log p(x), penalty)."""
        z, log_det, *penalty = self(x)
        log_p = self.base_log_prob(z) + log_det
        return (log_p, *penalty) if penalty else log_p

    def base_log_prob(self, z: Tensor) -> Tensor:
        """Return the logarithm of the base's density at z of shape (n, *shape), of shape (n,)."""
        if self.base is None:
            return -0.5 * (z.square().flatten(1).sum(1) + math.prod(self.shape) * math.log(2 * math.pi))
        log_p = self.base.log_prob(z)
        if log_p.shape[:1] != z.shape[:1]:
            raise InvalidInput(
                f"base.log_prob must return one number for each of {len(z)} samples, or for each of their elements; "
                f"got shape {tuple(log_p.shape)}. Give `base` the shape of one sample, {tuple(self.shape)}."
            )
        return log_p if log_p.dim() == 1 else log_p.flatten(1).sum(1)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Return n samples of x, of shape (n, *shape), without a gradient. `inverse` has one."""
        if not hasattr(n, "__index__") or n < 0:
            use = "flow.sample(3)"
            if isinstance(n, (tuple, list)):
                use = f"flow.sample({math.prod(n)}).unflatten(0, {tuple(n)})"
            raise InvalidInput(f"n must be the number of samples; got {n!r:.60}. Use for example `{use}`.")
        if self.base is not None:
            z = self.base.sample((n,))
        else:
            like = next((p for p in self.ode.parameters() if p.is_floating_point()), None)
            z = torch.randn(
                (n, *self.shape),
                dtype=None if like is None else like.dtype,
                device=None if like is None else like.device,
            )
        return self(z, reverse=True, with_log_det=False)

    @property
    def stats(self) -> Stats | None:
        """The statistics of the last solve."""
        return self.ode.stats

    def _with_trace(self, func: Func, x: Tensor) -> WithTrace:
        _check_one_of("trace", self.trace, TRACES)
        if self.trace == "exact":
            return WithTrace(func, None)
        return WithTrace(func, draw_noise(self.noise, x.shape, x.dtype, x.device))

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.shape[1:] != self.shape or x.dim() == 0:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise InvalidInput(
                f"ContinuousFlow takes samples of shape (n, {', '.join(map(str, self.shape))}); got {got}. Use "
                "`x.unsqueeze(0)` for one sample, or another shape in `ContinuousFlow(func, shape)`."
            )

    def extra_repr(self) -> str:
        """Return the settings of the flow as text."""
        return f"shape={tuple(self.shape)}, trace={self.trace!r}, noise={self.noise!r}"


class WithTrace(nn.Module):
    """The field of (x, l): func, and tr(df/dx) for each sample. noise: eps, or None for the exact trace.

    It is made for one solve, so that the noise is the same in both passes.
    """

    def __init__(self, func: Func, noise: Tensor | None) -> None:
        super().__init__()
        self.func = func
        self.noise = noise
        # The parameters of a replica of DataParallel are found in another way.
        self._is_replica = getattr(func, "_is_replica", False)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return (func(t, x), the trace)."""
        x, taped = state[0], torch.is_grad_enabled()
        # Inference mode records nothing, and tensors made in it cannot be recorded later.
        with torch.inference_mode(False), torch.enable_grad():
            t, x = recordable(t, x)
            root = x if taped and x.requires_grad else x.detach().requires_grad_(True)
            dx = self.func(t, root.clone())  # func may write into the copy
            if not isinstance(dx, Tensor) or dx.shape != x.shape:
                got = f"shape {tuple(dx.shape)}" if isinstance(dx, Tensor) else f"a {type(dx).__name__}"
                raise InvalidField(f"func must return a tensor of x's shape, {tuple(x.shape)}; got {got}.")
            trace = self._trace(dx, root, taped)
        return (dx, trace) if taped else (dx.detach(), trace.detach())

    def _trace(self, dx: Tensor, root: Tensor, taped: bool) -> Tensor:
        if not dx.requires_grad:  # a constant field
            return root.new_zeros(len(root))
        if self.noise is not None:
            return (_vjp(dx, root, self.noise, taped) * self.noise).flatten(1).sum(1)
        rows = dx.flatten(1)
        entries = [
            _vjp(rows[:, i], root, torch.ones_like(rows[:, i]), taped or i + 1 < rows.shape[1], taped).flatten(1)[:, i]
            for i in range(rows.shape[1])
        ]
        return torch.stack(entries).sum(0)


def _vjp(dx: Tensor, root: Tensor, v: Tensor, keep: bool, taped: bool | None = None) -> Tensor:
    """Return v^T d(dx)/d(root). keep: the graph is used again. taped: the result is differentiated, by default keep."""
    (found,) = torch.autograd.grad(
        dx, root, v, retain_graph=keep, create_graph=keep if taped is None else taped, allow_unused=True
    )
    return torch.zeros_like(root) if found is None else found


def _check_one_of(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise InvalidInput(
            f"{name} must be {' or '.join(map(repr, known))}; got {value!r:.60}.{did_you_mean(value, known)}"
        )
