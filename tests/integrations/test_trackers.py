"""Trackers get what TensorBoard gets, from stand-ins of their packages, and end no run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from training_jobs import EXACT, Injected, Job, assert_equal, learning_of

from tbptt_ckpt import Snapshots
from tbptt_ckpt.errors import ArgumentError, TbpttWarning
from tbptt_ckpt.integrations.trackers import MLflow, WandB
from tbptt_ckpt.trainer import JsonLines, UpdateEvent


class Run:
    """Stands in for what `wandb.init` returns."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.logged: list[tuple[str, float, int]] = []
        self.summary: dict[str, str] = {}
        self.fails = fails

    def log(self, data: dict[str, Any], step: int) -> None:
        if self.fails is not None:
            raise self.fails
        self.logged += [(name, value, step) for name, value in data.items()]


class Client:
    """Stands in for MLflow's, with one run."""

    fails: Exception | None = None
    logged: list[tuple[str, float, int]]
    tags: dict[str, str]

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        assert run_id == "r1"
        if self.fails is not None:
            raise self.fails
        assert all(isinstance(metric.timestamp, int) for metric in metrics)
        self.logged += [(metric.key, metric.value, metric.step) for metric in metrics]

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        assert run_id == "r1"
        self.tags[key] = value


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    def metric(key: str, value: float, timestamp: int, step: int) -> Any:
        return SimpleNamespace(key=key, value=value, timestamp=timestamp, step=step)

    made: Any = ModuleType("mlflow")
    made.MlflowClient, made.entities = Client, SimpleNamespace(Metric=metric)
    made.active_run = lambda: SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    monkeypatch.setitem(sys.modules, "mlflow", made)
    monkeypatch.setattr(Client, "logged", [], raising=False)
    monkeypatch.setattr(Client, "tags", {}, raising=False)
    return made


def run_with(sink: Any, folder: Path) -> tuple[Any, list[tuple[str, float, int]]]:
    """A trainer that has run, and the figures that its log has."""
    events = [sink, JsonLines(folder / "log")]
    trainer, _, _ = Job(num_steps=9).build(
        events=events, snapshots=Snapshots(directory=folder / "saves")
    )
    trainer.train()
    names = {
        "window": ("loss", "drift", "steps_per_second", "executed_steps_per_step"),
        "update": ("grad_norm", "learning_rate"),
    }
    told = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    expected = [
        (f"{event['event']}/{name}", event[name], event["steps"])
        for event in told
        for name in names.get(event["event"], ())
    ]
    assert len(expected) == 5 * 6
    return trainer, expected


def of_windows_and_updates(logged: list[tuple[str, float, int]]) -> list[tuple[str, float, int]]:
    return [
        each
        for each in logged
        if each[0].startswith(("window/", "update/")) and each[0] != "window/reach_steps"
    ]


def test_wandb_gets_every_figure(tmp_path: Path) -> None:
    run = Run()
    _, expected = run_with(WandB(run), tmp_path)
    assert of_windows_and_updates(run.logged) == expected
    assert run.summary["snapshot"]


def test_mlflow_gets_every_figure(mlflow: Any, tmp_path: Path) -> None:
    _, expected = run_with(MLflow(), tmp_path)
    assert of_windows_and_updates(Client.logged) == expected
    assert Client.tags["snapshot"]
    Client.logged.clear()
    run_with(MLflow(run_id="r1"), tmp_path / "again")
    assert of_windows_and_updates(Client.logged)


@pytest.mark.parametrize("error", [ConnectionError("down"), ValueError("quota")])
@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_one_that_fails_ends_no_run(
    kind: str, error: Exception, mlflow: Any, monkeypatch: Any, injected: Injected
) -> None:
    monkeypatch.setattr(Client, "fails", error)
    job = Job(num_steps=9)
    trainer, _, _ = job.build()
    trainer._announcer._sinks.append(WandB(Run(error)) if kind == "wandb" else MLflow())
    with pytest.warns(TbpttWarning, match="failed, and is tried again with the next event"):
        trainer.train()
    injected("a sink fails")
    assert_equal(learning_of(trainer), job.undisturbed()["learning"], EXACT)


def test_what_is_no_run_is_refused(mlflow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (None, "x", 3, Run):
        with pytest.raises(ArgumentError, match=r"run=.* must be what wandb.init\(\) returns"):
            WandB(wrong)
    with pytest.raises(ArgumentError, match="run_id=3 must be text, or None"):
        MLflow(3)  # type: ignore[arg-type]
    mlflow.active_run = lambda: None
    with pytest.raises(ArgumentError, match=r"there is none: mlflow\.start_run"):
        MLflow()
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ArgumentError, match=r"mlflow is missing: pip install 'tbptt-ckpt\[mlflow"):
        MLflow()


needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"no {name} here")
    for name in ("wandb", "mlflow")
}


@needs["wandb"]
@pytest.mark.filterwarnings("default")
def test_wandb_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = wandb.init(project="x", dir=tmp_path)
    _, expected = run_with(WandB(run), tmp_path)
    run.log({"end": 1}, step=100)  # a step is complete when the next one comes
    last = [value for name, value, _ in expected if name == "window/loss"][-1]
    assert run.summary["window/loss"] == last
    norm = run.summary["update/grad_norm"]
    again = UpdateEvent(steps=9, updates=1, grad_norm=123.0, learning_rate=1.0)
    WandB(run).on_update(again)
    run.log({"end": 2}, step=101)
    assert run.summary["update/grad_norm"] == norm
    run.finish()


@needs["mlflow"]
@pytest.mark.filterwarnings("default")
def test_mlflow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'tracked'}")
    with mlflow.start_run() as run:
        _, expected = run_with(MLflow(), tmp_path)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "window/loss")
    assert [(m.key, m.value, m.step) for m in history] == [
        each for each in expected if each[0] == "window/loss"
    ]
