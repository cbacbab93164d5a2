"""Weights that change inside a window, snapshots of other runs, options that cannot work."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import nn
from training_jobs import EXACT, Injected, Job, assert_equal, learning_of, patch, with_snapshots

from tbptt_ckpt import (
    ArgumentError,
    NonFinite,
    OutOfMemory,
    Snapshots,
    StaleWeightsError,
    TbpttWarning,
)
from tbptt_ckpt.trainer import JsonLines


def test_weights_that_change_inside_a_window_are_noticed(injected: Injected) -> None:
    count = 0
    while True:
        count += 1
        job = Job(num_steps=6, engine={"strategy": "uniform:1"}, k1=3, k2=5)
        trainer, module, _ = job.build()

        def step(module: nn.Module = module) -> None:
            with torch.no_grad():
                next(module.parameters()).add_(1.0)

        patch(trainer, "backward", count, step)
        try:
            trainer.train()
        except StaleWeightsError:
            injected("weights changed between advance and replay")
        else:
            break
        assert count < 100
    assert count > 3


class TestOtherRuns:
    def test_a_snapshot_of_another_run_changes_nothing(
        self, tmp_path: Path, injected: Injected
    ) -> None:
        trainer, _, _ = with_snapshots(Job(), tmp_path)
        trainer.train()
        others = {
            "k2": Job(k2=5),
            "overlap": Job(engine={"overlap": "stale"}),
            "parameters": Job(module=cases.LSTMCellWithReadout),
            "optimizer": Job(optimizer=None),
            "speed": Job(trainer={"identity": {"speed": 3}}),
        }
        for word, job in others.items():
            other, module, _ = with_snapshots(job, tmp_path)
            before = copy.deepcopy(module.state_dict())
            with pytest.raises(ArgumentError, match=word):
                other.resume()
            injected("bad input")
            assert_equal(dict(module.state_dict()), dict(before), EXACT)
            assert other.num_steps == 0

    def test_a_directory_with_snapshots_is_not_begun_anew(
        self, tmp_path: Path, injected: Injected
    ) -> None:
        with_snapshots(Job(), tmp_path)[0].train()
        with pytest.raises(ArgumentError, match="holds snapshots of another run; resume"):
            with_snapshots(Job(), tmp_path)[0].train()
        injected("bad input")

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: Job().build(epochs=None), "epochs=None needs max_steps"),
            (lambda: Job().build(epochs=0), "epochs=0 must be an integer of at least 1"),
            (lambda: Job().build(max_steps=-1), "max_steps=-1 must be"),
            (lambda: Job().build()[0].resume(), "needs snapshots="),
            (lambda: Job().build()[0].save(), "needs snapshots="),
            (lambda: NonFinite(policy="ignore"), "policy='ignore' must be 'stop' or 'skip'"),
            (lambda: NonFinite(most_in_a_row=0), "most_in_a_row=0"),
            (lambda: OutOfMemory(retries=-1), "retries=-1"),
            (lambda: Snapshots(directory="x", keep=0), "keep=0"),
            (lambda: Snapshots(directory="x", every_steps=0), "every_steps=0"),
            (lambda: Snapshots(directory="x", every_minutes=0.0), "every_minutes=0.0"),
            (lambda: Snapshots(directory="x", every_minutes=float("nan")), "every_minutes=nan"),
            (lambda: Snapshots(directory="x", on_failure="?"), "on_failure='\\?'"),
            (lambda: Snapshots(directory=""), "directory='' must be a path"),
            (
                lambda: Job().build(extra={"a": 3}),
                r"extra\['a'\]=3 is no Stateful: it lacks",
            ),
            (lambda: Job().build(extra={"a": nn.Linear}), "is a class; pass an instance"),
            (
                lambda: Job().build(identity={"k1": 3}),
                r"identity=\{'k1': 3\} must be",
            ),
            (lambda: Job().build(identity={"data": "a"}), r"identity=\{'data': 'a'\}"),
            (
                lambda: Job().build(identity={"a": [Path("b")]}),
                r"identity=\{'a': .* must be",
            ),
            (lambda: Job().build(identity={"a": torch.zeros(2)}), r"identity=\{'a': <Tensor"),
            (lambda: Job().build(identity={3: 4}), r"identity=\{3: 4\} must be"),
        ],
    )
    def test_options_that_cannot_work(
        self, make: Callable[[], Any], words: str, injected: Injected
    ) -> None:
        with pytest.raises(ArgumentError, match=words):
            make()
        injected("bad input")


def test_a_log_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, injected: Injected
) -> None:
    (tmp_path / "file").touch()
    job = Job()
    trainer, _, _ = job.build(events=[JsonLines(tmp_path / "file" / "log.jsonl")])
    with pytest.warns(TbpttWarning, match=r"log\.jsonl.*on_update failed, and is tried again"):
        trainer.train()
    injected("disk full")
    assert_equal(learning_of(trainer), job.undisturbed()["learning"], EXACT)
