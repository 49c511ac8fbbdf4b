"""The other solvers of a case: torchdiffeq, torchode, and diffrax jitted, each with the gradient of a pass.

A maker returns a function without arguments that does one solve, or one training step, and returns a Run. torchode and
diffrax are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parts.common.fields import ConvField, Counted, DeepField, FlowField, MLPField
from parts.common.libraries import DIFFRAX, OURS, RIVAL, function
from parts.common.modes import ADJOINT, DISCRETE
from parts.compiled.cases import FORWARD, Case

TORCHODE = "torchode"
COMPILED, EAGER = f"{OURS} compiled", f"{OURS} eager"


class Run(NamedTuple):
    """The results of one run. work: what the library says of it (evaluations or steps, the loop)."""

    ys: Any
    gradients: tuple[Any, ...]
    work: dict[str, Any]


Contestant = Callable[[], Run]


def loss_of(ys: Any) -> Any:
    """The mean over outputs and samples of |y|^2."""
    return (ys**2).sum() / (ys.shape[0] * ys.shape[1])


def stepped(field: nn.Module, solve: Callable[[Tensor], tuple[Tensor, dict[str, Any]]], case: Case, timed: str) -> Run:
    """One solve without gradients, or one training step."""
    if timed == FORWARD:
        with torch.no_grad():
            ys, work = solve(case.start())
        return Run(ys, (), work)
    y0 = case.start().requires_grad_()
    ys, work = solve(y0)
    return Run(ys.detach(), torch.autograd.grad(loss_of(ys), [y0, *field.parameters()]), work)


def by_us(case: Case, timed: str, *, compiled: bool) -> Contestant:
    """node_cuda, compiled or not."""
    field, t, solver = case.field(), case.t(), function(OURS, "solve")
    solve = {"gradient": timed} if timed != FORWARD else {}
    options = {"options": {"compile": True}} if compiled else {}
    tolerances = {"rtol": case.rtol, "atol": case.atol}
    stats: Any = None

    def ys(y0: Tensor) -> tuple[Tensor, dict[str, Any]]:
        nonlocal stats
        found = solver(field, y0, t, method="dopri5", **tolerances, **solve, **options)
        stats = found.stats
        return found.ys, {}

    def run() -> Run:
        found = stepped(field, ys, case, timed)
        loops = {"loop": stats.loop, "why": stats.why}
        if timed != FORWARD:
            loops |= {"loop_backward": stats.loop_backward, "why_backward": stats.why_backward}
        return found._replace(work={"nfe": stats.nfe, "nfe_backward": stats.nfe_backward, **loops})

    return run


def by_torchdiffeq(case: Case, timed: str) -> Contestant:
    """torchdiffeq: with the adjoint, or by backprop through the steps, its counterpart of the discrete adjoint."""
    counted, t = Counted(case.field()), case.t()
    solver = function(RIVAL, "odeint_adjoint" if timed == ADJOINT else "odeint")

    def ys(y0: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return solver(counted, y0, t, rtol=case.rtol, atol=case.atol, method="dopri5"), {"nfe": counted.reset()}

    def run() -> Run:
        found = stepped(counted, ys, case, timed)
        return found._replace(work={**found.work, "nfe_backward": counted.reset()})

    return run


class Flattened(nn.Module):
    """A field as torchode calls it: with a time for each sample, and states of two dimensions."""

    def __init__(self, field: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.field, self.shape = field, shape

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        wide = t.reshape(-1, *[1] * (len(self.shape) - 1))
        return self.field(wide, y.view(self.shape)).flatten(1)


def by_torchode(case: Case, timed: str) -> Contestant:
    """torchode, which solves each sample with steps of its own: with its joint adjoint, or by backprop."""
    torchode = importlib.import_module("torchode")
    field = case.field()
    t = case.t().expand(case.shape[0], -1).contiguous()
    term = torchode.ODETerm(Flattened(field, case.shape))
    method = torchode.Dopri5(term=term)
    control = torchode.IntegralController(atol=case.atol, rtol=case.rtol, term=term)
    adjoint = torchode.JointBacksolveAdjoint if timed == ADJOINT else torchode.AutoDiffAdjoint
    solver = adjoint(term, method, control) if timed == ADJOINT else adjoint(method, control)

    def ys(y0: Tensor) -> tuple[Tensor, dict[str, Any]]:
        found = solver.solve(torchode.InitialValueProblem(y0=y0.flatten(1), t_eval=t))
        return found.ys.transpose(0, 1).reshape(-1, *case.shape), {"steps": int(found.stats["n_steps"].max())}

    return lambda: stepped(field, ys, case, timed)


def by_diffrax(case: Case, timed: str) -> Contestant:
    """diffrax, jitted: RecursiveCheckpointAdjoint for the discrete adjoint, BacksolveAdjoint for the adjoint."""
    diffrax, jax = map(importlib.import_module, ("diffrax", "jax"))
    field = case.field()
    formula, parameters = in_jax(field), [jax.numpy.array(p.detach().numpy()) for p in field.parameters()]
    y0, ts = (jax.numpy.array(x.numpy()) for x in (case.start(), case.t()))
    adjoint = diffrax.BacksolveAdjoint() if timed == ADJOINT else diffrax.RecursiveCheckpointAdjoint()

    def solve(y0: Any, parameters: Any, ts: Any) -> Any:
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(formula),
            diffrax.Dopri5(),
            ts[0],
            ts[-1],
            None,
            y0,
            parameters,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(rtol=case.rtol, atol=case.atol),
            adjoint=adjoint,
            max_steps=4096,
        )
        return found.ys, found.stats["num_steps"]

    def loss(y0: Any, parameters: Any, ts: Any) -> Any:
        ys, steps = solve(y0, parameters, ts)
        return loss_of(ys), (ys, steps)

    once = jax.jit(solve if timed == FORWARD else jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def run() -> Run:
        found = jax.block_until_ready(once(y0, parameters, ts))
        if timed == FORWARD:
            (ys, steps), gradients = found, ()
        else:
            (_, (ys, steps)), (grad_y0, grads) = found
            gradients = (grad_y0, *grads)
        return Run(ys, gradients, {"steps": int(steps)})

    return run


def in_jax(field: nn.Module) -> Callable[[Any, Any, Any], Any]:
    """The formula of a field of the cases in JAX, as a function of (t, y, parameters)."""
    jax = importlib.import_module("jax")
    jnp = jax.numpy
    activation = {MLPField: jnp.tanh, DeepField: jax.nn.elu, FlowField: jnp.tanh}.get(type(field), jax.nn.relu)

    def layers(x: Any, p: Any) -> Any:
        for i in range(0, len(p), 2):
            x = x @ p[i].T + p[i + 1]
            x = activation(x) if i + 2 < len(p) else x
        return x

    def flow(t: Any, state: Any, p: Any) -> Any:
        def velocity(z: Any) -> Any:
            return layers(jnp.concatenate([z, t[None]]), p)

        def sample(z: Any) -> Any:
            return jnp.append(velocity(z), -jnp.trace(jax.jacrev(velocity)(z)))

        return jax.vmap(sample)(state[:, :-1])

    def convolved(x: Any, w: Any, b: Any) -> Any:
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME") + b[:, None, None]

    def convolutions(t: Any, z: Any, p: Any) -> Any:
        time = jnp.broadcast_to(t, (z.shape[0], 1, *z.shape[2:])).astype(z.dtype)
        return convolved(activation(convolved(jnp.concatenate([z, time], 1), p[0], p[1])), p[2], p[3])

    if isinstance(field, FlowField):
        return flow
    return convolutions if isinstance(field, ConvField) else lambda t, y, p: layers(y, p)


MAKERS: dict[str, Callable[[Case, str], Contestant]] = {
    COMPILED: lambda case, timed: by_us(case, timed, compiled=True),
    EAGER: lambda case, timed: by_us(case, timed, compiled=False),
    RIVAL: by_torchdiffeq,
    TORCHODE: by_torchode,
    DIFFRAX: by_diffrax,
}
"""Contestants by name, the compiled one first."""

GRADIENT_OF = {
    RIVAL: {DISCRETE: "backprop", ADJOINT: "adjoint"},
    TORCHODE: {DISCRETE: "backprop", ADJOINT: "joint adjoint"},
    DIFFRAX: {DISCRETE: "RecursiveCheckpointAdjoint", ADJOINT: "BacksolveAdjoint"},
}
"""How the others differentiate in a pass."""
