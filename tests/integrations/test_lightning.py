"""Lightning trains by windows, and all that it does around a step meets a window's gradient."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import WIDTH, WIDTH_IN, bitwise, random_data, relative_error
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.errors import ArgumentError, TbpttError
from tbptt_ckpt.integrations.lightning import WindowBatch, WindowedTraining

pl = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("default")

K1, K2 = 4, 6
LENGTHS = (12, 10, 3)  # 3, 3 and 1 windows


class Model(WindowedTraining, pl.LightningModule):
    k1, k2 = K1, K2

    def __init__(self, net: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.recurrent, self.told = net.to(dtype), []

    def loss_fn(self, y: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(y, target)

    def training_step(self, window: WindowBatch, batch_idx: int) -> Any:
        loss = self.window_loss(window)
        self.log("loss", loss)
        self.told.append(self.window.loss_value)
        return loss

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        every = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": every, "interval": "step"}}


def lstm() -> nn.Module:
    torch.manual_seed(0)
    return nn.LSTM(WIDTH_IN, WIDTH)


def batches(dtype: torch.dtype = torch.float64) -> list[Any]:
    return [tuple(t.to(dtype) for t in random_data(n, seed=n)) for n in LENGTHS]


def fit(model: Any, data: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", enable_model_summary=False, **{**quiet, **options}
    )
    trainer.fit(model, model.windows(data))
    return trainer


def by_ourselves(data: Any, **options: Any) -> tuple[nn.Module, list[float]]:
    net = lstm().to(data[0][0].dtype)
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)
    tbptt = TBPTT(net, F.mse_loss, K1, K2, sgd, scheduler=scheduler, **options)
    losses = [
        window.loss_value
        for _ in range(2)
        for x, y in data
        for window in tbptt.windows(TensorSequence(x, y))
    ]
    return net, losses


@pytest.mark.parametrize("strategy", ["auto", "uniform:2"])
def test_weights_are_those_of_windows_alone(strategy: str) -> None:
    model = Model(lstm())
    model.strategy = strategy
    trainer = fit(model, batches())
    net, losses = by_ourselves(batches(), strategy=strategy)
    assert model.told == losses
    assert bitwise(list(model.recurrent.parameters()), list(net.parameters()))
    assert trainer.global_step == len(losses) == 14
    assert float(trainer.logged_metrics["loss"]) == losses[-1]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**14)


def test_a_mean_over_an_epoch_is_logged() -> None:
    class Logging(Model):
        def training_step(self, window: WindowBatch, batch_idx: int) -> Any:
            loss = self.window_loss(window)
            self.log("mean", loss, on_epoch=True, batch_size=self.window.num_new_steps)
            return loss

    model, (inputs, targets) = Logging(lstm()), batches()[1]
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.0)
    trainer = fit(model, [(inputs, targets)])
    loss = F.mse_loss(lstm().double()(inputs)[0], targets)
    assert float(trainer.logged_metrics["mean_epoch"]) == pytest.approx(loss.item(), rel=1e-6)


def test_lightnings_clipping_meets_the_windows_gradient() -> None:
    model = Model(lstm())
    fit(model, batches(), gradient_clip_val=0.05)
    net, losses = by_ourselves(batches(), clip_grad_norm=0.05)
    assert model.told == pytest.approx(losses, rel=1e-12)
    assert relative_error(list(model.recurrent.parameters()), list(net.parameters())) < 1e-12
    assert relative_error(list(net.parameters()), list(by_ourselves(batches())[0].parameters())) > 0


def test_lightnings_accumulation_takes_the_mean_of_windows() -> None:
    model, data = Model(lstm()), [tuple(t[:8] for t in batches()[0])]
    trainer = fit(model, data, accumulate_grad_batches=2)
    net, losses = by_ourselves(data, accumulate=2)
    assert trainer.global_step == 2
    assert model.told == pytest.approx(losses, rel=1e-12)
    assert relative_error(list(model.recurrent.parameters()), list(net.parameters())) < 1e-12


def test_mixed_precision_is_autocast_in_module_and_loss() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.seen = nn.Linear(WIDTH_IN + WIDTH, WIDTH), set()

        def forward(self, x: Tensor, h: Tensor | None) -> Any:
            h = x.new_zeros(x.shape[0], WIDTH) if h is None else h
            h = torch.tanh(self.inner(torch.cat([x.float(), h.float()], 1)))
            self.seen.add(h.dtype)
            return h, h

    data, plain = batches(torch.float32), Wide()
    model = Model(Wide(), torch.float32)
    fit(model, data, precision="bf16-mixed")
    assert model.recurrent.seen == {torch.bfloat16}
    sgd = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)
    tbptt = TBPTT(plain, F.mse_loss, K1, K2, sgd, scheduler=scheduler)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as Lightning has it
        losses = [
            window.loss_value
            for _ in range(2)
            for x, y in data
            for window in tbptt.windows(TensorSequence(x, y))
        ]
    assert model.told == losses
    assert bitwise(list(model.parameters()), list(plain.parameters()))


def test_checkpoints_count_updates_and_load(tmp_path: Path) -> None:
    saves = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    model = Model(lstm())
    fit(model, batches(), callbacks=[saves], enable_checkpointing=True)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert [name.partition("step=")[2] for name in found] == ["5.ckpt", "10.ckpt"]
    last = tmp_path / next(name for name in found if "step=10" in name)
    other = Model(lstm())
    fit(other, batches(), max_steps=10)
    loaded = torch.load(last, weights_only=False)["state_dict"]
    assert bitwise(list(loaded.values()), list(other.state_dict().values()))


def test_batch_first_other_batches_and_a_first_state() -> None:
    class Other(Model):
        tbptt_options = {"check_replays": False}  # noqa: RUF012

        def sequence(self, batch: Any) -> Any:
            return TensorSequence(batch["x"], batch["y"], time_dim=1)

        def first_state(self, batch: Any) -> Any:
            return self.h0.expand(1, len(batch["x"]), WIDTH) * 1.0

    torch.manual_seed(0)
    gru = nn.GRU(WIDTH_IN, WIDTH, batch_first=True)
    data = [{"x": x.transpose(0, 1), "y": y.transpose(0, 1)} for x, y in batches()]
    model = Other(gru)
    model.h0 = nn.Parameter(torch.zeros(1, 1, WIDTH, dtype=torch.float64))
    twin = copy.deepcopy(model)
    # The gradient of what the first state is computed from comes with the last window of a batch.
    sgd = torch.optim.SGD([*twin.recurrent.parameters(), twin.h0], 0.1, momentum=0.9)
    tbptt = TBPTT(twin.recurrent, F.mse_loss, K1, K2)
    factor = 0.1
    for _ in range(2):
        for batch in data:
            windows = tbptt.windows(twin.sequence(batch), twin.first_state(batch))
            count = -(-batch["x"].shape[1] // K1)
            for n in range(count):
                sgd.zero_grad()
                next(windows)
                if n == count - 1:
                    next(windows, None)
                sgd.param_groups[0]["lr"] = factor
                sgd.step()
                factor *= 0.9
    fit(model, data)
    assert float(model.h0.detach().abs().sum()) > 0
    assert relative_error(list(model.parameters()), list(twin.parameters())) < 1e-12


def test_what_cannot_work_is_one_error() -> None:
    class Closures(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    with pytest.raises(ArgumentError, match="such as LBFGS"):
        fit(Closures(lstm()), batches())
    with pytest.raises(ArgumentError, match=r"batch=.* must be \(inputs, targets\)"):
        fit(Model(lstm()), [torch.zeros(3)])

    class Lossless(WindowedTraining, pl.LightningModule):
        training_step, configure_optimizers = Model.training_step, Model.configure_optimizers
        k1, k2 = K1, K2

        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.told = lstm().double(), []

    with pytest.raises(NotImplementedError, match="needs a loss_fn"):
        fit(Lossless(), batches())


def test_a_gradient_is_handed_on_once() -> None:
    class Twice(Model):
        def backward(self, loss: Tensor) -> None:
            loss.backward(retain_graph=True)
            loss.backward()

    with pytest.raises(TbpttError, match="differentiated once"):
        fit(Twice(lstm()), batches())


def test_several_processes_are_refused() -> None:
    model = Model(lstm())

    class Trainer:
        world_size = 2

    model._trainer = Trainer()
    with pytest.raises(ArgumentError, match=r"not in 2; use devices=1"):
        model.window_loss(WindowBatch(batches()[0], 0, 3))
