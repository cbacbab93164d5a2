"""Programs of other libraries' users, before and with windows: which lines change, and what stays.

Both are run. With windows as long as those of the program before, weights are its own; with windows
that reach further back they are those of `TBPTT` alone. Loggers and checkpoints are the host's.
"""

from __future__ import annotations

import csv
import re
from difflib import SequenceMatcher
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import relative_error
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence

pytestmark = pytest.mark.filterwarnings("default")

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
LANES, STEPS, K1 = 4, 12, 4
K2 = 8

IGNITE = """
    import torch
    from ignite.contrib.engines.tbptt import Tbptt_Events
    from ignite.contrib.engines.tbptt import create_supervised_tbptt_trainer
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.metrics import RunningAverage

    trainer = create_supervised_tbptt_trainer(net, sgd, mse, 4, dim=1)
    RunningAverage(output_transform=float).attach(trainer, "loss")
    saver = Checkpoint({"net": net}, DiskSaver(folder, require_empty=False), n_saved=None)
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_COMPLETED, saver)

    @trainer.on(Tbptt_Events.TIME_ITERATION_COMPLETED)
    def tell(engine):
        losses.append(engine.state.output)

    trainer.run(batches)
    logged = [trainer.state.metrics["loss"]]
"""
IGNITE_WINDOWS = IGNITE.replace(
    "from ignite.contrib.engines.tbptt import create",
    "from tbptt_ckpt.integrations.ignite import create",
).replace("mse, 4, dim=1)", "mse, 4, dim=1, k2=K2)")

LIGHTNING = """
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.recurrent = net

        def training_step(self, batch, batch_idx):
            x, y = batch
            outputs, _ = self.recurrent(x)
            loss = mse(outputs, y)
            self.log("loss", loss, prog_bar=True)
            losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return sgd

    logger = CSVLogger(folder, name="", version="")
    saver = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=logger, callbacks=[saver], log_every_n_steps=1
    )
    model = Model()
    trainer.fit(model, batches)
    logged = [float(trainer.progress_bar_metrics["loss"])]
"""
LIGHTNING_WINDOWS = (
    LIGHTNING.replace(
        "import CSVLogger",
        "import CSVLogger\n    from tbptt_ckpt.integrations.lightning import WindowedTraining",
    )
    .replace("(pl.LightningModule)", "(WindowedTraining, pl.LightningModule, k1=K1, k2=K2)")
    .replace("fit(model, batches)", "fit(model, model.windows(batches))")
)

_BY_HAND = """
    for x, y in batches:
        state = None
        for start in range(0, 12, 4):
            outputs, state = net(x[:, start : start + 4], state)
            state = tuple(part.detach() for part in state)
            loss = mse(outputs, y[:, start : start + 4])
            sgd.zero_grad()
            HOST.backward(loss)
            sgd.step()
            losses.append(loss.item())
            HOST.LOG, step=len(losses))
"""


def in_host(host: str, text: str, log: str) -> str:
    return text.replace("HOST.LOG", f"{host}.{log}").replace("HOST", host)


_FABRIC = """
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import CSVLogger
    fabric = Fabric(
        accelerator="cpu",
        loggers=CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1),
    )
    net, sgd = fabric.setup(net, sgd)
    batches = fabric.setup_dataloaders(batches)
"""
_ACCELERATE = """
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("run")
    net, sgd, batches = accelerator.prepare(net, sgd, batches)
"""
_IMPORT = "\n    from tbptt_ckpt.integrations.windowed import Windowed"
_WRAPPED = "\n    net = Windowed(net, K2)"


def _windowed(program: str, before: str) -> str:
    return _IMPORT + program.replace(before, _WRAPPED + before)


FABRIC = (
    _FABRIC
    + in_host("fabric", _BY_HAND, 'log("loss", losses[-1]')
    + '    fabric.save(folder / "saved", {"net": net})\n'
)
FABRIC_WINDOWS = _windowed(FABRIC, "\n    net, sgd = fabric.setup")
ACCELERATE = (
    _ACCELERATE
    + in_host("accelerator", _BY_HAND, 'log({"loss": losses[-1]}')
    + "    accelerator.save_state(folder)\n"
)
ACCELERATE_WINDOWS = _windowed(ACCELERATE, "\n    net, sgd, batches = accelerator.prepare")

TORCHRL = """
    import torch
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.modules import LSTMModule, ProbabilisticActor, ValueOperator, set_recurrent_mode
    from torchrl.objectives import ClipPPOLoss
    from torchrl.record.loggers import CSVLogger

    torch.manual_seed(0)
    lstm = LSTMModule(4, 16, in_key="observation", out_key="features")
    head = TensorDictModule(torch.nn.Linear(16, 3), ["features"], ["logits"])
    actor = ProbabilisticActor(
        TensorDictSequential(lstm, head),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = ValueOperator(torch.nn.Linear(4, 1), in_keys=["observation"])
    loss = ClipPPOLoss(actor, critic)
    sgd = torch.optim.SGD(loss.parameters(), 0.1)
    weights[:] = loss.parameters()
    fields = {
        "observation": torch.randn(4, 12, 4),
        "is_init": torch.rand(4, 12, 1) < 0.1,
        "action": torch.randint(3, (4, 12)),
        "action_log_prob": torch.full((4, 12), -1.1),
        "advantage": torch.randn(4, 12, 1),
        "value_target": torch.randn(4, 12, 1),
    }
    logger = CSVLogger("run", log_dir=str(folder))
    for rollout in [TensorDict(fields, [4, 12])]:
        with set_recurrent_mode(True):
            parts = loss(rollout)
        total = sum(part for name, part in parts.items() if name.startswith("loss_"))
        sgd.zero_grad()
        total.backward()
        sgd.step()
        losses.append(total.item())
        logger.log_scalar("loss", losses[-1], step=len(losses))
"""
TORCHRL_WINDOWS = TORCHRL.replace(
    "import CSVLogger\n",
    "import CSVLogger\n    from tbptt_ckpt.integrations.torchrl import windowed\n",
).replace(
    "    head = TensorDictModule", "    lstm = windowed(lstm, K1, K2)\n    head = TensorDictModule"
)

PROGRAMS = {  # before and after, the steps of its own windows, and the packages
    "Ignite": (IGNITE, IGNITE_WINDOWS, (K1, K1), "ignite"),
    "Lightning": (LIGHTNING, LIGHTNING_WINDOWS, (STEPS, STEPS), "lightning"),
    "Fabric": (FABRIC, FABRIC_WINDOWS, (K1, K1), "lightning"),
    "Accelerate": (ACCELERATE, ACCELERATE_WINDOWS, (K1, K1), "accelerate"),
    "TorchRL": (TORCHRL, TORCHRL_WINDOWS, (STEPS, STEPS), "torchrl"),
}


def parts(num_batches: int = 2) -> tuple[nn.Module, Any, list[tuple[Tensor, Tensor]]]:
    """A network, its optimizer and some batches [B, T, F]."""
    torch.manual_seed(0)
    net = nn.LSTM(3, 5, batch_first=True)
    shapes = [((LANES, STEPS, 3), (LANES, STEPS, 5))] * num_batches
    batches = [(torch.randn(x), torch.randn(y)) for x, y in shapes]
    return net, torch.optim.SGD(net.parameters(), 0.1), batches


def ran(program: str, folder: Path, k1: int = K1, k2: int = K2) -> Any:
    """What a program leaves behind."""
    net, sgd, batches = parts()
    told: list[tuple[dict[str, float], int]] = []
    steps = torch.utils.data.TensorDataset(
        *(torch.cat(each) for each in zip(*batches, strict=True))
    )
    given = {"net": net, "sgd": sgd, "mse": nn.MSELoss(), "losses": [], "folder": folder}
    given["batches"] = torch.utils.data.DataLoader(steps, batch_size=LANES)
    weights = list(net.parameters())
    given |= {
        "K1": k1,
        "K2": k2,
        "weights": weights,
        "tracker": _tracker(told) if "accelerate" in program else None,
    }
    exec(compile(dedent(program), "program", "exec"), given)
    if "torchrl" in program:  # its logger leaves that to Python
        for file in given["logger"].experiment.files.values():
            file.close()
    return SimpleNamespace(told=told, **given)


def _tracker(told: list[Any]) -> Any:
    tracking = pytest.importorskip("accelerate.tracking")
    pytest.importorskip("accelerate").state.AcceleratorState._reset_state()

    class Tracker(tracking.GeneralTracker):
        name, requires_logging_directory = "own", False

        def __init__(self) -> None:
            super().__init__()

        tracker = property(lambda self: told)

        def store_init_configuration(self, values: Any) -> None:
            """Nothing."""

        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            told.append((values, step or 0))

    return Tracker()


@pytest.mark.exhaustive
@pytest.mark.parametrize("host", PROGRAMS)
def test_windows_of_its_own_length_train_what_it_trained(host: str, tmp_path: Path) -> None:
    before, after, (k1, k2), package = PROGRAMS[host]
    pytest.importorskip(package)
    expected = ran(before, tmp_path / "before")
    found = ran(after, tmp_path / "after", k1, k2)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert relative_error(found.weights, expected.weights) < 1e-6


@pytest.mark.parametrize("host", PROGRAMS)
def test_windows_that_reach_further_are_ours_and_told_where_its_users_look(
    host: str, tmp_path: Path
) -> None:
    _, after, _, package = PROGRAMS[host]
    pytest.importorskip(package)
    found = ran(after, tmp_path)
    losses = found.losses
    if host != "TorchRL":  # whose windows are held against a plain loop elsewhere
        losses = check_ours(found)
    LOGS[host](found, tmp_path, losses)


def check_ours(found: Any) -> list[float]:
    """Losses of `TBPTT` alone, whose weights are those that were found."""
    net, sgd, batches = parts()
    tbptt = TBPTT(net, nn.MSELoss(), K1, K2, sgd)
    losses = [
        window.loss_value
        for x, y in batches
        for window in tbptt.windows(TensorSequence(x, y, time_dim=1))
    ]
    assert found.losses == pytest.approx(losses, rel=1e-6)
    assert relative_error(found.weights, list(net.parameters())) < 1e-6
    return losses


def in_csv(_found: Any, folder: Path, losses: list[float]) -> None:
    with (folder / "metrics.csv").open() as file:
        rows = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert rows == pytest.approx(losses, rel=1e-4)


def of_ignite(found: Any, folder: Path, losses: list[float]) -> None:
    """A running average over batches, and a checkpoint of each, named after it."""
    means = [sum(losses[at : at + 3]) / 3 for at in (0, 3)]
    assert found.logged == pytest.approx([0.98 * means[0] + 0.02 * means[1]], rel=1e-6)
    assert sorted(path.name for path in folder.iterdir()) == ["net_1.pt", "net_2.pt"]
    saved = torch.load(folder / "net_2.pt", weights_only=True)
    assert relative_error(list(saved.values()), found.weights) == 0


def of_lightning(found: Any, folder: Path, losses: list[float]) -> None:
    in_csv(found, folder, losses)
    assert found.logged == pytest.approx(losses[-1:], rel=1e-4)
    assert len(list(folder.glob("*.ckpt"))) == len(losses)


def of_fabric(found: Any, folder: Path, losses: list[float]) -> None:
    in_csv(found, folder, losses)
    saved = torch.load(folder / "saved", weights_only=True)["net"]
    assert relative_error(list(saved.values()), found.weights) == 0


def of_accelerate(found: Any, folder: Path, losses: list[float]) -> None:
    assert [values["loss"] for values, _ in found.told] == pytest.approx(losses, rel=1e-6)
    assert [step for _, step in found.told] == [*range(1, len(losses) + 1)]
    weights = [weight.detach().clone() for weight in found.weights]
    with torch.no_grad():
        found.weights[0].zero_()
    found.accelerator.load_state(folder)
    assert relative_error(found.weights, weights) == 0


def of_torchrl(_found: Any, folder: Path, losses: list[float]) -> None:
    (path,) = folder.rglob("loss.csv")
    rows = [[float(number) for number in line.split(",")] for line in path.read_text().split()]
    assert [value for _, value in rows] == pytest.approx(losses, rel=1e-6)
    assert [step for step, _ in rows] == [1]


LOGS = {
    "TorchRL": of_torchrl,
    "Ignite": of_ignite,
    "Lightning": of_lightning,
    "Fabric": of_fabric,
    "Accelerate": of_accelerate,
}


@pytest.mark.parametrize("host", PROGRAMS)
def test_the_page_counts_the_lines_that_change(host: str) -> None:
    (row,) = re.findall(rf"^\| \[{host}\].*$", PAGE.read_text("utf-8"), re.MULTILINE)
    new, gone = changed(*PROGRAMS[host][:2])
    assert f"| {new} new, {gone} gone |" in row


def changed(before: str, after: str) -> tuple[int, int]:
    """Lines of a program that are not in the one before, and of that which are not in it."""
    ours, theirs = (
        [line for line in text.splitlines() if line.strip()] for text in (after, before)
    )
    spans = SequenceMatcher(None, theirs, ours, autojunk=False).get_matching_blocks()
    same = sum(span.size for span in spans)
    return len(ours) - same, len(theirs) - same
