"""What a trainer tells, to whom, and what survives a resume."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import pytest
import torch
from torch import nn

from tbptt_ckpt import TBPTT, ArgumentError, Snapshots, TensorSequence, Trainer
from tbptt_ckpt.errors import TbpttWarning
from tbptt_ckpt.trainer import JsonLines, TensorBoard
from tbptt_ckpt.trainer.events import Notice, UpdateEvent, WindowEvent

STEPS, K1, K2 = 11, 3, 6


def trainer(path: Path | None = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    module = cases.tanh_cell()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    engine = TBPTT(
        module, nn.functional.mse_loss, K1, K2, optimizer, strategy="uniform:2", scheduler=scheduler
    )
    events = [] if path is None else [JsonLines(path)]
    return Trainer(engine, TensorSequence(*cases.random_data(STEPS)), events=events, **options)


def lines(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in read if kind in (None, line["event"])]


def test_the_result_counts_what_the_windows_did() -> None:
    one = trainer()
    results = list(one.windows())
    found = one.result()
    assert (found.num_steps, found.num_windows, found.num_updates) == (STEPS, 4, 4)
    assert found.recomputed_steps == sum(result.recomputed_steps for result in results) > 0
    assert found.mean_drift == sum(result.drift for result in results) / 4 > 0
    assert found.last_loss == float(results[-1].loss)
    assert found.tokens_per_second == pytest.approx(STEPS * cases.LANES / found.seconds)
    assert found.peak_bytes is None
    resumed = trainer()
    resumed.load_state_dict(one.state_dict())
    assert resumed.result().tokens_per_second == 0.0
    assert resumed.result().num_steps == STEPS


def test_results_of_one_pass_and_of_a_trainer_name_the_same_things_alike() -> None:
    module, data = cases.tanh_cell(), TensorSequence(*cases.random_data(STEPS))
    engine = TBPTT(
        module, nn.functional.mse_loss, K1, K2, strategy="uniform:2", measure_memory=True
    )
    one, many = engine.train(data), Trainer(engine, data).train()
    assert (one.num_steps, one.num_windows) == (many.num_steps, many.num_windows) == (STEPS, 4)
    assert one.peak_bytes > 0
    assert many.peak_bytes > 0
    shared = {f.name for f in fields(one)} & {f.name for f in fields(many)}
    assert shared == {
        *("num_steps", "num_windows", "peak_bytes", "seconds", "tokens_per_second"),
    }


def test_a_window_and_an_update_are_told_as_they_were(tmp_path: Path) -> None:
    one = trainer(tmp_path / "log")
    results = list(one.windows())
    windows, updates = (lines(tmp_path / "log", kind) for kind in ("window", "update"))
    assert [w["steps"] for w in windows] == [3, 6, 9, 11]
    assert [u["updates"] for u in updates] == [1, 2, 3, 4]
    assert [u["learning_rate"] for u in updates] == [0.5, 0.25, 0.125, 0.0625]
    for told, result in zip(windows, results, strict=True):
        new = result.stop - result.new_start
        assert told["loss"] == float(result.loss)
        assert told["drift"] == result.drift
        assert told["executed_steps_per_step"] == 1 + result.recomputed_steps / new
        assert told["steps_per_second"] == pytest.approx(new / result.seconds)
        assert (told["start"], told["stop"], told["index"]) == (
            *(result.start, result.stop, result.index),
        )
        assert told["updated"]
    measured = [(w["reach"], w["decay"]) for w in windows if w["reach"] is not None]
    assert measured[0][0]["of"] == measured[0][1]["borders"][-1]["steps_back"]
    names = {f.name for f in fields(WindowEvent)} | {"event"}
    assert set(windows[0]) == names


def test_the_gradient_norm_is_that_of_the_gradients(tmp_path: Path) -> None:
    one = trainer(tmp_path / "log")
    norms = []
    for _ in one.windows():
        grads = [p.grad for p in one.tbptt.parts.parameters]
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in grads)))
    assert [u["grad_norm"] for u in lines(tmp_path / "log", "update")] == pytest.approx(norms)


def test_the_log_of_a_resumed_run_has_every_window_once(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    log = folder / "events.jsonl"
    first = trainer(snapshots=Snapshots(directory=folder))
    windows = first.windows()
    for _ in range(3):
        next(windows)
    first.save()
    next(windows)
    windows.close()
    with log.open("a") as file:
        file.write('{"event": "window", "steps": 11, "lo')  # as a kill leaves it
    assert [w["steps"] for w in lines_that_parse(log)] == [3, 6, 9, 11]
    second = trainer(snapshots=Snapshots(directory=folder))
    assert second.resume()
    assert [w["steps"] for w in lines(log, "window")] == [3, 6, 9]
    second.train()
    assert [w["steps"] for w in lines(log, "window")] == [3, 6, 9, 11]
    assert [n["kind"] for n in lines(log, "notice")] == [
        *("snapshot", "snapshot", "resumed", "snapshot"),
    ]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"event": "window", "st\xe9ps": 3}',
        b'{"steps": 1' + b"0" * 400 + b"}",
        b"[" * 100_000,
        b"\0",
        b"[]",
        b'{"steps": null}',
    ],
    ids=len,
)
def test_a_damaged_log_does_not_stop_a_resume(damage: bytes, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    trainer(snapshots=Snapshots(directory=tmp_path)).train()
    whole = log.read_bytes()
    log.write_bytes(damage + b"\n" + whole)
    again = trainer(snapshots=Snapshots(directory=tmp_path))
    with pytest.warns(TbpttWarning, match="1 damaged lines of the log"):
        assert again.resume()
    assert again.num_steps == STEPS
    again._saving.close()
    assert log.read_bytes().startswith(whole)


def test_a_log_that_is_a_pipe_is_a_warning(tmp_path: Path) -> None:
    trainer(snapshots=Snapshots(directory=tmp_path)).train()
    (tmp_path / "events.jsonl").unlink()
    os.mkfifo(tmp_path / "events.jsonl")
    again = trainer(snapshots=Snapshots(directory=tmp_path))
    with pytest.warns(TbpttWarning, match="not a regular file"):
        assert again.resume()
    again.train()


def test_what_a_link_in_the_logs_place_leads_to_is_not_written(tmp_path: Path) -> None:
    (folder := tmp_path / "runs").mkdir()
    (folder / "events.jsonl").symlink_to(other := tmp_path / "other")
    for text in (None, "somebody's\n"):
        if text is not None:
            other.write_text(text)
        with pytest.warns(TbpttWarning, match="is not a regular file"):
            trainer(snapshots=Snapshots(directory=folder)).train()
        again = trainer(snapshots=Snapshots(directory=folder))
        with pytest.warns(TbpttWarning, match="not a regular file"):
            assert again.resume()
        again._saving.close()
        assert (other.read_text() if other.exists() else None) == text
        for snapshot in folder.glob("step-*"):
            shutil.rmtree(snapshot)


def lines_that_parse(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines():
        try:
            read = json.loads(line)
        except ValueError:
            continue
        if read["event"] == "window":
            found.append(read)
    return found


def test_numbers_that_json_lacks_are_strings(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log")
    log.on_update(UpdateEvent(steps=1, updates=1, grad_norm=math.inf, learning_rate=math.nan))
    log.close()
    assert lines(tmp_path / "log")[0]["grad_norm"] == "inf"
    assert lines(tmp_path / "log")[0]["learning_rate"] == "nan"


def test_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ArgumentError, match=r"pip install 'tbptt-ckpt\[tensorboard\]'"):
        TensorBoard(tmp_path)
    with pytest.raises(ArgumentError, match=r"directory='' must be a path"):
        TensorBoard("")


class Writer:
    """Stands in for TensorBoard's, which need not be installed."""

    made: list[Writer] = []  # noqa: RUF012

    def __init__(self, directory: str, purge_step: int | None = None) -> None:
        self.purge_step, self.scalars, self.texts = purge_step, [], []
        self.closed = False
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert isinstance(value, int | float)
        self.scalars.append((name, value, step))

    def add_text(self, name: str, value: str, step: int) -> None:
        self.texts.append((name, value, step))

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", [])
    one = trainer(tmp_path / "log")
    sink = TensorBoard(tmp_path)
    one._announcer._sinks.append(sink)
    one.train()
    sink.on_notice(Notice(steps=11, kind="snapshot", message="here", figures={"seconds": 0.5}))
    told: dict[str, list[tuple[float, int]]] = {}
    for name, value, step in [scalar for made in Writer.made for scalar in made.scalars]:
        told.setdefault(name, []).append((value, step))
    windows, updates = (lines(tmp_path / "log", kind) for kind in ("window", "update"))
    for name in ("loss", "drift", "steps_per_second", "executed_steps_per_step"):
        assert told[f"window/{name}"] == [(w[name], w["steps"]) for w in windows]
    reaches = [(w["reach"], w["steps"]) for w in windows if w["reach"] is not None]
    assert reaches
    assert told["window/reach_steps"] == [(r["within"] or r["of"], step) for r, step in reaches]
    for name in ("grad_norm", "learning_rate"):
        assert told[f"update/{name}"] == [(u[name], u["steps"]) for u in updates]
    assert told["snapshot/seconds"] == [(0.5, 11)]
    assert Writer.made[-1].texts == [("snapshot", "here", 11)]
    sink.resume_at(6)
    assert Writer.made[-1].closed
    sink.on_update(UpdateEvent(steps=7, updates=1, grad_norm=1.0, learning_rate=1.0))
    assert Writer.made[-1].purge_step == 7


def test_events_are_plain_values() -> None:
    event = UpdateEvent(steps=1, updates=1, grad_norm=1.0, learning_rate=1.0)
    assert json.loads(json.dumps(asdict(event))) == asdict(event)
