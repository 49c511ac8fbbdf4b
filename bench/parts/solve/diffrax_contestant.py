"""A case solved by diffrax, compiled by jax.jit, with the same field, parameters, initial state and tolerances.

All else is diffrax's default. Its gradient is by its recommended adjoint, backpropagation with checkpoints.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parts.common.timing import seconds
from parts.solve.solving import Problem, Quantities, Solved

MAX_STEPS = 256  # more than any case takes; the memory of the checkpoints grows with it


class DiffraxContestant:
    """A case for diffrax. Raises JAX's error if JAX finds no device of the problem's kind."""

    def __init__(self, problem: Problem) -> None:
        # Before JAX starts: else it reserves most of the GPU's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        jax, diffrax = (importlib.import_module(name) for name in ("jax", "diffrax"))
        # Products in float32, as in torch, not in TensorFloat-32.
        jax.config.update("jax_default_matmul_precision", "highest")
        case, field, y0 = problem
        self.jax, self.problem = jax, problem
        self.device = jax.devices("gpu" if y0.device.type == "cuda" else "cpu")[0]
        self.y0 = self._array(y0)
        self.parameters = [self._array(p) for p in field.parameters()]

        def vector_field(t: Any, y: Any, parameters: Any) -> Any:
            if case.hidden is None:
                return jax.numpy.sin(y)
            inner, inner_bias, outer, outer_bias = parameters
            return jax.numpy.tanh(y @ inner.T + inner_bias) @ outer.T + outer_bias

        def solve(y0: Any, parameters: Any) -> tuple[Any, Any]:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(vector_field),
                diffrax.Dopri5(),
                t0=0.0,
                t1=case.t_end,
                dt0=None,
                y0=y0,
                args=parameters,
                stepsize_controller=diffrax.PIDController(rtol=case.rtol, atol=case.atol),
                max_steps=MAX_STEPS,
            )
            assert solution.ys is not None
            return solution.ys[-1], solution.stats["num_accepted_steps"]

        def loss(y0: Any, parameters: Any) -> tuple[Any, tuple[Any, Any]]:
            y1, accepted = solve(y0, parameters)
            return (y1**2).sum() / case.batch, (y1, accepted)

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        self.run = jax.jit(solve if case.timed == "forward" else gradient)

    def solved(self) -> Solved:
        """One run with its counts: diffrax counts steps but not evaluations."""
        found = self._run()
        if self.problem.case.timed == "forward":
            y1, accepted = found
            return Solved(Quantities(self._ys(y1)), None, None, int(accepted))
        (_, (y1, accepted)), (grad_y0, grad_parameters) = found
        flat = [self._tensor(g).flatten() for g in grad_parameters]
        quantities = Quantities(self._ys(y1), self._tensor(grad_y0), torch.cat(flat) if flat else None)
        return Solved(quantities, None, None, int(accepted))

    def timed(self) -> float:
        """One run and its seconds."""
        return seconds(self._run, self.problem.y0.device)

    def _run(self) -> Any:
        return self.jax.block_until_ready(self.run(self.y0, self.parameters))

    def _ys(self, y1: Any) -> Tensor:
        """The outputs in the form of the other contestants: the initial state first."""
        return torch.stack([self.problem.y0, self._tensor(y1)])

    def _array(self, x: Tensor) -> Any:
        return self.jax.device_put(x.detach().cpu().numpy(), self.device)

    def _tensor(self, x: Any) -> Tensor:
        return torch.from_numpy(np.array(x)).to(self.problem.y0.device)
