"""A training run that is killed, stopped, or cannot save: no step is lost, none is done twice."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from disks import HastyDisk, KillingDisk
from torch import Tensor, nn
from training_jobs import (
    EXACT,
    Injected,
    Job,
    Listener,
    Noisy,
    assert_equal,
    in_a_fork,
    kill_me,
    learning_of,
    patch,
    with_snapshots,
)

from tbptt_ckpt import SnapshotError, Snapshots
from tbptt_ckpt.snapshot.store import SnapshotStore, SnapshotWarning

POINTS = ("advance or replay", "module", "optimizer", "scheduler", "update", "backward")
KILLED = Job(num_steps=9, k1=2, k2=5, engine={"strategy": "uniform:2"})


class TestKill:
    @pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.exhaustive)])
    @pytest.mark.parametrize("point", POINTS)
    def test_at_calls_of_a_named_point(
        self, point: str, stride: int, tmp_path: Path, injected: Injected
    ) -> None:
        """At all of them where there are few."""
        stride = stride if point in ("advance or replay", "module", "backward") else 1
        expected = KILLED.undisturbed()
        count = 1 - stride
        while True:
            count += stride
            folder = tmp_path / str(count)

            def work(folder: Path = folder, count: int = count) -> None:
                trainer, _, _ = with_snapshots(KILLED, folder)
                patch(trainer, point, count, kill_me)
                trainer.train()

            if in_a_fork(work) != signal.SIGKILL:
                break
            injected("kill -9 in mid-sequence")
            trainer, _, listener = with_snapshots(KILLED, folder)
            assert trainer.resume()
            trainer.train()
            found = KILLED.account(trainer, listener)
            missing = len(expected["windows"]) - len(found["windows"])
            for name in ("windows", "losses", "rates"):  # those after the last snapshot
                assert_equal(found[name], expected[name][missing:], EXACT, name)
            for name in ("steps", "updates", "learning", "random"):
                assert_equal(found[name], expected[name], EXACT, name)
        assert count > 4

    @pytest.mark.parametrize("stride", [16, pytest.param(3, marks=pytest.mark.exhaustive)])
    def test_at_calls_of_every_save(self, stride: int, tmp_path: Path, injected: Injected) -> None:
        job = Job(num_steps=4)
        expected = job.undisturbed()
        count = 0
        while True:
            count += stride
            folder = tmp_path / str(count)

            def work(folder: Path = folder, count: int = count) -> None:
                with_snapshots(job, folder, KillingDisk(count))[0].train()

            if in_a_fork(work) != signal.SIGKILL:
                break
            injected("kill -9 during a save")
            trainer, _, listener = with_snapshots(job, folder)
            trainer.resume()
            trainer.train()
            found = job.account(trainer, listener)
            for name in ("steps", "updates", "learning", "random"):
                assert_equal(found[name], expected[name], EXACT, name)
        assert count > 60


def test_measured_costs_are_saved_before_the_first_update_and_never_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, injected: Injected
) -> None:
    planned = {"strategy": "auto", "memory_budget": "64MiB"}
    job = Job(num_steps=40, k1=8, k2=16, engine=planned)

    def killed_at_the_first_update() -> None:
        trainer, _, _ = with_snapshots(job, tmp_path)
        patch(trainer, "update", 1, kill_me)
        trainer.train()

    assert in_a_fork(killed_at_the_first_update) == signal.SIGKILL
    injected("kill -9 in mid-sequence")
    assert SnapshotStore(tmp_path).steps() == [0]
    saved = SnapshotStore(tmp_path).load(0).state["plan"]["measured"]
    assert saved["costs"]

    def no_measuring(*_: Any, **__: Any) -> None:
        raise AssertionError("costs were measured again")

    monkeypatch.setattr("tbptt_ckpt.budget.window_costs.calibrate", no_measuring)
    accounts = []
    for stops in ((), (1, 3)):
        folder = tmp_path / str(len(accounts))
        shutil.copytree(tmp_path / "step-0", folder / "step-0")
        listener = Listener()
        for stop in (*stops, None):
            trainer, _, _ = with_snapshots(job, folder)
            trainer._announcer._sinks.append(listener)
            assert trainer.resume()
            assert trainer.tbptt.parts.budget.state_dict()["costs"]["state_bytes"]
            windows = trainer.windows()
            for result in windows:
                if result.index == stop:
                    trainer.save()
                    windows.close()
        accounts.append(job.account(trainer, listener))
    assert_equal(accounts[1], accounts[0], EXACT)


class TestSnapshotsThatFail:
    def test_the_run_stops_or_goes_on(self, tmp_path: Path, injected: Injected) -> None:
        job = Job(num_steps=9)
        expected = job.undisturbed()

        class Full(HastyDisk):
            full = False

            def write(self, descriptor: int, data: memoryview) -> int:
                if self.full:
                    raise OSError(28, "No space left on device")
                return super().write(descriptor, data)

        disk = Full()
        trainer, _, _ = with_snapshots(job, tmp_path / "stop", disk)
        windows = trainer.windows()
        next(windows)
        disk.full = True
        with pytest.raises(SnapshotError, match="No space left on device"):
            next(windows)
        injected("disk full")
        assert SnapshotStore(tmp_path / "stop").steps() == [0]
        disk.full = False
        trainer.train()
        assert_equal(learning_of(trainer), expected["learning"], EXACT)

        disk = Full()
        trainer, _, _ = with_snapshots(job, tmp_path / "on", disk, on_failure="go on")
        windows = trainer.windows()
        next(windows)
        disk.full = True
        for _ in range(2):
            with pytest.warns(SnapshotWarning, match="going on without it"):
                next(windows)
        injected("disk full", 2)
        disk.full = False
        for _ in windows:
            pass
        assert SnapshotStore(tmp_path / "on").steps() == [8, 9]
        assert_equal(learning_of(trainer), expected["learning"], EXACT)


class Slow(nn.Module):
    """Tells of every step through a pipe, and takes its time."""

    def __init__(self, pipe: int, pause: float) -> None:
        super().__init__()
        self.inner = Noisy()
        self.pipe, self.pause = pipe, pause

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        os.write(self.pipe, b".")
        time.sleep(self.pause)
        return self.inner(x, h)


@dataclass
class Child:
    """A training run in a forked process."""

    folder: Path
    pause: float = 0.0
    job: Job = field(default_factory=lambda: Job(num_steps=40, k1=4, k2=8))

    def __enter__(self) -> Child:
        self.steps, pipe = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(pipe)
            return self
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 1
        try:
            self.job.module = lambda: Slow(pipe, self.pause)
            trainer, _, _ = self.job.build(snapshots=Snapshots(directory=self.folder))
            trainer.resume()
            trainer.train()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        finally:
            os._exit(code)

    def __exit__(self, *_: object) -> None:
        os.close(self.steps)

    def wait_for_steps(self, count: int) -> None:
        for _ in range(count):
            assert os.read(self.steps, 1) == b"."

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def code(self) -> int:
        self.rest = 0
        while part := os.read(self.steps, 4096):
            self.rest += len(part)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class TestSignals:
    def test_the_window_is_finished_and_saved(self, tmp_path: Path, injected: Injected) -> None:
        with Child(tmp_path / "undisturbed") as child:
            assert child.code() == 0
        expected = SnapshotStore(tmp_path / "undisturbed").load(40).state
        for signum, code, steps in ((signal.SIGTERM, 143, 10), (signal.SIGINT, 130, 30)):
            with Child(tmp_path / "stopped", 0.003) as child:
                child.wait_for_steps(steps)
                child.send(signum)
                assert child.code() == code
            injected("SIGTERM, SIGINT")
            newest = SnapshotStore(tmp_path / "stopped").steps()[-1]
            assert 0 < newest < 40
            assert newest % 4 == 0
        with Child(tmp_path / "stopped") as child:
            assert child.code() == 0
        found = SnapshotStore(tmp_path / "stopped").load(40).state
        for name in ("learning", "random", "progress"):
            assert_equal(found[name], expected[name], EXACT, name)

    def test_a_second_one_ends_the_process_at_once(
        self, tmp_path: Path, injected: Injected
    ) -> None:
        with Child(tmp_path, 1.0) as child:  # a window takes seconds
            child.wait_for_steps(1)
            child.send(signal.SIGTERM)
            # Seen by the next step: of two that wait Python takes the smaller number first.
            child.wait_for_steps(1)
            assert os.waitpid(child.pid, os.WNOHANG) == (0, 0)
            child.send(signal.SIGINT)
            assert child.code() == 130
        injected("SIGTERM, SIGINT", 2)
        assert child.rest < 3
        assert SnapshotStore(tmp_path).steps() == [0]
