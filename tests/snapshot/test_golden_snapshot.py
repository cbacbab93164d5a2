"""A snapshot that an earlier version wrote is read, and its run goes on as it did then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cases
import pytest
import torch
from torch import nn

from tbptt_ckpt import TBPTT, TensorSequence, Trainer
from tbptt_ckpt.snapshot.store import SnapshotStore

GOLDEN = Path(__file__).parent / "golden"
STEPS, SAVED = 13, 6


def golden_trainer() -> Trainer:
    """The run that was saved, in format 2; never to be changed."""
    module = cases.lstm_cell()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    engine = TBPTT(
        module, nn.functional.mse_loss, 2, 5, optimizer, strategy="uniform:2", scheduler=scheduler
    )
    return Trainer(engine, TensorSequence(*cases.random_data(STEPS)))


def write_golden() -> None:
    """How the files were made."""
    trainer = golden_trainer()
    losses = []
    for window in trainer.windows():
        losses.append(float(window.loss))
        if window.stop == SAVED:
            store = SnapshotStore(GOLDEN / "format-2")
            store.save(SAVED, trainer.state_dict())
    (GOLDEN / "format-2" / "losses.json").write_text(json.dumps(losses) + "\n")


def test_a_snapshot_of_format_2_goes_on_as_it_did(injected: Callable[..., None]) -> None:
    store = SnapshotStore(GOLDEN / "format-2")
    (report,) = store.reports()
    assert report.problem is None
    trainer = golden_trainer()
    with torch.no_grad():
        for parameter in trainer.tbptt.parts.parameters:
            parameter.zero_()  # nothing is right by chance
    trainer.load_state_dict(store.load(SAVED).state)
    assert trainer.num_steps == SAVED
    losses = [float(window.loss) for window in trainer.windows()]
    expected = json.loads((GOLDEN / "format-2" / "losses.json").read_text())
    assert losses == pytest.approx(expected[SAVED // 2 :], rel=1e-12)
    injected("upgrade of the library")
