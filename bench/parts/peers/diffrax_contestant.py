"""diffrax on a problem of peers.py, compiled by jax.jit; all but the tolerances is its default.

The gradient is that of its recommended adjoint, backpropagation with checkpoints.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parts.common.libraries import DIFFRAX
from parts.peers.problems import Problem, VanDerPol
from parts.peers.torch_contestants import Solved
from parts.solve.solving import Quantities

MAX_STEPS = 1024  # more than any problem takes; the memory of the checkpoints grows with it
EVALUATIONS = 6  # of the field in an attempted step of dopri5; diffrax counts steps alone


class Diffrax:
    """A problem for diffrax, on one thread of the CPU."""

    def __init__(self, problem: Problem, rtol: float) -> None:
        # Before JAX starts. The second: XLA's threads would share the CPU time that is measured.
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
        jax, diffrax = (importlib.import_module(name) for name in ("jax", "diffrax"))
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_default_matmul_precision", "highest")
        self.jax, self.problem = jax, problem
        self.y0 = jax.numpy.asarray(problem.start().numpy())
        self.parameters = [jax.numpy.asarray(p.detach().numpy()) for p in problem.field().parameters()]
        field = FIELDS[problem.jax](jax)
        ts = jax.numpy.asarray(problem.t().double().numpy())

        def solve(y0: Any, parameters: Any) -> tuple[Any, Any]:
            found = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                diffrax.Dopri5(),
                t0=0.0,
                t1=problem.t_end,
                dt0=None,
                y0=y0,
                args=parameters,
                stepsize_controller=diffrax.PIDController(rtol=rtol, atol=rtol),
                saveat=diffrax.SaveAt(ts=ts),
                max_steps=MAX_STEPS,
            )
            return found.ys, found.stats["num_steps"]

        def loss(y0: Any, parameters: Any) -> tuple[Any, Any]:
            ys, steps = solve(y0, parameters)
            return (ys[1:] ** 2).mean(), (ys, steps)

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        self.compiled = jax.jit(gradient if problem.gradient else solve)

    def run(self) -> Any:
        return self.jax.block_until_ready(self.compiled(self.y0, self.parameters))

    def solved(self) -> Solved:
        if not self.problem.gradient:
            ys, steps = self.run()
            return Solved(Quantities(tensor(ys)), None, 0, int(steps))
        (_, (ys, steps)), (grad_y0, rest) = self.run()
        grad_parameters = torch.cat([tensor(grad).flatten() for grad in rest]) if rest else None
        return Solved(Quantities(tensor(ys), tensor(grad_y0), grad_parameters), None, 0, int(steps))


def tensor(x: Any) -> Tensor:
    """A tensor of an array of JAX."""
    return torch.from_numpy(np.array(x))


def mlp(jax: Any, parameters: Any, x: Any) -> Any:
    """Linear layers with tanh between them."""
    for i in range(0, len(parameters), 2):
        x = (jax.numpy.tanh(x) if i else x) @ parameters[i].T + parameters[i + 1]
    return x


def with_time(jax: Any, parameters: Any, t: Any, x: Any) -> Any:
    """The network of (x, t)."""
    column = jax.numpy.full((len(x), 1), t, x.dtype)
    return mlp(jax, parameters, jax.numpy.concatenate([x, column], 1))


def flow(jax: Any) -> Callable[..., Any]:
    def field(t: Any, y: Any, parameters: Any) -> Any:
        z = y[:, :-1]
        trace: Any = 0.0
        dz: Any = None
        for i in range(z.shape[1]):
            along = jax.numpy.zeros_like(z).at[:, i].set(1.0)
            dz, slope = jax.jvp(lambda z: with_time(jax, parameters, t, z), (z,), (along,))
            trace = trace + slope[:, i]
        return jax.numpy.concatenate([dz, -trace[:, None]], 1)

    return field


def van_der_pol(jax: Any) -> Callable[..., Any]:
    def field(t: Any, y: Any, parameters: Any) -> Any:
        x, v = y[..., 0], y[..., 1]
        return jax.numpy.stack([v, VanDerPol.mu * (1 - x**2) * v - x], -1)

    return field


FIELDS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "cubic": lambda jax: lambda t, y, parameters: mlp(jax, parameters, y**3),
    "flow": flow,
    "deep": lambda jax: lambda t, y, parameters: mlp(jax, parameters, y),
    "velocity": lambda jax: lambda t, y, parameters: with_time(jax, parameters, t, y),
    "van_der_pol": van_der_pol,
    "sine": lambda jax: lambda t, y, parameters: jax.numpy.sin(y),
}


def diffraxes(problem: Problem, rtol: float) -> dict[str, Any]:
    """The contestant of diffrax."""
    return {DIFFRAX: lambda: Diffrax(problem, rtol)}
