"""Training in PyTorch Lightning, where it is installed: fit, checkpoints, mixed precision and two processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from node_cuda import NeuralODE, odeint_adjoint

lightning: Any = pytest.importorskip("lightning")  # no other test needs it

pytestmark = pytest.mark.filterwarnings("ignore")  # those of lightning about loaders and loggers

T = torch.linspace(0.0, 1.0, 4)
TOL: Any = dict(rtol=1e-4, atol=1e-4)


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, t, y):
        return self.net(y)


class Spiral(lightning.LightningModule):
    """Fits a rotation. mode: the gradient of the layer, or "odeint_adjoint", which is called as a function."""

    def __init__(self, mode):
        super().__init__()
        self.save_hyperparameters()
        self.mode, self.field = mode, Field()
        self.layer = None if mode == "odeint_adjoint" else NeuralODE(self.field, T, gradient=mode, **TOL)
        self.losses = []

    def forward(self, y0):
        return odeint_adjoint(self.field, y0, T.to(y0.device), **TOL) if self.layer is None else self.layer(y0)

    def training_step(self, batch, index):
        loss = (self(batch[0]) - batch[1].transpose(0, 1)).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, index):
        """Lightning calls this in inference mode, once before the first training step."""
        self.log("loss", (self(batch[0]) - batch[1].transpose(0, 1)).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def batches():
    y0 = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    turn = torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
    return DataLoader(TensorDataset(y0, torch.stack([y0 @ torch.matrix_exp(turn * t) for t in T], 1)), 16)


def trainer(folder, **more):
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
    return lightning.Trainer(accelerator="cpu", default_root_dir=folder, **{"max_epochs": 4, **quiet, **more})


@pytest.mark.parametrize("mode", ["odeint_adjoint", "discrete", "auto"])
def test_a_model_trains_is_saved_and_goes_on(mode, tmp_path):
    torch.manual_seed(1)
    model = Spiral(mode)
    first = trainer(tmp_path)
    first.fit(model, batches(), batches())
    assert model.losses[-1] < 0.8 * model.losses[0]
    first.save_checkpoint(tmp_path / "saved.ckpt")
    again = Spiral.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=False)
    y0 = torch.randn(3, 2)
    with torch.no_grad():
        assert torch.equal(again(y0), model(y0))
    trainer(tmp_path, max_epochs=6).fit(again, batches(), batches(), ckpt_path=tmp_path / "saved.ckpt")
    assert len(again.losses) == 4, "two epochs of two batches"
    longer = trainer(tmp_path, max_epochs=6)
    torch.manual_seed(1)
    longer.fit(model := Spiral(mode), batches(), batches())
    assert again.losses == model.losses[-4:]


@pytest.mark.parametrize("mode", ["odeint_adjoint", "discrete"])
def test_mixed_precision_trains(mode, tmp_path):
    torch.manual_seed(1)
    model = Spiral(mode)
    trainer(tmp_path, precision="bf16-mixed", gradient_clip_val=1.0).fit(model, batches(), batches())
    assert model.losses[-1] < 0.8 * model.losses[0] and next(model.parameters()).dtype is torch.float32


@pytest.mark.parametrize("mode", ["odeint_adjoint", "discrete"])
def test_two_processes_train_one_model(mode, tmp_path):
    """A batch of 16 in two processes has the gradient of one of 32."""
    torch.manual_seed(1)
    model = Spiral(mode)
    trainer(tmp_path, strategy="ddp_fork", devices=2).fit(model, batches())
    torch.manual_seed(1)
    alone = Spiral(mode)
    trainer(tmp_path).fit(alone, DataLoader(batches().dataset, 32))
    for x, y in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)  # sums in another order, through Adam
