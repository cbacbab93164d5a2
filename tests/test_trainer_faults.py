"""A training run under every fault: no step is lost, none is done twice."""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from disks import HastyDisk, KillingDisk
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tbptt_ckpt import (
    TBPTT,
    ArgumentError,
    JsonLines,
    NonFinite,
    NonFiniteError,
    OutOfMemory,
    OutOfMemoryError,
    SnapshotError,
    Snapshots,
    StaleWeightsError,
    TbpttError,
    TbpttWarning,
    TensorSequence,
    Trainer,
)
from tbptt_ckpt.snapshot.store import SnapshotStore, SnapshotWarning
from tbptt_ckpt.trainer.events import Notice, UpdateEvent, WindowEvent
from tbptt_ckpt.trainer.saving import Saving

Injected = Callable[..., None]
EXACT, ROUNDING = 0.0, 1e-12


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
        module = self.module().double()
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
            "steps": trainer.steps,
            "updates": trainer.updates,
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


class Scarce(TorchDispatchMode):
    """The n-th operation that would allocate a tensor finds no memory."""

    ERRORS = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    )

    def __init__(self, at: int, times: int = 1) -> None:
        super().__init__()
        self.at, self.times, self.count, self.fired = at, times, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t) for t in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        if any(id(t) not in given for t in _storages(result)):
            self.count += 1
            if self.at <= self.count < self.at + self.times:
                self.fired += 1
                raise copy.copy(self.ERRORS[self.at % len(self.ERRORS)])
        return result


def _storages(tree: Any) -> list[Any]:
    if isinstance(tree, Tensor):
        return [_Key(tree.untyped_storage().data_ptr())]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return [storage for item in tree for storage in _storages(item)]
    return []


class _Key:
    """Equal addresses have one identity."""

    _known: dict[int, _Key] = {}  # noqa: RUF012

    def __new__(cls, address: int) -> _Key:
        return cls._known.setdefault(address, super().__new__(cls))


OOM_JOBS = {
    "refresh": Job(),
    "stale": Job(engine={"overlap": "stale"}),
    "no overlap, clipped": Job(k2=2, engine={"clip_grad_norm": 0.1}),
    "accumulated": Job(optimizer=None),
    "segments": Job(
        module=lambda: nn.LSTM(cases.WIDTH_IN, cases.WIDTH), engine={"executor": "checkpoint"}
    ),
}


class TestOutOfMemory:
    @pytest.fixture(autouse=True)
    def quick_collection(self) -> Any:
        """What exists already need not be looked at by every collection."""
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()

    @pytest.mark.parametrize("name", OOM_JOBS)
    @pytest.mark.filterwarnings("ignore::tbptt_ckpt.errors.TbpttWarning")
    def test_at_every_fifth_allocation_no_step_is_lost_or_done_twice(
        self, name: str, injected: Injected
    ) -> None:
        self.exhaust(OOM_JOBS[name], 5, injected)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", OOM_JOBS)
    @pytest.mark.filterwarnings("ignore::tbptt_ckpt.errors.TbpttWarning")
    def test_at_every_allocation_no_step_is_lost_or_done_twice(
        self, name: str, injected: Injected
    ) -> None:
        self.exhaust(OOM_JOBS[name], 1, injected)

    def exhaust(self, job: Job, stride: int, injected: Injected) -> None:
        """Let every `stride`-th allocation of a run find no memory, one in each run."""
        expected = job.undisturbed()
        count = 1 - stride
        while True:
            count += stride
            trainer, _, listener = job.build()
            with Scarce(count) as scarce:
                trainer.train()
            if not scarce.fired:
                break
            injected("out of memory on the device")
            assert "out_of_memory" in listener.kinds()
            assert_equal(job.account(trainer, listener), expected, ROUNDING, str(count))
        assert count > 60

    @pytest.mark.filterwarnings("ignore::tbptt_ckpt.errors.TbpttWarning")
    def test_plans_get_smaller_until_one_fits(self, injected: Injected) -> None:
        job = Job(num_steps=64, k1=64, k2=64, module=cases.TanhCell)
        expected = job.undisturbed()
        trainer, _, listener = job.build()
        fits = 4
        run = trainer.tbptt.settings.runner.run

        def run_or_fail(task: Any, start: int, stop: int, *args: Any, **options: Any) -> Any:
            if torch.is_grad_enabled() and stop - start > fits:
                injected("out of memory on the device")
                raise MemoryError
            return run(task, start, stop, *args, **options)

        trainer.tbptt.settings.runner.run = run_or_fail  # type: ignore[method-assign]
        trainer.train()
        assert str(trainer.tbptt.settings.strategy) == "uniform:4"
        assert [n.figures["attempt"] for n in listener.notices] == [1, 2, 3, 4]
        assert_equal(job.account(trainer, listener), expected, ROUNDING)

    @pytest.mark.filterwarnings("ignore::tbptt_ckpt.errors.TbpttWarning")
    def test_retries_are_bounded_and_the_error_has_the_figures(self, injected: Injected) -> None:
        job = Job()
        trainer, module, listener = job.build(out_of_memory=OutOfMemory(retries=3))
        before = copy.deepcopy(module.state_dict())
        with Scarce(1, times=10**9) as scarce, pytest.raises(OutOfMemoryError) as caught:
            trainer.train()
        assert scarce.fired
        injected("out of memory on the device", scarce.fired)
        message = str(caught.value)
        assert "window 0, steps 0 to 2, does not fit" in message
        assert "after 4 tries" in message
        assert "free on cpu" in message
        assert "resident" in message
        assert isinstance(caught.value, MemoryError)
        assert_equal(module.state_dict(), before, EXACT)
        assert trainer.steps == 0
        trainer.train()  # memory is back
        expected = job.undisturbed()
        assert_equal(job.account(trainer, listener), expected, ROUNDING)

    def test_an_update_cut_short_without_a_copy_is_an_error(self, injected: Injected) -> None:
        job = Job()
        expected = job.undisturbed()
        outcomes = set()
        count = 0
        while True:
            count += 7
            trainer, _, listener = job.build(out_of_memory=OutOfMemory(protect_update=False))
            with Scarce(count) as scarce, warnings.catch_warnings():
                warnings.simplefilter("ignore", TbpttWarning)
                try:
                    trainer.train()
                except TbpttError as error:
                    outcomes.add(str(error))
            if not scarce.fired:
                break
            injected("out of memory on the device")
            if trainer.steps == 5:
                assert_equal(job.account(trainer, listener), expected, ROUNDING)
        assert len(outcomes) == 1
        assert "go on from the last snapshot" in outcomes.pop()

    def test_other_errors_are_not_taken_for_it(self) -> None:
        trainer, module, _ = Job().build()
        module.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()

    def test_for_real_below_a_limit_of_the_address_space(
        self, tmp_path: Path, injected: Injected
    ) -> None:
        """RLIMIT_AS half-way to what the first plan needs: a smaller plan, the same losses."""
        free = limited_child(tmp_path, 0)
        assert free["notices"] == []
        limited = limited_child(tmp_path, free["peak_bytes"] // 2)
        injected("out of memory on the device", limited["notices"].count("out_of_memory"))
        assert "retain" in free["strategy"]
        assert limited["strategy"] != free["strategy"]
        assert limited["losses"] == pytest.approx(free["losses"], rel=1e-5)
        assert limited["windows"] == free["windows"] == 3
        assert limited["peak_bytes"] < 0.6 * free["peak_bytes"]


CHILD_WITH_A_LIMIT = """
    import json, resource, sys, warnings
    import torch
    from torch import nn
    from tbptt_ckpt import TBPTT, TensorSequence, Trainer

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    steps, lanes, width = 600, 16, 64

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.LSTMCell(8, width), nn.Linear(width, 8)
        def forward(self, x, state):
            h, c = self.cell(x, state)
            return self.head(h), (h, c)

    def memory(name):
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith(name))
        return 1024 * int(line.split()[1])

    class Kinds(list):
        def on_window(self, event): pass
        def on_update(self, event): pass
        def on_notice(self, event): self.append(event.kind)
        def resume_at(self, steps): pass
        def flush(self): pass
        def close(self): pass

    def run(steps, kinds):
        module = Cell()
        inputs = torch.randn(steps, lanes, 8)
        tbptt = TBPTT(module, nn.functional.mse_loss, steps // 3, None,
                      torch.optim.Adam(module.parameters(), 0.01), strategy="retain")
        trainer = Trainer(tbptt, TensorSequence(inputs, inputs.roll(1, 0)), events=[kinds])
        losses = [float(window.loss) for window in trainer.windows()]
        return losses, str(tbptt.settings.strategy)

    run(30, Kinds())  # all that is loaded lazily is there
    before = memory("VmSize")
    allowed = int(sys.argv[1])
    if allowed:
        resource.setrlimit(resource.RLIMIT_AS, (before + allowed, before + allowed))
    kinds = Kinds()
    losses, strategy = run(steps, kinds)
    peak = memory("VmPeak") - before
    print(json.dumps({"losses": losses, "strategy": strategy, "notices": kinds,
                      "windows": len(losses), "peak_bytes": peak}))
"""


def limited_child(tmp_path: Path, allowed_bytes: int) -> dict[str, Any]:
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD_WITH_A_LIMIT))
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, str(script), str(allowed_bytes)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


class Poisoned(nn.Module):
    """Its output, state or gradient is not finite at one call of one window."""

    def __init__(self, what: str, at: int) -> None:
        super().__init__()
        self.inner = cases.TanhCell()
        self.what, self.at = what, at
        self.calls = 0
        self.fired = 0

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        y, h = self.inner(x, h)
        if self.at <= float(x[0, 0]) < self.at + 1:
            self.fired += 1
            if self.what == "loss":
                y = y * float("nan")
            elif self.what == "state":
                h = torch.where(torch.arange(h.shape[1]) == 1, float("inf"), h)
            elif y.requires_grad:
                y.register_hook(lambda grad: grad * float("inf"))
        return y, h


@dataclass
class Poison:
    """A run whose steps carry their number, so that a fault can be put at one of them."""

    what: str
    at: int
    k1: int = 2
    k2: int | None = 4
    num_steps: int = 9
    overlap: str = "refresh"

    def build(self, **options: Any) -> tuple[Trainer, Poisoned, Listener]:
        torch.manual_seed(1)
        module = Poisoned(self.what, self.at).double()
        listener = Listener()
        engine = self.engine(module)
        source = TensorSequence(*self.data())
        return Trainer(engine, source, events=[listener], **options), module, listener

    def engine(self, module: nn.Module) -> TBPTT:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
        options: dict[str, Any] = {"overlap": self.overlap, "strategy": "uniform:2"}
        return TBPTT(module, nn.functional.mse_loss, self.k1, self.k2, optimizer, **options)

    def data(self) -> tuple[Tensor, Tensor]:
        inputs, targets = cases.random_data(self.num_steps)
        inputs[:, 0, 0] = torch.arange(self.num_steps) + 0.5
        return inputs, targets

    @property
    def window(self) -> int:
        """The first window that meets it."""
        return self.at // self.k1


WHATS = ("loss", "state", "gradient")


class TestNonFinite:
    @pytest.mark.parametrize("overlap", ["refresh", "stale"])
    @pytest.mark.parametrize("what", WHATS)
    @pytest.mark.parametrize("at", range(9))
    def test_stop_leaves_everything_as_it_was_before_the_window(
        self, what: str, at: int, overlap: str, injected: Injected
    ) -> None:
        poison = Poison(what, at, overlap=overlap)
        healthy, _, heard = Poison("none", -1, overlap=overlap).build()
        states = [_learning(healthy)]
        states += [_learning(healthy) for _ in healthy.windows()]
        trainer, module, listener = poison.build()
        with pytest.raises(NonFiniteError) as caught:
            trainer.train()
        assert module.fired
        injected("NaN or Inf in loss, gradient or carried state")
        start, stop = poison.window * 2, min(poison.window * 2 + 2, 9)
        assert f"window {poison.window}, steps {start} to {stop}: the " in str(caught.value)
        words = {"gradient": "norm of the gradients", "loss": "loss is nan", "state": "the "}
        assert words[what] in str(caught.value)
        assert trainer.steps == start
        assert_equal(_learning(trainer), states[poison.window], EXACT)
        module.at = -1  # healed: it goes on as if nothing had been
        trainer.train()
        assert_equal(_learning(trainer), states[-1], EXACT)
        assert [w.loss for w in listener.windows] == [w.loss for w in heard.windows]

    @pytest.mark.parametrize("overlap", ["refresh", "stale"])
    @pytest.mark.parametrize("k2", [2, 4, None])
    @pytest.mark.parametrize("what", WHATS)
    @pytest.mark.parametrize("at", [0, 3, 4, 8])
    def test_skip_goes_on_from_the_last_finite_state(
        self, what: str, at: int, k2: int | None, overlap: str, injected: Injected
    ) -> None:
        poison = Poison(what, at, k2=k2, overlap=overlap)
        trainer, module, listener = poison.build(non_finite=NonFinite(policy="skip"))
        with pytest.warns(TbpttWarning, match=f"window {poison.window}, .*; skipped"):
            result = trainer.train()
        assert module.fired
        injected("NaN or Inf in loss, gradient or carried state")
        # The same by hand: the windows before, and a run over the rest from the state they left.
        twin = Poison("none", -1, k2=k2, overlap=overlap)
        torch.manual_seed(1)
        copied = Poisoned("none", -1).double()
        engine, (inputs, targets) = twin.engine(copied), twin.data()
        losses, state = [], None
        for window in engine.windows(TensorSequence(inputs, targets)):
            if window.index == poison.window:
                break
            losses.append(float(window.loss))
            state = window.state
        rest = 2 * poison.window + 2
        torch.manual_seed(1)
        copied = Poisoned("none", -1).double()
        engine = twin.engine(copied)
        before = engine.windows(TensorSequence(inputs, targets))
        for _ in range(poison.window):
            next(before)
        if rest < 9:
            part = TensorSequence(inputs[rest:], targets[rest:])
            losses += [float(w.loss) for w in engine.windows(part, state)]
        assert [w.loss for w in listener.windows] == losses
        assert_equal(dict(module.state_dict()), dict(copied.state_dict()), EXACT)
        assert (result.steps, result.windows, result.updates) == (9, 5, 4)
        assert all(torch.isfinite(p).all() for p in module.parameters())

    def test_skipping_without_end_stops(self, injected: Injected) -> None:
        trainer, module, _ = Poison("loss", 0).build(
            non_finite=NonFinite(policy="skip", most_in_a_row=2)
        )
        module.what, module.at = "loss", 0
        trainer.tbptt.settings.loss_function.loss_fn = lambda y, _: y.sum() * float("nan")
        with pytest.warns(TbpttWarning), pytest.raises(NonFiniteError, match="2 windows before"):
            trainer.train()
        injected("NaN or Inf in loss, gradient or carried state", 3)
        assert trainer.steps == 4

    @pytest.mark.parametrize("what", WHATS)
    def test_going_on_is_not_silent(self, what: str, injected: Injected) -> None:
        trainer, module, listener = Poison(what, 4).build(non_finite=NonFinite(policy="go on"))
        with pytest.warns(TbpttWarning, match="going on"):
            result = trainer.train()
        assert module.fired
        injected("NaN or Inf in loss, gradient or carried state")
        assert result.updates == 5
        assert "non_finite" in listener.kinds()

    def test_a_scaler_keeps_its_own_way_with_gradients(self, injected: Injected) -> None:
        trainer, module, listener = Poison("gradient", 4).build()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
        trainer.tbptt.settings.updater._scaler = scaler
        result = trainer.train()
        assert module.fired
        injected("NaN or Inf in loss, gradient or carried state")
        # The window in which the step is new makes no update, and the scale is halved.
        assert (result.updates, scaler.get_scale()) == (4, 4.0)
        assert [w.updated for w in listener.windows] == [True, True, False, True, True]
        trainer, module, _ = Poison("loss", 4).build()
        trainer.tbptt.settings.updater._scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        with pytest.raises(NonFiniteError, match="window 2"):
            trainer.train()
        injected("NaN or Inf in loss, gradient or carried state")


def _learning(trainer: Trainer) -> dict[str, Any]:
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
    settings = trainer.tbptt.settings
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


POINTS = ("advance or replay", "module", "optimizer", "scheduler", "update", "backward")
KILLED = Job(num_steps=9, k1=2, k2=5, engine={"strategy": "uniform:2"})


class TestKill:
    @pytest.mark.parametrize("point", POINTS)
    def test_at_every_call_of_a_named_point(
        self, point: str, tmp_path: Path, injected: Injected
    ) -> None:
        expected = KILLED.undisturbed()
        count = 0
        while True:
            count += 1
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

    def test_at_every_third_call_of_every_save(self, tmp_path: Path, injected: Injected) -> None:
        job = Job(num_steps=4)
        expected = job.undisturbed()
        count = 0
        while True:
            count += 3
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

    monkeypatch.setattr("tbptt_ckpt.budget.costed_plans.calibrate", no_measuring)
    accounts = []
    for stops in ((), (1, 3)):
        folder = tmp_path / str(len(accounts))
        shutil.copytree(tmp_path / "step-0", folder / "step-0")
        listener = Listener()
        for stop in (*stops, None):
            trainer, _, _ = with_snapshots(job, folder)
            trainer._announcer._sinks.append(listener)
            assert trainer.resume()
            assert trainer.tbptt.settings.plans.state_dict()["costs"]["state_bytes"]
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
        assert_equal(_learning(trainer), expected["learning"], EXACT)

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
        assert_equal(_learning(trainer), expected["learning"], EXACT)


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
        with Child(tmp_path, 0.5) as child:  # a window takes seconds
            child.wait_for_steps(1)
            child.send(signal.SIGTERM)
            time.sleep(0.2)
            assert os.waitpid(child.pid, os.WNOHANG) == (0, 0)
            child.send(signal.SIGINT)
            assert child.code() == 130
        injected("SIGTERM, SIGINT", 2)
        assert child.rest < 3
        assert SnapshotStore(tmp_path).steps() == [0]


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
            "another module": Job(module=cases.LSTMCellWithReadout),
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
            assert other.steps == 0

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
            (lambda: NonFinite(policy="ignore"), "policy='ignore' must be one of 'stop'"),
            (lambda: NonFinite(most_in_a_row=0), "most_in_a_row=0"),
            (lambda: OutOfMemory(retries=-1), "retries=-1"),
            (lambda: Snapshots(directory="x", keep=0), "keep=0"),
            (lambda: Snapshots(directory="x", every_steps=0), "every_steps=0"),
            (lambda: Snapshots(directory="x", every_minutes=0.0), "every_minutes=0.0"),
            (lambda: Snapshots(directory="x", every_minutes=float("nan")), "every_minutes=nan"),
            (lambda: Snapshots(directory="x", on_failure="?"), "on_failure='\\?'"),
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
    with pytest.warns(TbpttWarning, match="cannot be written, so it ends here"):
        trainer.train()
    injected("disk full")
    assert_equal(_learning(trainer), job.undisturbed()["learning"], EXACT)
