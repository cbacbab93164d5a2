"""Anybody's model in all three commands: a regression cell, a classifier, a state-space layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_lines import outcome_of, refusal_of

from tbptt_ckpt.cli.app import main
from tbptt_ckpt.cli.starting import STARTING_POINT

MODELS = '''
import numpy as np
import torch
from torch import nn

from tbptt_ckpt import LaneSource, TensorSequence, Workload


class Cell(nn.Module):
    """A regression: one step, its state made by its factory."""

    def __init__(self):
        super().__init__()
        self.cell, self.readout = nn.LSTMCell(1, 8), nn.Linear(8, 1)

    def forward(self, x, state):
        h, c = self.cell(x, state)
        return self.readout(h), (h, c)


def regression(data=None, dtype=torch.float32):
    torch.manual_seed(0)
    signal = torch.sin(torch.arange(1204) / 3) if data is None else torch.tensor(np.load(data))
    signal = signal.to(dtype)[: len(signal) // 4 * 4].reshape(4, -1, 1).movedim(0, 1)
    state = (torch.zeros(4, 8, dtype=dtype),) * 2
    module = Cell().to(dtype)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    loss = nn.functional.mse_loss
    return Workload(
        module=module, loss_fn=loss, inputs=signal[:-1], targets=signal[1:], init_state=state,
        optimizer=optimizer,
    )


class Classifier(nn.Module):
    """Two layers of nn.GRU and classes for every step of a segment."""

    per_step = False

    def __init__(self, hidden=8):
        super().__init__()
        self.gru, self.readout = nn.GRU(2, hidden, num_layers=2), nn.Linear(hidden, 3)

    def forward(self, x, state=None):
        y, state = self.gru(x, state)
        return self.readout(y), state


class StateSpace(nn.Module):
    """h' = a h + B x, y = C h + D x, written by hand for [B, F]."""

    def __init__(self, lanes_width=6):
        super().__init__()
        self.a = nn.Parameter(torch.linspace(-1, 2, lanes_width))
        self.b, self.c = nn.Linear(2, lanes_width), nn.Linear(lanes_width, 2)
        self.d = nn.Parameter(torch.zeros(2))

    def forward(self, x, state):
        state = torch.sigmoid(self.a) * state + self.b(x)
        return self.c(state) + self.d * x, state


def state_space(data=None):
    """Episodes of several lengths in two lanes."""
    torch.manual_seed(0)
    episodes = [torch.randn(n, 2) for n in (40, 25, 60, 35)]
    source = LaneSource([TensorSequence(x, x / 2) for x in episodes], 2)
    module = StateSpace()
    return Workload(
        module=module, loss_fn=nn.functional.mse_loss, source=source, init_state=torch.zeros(2, 6)
    )


def nothing():
    return [1, 2]


def function():
    step = lambda x, state: (x, state)
    return Workload(module=step, loss_fn=nn.functional.mse_loss, inputs=torch.zeros(4, 1, 1),
                    targets=torch.zeros(4, 1, 1))


def crashes():
    raise KeyError("no such file")
'''
WINDOWS = ["--k1", "8", "--k2", "16"]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the models and data for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODELS)
    rng = np.random.default_rng(0)
    np.save("signal.npy", np.sin(np.arange(804) / 3))
    np.save("x.npy", rng.normal(size=(400, 2)).astype(np.float32))
    np.save("y.npy", (np.load("x.npy") > 0).sum(axis=1))
    np.save("lanes.npy", rng.normal(size=(200, 3, 2)))
    rng.normal(size=(400, 2)).astype(">f4").tofile("raw")
    return tmp_path


KINDS = {
    "regression": ["--model", "mine.py:regression"],
    "classifier": ["--model", "mine.py:Classifier", "--data", "x.npy", "--target", "y.npy"],
    "state_space": ["--model", "mine.py:state_space"],
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_it_trains(kind: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *KINDS[kind], *WINDOWS, "--max-steps", "160"]
    words += ["--lanes", "4", "--lr", "0.03"] if kind == "classifier" else []
    outcome = outcome_of(capsys, [*words, "--strategy", "uniform:4"])
    work = outcome["work"]
    assert work["num_steps"] == 160
    assert work["last_loss"] < work["first_loss"]
    retained = outcome_of(capsys, [*words, "--strategy", "retain"])["work"]
    assert retained["last_loss"] == pytest.approx(work["last_loss"], rel=1e-3)
    assert main(words) == 0
    assert "training loss, last window" in (printed := capsys.readouterr().out) or (
        "held-out loss after training" in printed
    )


@kinds
def test_it_is_planned(kind: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", *KINDS[kind], "--budget", "1MiB"]
    assert main([*words, "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)["reaches"]
    assert table["rows"]
    assert all(row["predicted_peak_bytes"] <= 1 << 20 for row in table["rows"])


@pytest.mark.parametrize(
    "kind",
    ["state_space", *(pytest.param(k, marks=pytest.mark.exhaustive) for k in list(KINDS)[:2])],
)
def test_it_is_profiled(kind: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", *KINDS[kind], *WINDOWS, "--repeats", "1", "--strategy", "retain"]
    assert main([*words, "--time-batching", "false", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["status"] == "ok"
    assert row["peak_bytes"] > row["fixed_bytes"] > 0


def test_what_init_writes_runs_as_it_is(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "start.py"]) == 0
    assert (mine / "start.py").read_text() == STARTING_POINT
    commands = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in commands] == ["plan", "profile", "train"]
    further = {
        "plan": ["--budget", "50MiB"],
        "profile": ["--strategy", "retain", "--time-batching", "false", "--repeats", "1", *WINDOWS],
        "train": ["--data", "signal.npy", "--lanes", "2", "--hidden", "4", "--max-steps", "64"],
    }
    for line in commands:
        words = line.split()[1:]
        assert main([*words, *further[words[0]]]) == 0
    assert main(["init", "start.py"]) == 2  # it is not replaced


def test_data_named_on_the_command_line_is_the_factorys(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *KINDS["regression"], *WINDOWS, "--data", "signal.npy", "--max-steps", "16"]
    assert outcome_of(capsys, words)["num_train_steps"] == 804 // 4 - 1
    assert outcome_of(capsys, [*words, "--dtype", "float64"])["data"] == "signal.npy"


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (["--data", "x.npy", "--next-step"], (1, 2)),
        (["--data", "x.npy", "--next-step", "--lanes", "4"], (4, 2)),
        (["--data", "lanes.npy", "--next-step"], (3, 2)),
        (["--input", "raw", "--data-dtype", ">f4", "--features", "2", "--next-step"], (1, 2)),
        (["--data", "x.npy", "--target", "x.npy", "--loss", "huber"], (1, 2)),
        (["--data", "x.npy", "--target", "x.npy", "--loss", "mine.py:nn.MSELoss()"], None),
    ],
)
def test_arrays_in_files_are_read_as_they_lie(
    data: list[str], shape: tuple[int, ...] | None, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "gru.py").write_text("import torch\ndef make():\n    return torch.nn.GRUCell(2, 2)\n")
    words = ["train", "--model", "gru.py:make", *data, "--k1", "4", "--k2", "4", "--max-steps", "8"]
    if shape is None:
        assert "--loss" in refusal_of(capsys, words)
        return
    assert outcome_of(capsys, words)["scores"]["unit"] == "loss"
    from tbptt_ckpt.cli.models import make_task
    from tbptt_ckpt.cli.train.config import TrainingConfig

    named = dict(zip(data[::2], data[1::2], strict=False))
    config = TrainingConfig(
        model="gru.py:make",
        data=Path(named.get("--data", "raw")),
        next_step="--next-step" in data,
        target=Path(named["--target"]) if "--target" in named else None,
        data_dtype=named.get("--data-dtype"),
        features=2 if "--features" in data else None,
        lanes=4 if "4" in data else 1,
        given=("lanes",) if "4" in data else (),
    )
    inputs, targets = make_task(config).workload.source.read(0, 5)
    array = np.fromfile("raw", ">f4").reshape(-1, 2) if config.data == Path("raw") else None
    array = np.load(config.data) if array is None else array
    assert inputs.shape == targets.shape == (5, *shape)
    lane = array[:, 0] if array.ndim == 3 else array
    assert np.allclose(inputs[:, 0], lane[:5])
    assert np.allclose(targets[:, 0], lane[:5] if config.target else lane[1:6])


Change = Callable[[list[str]], list[str]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model mine.py:nothing", "returned list, not what a command can work on: a factory"),
        ("--model mine.py:function", "its module must be an nn.Module"),
        ("--model mine.py:crashes", "raised KeyError: 'no such file'"),
        ("--model mine.py:regression --hidden 8", "--hidden would change nothing"),
        ("--model mine.py:regression --lr 0.1", "--lr would change nothing"),
        ("--model mine.py:regression --loss mse", "--loss would change nothing"),
        ("--model mine.py:Cell", "called with int64"),
        ("--model mine.py:Cell --layers 2", "--layers would change nothing"),
        ("--model lstm --loss mse", "--loss would change nothing"),
        ("--model mine.py:Classifier --data x.npy", "--target FILE, or with --next-step"),
        ("--model mine.py:Classifier --next-step", "--data is missing"),
        ("--model mine.py:Classifier --data raw --next-step", "say --data-dtype"),
        ("--model mine.py:Classifier --data x.npy --next-step --loss best", "is neither mse"),
        ("--model mine.py:Classifier --data x.npy --target signal.npy", "has 804 steps, --data"),
        ("--model mine.py:Classifier --data lanes.npy --next-step --lanes 2", "has its own, 3"),
        ("--model mine.py:Classifier --data no.npy --next-step", "--data no.npy does not exist"),
        ("--model mine.py:Classifier --data y.npy --next-step", "called with int64"),
    ],
)
def test_what_cannot_work_is_one_line(
    words: str, message: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal_of(capsys, ["train", *words.split()])


def test_a_file_of_options_is_what_they_are_on_the_command_line(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "a.toml").write_text(
        'model = "mine.py:regression"\nk1 = 4\nk2 = "none"\nmax-steps = 12\nstrategy = "sqrt"\n'
    )
    outcome = outcome_of(capsys, ["train", "--config", "a.toml", "--max-steps", "8"])
    config: dict[str, Any] = outcome["config"]
    assert (config["k1"], config["k2"], config["max_steps"]) == (4, None, 8)
    assert set(config["given"]) == {"model", "k1", "k2", "max_steps", "strategy"}
    for text, message in (
        ("widht = 3", "--config a.toml: widht is no option of train"),
        ("k1 = 0", "--k1=0 must be"),
        ("k1 = ", "--config a.toml cannot be read"),
        ('lanes = 4\nmodel = "mine.py:regression"', "--lanes would change nothing"),
    ):
        (mine / "a.toml").write_text(text)
        assert message in refusal_of(capsys, ["train", "--config", "a.toml"])
