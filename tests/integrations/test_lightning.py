"""Lightning trains by windows, and all that it does around a step meets a window's gradient."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LANES, WIDTH, WIDTH_IN, bitwise, random_data, relative_error
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.integrations.lightning import WindowedTraining

pl = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("default")

K1, K2 = 4, 6
LENGTHS = (12, 10, 3)  # 3, 3 and 1 windows


class Model(WindowedTraining, pl.LightningModule, k1=K1, k2=K2):
    def __init__(self, net: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.recurrent, self.told = net.to(dtype), []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        outputs, _ = self.recurrent(x)
        loss = F.mse_loss(outputs, y)
        self.log("loss", loss)
        self.told.append(loss.item())
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
    """The same by `TBPTT` alone."""
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
    net, losses = by_ourselves(batches())
    assert model.told == pytest.approx(losses, rel=1e-12)
    assert relative_error(list(model.parameters()), list(net.parameters())) < 1e-12
    assert trainer.global_step == len(losses) == 14
    assert float(trainer.logged_metrics["loss"]) == pytest.approx(losses[-1], rel=1e-6)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**14)


def test_hooks_and_callbacks_are_given_the_steps_themselves() -> None:
    seen: dict[str, list[Any]] = {"callback": [], "hook": [], "mean": []}

    class Looking(pl.Callback):
        def on_train_batch_start(self, _: Any, __: Any, batch: Any, batch_idx: int) -> None:
            seen["callback"].append((batch_idx, batch[0].shape[0]))

    class Hooked(Model):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen["hook"].append(batch[0].shape[0])
            return batch

    fit(Hooked(lstm()), batches(), callbacks=[Looking()])
    steps = [4, 4, 4, 4, 4, 2, 3]
    assert seen["callback"] == [*enumerate(steps)] * 2
    assert seen["hook"] == steps * 2


def test_a_mean_over_an_epoch_is_logged() -> None:
    class Logging(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("mean", loss, on_epoch=True, batch_size=len(batch[0]))
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


class Wide(nn.Module):
    """Chunks, time first; its dtypes are seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.seen = nn.Linear(WIDTH_IN + WIDTH, WIDTH), set()

    def forward(self, x: Tensor, h: Tensor | None = None) -> Any:
        h = x.new_zeros(x.shape[1], WIDTH) if h is None else h
        outputs = []
        for step in x:
            h = torch.tanh(self.inner(torch.cat([step.float(), h.float()], 1)))
            self.seen.add(h.dtype)
            outputs.append(h)
        return torch.stack(outputs), h


def test_mixed_precision_is_autocast_when_steps_run_again_too() -> None:
    data, plain = batches(torch.float32), Wide()
    model = Model(Wide(), torch.float32)
    model.strategy = "uniform:2"
    fit(model, data, precision="bf16-mixed")
    assert model.recurrent.seen == {torch.bfloat16}
    sgd = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)
    tbptt = TBPTT(plain, F.mse_loss, K1, K2, sgd, scheduler=scheduler, per_step=False)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as Lightning has it
        losses = [
            window.loss_value
            for _ in range(2)
            for x, y in data
            for window in tbptt.windows(TensorSequence(x, y))
        ]
    assert model.told == pytest.approx(losses, rel=1e-2)
    assert relative_error(list(model.parameters()), list(plain.parameters())) < 1e-2


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
    fresh = Model(lstm())  # which no loader of windows has seen
    assert [*fresh.state_dict()] == [*loaded]
    fresh.load_state_dict(loaded)
    assert bitwise(list(fresh.parameters()), list(other.parameters()))


def test_the_recurrent_module_may_be_anywhere_inside() -> None:
    class Deeper(Model, recurrent_name="parts.body"):
        def __init__(self, net: nn.Module) -> None:
            super().__init__(net)
            self.parts = nn.ModuleDict({"body": self.recurrent, "head": nn.Identity()})
            del self.recurrent

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            loss = F.mse_loss(self.parts["head"](self.parts["body"](x)[0]), y)
            self.told.append(loss.item())
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("whole", F.mse_loss(self.parts["body"](batch[0])[0], batch[1]))

    model, net = Deeper(lstm()), by_ourselves(batches())[0]
    loader = torch.utils.data.DataLoader([batches()[0]], batch_size=None)
    model.val_dataloader = lambda: loader
    trainer = fit(model, batches(), val_check_interval=2)
    assert relative_error(list(model.parameters()), list(net.parameters())) < 1e-12
    x, y = batches()[0]
    expected = F.mse_loss(net(x)[0], y)
    assert float(trainer.validate(model, loader, verbose=False)[0]["whole"]) == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_batch_first_other_batches_and_a_learned_first_state() -> None:
    class Other(Model, k2=8):
        def num_steps(self, batch: Any) -> int:
            return batch["x"].shape[1]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = batch["x"]
            outputs, _ = self.recurrent(x, self.h0.expand(1, len(x), WIDTH) * 1.0)
            loss = F.mse_loss(outputs, batch["y"]) * batch["weight"].mean()
            self.told.append(loss.item())
            return loss

    torch.manual_seed(0)
    gru = nn.GRU(WIDTH_IN, WIDTH, batch_first=True).double()
    x, y = (each.transpose(0, 1) for each in batches()[0])
    weight = torch.rand(LANES, dtype=torch.float64)  # of each sequence: no time to be cut
    model = Other(gru)
    model.h0 = nn.Parameter(torch.zeros(1, 1, WIDTH, dtype=torch.float64))
    twin, h0 = copy.deepcopy(gru), model.h0.detach().clone().requires_grad_()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.1)
    fit(model, [{"weight": weight, "x": x, "y": y}])
    sgd, losses = torch.optim.SGD([*twin.parameters(), h0], 0.1), []
    for _ in range(2):  # windows [0, 4), [0, 8), and [4, 12) from a state that is a constant
        state = None
        for start, stop in ((0, 4), (0, 8), (4, 12)):
            first = h0.expand(1, LANES, WIDTH) * 1.0 if start == 0 else state
            outputs, _ = twin(x[:, start:stop], first)
            state = twin(x[:, :4], first)[1].detach() if start == 0 else None
            new = slice(stop - 4, stop)
            loss = F.mse_loss(outputs[:, -4:], y[:, new]) * weight.mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
    assert model.told == pytest.approx(losses, rel=1e-12)
    assert relative_error([*gru.parameters(), model.h0], [*twin.parameters(), h0]) < 1e-12


def test_what_cannot_work_is_one_error() -> None:
    class Closures(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    with pytest.raises(ArgumentError, match="such as LBFGS"):
        fit(Closures(lstm()), batches())
    with pytest.raises(ArgumentError, match="must begin with a tensor that has time"):
        fit(Model(lstm()), [torch.zeros(())])

    class Without(WindowedTraining, pl.LightningModule):
        """No k1, no k2."""

    with pytest.raises(
        ArgumentError, match=r"class Without\(WindowedTraining, Light.*, k1=20, k2=60\)"
    ):
        Without().windows(batches())
    for k1, k2, named in ((0, 6, "k1=0"), (4, -1, "k2=-1"), (4, 3, "k2=3 must be at least")):
        model = Model(lstm())
        model.k1, model.k2 = k1, k2
        with pytest.raises(ArgumentError, match=named):
            fit(model, batches())

    class Sometimes(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    with pytest.raises(ArgumentError, match="was not called for the steps before 8"):
        fit(Sometimes(lstm()), batches())

    class Alone(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            """Forgets the mix-in's."""

    with pytest.raises(ArgumentError, match=r"call super\(\)\.on_train_batch_start"):
        fit(Alone(lstm()), batches())


def test_a_loader_without_windows_is_refused() -> None:
    model = Model(lstm())
    for _ in range(2):  # before and after a fit by windows
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False
        )
        with pytest.raises(ArgumentError, match=r"give it the loader as model\.windows\(loader\)"):
            trainer.fit(model, batches())
        fit(model, batches())
    outputs, _ = model.recurrent(batches()[0][0])  # by itself it is the module
    assert len(outputs) == LENGTHS[0]


def test_several_processes_are_refused() -> None:
    model = Model(lstm())

    class Trainer:
        world_size = 2

    model._trainer = Trainer()
    with pytest.raises(ArgumentError, match=r"not in 2; use devices=1"):
        model.on_train_batch_start(batches()[0], 0)
