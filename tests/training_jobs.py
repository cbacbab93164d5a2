"""Small training runs that are built alike each time, and ways to disturb them."""

from __future__ import annotations

import copy
import functools
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from devices import placed
from disks import HastyDisk
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, Snapshots, TensorSequence, Trainer
from tbptt_ckpt.trainer.events import Notice, UpdateEvent, WindowEvent
from tbptt_ckpt.trainer.saving import Saving

Injected = Callable[..., None]
EXACT, ROUNDING = 0.0, 1e-12


class Stream:
    """A source of unknown length that gives its steps once, in order, and can be resumed."""

    time_dim = 0

    def __init__(self, num_steps: int) -> None:
        self.data = cases.random_data(num_steps)
        self.position = 0

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        assert start == self.position, "a stream gives each step once"
        inputs, targets = (tensor[start:stop] for tensor in self.data)
        self.position += len(inputs)
        return inputs, targets

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Listener:
    """Remembers events."""

    def __init__(self) -> None:
        self.windows: list[WindowEvent] = []
        self.updates: list[UpdateEvent] = []
        self.notices: list[Notice] = []

    def on_window(self, event: WindowEvent) -> None:
        self.windows.append(event)

    def on_update(self, event: UpdateEvent) -> None:
        self.updates.append(event)

    def on_notice(self, event: Notice) -> None:
        self.notices.append(event)

    def resume_at(self, steps: int) -> None:
        self.windows = [event for event in self.windows if event.steps <= steps]
        self.updates = [event for event in self.updates if event.steps <= steps]

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is open."""

    def kinds(self) -> list[str]:
        return [notice.kind for notice in self.notices]


class Noisy(nn.Module):
    """Dropout, and a buffer that counts what was run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = cases.TanhCell()
        self.drop = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        y, h = self.inner(self.drop(x), h)
        self.calls += 1
        return y, h


@dataclass
class Job:
    """A small run, built alike each time."""

    num_steps: int = 5
    k1: int = 2
    k2: int | None = 3
    module: Callable[[], nn.Module] = Noisy
    optimizer: str | None = "adam"
    engine: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def build(self, **options: Any) -> tuple[Trainer, nn.Module, Listener]:
        torch.manual_seed(3)
        module = placed(self.module().double())
        optimizer = None
        scheduler = None
        if self.optimizer is not None:
            optimizer = torch.optim.Adam(module.parameters(), lr=0.05, amsgrad=True)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        engine = TBPTT(
            module,
            nn.functional.mse_loss,
            self.k1,
            self.k2,
            optimizer,
            scheduler=scheduler,
            **({"strategy": "retain"} | self.engine),
        )
        torch.manual_seed(4)
        random.seed(4)
        np.random.seed(4)  # noqa: NPY002 - the global generators are part of a snapshot
        listener = Listener()
        source = TensorSequence(*cases.random_data(self.num_steps))
        options = {"events": [listener]} | self.trainer | options
        return Trainer(engine, source, **options), module, listener

    def account(self, trainer: Trainer, listener: Listener) -> dict[str, Any]:
        state = trainer.state_dict()
        return {
            "steps": trainer.num_steps,
            "updates": trainer.num_updates,
            "windows": [(w.index, w.start, w.stop, w.updated) for w in listener.windows],
            "losses": [w.loss for w in listener.windows],
            "rates": [u.learning_rate for u in listener.updates],
            "learning": state["learning"],
            "random": state["random"],
        }

    def undisturbed(self) -> dict[str, Any]:
        trainer, _, listener = self.build()
        trainer.train()
        return self.account(trainer, listener)


def assert_equal(found: Any, expected: Any, rel: float, where: str = "") -> None:
    """Equal in structure and integers; floating values to `rel`, 0 for bitwise."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], rel, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, rel, f"{where}.{index}")
    elif isinstance(expected, Tensor):
        if rel == EXACT or not expected.is_floating_point():
            assert torch.equal(found, expected), where
        else:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=where)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel), where
    else:
        assert found == expected, where


def learning_of(trainer: Trainer) -> dict[str, Any]:
    learning: dict[str, Any] = copy.deepcopy(trainer.state_dict()["learning"])
    return learning


def with_snapshots(job: Job, folder: Path, disk: Any = None, **options: Any) -> Any:
    """A trainer that saves after every window, by way of a disk."""
    every = Snapshots(directory=folder, every_steps=1, keep=2, **options)
    trainer, module, listener = job.build(snapshots=every)
    trainer._saving = Saving(every, disk or HastyDisk())
    return trainer, module, listener


def in_a_fork(work: Callable[[], None]) -> int:
    """The signal that ended a child process, or 0; its exit code must be 0 then."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0
    return 0


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(function: Callable[..., Any], count: int, do: Callable[[], None]) -> Callable[..., Any]:
    """The function, which calls something before its n-th call."""
    remaining = [count]

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        remaining[0] -= 1
        if remaining[0] == 0:
            do()
        return function(*args, **options)

    return call


def patch(trainer: Trainer, point: str, count: int, do: Callable[[], None]) -> None:
    settings = trainer.tbptt.parts
    owners = {
        "advance or replay": (settings.runner, "run"),
        "module": (settings.recurrence.module, "forward"),
        "optimizer": (settings.updater.optimizer, "step"),
        "scheduler": (torch.optim.lr_scheduler.StepLR, "step"),
        "update": (settings.updater, "step"),
        "backward": (torch.autograd, "backward"),
    }
    owner, name = owners[point]
    setattr(owner, name, at(getattr(owner, name), count, do))
