"""What gradients.py compares: the ways to a gradient, the problems, and the gradients that the errors are told by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import libraries
import torch
from fields import Counted, MLPField
from libraries import OURS, REFERENCE, RIVAL
from solving import flat_gradient
from torch import Tensor, nn

LIMIT = {"max_num_steps": 20_000}  # of the forward and of the backward solve: a failure takes seconds, not hours


class Mode(NamedTuple):
    """A library's function and the arguments that choose how it differentiates."""

    library: str
    function: str
    arguments: dict[str, Any]


ADJOINT, DISCRETE = f"{RIVAL} adjoint", "discrete"
MODES = {
    ADJOINT: Mode(RIVAL, "odeint_adjoint", {}),
    f"{RIVAL} backprop": Mode(RIVAL, "odeint", {}),
    "backprop": Mode(OURS, "odeint", {}),
    "adjoint": Mode(OURS, "odeint_adjoint", {}),
    "adjoint, seminorm": Mode(OURS, "odeint_adjoint", {"adjoint_options": {"norm": "seminorm", **LIMIT}}),
    DISCRETE: Mode(OURS, "odeint_adjoint", {"gradient": "discrete"}),
    "discrete, 8 checkpoints": Mode(OURS, "odeint_adjoint", {"gradient": "discrete", "checkpoints": 8}),
}
TIMED = (ADJOINT, "adjoint", DISCRETE, "discrete, 8 checkpoints", "backprop")
QUICK_MODES = (ADJOINT, DISCRETE)


def installed(names: tuple[str, ...]) -> list[str]:
    """Those of the modes whose library is there."""
    return [name for name in names if libraries.installed(MODES[name].library)]


class DissipativeField(nn.Module):
    """dz/dt = -A(z), A(z) = rate z + W^T (W z + b)^3: monotone; backwards in time no error stays small.

    z (batch, dim) -> (batch, dim), dtype of the parameters.
    """

    def __init__(self, dim: int, hidden: int, rate: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((dim,), rate))
        self.inner = nn.Linear(dim, hidden)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -(self.rate * z + self.inner(z).pow(3) @ self.inner.weight)


class DeepField(nn.Module):
    """An MLP of two hidden layers. z (batch, dim) -> (batch, dim), dtype of the parameters."""

    def __init__(self, dim: int, hidden: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden), activation(), nn.Linear(hidden, hidden), activation(), nn.Linear(hidden, dim)
        )

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(z)


class GradientProblem(NamedTuple):
    """A field in float32 with a start and output times; the loss is the sum of all squared outputs / (outputs batch).

    `target`: the ratio of torchdiffeq's adjoint's time to the discrete adjoint's that is promised, if it is.
    """

    name: str
    make_field: Callable[[], nn.Module]
    batch: int
    dim: int
    times: tuple[float, ...]
    rtol: float = 1e-7  # torchdiffeq's defaults
    atol: float = 1e-9
    target: float | None = None

    def field(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Counted:
        """Always the same parameters, rounded to float32."""
        torch.manual_seed(0)
        return Counted(self.make_field()).to(device, dtype)

    def start(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.batch, self.dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def t(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rounded to float32: the same times in every dtype."""
        return torch.tensor(self.times).to(device, dtype)


def evenly(t_end: float, outputs: int) -> tuple[float, ...]:
    return tuple(torch.linspace(0.0, t_end, outputs).tolist())


def to_time(batch: int, dim: int, hidden: int, outputs: int, target: float) -> GradientProblem:
    name = f"{batch}x{dim} hidden {hidden}, {outputs} outputs"
    return GradientProblem(name, lambda: MLPField(dim, hidden), batch, dim, evenly(5.0, outputs), target=target)


PROBLEMS_TIMED = (
    to_time(16, 2, 50, 2, target=3.0),
    to_time(16, 2, 50, 100, target=10.0),
    to_time(128, 64, 64, 2, target=3.0),
    to_time(128, 64, 64, 100, target=10.0),
)
LOOSE = {"rtol": 1e-5, "atol": 1e-7}
PROBLEMS_PLOTTED = (
    # An early output, or nothing would be left of y0's gradient; the last is so late that rate * time is 20.
    GradientProblem(
        "dissipative, rate x time = 20", lambda: DissipativeField(8, 32, 4.0), 1024, 8, (0.0, 0.25, 5.0), **LOOSE
    ),
    GradientProblem("latent ODE, 200 outputs", lambda: DeepField(8, 64, nn.ELU), 256, 8, evenly(5.0, 200), **LOOSE),
    GradientProblem(
        "a million parameters, state of 4", lambda: DeepField(4, 1000, nn.Tanh), 1, 4, evenly(5.0, 2), **LOOSE
    ),
)
QUICK_PROBLEM = GradientProblem("quick", lambda: MLPField(2, 8), 4, 2, evenly(1.0, 3), rtol=1e-4, atol=1e-4, target=3.0)
PROBLEMS = {problem.name: problem for problem in (*PROBLEMS_TIMED, *PROBLEMS_PLOTTED, QUICK_PROBLEM)}


class Gradients(NamedTuple):
    """Of y0 and of all parameters, in one vector; and the evaluations forward and backward."""

    y0: Tensor
    parameters: Tensor
    nfe: int
    nfe_backward: int


class Step:
    """A problem by a mode, ready to run: `step()` solves and differentiates."""

    def __init__(self, problem: GradientProblem, mode: str, device: torch.device) -> None:
        self.problem, self.mode, self.device = problem, MODES[mode], device
        self.function = libraries.function(self.mode.library, self.mode.function)
        self.field, self.y0, self.t = problem.field(device), problem.start(device), problem.t(device)

    def __call__(self, part: float = 1.0) -> Gradients:
        """`part`: of the time to solve over."""
        self.field.zero_grad(set_to_none=False)
        self.field.reset()
        start = self.y0.clone().requires_grad_()
        arguments = {"rtol": self.problem.rtol, "atol": self.problem.atol, "method": "dopri5", "options": dict(LIMIT)}
        loss = loss_of(self.function(self.field, start, part * self.t, **arguments, **self.mode.arguments))
        nfe = self.field.reset()
        loss.backward()
        return collected(self.field, start, nfe)


def loss_of(ys: Tensor) -> Tensor:
    return ys.square().sum() / (ys.shape[0] * ys.shape[1])


def collected(field: Counted, start: Tensor, nfe: int) -> Gradients:
    """Copies: the parameters' gradients are overwritten by the next step."""
    parameters = flat_gradient(field)
    assert parameters is not None and start.grad is not None
    return Gradients(start.grad, parameters, nfe, field.reset())


def exact(problem: GradientProblem, device: torch.device) -> Gradients:
    """In float64 by dopri8 at rtol 1e-12, differentiated by backpropagation; torchdiffeq's word, where it is there."""
    by = RIVAL if libraries.installed(RIVAL) else REFERENCE
    return _in_float64(problem, device, by, rtol=1e-12, atol=1e-14, method="dopri8")


def of_same_steps(problem: GradientProblem, device: torch.device) -> Gradients:
    """In float64 over the very steps that our float32 solve takes, differentiated by our backpropagation.

    The steps are forced: no tolerance rejects one, and each would be longer if the next time were not to be met.
    """
    solve = libraries.function(OURS, "solve")
    tolerances = {"rtol": problem.rtol, "atol": problem.atol, "method": "dopri5"}
    with torch.no_grad():
        solution = solve(
            problem.field(device),
            problem.start(device),
            problem.t(device),
            **tolerances,
            options={"record_steps": True, **LIMIT},
        )
    times = torch.tensor(solution.stats.step_times, dtype=torch.float64, device=device)
    forced = {"step_t": times[1:], "first_step": float(times[-1] - times[0])}
    return _in_float64(problem, device, REFERENCE, rtol=1e30, atol=1e30, method="dopri5", options=forced)


def _in_float64(problem: GradientProblem, device: torch.device, by: str, **arguments: Any) -> Gradients:
    field = problem.field(device, torch.float64)
    start = problem.start(device, torch.float64).requires_grad_()
    with libraries.path(by):
        ys = libraries.function(by, "odeint")(field, start, problem.t(device, torch.float64), **arguments)
        nfe = field.reset()
        loss_of(ys).backward()
    return collected(field, start, nfe)


def difference(found: Gradients, expected: Gradients) -> float:
    """The larger relative error of the two gradients, each in the Euclidean norm."""
    pairs = ((found.y0, expected.y0), (found.parameters, expected.parameters))
    errors = [torch.linalg.vector_norm(a.double() - b) / torch.linalg.vector_norm(b) for a, b in pairs]
    return torch.stack(errors).max().item()  # NaN if one is
