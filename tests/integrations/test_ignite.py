"""Ignite's trainer with windows: what Ignite trains where they do not overlap, and more."""

from __future__ import annotations

import copy
import sys
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from cases import WIDTH, WIDTH_IN, bitwise, random_data, relative_error
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.errors import ArgumentError

tbptt_of_ignite = pytest.importorskip("ignite.contrib.engines.tbptt")
Events = pytest.importorskip("ignite.engine").Events

from tbptt_ckpt.integrations.ignite import create_supervised_tbptt_trainer  # noqa: E402

LANES, K1 = 3, 4


class Readout(nn.Module):
    """Dropout-free layers around an LSTM, called with or without a state."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.encode = nn.Linear(WIDTH_IN, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=batch_first)
        self.norm, self.readout = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.lstm(torch.tanh(self.encode(x)), state)
        return self.readout(self.norm(y)), state


class Loop(nn.Module):
    """A loop over a cell, with a statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH_IN, WIDTH)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = []
        for each in x:
            self.seen = self.seen + each.detach().sum()
            h = self.cell(each, h)
            outputs.append(h)
        return torch.stack(outputs), h


MODELS = {
    "lstm": lambda: nn.LSTM(WIDTH_IN, WIDTH),
    "batch first": lambda: nn.GRU(WIDTH_IN, WIDTH, batch_first=True),
    "readout": lambda: Readout(batch_first=False),
    "readout, batch first": lambda: Readout(batch_first=True),
    "loop": Loop,
}


def batches(dim: int, lengths: tuple[int, ...] = (12, 10, 3)) -> list[tuple[Tensor, Tensor]]:
    """Several, of which the last chunks are short, in float32."""
    found = [random_data(length, seed, LANES) for seed, length in enumerate(lengths)]
    return [
        tuple(t.float().transpose(0, dim).contiguous() for t in pair)  # type: ignore[misc]
        for pair in found
    ]


def trained(create: Any, model: nn.Module, data: Any, optimizer: type[Any], **options: Any) -> Any:
    """Weights after two passes, and all that events told."""
    told: list[Any] = []
    made = optimizer(model.parameters(), 0.05)
    trainer = create(model, made, **{"loss_fn": F.mse_loss, "tbtt_step": K1, **options})
    for event in (*tbptt_of_ignite.Tbptt_Events, Events.ITERATION_COMPLETED):
        trainer.add_event_handler(
            event, lambda engine, name: told.append((name, engine.state.output)), str(event)
        )
    trainer.run(data, max_epochs=2)
    return list(model.state_dict().values()), told


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_without_overlap_it_is_ignites_to_the_bit(name: str, optimizer: type[Any]) -> None:
    torch.manual_seed(0)
    model, dim = MODELS[name](), int("batch first" in name)
    twin, data = copy.deepcopy(model), batches(dim)
    theirs, told = trained(
        tbptt_of_ignite.create_supervised_tbptt_trainer, model, data, optimizer, dim=dim
    )
    mine, retold = trained(create_supervised_tbptt_trainer, twin, data, optimizer, dim=dim)
    assert bitwise(mine, theirs)
    assert retold == told
    assert len(told) == 2 * (2 * (3 + 3 + 1) + 3)


def test_a_loss_of_ones_own_and_a_batch_that_is_prepared() -> None:
    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y.flatten(0, 1), target.flatten(), ignore_index=0)

    def prepare(batch: Any, device: Any, non_blocking: bool) -> Any:
        assert (device, non_blocking) == ("cpu", True)
        return batch[0] * 2, (batch[1] > 0).long().sum(-1).clamp(0, WIDTH - 1)

    torch.manual_seed(0)
    model = MODELS["readout"]()
    options = {"loss_fn": loss_fn, "prepare_batch": prepare, "device": "cpu", "non_blocking": True}
    given = copy.deepcopy(model), batches(0), torch.optim.SGD
    theirs = trained(tbptt_of_ignite.create_supervised_tbptt_trainer, *given, **options)
    mine = trained(create_supervised_tbptt_trainer, model, *given[1:], **options)
    assert bitwise(mine[0], theirs[0])
    assert mine[1] == theirs[1]


@pytest.mark.parametrize("k2", [6, 8, None])
@pytest.mark.parametrize("strategy", ["auto", "sqrt"])
def test_with_overlap_it_is_a_plain_loop(k2: int | None, strategy: str) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(WIDTH_IN, WIDTH).double()
    plain = copy.deepcopy(lstm)
    sgd, losses = torch.optim.SGD(plain.parameters(), 0.05), []
    data = [random_data(length, length) for length in (12, 10, 3)]
    for inputs, targets in data:
        problem = naive.Problem(
            step=plain,
            loss_fn=F.mse_loss,
            inputs=list(inputs.split(1)),
            targets=list(targets.split(1)),
            init_state=None,
            parameters=list(plain.parameters()),
        )
        losses.append([float(w.loss) for w in naive.refresh(problem, K1, k2, optimizer=sgd)])
    told: list[float] = []
    trainer = create_supervised_tbptt_trainer(
        lstm, torch.optim.SGD(lstm.parameters(), 0.05), F.mse_loss, K1, k2=k2, strategy=strategy
    )

    @trainer.on(tbptt_of_ignite.Tbptt_Events.TIME_ITERATION_COMPLETED)
    def tell(engine: Any) -> None:
        told.append(engine.state.output)

    state = trainer.run(data)
    assert told == pytest.approx([loss for each in losses for loss in each], rel=1e-12)
    assert state.output == pytest.approx(sum(losses[-1]) / len(losses[-1]), rel=1e-12)
    assert relative_error(list(lstm.parameters()), list(plain.parameters())) < 1e-12


def test_a_budget_and_further_options_go_through() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(WIDTH_IN, WIDTH)
    sgd = torch.optim.SGD(model.parameters(), 1.0)
    trainer = create_supervised_tbptt_trainer(
        model, sgd, F.mse_loss, K1, k2=8, memory_budget="1MiB", clip_grad_norm=1e-3
    )
    before = [p.detach().clone() for p in model.parameters()]
    trainer.run(batches(0, (4,)))
    moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    assert float(torch.cat([m.flatten() for m in moved]).norm()) == pytest.approx(1e-3, rel=1e-4)


def test_k2_may_be_found() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(WIDTH_IN, WIDTH)
    twin, losses = copy.deepcopy(lstm), []
    options = {"k2": "auto", "max_k2": 8}
    sgd = torch.optim.SGD(lstm.parameters(), 0.05)
    trainer = create_supervised_tbptt_trainer(lstm, sgd, F.mse_loss, K1, **options)
    trainer.add_event_handler(
        tbptt_of_ignite.Tbptt_Events.TIME_ITERATION_COMPLETED,
        lambda engine: losses.append(engine.state.output),
    )
    trainer.run(batches(0))
    tbptt = TBPTT(
        twin, F.mse_loss, K1, optimizer=torch.optim.SGD(twin.parameters(), 0.05), **options
    )
    own = [w.loss_value for x, y in batches(0) for w in tbptt.windows(TensorSequence(x, y))]
    assert losses == own


def test_what_cannot_work_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.LSTM(WIDTH_IN, WIDTH)
    given = model, torch.optim.SGD(model.parameters(), 1.0), F.mse_loss
    for wrong, reason in (
        ({"tbtt_step": 0}, "tbtt_step=0 must be an integer of at least 1"),
        ({"tbtt_step": 4, "k2": "x"}, "k2='x' must be"),
        ({"tbtt_step": 4, "dim": -1}, "dim=-1 must be"),
        ({"tbtt_step": 4, "dim": 1}, "time_dim=1 contradicts module=LSTM with batch_first=False"),
        ({"tbtt_step": 4, "strategy": "x"}, "strategy='x'"),
    ):
        with pytest.raises(ArgumentError) as raised:
            create_supervised_tbptt_trainer(*given, **wrong)  # type: ignore[arg-type]
        assert reason in str(raised.value)
    trainer = create_supervised_tbptt_trainer(*given, 4)
    with pytest.raises(ArgumentError, match=r"a batch must be \(x, y\)"):
        trainer.run([torch.zeros(3)])
    monkeypatch.setitem(sys.modules, "ignite.engine", None)
    with pytest.raises(
        ArgumentError, match=r"ignite is missing: pip install 'tbptt-ckpt\[ignite\]'"
    ):
        create_supervised_tbptt_trainer(*given, 4)
