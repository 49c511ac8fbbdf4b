"""The vector fields f(t, z) that the benchmarks solve, and wrappers that count evaluations and steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MLPField(nn.Module):
    """dz/dt = W2 tanh(W1 z + b1) + b2.  z (batch, dim) -> (batch, dim), dtype of the parameters."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(z)


class SineField(nn.Module):
    """dz/dt = sin z: a very cheap nonlinear field. z and dz/dt have the same shape, any shape."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.sin(z)

    @staticmethod
    def exact(z0: Tensor, t: Tensor) -> Tensor:
        """z(t), of shape (*t, *z0): tan(z / 2) grows as e^t, and no z leaves the interval between two odd pi."""
        t = t.view(-1, *[1] * z0.dim())
        turn = 2 * torch.pi * torch.round(z0.detach() / (2 * torch.pi))
        return turn + 2 * torch.atan(torch.tan((z0 - turn) / 2) * torch.exp(t))


class ConvField(nn.Module):
    """dz/dt = conv(relu(conv([z, t]))): a small residual branch with the time as one more channel.

    z (batch, channels, height, width) -> the same shape; t () is broadcast to one channel of the image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels + 1, channels, kernel_size=3, padding=1)
        self.outer = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        time = t.to(z.dtype).expand(z.shape[0], 1, *z.shape[2:])
        return self.outer(torch.relu(self.inner(torch.cat([z, time], dim=1))))


class DissipativeField(nn.Module):
    """dz/dt = -A(z), A(z) = rate z + W^T (W z + b)^3. A is monotone, so errors grow fast backwards in time.

    z (batch, dim) -> (batch, dim), dtype of the parameters.
    """

    def __init__(self, dim: int, hidden: int, rate: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((dim,), rate))
        self.inner = nn.Linear(dim, hidden)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -(self.rate * z + self.inner(z).pow(3) @ self.inner.weight)


def deep(inputs: int, hidden: int, outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    """An MLP with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, hidden), activation(), nn.Linear(hidden, outputs)
    )


class DeepField(nn.Module):
    """An MLP of two hidden layers. z (batch, dim) -> (batch, dim), dtype of the parameters."""

    def __init__(self, dim: int, hidden: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.net = deep(dim, hidden, dim, activation)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(z)


class FlowField(nn.Module):
    """A continuous normalizing flow: dz/dt = g(z, t), g an MLP, and dl/dt = -tr(dg/dz), exactly, by autograd.

    [z, l] (batch, dim + 1) -> the same shape, dtype of the parameters. dz/dt does not depend on l.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = deep(dim + 1, hidden, dim, nn.Tanh)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.mul_(3.0)  # the points of an untrained flow would hardly move

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        outside = torch.is_grad_enabled()  # then the trace must be differentiable
        with torch.enable_grad():
            z = state[:, :-1]
            if not z.requires_grad:
                z = z.detach().requires_grad_()
            dz = self.net(torch.cat([z, t.to(z.dtype).reshape(-1, 1).expand(len(z), 1)], dim=1))
            rows = [
                torch.autograd.grad(dz[:, i].sum(), z, create_graph=outside, retain_graph=True)[0][:, i]
                for i in range(dz.shape[1])
            ]
        return torch.cat([dz, -sum(rows[1:], rows[0])[:, None]], dim=1)


class CountsSteps(nn.Module):
    """Wraps `field` and counts the accepted steps in `accepted`, through torchdiffeq's callback."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field
        self.accepted = 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.field(t, z)

    def callback_accept_step(self, t: Tensor, z: Tensor, dt: Tensor) -> None:
        self.accepted += 1


class Counted(nn.Module):
    """Wraps `field` and counts its evaluations since the last `reset` in `nfe`."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field
        self.nfe = 0

    def reset(self) -> int:
        """Returns the count and sets it to zero."""
        nfe, self.nfe = self.nfe, 0
        return nfe

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.nfe += 1
        return self.field(t, z)
