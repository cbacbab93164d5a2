"""Sinks that fail, logs that are taken away, sinks that are none."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from cases import random_data
from training_jobs import EXACT, Injected, Job, Listener, assert_equal, learning_of, with_snapshots

from tbptt_ckpt import ArgumentError, Snapshots, TbpttWarning, TensorSequence, Validation
from tbptt_ckpt.snapshot.store import SnapshotWarning
from tbptt_ckpt.trainer import JsonLines, ProgressBar


class Down(Listener):
    """A tracker that cannot be reached for some events."""

    def __init__(self, method: str, calls: range, error: Exception) -> None:
        super().__init__()
        self.fired = 0

        def fail(*_: Any) -> None:
            self.fired += 1
            if self.fired in calls:
                raise error
            getattr(Listener, method)(self, *_)

        setattr(self, method, fail)


@pytest.mark.parametrize("error", [ConnectionError("down"), StopIteration(), KeyError("run")])
@pytest.mark.parametrize("method", ["on_window", "on_update", "on_notice", "flush", "close"])
def test_a_sink_that_fails_is_tried_again(
    method: str, error: Exception, tmp_path: Path, injected: Injected
) -> None:
    sink = Down(method, range(1, 3), error)
    job = Job(num_steps=9)
    trainer, _, healthy = job.build(snapshots=Snapshots(directory=tmp_path))
    trainer._announcer._sinks.append(sink)
    with pytest.warns(TbpttWarning, match=f"{method} failed, and is tried again") as caught:
        trainer.train()
    injected("a sink fails")
    assert len([w for w in caught if "tried again" in str(w.message)]) == 1  # for both
    expected = job.undisturbed()
    assert_equal(learning_of(trainer), expected["learning"], EXACT)
    missed = 2 * (method == "on_window")
    assert [w.loss for w in sink.windows] == expected["losses"][missed:]
    assert [w.loss for w in healthy.windows] == expected["losses"]


def test_every_new_failure_is_told(tmp_path: Path, injected: Injected) -> None:
    trainer, _, _ = Job(num_steps=9).build()
    fails = Down("on_window", range(1, 2), OSError("once"))
    calls = range(3, 4)
    again = Down("on_window", calls, OSError("later"))
    trainer._announcer._sinks[:] = [fails, again]
    with pytest.warns(TbpttWarning) as caught:
        trainer.train()
    assert [str(w.message)[-4:] for w in caught] == ["once", "ater"]
    injected("a sink fails", 2)


class HalfASink:
    def on_window(self, event: object) -> None:
        """Take it."""


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([JsonLines("log"), print], r"events\[1\]=.*no EventSink: it lacks on_window, on_update"),
        ([JsonLines], r"events\[0\]=.*it is a class; pass an instance"),
        ([HalfASink()], r"lacks on_update, on_notice, resume_at, flush, close"),
        (JsonLines("log"), "events=.*must be a list of EventSinks"),
        ("log.jsonl", "events='log.jsonl' must be a list of EventSinks"),
        (None, "events=None must be"),
    ],
)
def test_what_is_no_sink_is_refused_at_once(events: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Job().build(events=events)


def test_a_log_takes_text_and_nothing_else(tmp_path: Path) -> None:
    trainer, _, _ = Job().build(events=[JsonLines(str(tmp_path / "runs" / "log.jsonl"))])
    trainer.train()
    assert (tmp_path / "runs" / "log.jsonl").read_text().count('"window"') == 3
    for wrong in (3, None, b"log", ""):
        with pytest.raises(ArgumentError, match=r"path=.* must be a path that a file"):
            JsonLines(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["unlink", "replace", "folder"])
def test_a_log_that_is_taken_away_goes_on_in_a_new_one(
    way: str, tmp_path: Path, injected: Injected
) -> None:
    folder = tmp_path / "snapshots"
    trainer, _, _ = with_snapshots(Job(num_steps=9), folder)
    windows = trainer.windows()
    next(windows)
    next(windows)
    log = folder / "events.jsonl"
    if way == "unlink":
        log.unlink()
    elif way == "replace":
        os.replace(shutil.copy(log, tmp_path / "other"), log)  # noqa: PTH105
    else:
        shutil.rmtree(folder)
    with pytest.warns(TbpttWarning) as caught:
        for _ in windows:
            pass
    injected("snapshot folder removed")
    told = [str(w.message) for w in caught]
    assert any("was removed or replaced; it goes on in a new file" in text for text in told)
    assert any("has disappeared" in text for text in told) == (way == "folder")
    assert log.read_text().count('"window"') >= 3


def test_a_run_that_nothing_disturbs_warns_of_nothing(tmp_path: Path) -> None:
    trainer, _, _ = with_snapshots(Job(num_steps=9), tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [w for w in caught if issubclass(w.category, SnapshotWarning | TbpttWarning)]


class Terminal(io.StringIO):
    """Takes what a terminal of 80 columns would show."""

    def isatty(self) -> bool:
        return True


def shown_by(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **options: Any) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    job = Job(num_steps=9)
    trainer, _, _ = job.build(**options)
    trainer._announcer._sinks.append(ProgressBar())
    trainer.train()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


def test_a_bar_shows_how_far_it_is_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    validation = Validation(source=TensorSequence(*random_data(3)), every_windows=1)
    text = shown_by(monkeypatch, Terminal(), validation=validation)
    last = re.findall(r"training .*", text)[-1]
    assert re.search(r"9/9 steps  loss [0-9.]+  val [0-9.]+  [0-9,]+/s.*0:00:", last), last
    assert not shown_by(monkeypatch, io.StringIO())


def test_a_bar_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ArgumentError, match=r"pip install 'tbptt-ckpt\[cli\]'"):
        ProgressBar()


def test_notices_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tbptt_ckpt")
    trainer, _, _ = Job(num_steps=9).build(snapshots=Snapshots(directory=tmp_path))
    trainer.train()
    assert f"snapshot after 9 steps: {tmp_path / 'step-9'}" in caplog.messages


def test_the_steps_there_will_be_are_told_as_far_as_they_are_known() -> None:
    job = Job(num_steps=9)
    for options, expected in (
        ({"epochs": 2}, 18),
        ({"epochs": 2, "max_steps": 12}, 12),
        ({"epochs": None, "max_steps": 30}, 30),
    ):
        trainer, _, told = job.build(**options)
        next(trainer.windows())
        assert told.windows[0].total_steps == expected
