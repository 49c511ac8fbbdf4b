"""The ODE-Net and its data: scikit-learn's bundled 8x8 handwritten digits, and the training loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from parts.common.fields import ConvField, Counted

Solver = Callable[..., Tensor]
CLASSES, PIXELS = 10, 8


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) float32 in [0, 1] and labels (n,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def fewer(self, images: int) -> Digits:
        """With the first `images` of the training set and the whole test set."""
        return self._replace(train_images=self.train_images[:images], train_labels=self.train_labels[:images])


def load(device: torch.device) -> Digits:
    """The 1797 images: 1347 for training and 450 for the test, stratified, always the same ones."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.as_tensor(part, device=device) for part in parts)
    return Digits(
        train_x.float().view(-1, 1, PIXELS, PIXELS),
        train_y,
        test_x.float().view(-1, 1, PIXELS, PIXELS),
        test_y,
    )


class ODENet(nn.Module):
    """images (n, 1, 8, 8) -> scores (n, 10): a convolution, dz/dt = f(z, t) from t = 0 to 1, a linear layer."""

    def __init__(self, channels: int, solver: Solver, **solver_options: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, kernel_size=3, padding=1)
        self.field = Counted(ConvField(channels))
        self.head = nn.Linear(channels * PIXELS * PIXELS, CLASSES)
        self.solver = solver
        self.solver_options = solver_options

    def forward(self, images: Tensor) -> Tensor:
        t = torch.tensor([0.0, 1.0], device=images.device)
        z = self.solver(self.field, self.stem(images), t, **self.solver_options)
        return self.head(z[-1].flatten(1))


def train(
    net: ODENet,
    digits: Digits,
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Trains by Adam with a one-cycle rate; returns history and test accuracy. report: called after every batch."""
    images, labels = digits.train_images, digits.train_labels
    batches = batches_of(digits, batch)
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * batches)
    history: list[dict[str, float]] = []
    start = time.perf_counter()
    for epoch in range(epochs):
        loss_sum, nfe, nfe_backward = 0.0, 0, 0
        order = torch.randperm(len(images)).to(images.device)
        for chosen in order.split(batch):
            optimizer.zero_grad()
            net.field.reset()
            loss = cross_entropy(net(images[chosen]), labels[chosen])
            nfe += net.field.reset()
            loss.backward()
            nfe_backward += net.field.reset()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(chosen)
            report(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.3f}")
        history.append(
            {
                "loss": loss_sum / len(images),
                "test_accuracy": accuracy(net, digits),
                "nfe": nfe / batches,
                "nfe_backward": nfe_backward / batches,
            }
        )
    return {
        "seconds": time.perf_counter() - start,
        "test_accuracy": history[-1]["test_accuracy"],
        "history": history,
    }


def batches_of(digits: Digits, batch: int) -> int:
    """The number of batches in an epoch; the last one may be smaller."""
    return -(-len(digits.train_images) // batch)


@torch.no_grad()
def accuracy(net: ODENet, digits: Digits) -> float:
    """The share of test images with the correct label."""
    return (net(digits.test_images).argmax(1) == digits.test_labels).double().mean().item()
