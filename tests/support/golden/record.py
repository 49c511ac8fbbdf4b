"""Records a solve of the golden set as JSON: bits as a hash, rounded numbers, counts, and the status."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from golden.problems import Problem
from torch import Tensor, nn

from node_cuda import Solution, SolveError

COUNTS = ("nfe", "nfe_backward", "accepted", "rejected", "host_reads", "steps_again", "peak_checkpoints", "graph_of",
          "loop", "why", "loop_backward", "why_backward", "step_times")  # fmt: skip


def machine() -> str:
    """Return everything that the bits of these solves may depend on."""
    x = torch.arange(1, 65, dtype=torch.float64) / 7
    probe = hashlib.sha256(x.exp().numpy().tobytes() + x.pow(0.3).numpy().tobytes() + (x @ x).numpy().tobytes())
    return f"{torch.__version__.partition('+')[0]} {torch.backends.cpu.get_cpu_capability()} {probe.hexdigest()[:8]}"


def told(x: Tensor) -> list[Any]:
    """Return a hash of the bits, and a rounded number: the mean of the magnitudes."""
    x = x.detach().contiguous()
    raw = x.view(torch.uint8) if x.ndim else x.reshape(1).view(torch.uint8)
    size = x.abs().double().nan_to_num(nan=-1.0).mean() if x.numel() else torch.zeros(())
    return [hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:12], float(f"{float(size):.5g}")]


def record(problem: Problem, **options: Any) -> dict[str, Any]:
    """Record one solve with its gradients. options: further options."""
    func, y0, t, arguments, gradient, call = problem
    if options:
        arguments = {**arguments, "options": {**arguments.get("options", {}), **options}}
    parts = y0 if isinstance(y0, tuple) else (y0,)
    if gradient:
        t = t.clone().requires_grad_()
        parts = tuple(part.clone().requires_grad_() for part in parts)
    try:
        result = call(func, parts if isinstance(y0, tuple) else parts[0], t, **arguments)
    except Exception as failure:
        status = {"status": failure.status.name} if isinstance(failure, SolveError) else {}
        return {"raised": type(failure).__name__, **status}
    found: dict[str, Any] = {}
    if isinstance(result, Solution):
        outputs = [*(result.ys if isinstance(result.ys, tuple) else (result.ys,))]
        outputs += [x for x in (result.event_t, result.integral) if x is not None]
        found["status"] = result.status.name
    else:
        outputs = [*result] if isinstance(result, tuple) else [result]
    found["outputs"] = [told(x) for x in outputs]
    if gradient:
        loss = sum((x.abs().square() * 0.5).sum() for x in outputs if x.requires_grad)
        params = [*func.parameters()] if isinstance(func, nn.Module) else []
        inputs = [t, *parts, *params]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        found["gradients"] = [None if g is None else told(g) for g in grads]
    if isinstance(result, Solution):
        found |= {name: value for name in COUNTS if (value := getattr(result.stats, name)) is not None}
        if result.stats.step_times is not None:
            found["step_times"] = [float(f"{s:.9g}") for s in result.stats.step_times]
    return found
